"""What T-Rex is compared with: Wachter's counterfactuals, stable neighbours (SNS) and ROAR.

================================  =================================================================================
:class:`WachterCounterfactual`    S. Wachter, B. Mittelstadt, C. Russell 2017, arXiv 1711.00399
:class:`StableNeighbor`           E. Black, Z. Wang, M. Fredrikson, A. Datta 2022, arXiv 2111.00358
:class:`Roar`                     S. Upadhyay, S. Joshi, H. Lakkaraju 2021, arXiv 2102.13620
================================  =================================================================================

Departures: Wachter's squared error of the score is a hinge on the log-odds, since its gradient vanishes where a softmax
saturates. SNS integrates the score by the midpoint rule on the line from 0. ROAR's local linear model is the gradient
of the log-odds at the query (LIME in the limit of a small neighbourhood), re-taken at each step, and its adversary, an
L2 ball around the weights, is solved in closed form: it takes ``delta |(x, 1)|`` off the log-odds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.models import frozen
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals, report
from vision_robust.explain.robust_counterfactuals.search import (
    ClosestCounterfactual,
    Generator,
    in_ball,
    per_row,
    slopes,
    unit,
)
from vision_robust.explain.robust_counterfactuals.stability import Recourse

__all__ = ["Roar", "StableNeighbor", "WachterCounterfactual"]


def _shrink(change: Tensor, amount: Tensor) -> Tensor:
    """Return the proximal step of ``amount |change|_1``: soft thresholding."""
    return change.sign() * (change.abs() - amount).clamp(min=0)


@dataclass(frozen=True)
class WachterCounterfactual:
    """Minimise ``weight * max(0, log-odds missing) + |x' - x|_1 / scale``, raising the weight until accepted.

    Proximal gradient steps, so that features that need not move do not move at all; every row has a weight of its own,
    which doubles in each round without an accepted point. Of the accepted points the cheapest in L1 is returned.

    Args:
        recourse: the question.
        scale: spread of each feature, shaped like one input or a number (Wachter: median absolute deviation).
        weight: of the first round.
        n_rounds: rounds.
        n_iter: steps in each round.
        step_size: of the proximal gradient.
        margin: log-odds wanted beyond the threshold's.
    """

    recourse: Recourse
    scale: float | Tensor = 1.0
    weight: float = 0.1
    n_rounds: int = 8
    n_iter: int = 60
    step_size: float = 0.02
    margin: float = 0.05

    def __post_init__(self) -> None:
        check_count("n_rounds", self.n_rounds)
        check_count("n_iter", self.n_iter)
        check_number("weight", self.weight, low=0, open_low=True)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_number("margin", self.margin, low=0)
        if not bool((torch.as_tensor(self.scale) > 0).all()):
            raise ValueError("scale must be above 0 in every feature; give constant features the scale 1")

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        recourse, spec = self.recourse, self.recourse.spec
        recourse.check(x)
        threshold = recourse.score.threshold
        goal = math.log(threshold / (1 - threshold)) + self.margin
        points, here = x.clone(), x.clone()
        cheapest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        cheapest[recourse.score.accepts(x)] = 0.0
        weight = torch.full((len(x),), self.weight, device=x.device, dtype=x.dtype)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for _ in range(self.n_rounds):
            rows = torch.isinf(cheapest).nonzero().flatten()
            if not len(rows):
                break
            here[rows] = x[rows]
            for _ in range(self.n_iter):
                here[rows], snapped, odds = self._step(here[rows], x[rows], weight[rows], goal)
                cost = (snapped - x[rows]).abs().flatten(1).sum(1).double()
                better = (odds >= goal - self.margin) & recourse.score.accepts(snapped) & (cost < cheapest[rows])
                points[rows[better]], cheapest[rows[better]] = snapped[better], cost[better]
                steps[rows] += 1
            weight[rows] *= 2
        missing = torch.isinf(cheapest)
        points[missing] = spec.snap(here[missing], x[missing])
        return report(recourse, x, points, steps, method="Wachter", tau=None)

    def _step(self, here: Tensor, x: Tensor, weight: Tensor, goal: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next points, their snapped form and its log-odds."""
        recourse, spec = self.recourse, self.recourse.spec
        with frozen(recourse.score.model), torch.no_grad():
            short = (recourse.score.log_odds(here) < goal).to(here)
        push = slopes(recourse, here) * per_row(short * weight, here) * spec.movable(x)
        amount = self.step_size / torch.as_tensor(self.scale).to(here)
        moved = x + _shrink(here + self.step_size * push - x, amount)
        moved = spec.project(moved, x)
        snapped = spec.snap(moved, x)
        with frozen(recourse.score.model), torch.no_grad():
            return moved, snapped, recourse.score.log_odds(snapped)


