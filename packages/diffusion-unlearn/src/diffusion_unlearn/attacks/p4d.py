"""Prompting4Debugging (P4D): tokens with which the victim says what the original model says of the concept.

Chin, Jiang, Huang, Chen and Chiu 2024 (arXiv 2309.06135), in the form in which UnlearnDiffAtk runs it beside itself:
the same 50 x 40 steps on noised pictures of the concept, Adam with 0.01 and weight decay 0.1, prompts kept as vectors
that are projected onto the token of highest cosine (PEZ), where the gradient is taken
(:class:`~robust_core.attacks.tokens.Projected`). It needs the model before the erasure.

    min over c' of  E |e_o(x_t|c) - e(x_t|c')|^2          :func:`~.losses.imitation_error`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_unlearn.attacks.base import Scene
from diffusion_unlearn.attacks.gradient import RowLoss, TokenAttack
from diffusion_unlearn.attacks.losses import imitation_error
from diffusion_unlearn.pipeline import Conditioning
from robust_core.attacks.tokens import Projected

__all__ = ["P4D"]


@dataclass(frozen=True)
class P4D(TokenAttack):
    """Tokens under which the victim imitates the original; see the module."""

    name: ClassVar[str] = "p4d"
    needs_original: ClassVar[bool] = True

    def search(self, batch_size: int = 1) -> Projected:
        """Return core's search, for ``batch_size`` prompts at a time."""
        return Projected(
            n_steps=self.n_steps, check_every=self.iterations, lr=self.lr, weight_decay=self.weight_decay,
            decoupled=False, batch_size=batch_size, padding=False, compare=False,
        )  # fmt: skip

    def row_loss(self, scene: Scene) -> RowLoss:
        """Return the distance to what the original says under the prompt itself."""
        original = scene.original
        if original is None:
            raise ValueError("p4d needs the pipeline before the erasure: give original")
        with torch.no_grad():
            told = original.encode(scene.texts)

        def loss(rows: Tensor, x0: Tensor, noise: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
            x_t = scene.victim.noised(x0, noise, t)
            return imitation_error(
                scene.victim, x_t, t, condition, original=original, told=told[rows], loss=self.loss
            )  # fmt: skip

        return loss
