"""Gradient estimates from scores alone: for models that are only functions of arrays.

The slope is measured along random directions, ``(f(x + h u) - f(x - h u)) / (2 h)``, and averaged; then follows a step
as in PGD. Where Square proposes patches, this follows whatever smooth slope there is: inputs that are no images, models
behind an interface, simulators.

Sources: natural evolution strategies with antithetic pairs, Ilyas et al. 2018 (arXiv 1804.08598), section 2; symmetric
difference quotients, Chen et al. 2017 (ZOO, arXiv 1708.03999), equation 6. Directions are random signs instead of
Gaussians (the same mean, less spread). Left out: ZOO's coordinate-wise Adam, importance sampling and its feature space.
Every sample has its own directions, so results do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.checks import check_count, check_number
from robust_core.losses.margin import margin
from robust_core.threats import L1, Threat

__all__ = ["ArrayModel", "ZerothOrder"]

_L1_SHARE = 20  # of the elements, as PGD moves them


class ArrayModel:
    """A function of numpy arrays as a classifier.

    Args:
        function: maps (B, ...) arrays to (B, C) scores; probabilities do if their logarithms are taken first.
    """

    differentiable = False
    stochastic = False
    optimises_at_test_time = False

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, not {type(function).__name__}")
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        """Return (B, C) scores in the dtype and on the device of ``x``."""
        scores = np.asarray(self.function(x.detach().cpu().numpy()))
        return torch.from_numpy(np.array(scores)).to(device=x.device, dtype=x.dtype)


@dataclass(frozen=True)
class ZerothOrder(IterativeAttack):
    """Projected ascent of the margin along an estimated gradient (Linf, L2, L1).

    Args:
        threat: what may be changed.
        n_iter: steps.
        n_directions: random directions for each step; a step costs ``2 n_directions + 1`` queries.
        spread: distance ``h`` at which the score is probed, in input units.
        step_size: length of a step in the norm of the threat; None means ``2.5 eps / n_iter``.
        momentum: share of the last estimate that is kept, between 0 and 1.
        batch_size: rows worked on at a time.
    """

    threat: Threat
    n_iter: int = 100
    n_directions: int = 10
    spread: float = 1e-3
    step_size: float | None = None
    momentum: float = 0.8
    batch_size: int = 256

    name: ClassVar[str] = "zeroth-order"
    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        check_count("n_directions", self.n_directions)
        check_number("spread", self.spread, low=0, open_low=True)
        check_number("momentum", self.momentum, low=0, high=1, open_high=True)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0)

    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows: the start and no slope yet."""
        start = problem.x if problem.init is None else problem.init
        work = torch.promote_types(start.dtype, torch.float32)
        return {
            "next": start.clone(),
            "slope": torch.zeros_like(start, dtype=work),
            "time": torch.zeros_like(problem.y),
            **self.threat.frame(problem.x),
        }

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Evaluate the point at hand, measure the slope around it and move on."""
        point = state["next"]
        logits = problem.logits(point)
        if problem.last_step:
            return state, point, logits
        slope = self.momentum * state["slope"] + (1 - self.momentum) * self._slope(problem, point, state["time"])
        length = 2.5 * self.threat.eps / self.n_iter if self.step_size is None else self.step_size
        moved = point.to(slope.dtype) + length * self._direction(problem, slope)
        moved = self.threat.project(moved.to(point.dtype), problem.x, frame=state)
        return {**state, "next": moved, "slope": slope, "time": state["time"] + 1}, point, logits

    def _slope(self, problem: Problem, point: Tensor, time: Tensor) -> Tensor:
        """Return the (B, ...) estimate of the margin's gradient, from probes inside the domain."""
        streams = problem.streams(self.name)
        work = torch.promote_types(point.dtype, torch.float32)
        column = (-1, *[1] * (point.ndim - 1))
        total = torch.zeros_like(point, dtype=work)
        for number in range(self.n_directions):
            signs = streams.signs(point.shape[1:], chunk=time * self.n_directions + number, dtype=work)
            ahead, behind = (
                self.threat.clamp((point.to(work) + side * self.spread * signs).to(point.dtype)) for side in (1, -1)
            )
            rise = margin(problem.logits(ahead), problem.y) - margin(problem.logits(behind), problem.y)
            total += signs * rise.to(work).reshape(column)
        return (total / (2 * self.spread * self.n_directions)).nan_to_num_()

    def _direction(self, problem: Problem, slope: Tensor) -> Tensor:
        if isinstance(self.threat, L1):
            share = max(slope[0].numel() // _L1_SHARE, 1)
            return self.threat.spread(slope, torch.full_like(problem.y, share))
        return self.threat.steepest(slope)
