"""Who holds which samples: the same for all, or classes in proportions drawn from a Dirichlet distribution.

Every sample goes to exactly one peer. (The official experiments of MoNNA draw each peer's samples on their own, so
that peers share samples; a partition is the harder and the usual setting: Hsu et al. 2019, arXiv 1909.06335.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robust_core.checks import check_count, check_labels, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["dirichlet_shards", "even_shards"]


def even_shards(n_samples: int, n: int, *, generator: Seed = None) -> list[Tensor]:
    """Return a random partition of 0 .. n_samples - 1 into n parts of equal size, give or take one."""
    check_count("n", n)
    check_count("n_samples", n_samples, low=n)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(resolve_seed(generator)))
    return list(order.tensor_split(n))


def dirichlet_shards(y: Tensor, n: int, *, concentration: float = 1.0, generator: Seed = None) -> list[Tensor]:
    """Return a partition in which each class is split over the n peers in Dirichlet proportions.

    Args:
        y: (N,) int64 labels, N >= n.
        n: peers.
        concentration: small is heterogeneous, large is even; infinity is :func:`even_shards`.
        generator: the seed. A peer that would be left without samples gets one of the largest shard's.
    """
    check_labels(y, len(y))
    check_count("n", n)
    if math.isinf(concentration):
        return even_shards(len(y), n, generator=generator)
    check_number("concentration", concentration, low=0.0, open_low=True)
    if len(y) < n:
        raise ValueError(f"{len(y)} samples for n={n} peers: every peer needs one")
    import numpy as np

    seed = resolve_seed(generator)
    draw = np.random.default_rng(derive(seed, "dirichlet"))
    parts: list[list[int]] = [[] for _ in range(n)]
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten().cpu().numpy()
        draw.shuffle(rows)
        cuts = (np.cumsum(draw.dirichlet(np.full(n, concentration)))[:-1] * len(rows)).round().astype(int)
        for part, share in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(share.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [torch.tensor(sorted(part)) for part in parts]
