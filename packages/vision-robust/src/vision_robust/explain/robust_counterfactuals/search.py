"""Gradient searches: the closest counterfactual, and T-Rex:I, which walks on from it until it is stable.

All rows walk at once; a row that has arrived leaves the batch. What is judged is always the snapped point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_number
from robust_core.models import frozen
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals, check_tau, report
from vision_robust.explain.robust_counterfactuals.stability import Recourse

__all__ = ["ClosestCounterfactual", "Generator", "TRexIterative"]


SURE = 3.0
"""A search stops so many standard errors above ``tau``, so that fresh draws confirm it."""


class Generator(Protocol):
    """Anything that proposes counterfactuals."""

    @property
    def recourse(self) -> Recourse:
        """The question that it answers."""
        ...

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        ...


def slopes(recourse: Recourse, x: Tensor) -> Tensor:
    """Return (B, ...) gradients of the log-odds, which point where the score's do and do not vanish with them."""
    score, parts = recourse.score, []
    with frozen(score.model), torch.enable_grad():
        for rows in x.split(score.rows(x)):
            leaf = rows.detach().requires_grad_(True)
            parts.append(torch.autograd.grad(score.log_odds(leaf).sum(), leaf)[0])
    return torch.cat(parts)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return (B,) values in a shape that broadcasts against (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def unit(direction: Tensor) -> Tensor:
    """Return rows of L2 length 1; a row of zeros stays."""
    length = direction.flatten(1).norm(dim=1)
    return direction / per_row(length.clamp(min=1e-30), direction)


def steepest(gradient: Tensor, here: Tensor, recourse: Recourse, norm: str) -> Tensor:
    """Return the direction of steepest ascent among movable features: the gradient in L2, one feature in L1."""
    spec = recourse.spec
    moving = gradient * spec.movable(here)
    if norm == "L2":
        return unit(moving)
    low, high = (torch.as_tensor(bound).to(here) for bound in (spec.low, spec.high))
    stuck = ((moving > 0) & (here >= high)) | ((moving < 0) & (here <= low))
    size = moving.abs().masked_fill(stuck, 0).flatten(1)
    best = size.argmax(1, keepdim=True)
    flat = torch.zeros_like(size).scatter(1, best, moving.flatten(1).gather(1, best).sign())
    return torch.where(size.amax(1, keepdim=True) > 0, flat, 0.0).reshape(here.shape)


@dataclass(frozen=True)
class ClosestCounterfactual:
    """Climb the log-odds by short steps until the model accepts.

    Args:
        recourse: the question.
        norm: ``"L2"`` (steps along the gradient) or ``"L1"`` (one feature at a time).
        step_size: length of a step.
        n_iter: most steps. The paper's 60 suffice for tables; rows that need more may take them.
        confidence: probability to reach; the threshold when None.
    """

    recourse: Recourse
    norm: str = "L2"
    step_size: float = 0.02
    n_iter: int = 200
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("L2", "L1"))
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_iter", self.n_iter)
        if self.confidence is not None:
            threshold = self.recourse.score.threshold
            check_number("confidence", self.confidence, low=threshold, high=1, open_high=True)

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...); a row that is accepted already stays where it is."""
        recourse, spec = self.recourse, self.recourse.spec
        recourse.check(x)
        goal = recourse.score.threshold if self.confidence is None else self.confidence
        here, points = x.clone(), x.clone()
        arrived = recourse.score.judge(x) >= goal
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for _ in range(self.n_iter):
            rows = (~arrived).nonzero().flatten()
            if not len(rows):
                break
            ahead = steepest(slopes(recourse, here[rows]), here[rows], recourse, self.norm)
            moved = spec.project(here[rows] + self.step_size * ahead, x[rows])
            snapped = spec.snap(moved, x[rows])
            here[rows], points[rows] = moved, snapped
            steps[rows] += 1
            arrived[rows] = recourse.score.judge(snapped) >= goal
        return report(recourse, x, points, steps, method=f"closest ({self.norm})", tau=None)


def in_ball(x: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Return the nearest points (B, ...) of the L2 balls around ``centre``."""
    change = x - centre
    length = change.flatten(1).norm(dim=1)
    return centre + change * per_row((radius / length.clamp(min=1e-30)).clamp(max=1.0), change)


@dataclass(frozen=True)
class TRexIterative:
    """T-Rex:I: from a counterfactual, climb the stability until it reaches ``tau``.

    The stability is checked before each step, on draws shared by all steps; a row has arrived where its stability is
    :data:`SURE` standard errors above ``tau``, so that fresh draws will confirm it. Of a row that does not arrive the
    last accepted iterate is returned, and ``reached`` says so.

    Args:
        recourse: the question.
        tau: stability to reach, in (0, 1).
        base: where to start from; :class:`ClosestCounterfactual` when None.
        step_size: L2 length of a step.
        n_steps: most steps.
        radius: how far from the start, in L2.
    """

    recourse: Recourse
    tau: float = 0.75
    base: Generator | None = None
    step_size: float = 0.01
    n_steps: int = 20
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_steps", self.n_steps)
        check_number("radius", self.radius, low=0, open_low=True)

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        base = (self.base or ClosestCounterfactual(self.recourse)).generate(x)
        points, steps = self.improve(x, base.points, base.valid)
        return report(self.recourse, x, points, base.steps + steps, method="T-Rex:I", tau=self.tau)

    def improve(self, x: Tensor, start: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return improved points (B, ...) and the steps (B,) taken; rows that are not ``valid`` stay."""
        recourse, spec = self.recourse, self.recourse.spec
        meter = recourse.meter(x, "search")
        here, points, snapped = start.clone(), start.clone(), start.clone()
        accepted, open_ = valid.clone(), valid.clone()
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for step in range(self.n_steps + 1):
            rows = open_.nonzero().flatten()
            if not len(rows):
                break
            value, error, gradient = meter.with_gradient(here[rows])
            if spec.discrete:
                value, error = meter(snapped[rows])
            arrived = accepted[rows] & (value - SURE * error >= self.tau)
            open_[rows] = ~arrived
            if step == self.n_steps:
                break
            rows, gradient = rows[~arrived], gradient[~arrived]
            if not len(rows):
                break
            ahead = here[rows] + self.step_size * unit(gradient * spec.movable(x))
            here[rows] = spec.project(in_ball(ahead, start[rows], self.radius), x[rows])
            snapped[rows] = spec.snap(here[rows], x[rows])
            steps[rows] += 1
            accepted[rows] = recourse.score.accepts(snapped[rows])
            kept = rows[accepted[rows]]
            points[kept] = snapped[kept]
        return points, steps
