"""What a peer does with the vectors that it received: a mixing rule, for one peer or for many stacked at once.

A mixing rule maps a pool of messages, the rows of the peers' own vectors in it, and who heard what, to one new vector
for each peer. In one process the pool holds every message once; in a process of its own a peer has the pool that it
received, with its own vector in row ``own[0]``. The same code runs in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optim_robust.byzantine.geometry import combine, distances_to
from optim_robust.byzantine.vectors import (
    AggregationError,
    TooFewMessagesError,
    check_faulty,
    check_vectors,
    finite_rows,
)
from robust_core.checks import check_count, check_number

__all__ = ["Aggregation", "Mixing", "NearestNeighbors", "SelfCenteredClipping", "heard_finite"]


class Mixing(Protocol):
    """A rule that turns what peers heard into their next vectors."""

    def __call__(self, pool: Tensor, own: Tensor, heard: Tensor) -> Tensor:
        """Return (k, d), the next vector of each of k peers.

        Args:
            pool: (m, d) messages; rows nobody heard may hold anything.
            own: (k,) int64, the row of each peer's own vector.
            heard: (k, m) bool, which rows each peer has, its own among them.
        """
        ...


def heard_finite(pool: Tensor, own: Tensor, heard: Tensor, f: int, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Return who heard which *finite* rows (k, m), and how many others of what they heard may be faulty (k,).

    A row that is not finite is proof of a faulty sender: it is left out and counted off ``f``.

    Raises:
        TooFewMessagesError: a peer heard fewer than n - f rows (``n`` given).
        AggregationError: a peer heard more than f rows that are not finite, or its own vector is not.
    """
    least = int(heard.sum(1).min())
    if n is not None and least < n - f:
        raise TooFewMessagesError(f"a peer has {least} messages, its own included; {n - f} (n - f) are needed")
    finite = finite_rows(pool)
    if bool(finite.all()):
        return heard, torch.full((len(own),), f, device=pool.device)
    bad = (heard & ~finite).sum(1)
    if not bool(finite[own].all()):
        raise AggregationError("a peer's own vector holds NaN or infinity: its training diverged (lower the step size)")
    if int(bad.max()) > f:
        raise AggregationError(f"a peer heard {int(bad.max())} vectors with NaN or infinity; at most f={f} are faulty")
    return heard & finite, f - bad


@dataclass(frozen=True)
class NearestNeighbors:
    """Each peer takes the mean of the r - f vectors nearest to its own, of the r that it heard (MoNNA's NNA).

    Where every peer waits for all n, r = n. Where it takes the first n - f messages, f of *those* may still be faulty:
    it keeps n - 2 f. Distances are sums of squared differences; nothing cancels.

    Attributes:
        f: senders that may be faulty.
    """

    f: int

    def __post_init__(self) -> None:
        check_count("f", self.f, low=0)

    @torch.no_grad()
    def __call__(self, pool: Tensor, own: Tensor, heard: Tensor) -> Tensor:
        """Return (k, d); see :class:`Mixing`."""
        check_vectors(pool)
        check_faulty(int(heard.sum(1).min()), self.f, rule="nearest-neighbour averaging")
        heard, faulty = heard_finite(pool, own, heard, self.f)
        keep = heard.sum(1) - faulty
        squared = _squared(pool, own, heard)
        order = squared.argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(len(pool), device=pool.device).expand_as(order))
        weights = (place < keep[:, None]).double() / keep[:, None]
        if not bool(heard.all()):  # a row that nobody keeps may be anything, and 0 * infinity is not 0
            pool = pool.where((weights > 0).any(0)[:, None], torch.zeros((), dtype=pool.dtype, device=pool.device))
        return combine(weights, pool)


def _squared(pool: Tensor, own: Tensor, heard: Tensor) -> Tensor:
    """Return (k, m) squared distances from each peer's own row; -1 to itself, infinite to what it did not hear."""
    found = _from_points(pool, pool[own], heard)
    found[torch.arange(len(own), device=pool.device), own] = -1.0
    return found


def _from_points(pool: Tensor, points: Tensor, heard: Tensor) -> Tensor:
    """Return (k, m) squared distances from (k, d) points to the rows heard; infinite to the others."""
    found = torch.full(heard.shape, torch.inf, dtype=torch.float64, device=pool.device)
    for point, mask, row in zip(points, heard, found, strict=True):
        row[mask] = distances_to(pool if bool(mask.all()) else pool[mask], point)
    return found


@dataclass(frozen=True)
class Aggregation:
    """Each peer applies one rule to all that it heard: coordinate-wise rules, Krum, the geometric median ...

    Peers that heard the same rows share one call.

    Attributes:
        rule: (r, d) -> (d,), or (r, d), f -> (d,) where ``f`` is given.
        f: senders that may be faulty; passed on, less those that sent NaN or infinity. None: the rule takes no f.
        columnwise: whether the rule treats each coordinate alone, so that all peers fit into one call.
    """

    rule: Callable[..., Tensor]
    f: int | None = None
    columnwise: bool = False

    @torch.no_grad()
    def __call__(self, pool: Tensor, own: Tensor, heard: Tensor) -> Tensor:
        """Return (k, d); see :class:`Mixing`."""
        check_vectors(pool)
        f = int(heard.sum(1).max()) if self.f is None else self.f
        heard, faulty = heard_finite(pool, own, heard, f)
        alike = len(set(zip(heard.sum(1).tolist(), faulty.tolist(), strict=True))) == 1
        if self.columnwise and alike and heard.sum() * pool.shape[1] <= 1 << 24 and not bool((heard == heard[0]).all()):
            rows = pool[heard.nonzero()[:, 1]].unflatten(0, (len(own), -1)).transpose(0, 1)  # (r, k, d)
            return self._apply(rows.flatten(1), int(faulty[0])).unflatten(0, (len(own), -1))
        made: dict[tuple[bool, ...], Tensor] = {}
        results = []
        for mask, left in zip(heard, faulty.tolist(), strict=True):
            key = tuple(mask.tolist())
            if key not in made:
                made[key] = self._apply(pool if all(key) else pool[mask], left)
            results.append(made[key])
        return torch.stack(results)

    def _apply(self, rows: Tensor, f: int) -> Tensor:
        return self.rule(rows) if self.f is None else self.rule(rows, f)


@dataclass(frozen=True)
class SelfCenteredClipping:
    """Each peer moves from its own vector by the mean of clipped differences (He et al. 2022, arXiv 2202.01545).

    Attributes:
        tau: radius of clipping, in the units of the vectors.
        n_iter: steps.
        f: senders of NaN or infinity that are put up with.
    """

    tau: float
    n_iter: int = 3
    f: int = 0

    def __post_init__(self) -> None:
        check_number("tau", self.tau, low=0.0, open_low=True)
        check_count("n_iter", self.n_iter)
        check_count("f", self.f, low=0)

    @torch.no_grad()
    def __call__(self, pool: Tensor, own: Tensor, heard: Tensor) -> Tensor:
        """Return (k, d); see :class:`Mixing`."""
        check_vectors(pool)
        heard, _ = heard_finite(pool, own, heard, self.f)
        if not bool(heard.all()):
            pool = pool.where(heard.any(0)[:, None], torch.zeros((), dtype=pool.dtype, device=pool.device))
        points = pool[own]
        for _ in range(self.n_iter):
            weights = (self.tau / _from_points(pool, points, heard).sqrt()).clamp(max=1.0) / heard.sum(1, keepdim=True)
            rest = (1 - weights.sum(1, keepdim=True)).to(points.dtype)
            points = combine(weights, pool) + rest * points
        return points
