"""Counterfactuals that are training points: the nearest accepted one, and T-Rex:NN, the nearest stable one.

Where features may not move, a candidate is the training point with the query's own values in them: nothing immutable
changes, at the price that the combination was never seen; acceptance is judged on the combination.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_inputs
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals, check_tau, report
from vision_robust.explain.robust_counterfactuals.search import SURE
from vision_robust.explain.robust_counterfactuals.stability import Meter, Recourse

__all__ = ["NearestCounterfactual", "TRexNearestNeighbor"]

BLOCK = 8
"""Candidates of each row that are looked at together, nearest first; the block doubles while rows stay open."""
DISTANCES = 1 << 25
"""Distances between queries and training points that are held at a time."""


def _pool(recourse: Recourse, x: Tensor, train_x: Tensor) -> Tensor:
    """Return the training points (N, ...) that the model accepts."""
    check_inputs(train_x, name="train_x")
    if train_x.shape[1:] != x.shape[1:] or train_x.dtype != x.dtype or train_x.device != x.device:
        raise ValueError(
            f"train_x is {train_x.dtype} {tuple(train_x.shape[1:])} on {train_x.device}, x {x.dtype} "
            f"{tuple(x.shape[1:])} on {x.device}; they must agree"
        )
    accepted = recourse.score.accepts(train_x)
    if not bool(accepted.any()):
        raise ValueError(
            f"train_x: the model accepts none of {len(train_x)} points for target {recourse.score.target} at threshold "
            f"{recourse.score.threshold:g}; give more points, or another target or threshold"
        )
    return train_x[accepted]


def _order(recourse: Recourse, x: Tensor, pool: Tensor) -> Tensor:
    """Return (B, N) positions in the pool, nearest in the movable features first."""
    movable = recourse.spec.movable(x)
    distance = torch.cdist((x * movable).flatten(1), (pool * movable).flatten(1))
    return distance.argsort(dim=1, stable=True)


def _candidates(recourse: Recourse, x: Tensor, pool: Tensor, chosen: Tensor) -> Tensor:
    """Return (B * k, ...) proposals from positions (B, k): queries with the pool's values in movable features."""
    spec, start = recourse.spec, x.repeat_interleave(chosen.shape[1], 0)
    return spec.snap(spec.project(pool[chosen.flatten()], start), start)


def _search(recourse: Recourse, x: Tensor, train_x: Tensor, tau: float | None) -> tuple[Tensor, Tensor]:
    """Return proposals (B, ...) and ranks (B,), for so many queries at a time that their distances fit."""
    pool = _pool(recourse, x, train_x)
    meter = None if tau is None else recourse.meter(x, "search")
    found = [_scan(recourse, rows, pool, meter, tau) for rows in x.split(max(1, DISTANCES // len(pool)))]
    return torch.cat([points for points, _ in found]), torch.cat([rank for _, rank in found])


def _scan(recourse: Recourse, x: Tensor, pool: Tensor, meter: Meter | None, tau: float | None) -> tuple[Tensor, Tensor]:
    """Return the first proposal (B, ...) that is accepted and stable enough, and its rank (B,).

    A row without one keeps the nearest accepted proposal, or where there is none the nearest proposal.
    """
    order = _order(recourse, x, pool)
    points = _candidates(recourse, x, pool, order[:, :1])
    rank = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    open_, fallback = torch.ones_like(rank, dtype=torch.bool), torch.ones_like(rank, dtype=torch.bool)
    first, block = 0, BLOCK
    while first < order.shape[1] and bool(open_.any()):
        rows = open_.nonzero().flatten()
        chosen = order[rows, first : first + block]
        proposals = _candidates(recourse, x[rows], pool, chosen)
        accepted = recourse.score.accepts(proposals)
        good = accepted.clone()
        if meter is not None and tau is not None and bool(accepted.any()):
            value, error = meter(proposals[accepted])
            good[accepted] = value - SURE * error >= tau
        proposals = proposals.reshape(len(rows), -1, *x.shape[1:])
        for mask, wanted in ((accepted, fallback), (good, open_)):
            table = mask.reshape(len(rows), -1)
            take = table.any(1) & wanted[rows]
            place = table.int().argmax(1)
            points[rows[take]] = proposals[take, place[take]]
            rank[rows[take]] = first + place[take]
            wanted[rows[take]] = False
        first, block = first + block, 2 * block
    return points, rank


@dataclass(frozen=True)
class NearestCounterfactual:
    """The nearest training point that the model accepts.

    Args:
        recourse: the question.
        train_x: (N, ...) training inputs.
    """

    recourse: Recourse
    train_x: Tensor

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...); ``steps`` is its rank among the accepted points."""
        self.recourse.check(x)
        points, rank = _search(self.recourse, x, self.train_x, None)
        return report(self.recourse, x, points, rank, method="nearest neighbour", tau=None)


@dataclass(frozen=True)
class TRexNearestNeighbor:
    """T-Rex:NN: the nearest accepted training point whose stability reaches ``tau``.

    Where there is none the nearest accepted one is returned, and ``reached`` says so.

    Args:
        recourse: the question.
        train_x: (N, ...) training inputs.
        tau: stability to reach, in (0, 1).
    """

    recourse: Recourse
    train_x: Tensor
    tau: float = 0.75

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...); ``steps`` is its rank among the accepted points."""
        self.recourse.check(x)
        points, rank = _search(self.recourse, x, self.train_x, self.tau)
        return report(self.recourse, x, points, rank, method="T-Rex:NN", tau=self.tau)
