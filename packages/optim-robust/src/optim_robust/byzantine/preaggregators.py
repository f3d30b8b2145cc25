"""What is done to the senders' vectors before a rule: (n, d) -> (m, d).

Nearest-neighbour mixing (Allouah et al. 2023, arXiv 2302.01772), bucketing (Karimireddy et al. 2022, arXiv 2006.09365),
static clipping, and adaptive clipping (ARC: Allouah et al. 2024, arXiv 2405.14432). All but the distances is one
product of an m x n matrix with the data: no copy of the data for each sender is made, and the input is never written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optim_robust.byzantine.geometry import combine, distances_to, mean_of_nearest, pairwise
from optim_robust.byzantine.vectors import admit
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, resolve_seed, stream

__all__ = ["adaptive_clipping", "bucketing", "clipping", "nearest_neighbor_mixing"]


@torch.no_grad()
def nearest_neighbor_mixing(x: Tensor, f: int) -> Tensor:
    """Return (n, d): each row replaced by the mean of the n - f rows nearest to it, itself included ("NNM").

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="nearest-neighbour mixing")
    return mean_of_nearest(pairwise(x).fill_diagonal_(-1.0), len(x) - f, x)


@torch.no_grad()
def bucketing(x: Tensor, s: int, *, generator: Seed = None) -> Tensor:
    """Return (ceil(n / s), d): means of random groups of ``s`` rows, the last one smaller.

    As many means may be faulty as rows were: a rule after it must withstand f of ceil(n / s).

    Args:
        x: (n, d) one row for each sender.
        s: rows of a group.
        generator: the seed of the groups; give a torch generator, or another number in each round.
    """
    x = admit(x)
    n = len(x)
    check_count("s", s)
    order = torch.randperm(n, generator=stream(resolve_seed(generator), 0, "bucketing"))
    weights = torch.zeros(math.ceil(n / s), n, dtype=torch.float64)
    for row, group in zip(weights, order.split(s), strict=True):
        row[group] = 1 / len(group)
    return combine(weights, x)


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Return rows times factors; rows with factor 1 keep their bits."""
    out = x.clone()
    for row in (factors != 1).nonzero().flatten().tolist():
        out[row] *= float(factors[row])
    return out


@torch.no_grad()
def clipping(x: Tensor, c: float) -> Tensor:
    """Return (n, d): rows longer than ``c`` scaled down to that length.

    Args:
        x: (n, d) one row for each sender.
        c: longest norm, in the units of ``x``, above 0.
    """
    x = admit(x)
    check_number("c", c, low=0.0, open_low=True)
    norms = distances_to(x, torch.zeros_like(x[0])).sqrt()
    return _scaled(x, (c / norms).clamp(max=1.0))


@torch.no_grad()
def adaptive_clipping(x: Tensor, f: int) -> Tensor:
    """Return (n, d): the floor(2 f (n - f) / n) longest rows scaled down to the norm of the next ("ARC").

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="adaptive clipping")
    n = len(x)
    count = 2 * f * (n - f) // n
    if count == 0:
        return x.clone()
    norms = distances_to(x, torch.zeros_like(x[0])).sqrt()
    limit = norms.sort(descending=True).values[min(count, n - 1)]
    return _scaled(x, torch.where(norms > limit, limit / norms, torch.ones_like(norms)))
