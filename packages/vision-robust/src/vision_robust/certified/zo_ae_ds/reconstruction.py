"""How far an attacker drives a reconstruction away from that of the clean image: the paper's second application."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_core.checks import check_count, check_inputs, check_number
from robust_core.models import Classifier, frozen
from robust_core.random import SampleStreams, Seed, derive, resolve_seed
from robust_core.threats import L2, Threat
from robust_core.training.inner import ascend
from robust_core.zeroth_order import random_gradient

__all__ = ["ReconstructionAttack"]


@dataclass(frozen=True)
class ReconstructionAttack:
    """Raise the mean squared error between the outputs for a moved image and for the image itself.

    By gradients where the model says that it has them, by random directions where it only answers queries.

    Args:
        threat: what the attacker may do; the paper's figure has L2 of radius 1.
        n_iter: steps of steepest ascent, of length ``2.5 eps / n_iter``, from a random start.
        n_directions: directions for each step of a model without gradients.
        spread: distance of the probes.
    """

    threat: Threat = field(default_factory=lambda: L2(1.0))
    n_iter: int = 40
    n_directions: int = 32
    spread: float = 0.005

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        check_count("n_directions", self.n_directions)
        check_number("spread", self.spread, low=0, open_low=True)

    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        reference: Tensor | None = None,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Return (B, ...) attacked images.

        Args:
            model: maps (B, ...) images to (B, ...) outputs; left as found.
            x: (B, ...) images inside the domain of the threat.
            reference: (B, ...) what the outputs should be; those for ``x`` by default.
            index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
            generator: seed.
        """
        check_inputs(x, self.threat.domain)
        index = torch.arange(len(x), device=x.device) if index is None else index
        seed = resolve_seed(generator)
        if reference is None:
            with frozen(model), torch.no_grad():
                reference = model(x)
        wanted = reference.detach()
        point = self.threat.random_start(x, SampleStreams(seed, index, "start"))
        length = 2.5 * self.threat.eps / self.n_iter
        if getattr(model, "differentiable", True):
            return ascend(
                model,
                self.threat,
                x,
                point,
                lambda outputs: squared_error(outputs, wanted),
                n_iter=self.n_iter,
                step_size=length,
            )
        with frozen(model), torch.no_grad():
            for step in range(self.n_iter):
                slope = random_gradient(
                    lambda points, rows: squared_error(model(points), wanted[rows]),
                    point,
                    n_directions=self.n_directions,
                    spread=self.spread,
                    index=index,
                    generator=derive(seed, "step", step),
                ).gradient
                point = self.threat.project(point + length * self.threat.steepest(slope), x)
        return point


def squared_error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return (B,) mean squared errors."""
    return (outputs.double() - wanted.double()).square().flatten(1).mean(1)