@dataclass(frozen=True)
class StableNeighbor:
    """SNS: near a counterfactual, the point with the greatest mean score on the line from 0, while accepted.

    Args:
        recourse: the question.
        base: where to start from; :class:`ClosestCounterfactual` when None.
        radius: of the L2 ball around the start.
        n_iter: steps.
        step_size: L2 length of a step.
        n_points: points of the midpoint rule.
    """

    recourse: Recourse
    base: Generator | None = None
    radius: float = 0.5
    n_iter: int = 50
    step_size: float = 0.02
    n_points: int = 20

    def __post_init__(self) -> None:
        check_number("radius", self.radius, low=0, open_low=True)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_iter", self.n_iter)
        check_count("n_points", self.n_points)

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        recourse, spec = self.recourse, self.recourse.spec
        base = (self.base or ClosestCounterfactual(recourse)).generate(x)
        here, points = base.points.clone(), base.points.clone()
        rows = base.valid.nonzero().flatten()
        for _ in range(self.n_iter if len(rows) else 0):
            pull = self._pull(here[rows]) * spec.movable(x)
            ahead = in_ball(here[rows] + self.step_size * unit(pull), base.points[rows], self.radius)
            here[rows] = spec.project(ahead, x[rows])
            snapped = spec.snap(here[rows], x[rows])
            kept = recourse.score.accepts(snapped)
            points[rows[kept]] = snapped[kept]
        return report(recourse, x, points, base.steps + self.n_iter * base.valid, method="SNS", tau=None)

    def _pull(self, x: Tensor) -> Tensor:
        """Return (B, ...) gradients of the mean score at ``t x``, t in (0, 1)."""
        score = self.recourse.score
        total = torch.zeros_like(x)
        with frozen(score.model), torch.enable_grad():
            for rows in torch.arange(len(x), device=x.device).split(score.rows(x)):
                for i in range(self.n_points):
                    leaf = x[rows].detach().requires_grad_(True)
                    value = score(leaf * ((i + 0.5) / self.n_points)).sum() / self.n_points
                    total[rows] += torch.autograd.grad(value, leaf)[0]
        return total


@dataclass(frozen=True)
class Roar:
    """ROAR: minimise the loss of the worst linear model near the local one, plus the L1 cost.

    Args:
        recourse: the question.
        delta: how far the weights (and the bias) of the local linear model may move, in L2.
        cost_weight: of the L1 cost.
        n_iter: steps.
        step_size: L2 length of the first step; later ones shrink linearly to 0.
    """

    recourse: Recourse
    delta: float = 0.1
    cost_weight: float = 0.1
    n_iter: int = 200
    step_size: float = 0.02

    def __post_init__(self) -> None:
        check_number("delta", self.delta, low=0)
        check_number("cost_weight", self.cost_weight, low=0)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_iter", self.n_iter)

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        recourse, spec = self.recourse, self.recourse.spec
        recourse.check(x)
        threshold = recourse.score.threshold
        goal = math.log(threshold / (1 - threshold))
        here = x.clone()
        for step in range(self.n_iter):
            slope = slopes(recourse, here)
            with frozen(recourse.score.model), torch.no_grad():
                odds = recourse.score.log_odds(here)
            length = (here.flatten(1).square().sum(1) + 1).sqrt()
            share = torch.sigmoid(-(odds - goal - self.delta * length))  # slope of the logistic loss
            worst = slope - self.delta * here / per_row(length, here)
            descent = worst * per_row(share, here) - self.cost_weight * (here - x).sign()
            length = self.step_size * (1 - step / self.n_iter)
            here = spec.project(here + length * unit(descent * spec.movable(x)), x)
        points = spec.snap(here, x)
        steps = torch.full((len(x),), self.n_iter, dtype=torch.int64, device=x.device)
        return report(recourse, x, points, steps, method="ROAR", tau=None)
