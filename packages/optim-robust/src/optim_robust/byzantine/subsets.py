"""Rules that choose which senders to average by looking at subsets: MDA, SMEA and Bulyan.

Minimum-diameter averaging (Rousseeuw 1985; El-Mhamdi et al. 2018) asks for the n - f rows whose largest mutual
distance is least. Instead of trying all C(n, f) subsets: rows within distance t of each other are what remains when,
of each pair farther apart than t, one is removed. That is a vertex cover of at most f rows, found by branching in
at most 2^f steps; t is found by bisection over the pairs. n = 30 and f = 7 take milliseconds, not two million subsets.
Of several subsets with the least diameter, the one of least variance counts, then the lower indices.

SMEA (Allouah et al. 2023, arXiv 2302.04787) takes the subset whose covariance has the least top eigenvalue: it is read
off the n x n inner products, in batches of subsets, whatever d is.

Bulyan (El-Mhamdi et al. 2018, arXiv 1802.07927): n - 2 f rows chosen by Krum one after another, then in each coordinate
the mean of the n - 4 f values nearest to their median.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optim_robust.byzantine.coordinates import nearest_to_median
from optim_robust.byzantine.geometry import combine, pairwise
from optim_robust.byzantine.rules import krum_scores
from optim_robust.byzantine.vectors import admit, check_vectors
from robust_core.errors import ResourceError

__all__ = ["bulyan", "least_diameter", "least_eigenvalue", "minimum_diameter_average", "smea"]

MAX_SUBSETS = 200_000


def _covers(edges: list[int], alive: int, budget: int) -> Iterator[int]:
    """Yield vertex covers (bit masks) of at most ``budget`` of the ``alive`` vertices; all minimal ones are among them.

    ``edges[v]`` is the mask of neighbours of v. Either v is in the cover, or all its neighbours are.
    """
    degrees = [((edges[v] & alive).bit_count(), -v) for v in range(len(edges)) if alive >> v & 1]
    most, negative = max(degrees, default=(0, 0))
    if most == 0:
        yield 0
        return
    if budget == 0 or budget * most < sum(degree for degree, _ in degrees) / 2:
        return
    vertex = -negative
    neighbours = edges[vertex] & alive
    for cover in _covers(edges, alive & ~(1 << vertex), budget - 1):
        yield cover | 1 << vertex
    if neighbours.bit_count() <= budget:
        for cover in _covers(edges, alive & ~neighbours & ~(1 << vertex), budget - neighbours.bit_count()):
            yield cover | neighbours


def least_diameter(squared: Tensor, f: int) -> list[int]:
    """Return the n - f rows of least diameter, in order.

    Args:
        squared: (n, n) squared distances.
        f: rows to leave out.
    """
    n = len(squared)
    table = squared.tolist()
    lengths = sorted({table[i][j] for i in range(n) for j in range(i)} | {0.0})

    def graph(limit: float) -> list[int]:
        return [sum(1 << j for j in range(n) if table[i][j] > limit) for i in range(n)]

    low, high = 0, len(lengths) - 1
    while low < high:
        middle = (low + high) // 2
        if next(_covers(graph(lengths[middle]), (1 << n) - 1, f), None) is None:
            low = middle + 1
        else:
            high = middle
    best: tuple[float, list[int]] | None = None
    for cover in _covers(graph(lengths[low]), (1 << n) - 1, f):
        kept = [i for i in range(n) if not cover >> i & 1][: n - f]
        spread = math.fsum(table[i][j] for i in kept for j in kept)
        if best is None or (spread, kept) < best:
            best = (spread, kept)
    if best is None:
        raise ValueError("squared holds NaN: distances are needed")
    return best[1]


def _average(x: Tensor, kept: list[int]) -> Tensor:
    weights = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    weights[kept] = 1 / len(kept)
    return combine(weights, x)


@torch.no_grad()
def minimum_diameter_average(x: Tensor, f: int) -> Tensor:
    """Return the mean of the n - f rows whose largest mutual distance is least ("MDA").

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n. The search takes at most 2^f steps.
    """
    x = admit(x, f, rule="minimum-diameter averaging")
    return _average(x, least_diameter(pairwise(x), f))


def least_eigenvalue(squared: Tensor, f: int) -> list[int]:
    """Return the n - f rows whose covariance has the least top eigenvalue; ties go to the lower indices.

    Args:
        squared: (n, n) squared distances.
        f: rows to leave out.

    Raises:
        ResourceError: more than ``MAX_SUBSETS`` subsets.
    """
    n = len(squared)
    count = math.comb(n, f)
    if count > MAX_SUBSETS:
        raise ResourceError(
            f"SMEA compares C({n}, {f}) = {count} subsets, above {MAX_SUBSETS}; take CAF or MDA, or fewer senders"
        )
    keep = n - f
    best, chosen = math.inf, list(range(keep))
    subsets = itertools.combinations(range(n), keep)
    while block := list(itertools.islice(subsets, 4096)):
        index = torch.tensor(block, device=squared.device)
        part = squared[index[:, :, None], index[:, None, :]]
        rows = part.mean(2, keepdim=True)
        inner = 0.5 * (rows + rows.transpose(1, 2) - part - part.mean((1, 2), keepdim=True))
        top = torch.linalg.eigvalsh(inner)[:, -1]
        at = int(top.argsort(stable=True)[0])
        if float(top[at]) < best:
            best, chosen = float(top[at]), list(block[at])
    return chosen


@torch.no_grad()
def smea(x: Tensor, f: int) -> Tensor:
    """Return the mean of the n - f rows whose covariance has the least top eigenvalue ("SMEA").

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.

    Raises:
        ResourceError: C(n, f) is above 200,000.
    """
    x = admit(x, f, rule="SMEA")
    return _average(x, least_eigenvalue(pairwise(x), f))


@torch.no_grad()
def bulyan(x: Tensor, f: int) -> Tensor:
    """Return Bulyan over Krum.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, n >= 4 f + 3 where f > 0.
    """
    n = len(check_vectors(x))
    x = admit(x, f, most=max(0, (n - 3) // 4), rule="Bulyan")
    squared, left, chosen = pairwise(x), list(range(n)), []
    for _ in range(n - 2 * f):
        rest = squared[left][:, left]
        count = max(1, len(left) - f - 2)
        scores = krum_scores(rest, len(left) - count - 1) if len(left) > 1 else rest[0]
        chosen.append(left.pop(int(scores.argsort(stable=True)[0])))
    return nearest_to_median(x[sorted(chosen)], n - 4 * f)
