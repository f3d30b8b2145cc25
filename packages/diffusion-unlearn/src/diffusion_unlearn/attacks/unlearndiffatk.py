"""UnlearnDiffAtk: a few tokens beside a prompt bring an erased concept back, found with the victim alone.

"To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now",
Zhang, Jia, Chen, Chen, Zhang, Liu, Ding and Liu 2024 (arXiv 2310.11868). Buys: whether a concept is gone or only its
name; no classifier and no second model stand in the loss, only a picture of the concept.

    min over c' of  E_{t, e} |e - e(x_t|c')|^2            :func:`~.losses.denoising_error` (why: there)
    tokens as rows of probabilities u, uniform at first   :class:`~robust_core.attacks.tokens.Simplex`
      draw one token a row; straight through, gradient clamped to [-1, 1]
      Adam (0.01, weight decay 0.1 in the gradient), rows back onto the simplex
    50 times 10, 30, ..., 990, 40 steps at each           :func:`~.losses.even_times`
    after each time: arg-max, decode, draw, judge         :meth:`~.gradient.TokenAttack.run`

Defaults are the paper's for nudity (k=5; k=3 for styles and objects). The optimiser's state goes on from time to time.

Departures: the marks of start and end are never candidates (the released code drops them from what was found); noise
may be averaged over ``noise_batch`` draws; several prompts share one batch, which changes their figures by rounding
alone. The bound behind the loss is reconstructed from the paper's argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusion_unlearn.attacks.base import Scene
from diffusion_unlearn.attacks.gradient import RowLoss, TokenAttack
from diffusion_unlearn.attacks.losses import denoising_error
from diffusion_unlearn.pipeline import Conditioning
from robust_core.attacks.tokens import Simplex

__all__ = ["UnlearnDiffAtk"]


@dataclass(frozen=True)
class UnlearnDiffAtk(TokenAttack):
    """Tokens under which the victim explains a picture of the concept; see the module."""

    name: ClassVar[str] = "unlearndiffatk"

    def search(self, batch_size: int = 1) -> Simplex:
        """Return core's search, for ``batch_size`` prompts at a time."""
        return Simplex(
            n_steps=self.n_steps, check_every=self.iterations, lr=self.lr, weight_decay=self.weight_decay,
            batch_size=batch_size, padding=False, compare=False,
        )  # fmt: skip

    def row_loss(self, scene: Scene) -> RowLoss:
        """Return the denoising error of the victim."""

        def loss(rows: Tensor, x0: Tensor, noise: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
            del rows
            return denoising_error(scene.victim, x0, noise, t, condition, loss=self.loss)

        return loss
