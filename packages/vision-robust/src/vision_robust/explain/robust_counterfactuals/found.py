"""What a search found: points, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust_core.checks import check_number
from vision_robust.explain.robust_counterfactuals.stability import Recourse

__all__ = ["Counterfactuals", "report"]


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Counterfactuals of a batch, one row for each query.

    Attributes:
        original: (B, ...) queries.
        points: (B, ...) proposals; for a row that is not ``valid`` the last point that was tried.
        score: (B,) float64, probability of the target at the proposal under the model that stands now.
        valid: (B,) whether it reaches the threshold.
        stability: (B,) float64, on draws that no search has seen.
        reached: (B,) whether the proposal is valid and its stability at least ``tau``; never True without a ``tau``.
        steps: (B,) int64, steps of the search.
        tau: the stability that was asked for, None where the method asks for none.
        kind: which stability it is, and whether a theorem speaks of it.
        method: name of the method.
    """

    original: Tensor
    points: Tensor
    score: Tensor
    valid: Tensor
    stability: Tensor
    reached: Tensor
    steps: Tensor
    tau: float | None
    kind: str
    method: str

    def __len__(self) -> int:
        return len(self.points)

    def cost(self, norm: str = "L2") -> Tensor:
        """Return (B,) float64 distances from query to proposal: ``"L2"``, ``"L1"``, or ``"L0"`` (changed features)."""
        change = (self.points.double() - self.original.double()).flatten(1)
        if norm == "L0":
            return (change != 0).sum(1).double()
        if norm not in ("L1", "L2"):
            raise ValueError(f"norm={norm!r}: choose 'L2', 'L1' or 'L0'")
        return torch.linalg.vector_norm(change, ord=int(norm[1]), dim=1)

    def subset(self, rows: Tensor) -> Counterfactuals:
        """Return some rows (positions or a boolean mask)."""
        columns = ("original", "points", "score", "valid", "stability", "reached", "steps")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})


def check_tau(tau: float) -> float:
    """Return ``tau`` if it lies strictly between 0 and 1."""
    return check_number("tau", tau, low=0, high=1, open_low=True, open_high=True)


def report(
    recourse: Recourse, original: Tensor, points: Tensor, steps: Tensor, *, method: str, tau: float | None
) -> Counterfactuals:
    """Judge proposals anew: score, validity and stability on draws that no search has seen.

    A search that climbs on its draws, or stops at them, is biased towards them; the theorem speaks of fresh ones.
    """
    score = recourse.score.judge(points).double()
    valid = score >= recourse.score.threshold
    stability, _ = recourse.meter(original, "report")(points)
    reached = torch.zeros_like(valid) if tau is None else valid & (stability >= tau)
    return Counterfactuals(original, points, score, valid, stability, reached, steps, tau, recourse.kind, method)
