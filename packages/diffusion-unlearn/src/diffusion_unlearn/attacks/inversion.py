"""Concept inversion: free vectors in place of tokens. A stronger threat, always reported apart.

Pham, Marshall, Cohen, Mittal and Hegde 2024 (arXiv 2308.01508): textual inversion (Gal et al. 2022, arXiv 2208.01618)
against an erased model. The vectors lower the same denoising error as UnlearnDiffAtk, at times drawn uniformly, and the
picture is drawn from them once, at the end. No text has these vectors: what breaks here need not break by a prompt.

Defaults: 1000 steps of Adam with 5e-3, textual inversion's step size for one picture at a time (1000 to 3000 steps are
in use), from the embeddings of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_unlearn.attacks.base import Found, Scene
from diffusion_unlearn.attacks.gradient import GradientAttack, RowLoss, saving_memory
from diffusion_unlearn.attacks.losses import denoising_error
from diffusion_unlearn.pipeline import Conditioning
from robust_core.attacks.tokens import SoftTokens
from robust_core.checks import check_count
from robust_core.random import SampleStreams

__all__ = ["ConceptInversion"]


@dataclass(frozen=True)
class ConceptInversion(GradientAttack):
    """Embeddings under which the victim explains a picture of the concept; see the module.

    Args:
        steps: gradients.
    """

    name: ClassVar[str] = "inversion"
    threat: ClassVar[str] = "embedding"

    lr: float = 5e-3
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)

    @property
    def n_steps(self) -> int:
        """Gradients for each prompt."""
        return self.steps

    def times(self, scene: Scene) -> Callable[[SampleStreams, int], Tensor]:
        """Return times drawn uniformly for every prompt, noise and step."""
        n_train = int(scene.victim.pipe.scheduler.config.num_train_timesteps)
        # the noise of a draw is its chunk of the same streams: times take the negative ones
        return lambda streams, draw: streams.integers(n_train, (self.noise_batch,), chunk=-1 - draw)

    def row_loss(self, scene: Scene) -> RowLoss:
        """Return the denoising error of the victim."""

        def loss(rows: Tensor, x0: Tensor, noise: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
            del rows
            return denoising_error(scene.victim, x0, noise, t, condition, loss=self.loss)

        return loss

    def run(self, scene: Scene) -> list[Found]:
        """Find the vectors, draw them once, judge."""
        writing = self.writing(scene.victim, scene.texts)
        problem = self.problem(scene, writing)
        search = SoftTokens(n_steps=self.steps, lr=self.lr, batch_size=len(scene), padding=False)
        with saving_memory(scene):
            result = search.run(problem, index=scene.streams(), generator=self.seed(scene))
        everyone = torch.arange(len(scene), device=result.embeddings.device)
        with torch.no_grad():
            condition = writing.condition(result.embeddings, everyone)
        looks = scene.drawing.look_at(condition, scene.tries)
        return [
            Found(look.hit, one.text, one.seed, look.score, 1, int(n))
            for look, one, n in zip(looks, scene.tries, result.n_gradients, strict=True)
        ]
