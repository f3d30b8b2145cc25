"""The attack inside training: projected gradient ascent for a fixed number of steps, and nothing else.

Evaluation wants the strongest point for each sample and stops where one is broken; training wants every sample moved by
the same small number of steps, without waiting for the device or refilling rows. :class:`FastPGD` has the calling
convention of any attack, so it may be evaluated, and any attack may stand in its place.

Projected gradient: Madry et al. 2018 (arXiv 1706.06083); one step from a random start, ``n_iter=1`` with
``step_size=1.25 * eps``: Wong et al. 2020 (arXiv 2001.03994).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_core.checks import check_count, check_labels, check_number
from robust_core.models import Classifier, frozen
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import Linf, Threat

__all__ = ["FastPGD", "RowLoss", "ascend", "refuse_bad_labels"]

RowLoss = Callable[[Tensor], Tensor]
"""Logits (B, C) -> loss (B,) that the attacker raises, row by row."""


def refuse_bad_labels(logits: Tensor, y: Tensor) -> None:
    """Name labels that the model does not know; on the CPU only, since looking makes an accelerator wait."""
    if y.device.type == "cpu" and y.dtype == torch.int64 and y.ndim == 1 and logits.ndim == 2:
        check_labels(y, len(logits), logits.shape[1])


def ascend(
    model: Classifier,
    threat: Threat,
    x: Tensor,
    start: Tensor,
    loss: RowLoss,
    *,
    n_iter: int,
    step_size: float,
) -> Tensor:
    """Return (B, ...) points after ``n_iter`` steepest-ascent steps from ``start``, each projected onto the threat.

    The model is held in eval mode with frozen parameters, and given back as found.
    """
    if not threat.eps:
        return x
    box = threat.box(x) if isinstance(threat, Linf) else None  # computed once: projecting is then two comparisons
    point = start.detach()
    with frozen(model), torch.enable_grad():
        for _ in range(n_iter):
            point.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(model(point)).sum(), point)
            with torch.no_grad():
                moved = point + step_size * threat.steepest(gradient)
                point = threat.project(moved, x) if box is None else torch.minimum(torch.maximum(moved, box[0]), box[1])
    return point.detach()


@dataclass(frozen=True)
class FastPGD:
    """Projected gradient ascent for training.

    Args:
        threat: what the attacker may do.
        n_iter: steps, 10 by default.
        step_size: length of a step in units of ``eps``'s norm; a quarter of ``eps`` when None (2/255 for 8/255).
        random_start: begin at a random point of the ball, else at the input.
    """

    threat: Threat
    n_iter: int = 10
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0, open_low=True)

    @property
    def step(self) -> float:
        """The length of a step."""
        return self.threat.eps / 4 if self.step_size is None else self.step_size

    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Return (B, ...) attacked inputs: cross entropy is raised.

        Args:
            model: maps (B, ...) to logits (B, C).
            x: (B, ...) inputs inside the domain of the threat.
            y: (B,) int64 labels.
            index: (B,) positions in the original data, which name the random starts.
            generator: seed.
        """
        start = x
        if self.random_start:
            index = torch.arange(len(x), device=x.device) if index is None else index
            start = self.threat.random_start(x, SampleStreams(resolve_seed(generator), index, "start"))

        def loss(logits: Tensor) -> Tensor:
            refuse_bad_labels(logits, y)
            return F.cross_entropy(logits, y, reduction="none")

        return ascend(model, self.threat, x, start, loss, n_iter=self.n_iter, step_size=self.step)
