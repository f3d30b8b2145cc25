"""What a method for two-stage problems returns: a checked first stage, what it costs at worst, and what is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optim_robust.solver import Status

__all__ = ["Recourse", "Step", "TwoStageSolution", "WorstCase", "relative_gap"]

Array = NDArray[np.float64]


def relative_gap(value: float, bound: float) -> float:
    """Return ``(value - bound) / max(1e-9, |value|)``, 0 when they meet, infinity when either is not finite."""
    if not (math.isfinite(value) and math.isfinite(bound)):
        return math.inf
    return max(0.0, value - bound) / max(1e-9, abs(value))


@dataclass(frozen=True)
class Recourse:
    """The best second stage once ``xi`` is known: ``value`` is d(xi)'y, without the first stage's cost.

    ``value`` is +inf when no y is feasible, -inf when the second stage is unbounded; then ``y`` is None.
    """

    value: float
    y: Array | None
    status: Status


@dataclass(frozen=True)
class WorstCase:
    """The worst case ``F(x)`` of one first stage.

    Attributes:
        value: cost at ``xi``: attained, therefore a lower bound on F(x). +inf: ``xi`` leaves no feasible recourse.
        upper: proven upper bound on F(x).
        xi: (dim,) a worst point, of the uncertainty set.
        certified: whether ``value`` and ``upper`` agree up to the tolerance that was asked.
        status: OPTIMAL if certified, else why it stopped.
        n_scenarios: recourse problems that were solved.
        seconds: wall clock.
    """

    value: float
    upper: float
    xi: Array | None
    certified: bool
    status: Status
    n_scenarios: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """One entry of a history: what was proven, and what was held, ``seconds`` after the start."""

    seconds: float
    lower_bound: float
    worst_case: float


@dataclass(frozen=True)
class TwoStageSolution:
    """The answer of a method, in the problem's own (minimised) units.

    Attributes:
        x: (n_x,) the first stage, or None if none was found.
        worst_case: F(x), exact if ``certified``, else the greatest cost found (F(x) lies between it and ``upper``).
        lower_bound: proven lower bound on the optimum over all x (-inf if the method gives none).
        scenarios: (S, dim) scenarios that the method worked with.
        history: how the bound and the incumbent went.
        status: OPTIMAL only if the gap is closed; else FEASIBLE, INFEASIBLE, UNBOUNDED, TIME_LIMIT or ERROR.
        seconds: wall clock, the evaluation of F(x) included.
        method: its name.
        upper: proven upper bound on F(x), the value that x guarantees.
        certified: whether ``worst_case`` is F(x) up to tolerance.
        policies: second-stage plans that were fixed in advance (static: one; k-adaptability: K).
        info: counts and notes of the method.
    """

    x: Array | None
    worst_case: float
    lower_bound: float
    scenarios: Array
    history: tuple[Step, ...]
    status: Status
    seconds: float
    method: str = ""
    upper: float = math.inf
    certified: bool = False
    policies: Array | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Certified relative gap between what ``x`` guarantees and the lower bound."""
        return relative_gap(self.upper if math.isfinite(self.upper) else math.inf, self.lower_bound)
