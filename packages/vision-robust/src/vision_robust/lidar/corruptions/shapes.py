"""ModelNet-C (PointCloud-C): seven corruptions of shapes in the unit sphere, at five severities.

Counts are published for clouds of 1,024 points; for other sizes they keep their share. Source: J. Ren, L. Pan, Z. Liu
2022, 2202.03377, and the constants of its public code. As there, an added point outside the sphere goes to
``p / |p|^2`` (inverted, not projected), and a rotated cloud is ``P R`` with rows as points.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vision_robust.lidar.corruptions.cloud import (
    Cloud,
    Draws,
    Rule,
    append,
    nearest,
    pick,
    rotation,
    some,
    transformed,
    unit_sphere,
)

__all__ = ["MODELNET_C", "add_global", "add_local", "drop_global", "drop_local", "jitter", "rotate", "scale"]

_MOST_CLUSTERS = 7


def _share(cloud: Cloud, of_1024: int) -> Tensor:
    """Return (B,) as many points as ``of_1024`` is of 1,024."""
    return (cloud.counts * of_1024 + 512) // 1024


def scale(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Scale each axis by U(1/s, s), s = 1.6 .. 2.0, then back into the unit sphere."""
    s = (1.6, 1.7, 1.8, 1.9, 2.0)[level]
    factors = draws("scale").uniform((1, 3)) * (s - 1 / s) + 1 / s
    return unit_sphere(cloud.moved(cloud.xyz * factors.to(cloud.xyz.dtype)))


def jitter(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add N(0, sigma) to every coordinate, sigma = 0.01 .. 0.05."""
    noise = draws("jitter").coarse_normal(cloud.xyz.shape[1:])
    return cloud.moved(torch.add(cloud.xyz, noise, alpha=0.01 * (level + 1)))


def rotate(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Rotate by Euler angles U(-a, a), a = 6 .. 30 degrees."""
    most = math.pi / 6 / 5 * (level + 1)
    angles = (draws("rotate").uniform((3,)) * 2 - 1) * most
    return transformed(cloud, rotation(angles))


def drop_global(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Drop a share of the points, 25 % .. 75 %."""
    share = (0.25, 0.375, 0.5, 0.625, 0.75)[level]
    counts = cloud.counts
    return cloud.without(some(cloud, counts - (counts * (1 - share)).to(torch.int64), draws("drop_global")))


def _cluster_sizes(total: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B,) numbers of clusters 1 .. 7, (B, M) the cluster of each of ``total`` (B,) points, which exist."""
    clusters = draws("clusters").integers(_MOST_CLUSTERS, ()) + 1
    most = int(total.max()) if total.numel() else 0
    owner = (draws("sizes").coarse_uniform((most,)) * clusters[:, None]).to(torch.int64)
    return clusters, owner, torch.arange(most, device=total.device) < total[:, None]


def drop_local(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Drop 100 .. 500 points (of 1,024) in 1 to 7 clusters: the nearest to a random point, which goes with them."""
    total = torch.minimum(_share(cloud, 100 * (level + 1)), (cloud.counts - 1).clamp_min(0))
    clusters, owner, real = _cluster_sizes(total, draws)
    slot = owner + _MOST_CLUSTERS * torch.arange(len(total), device=total.device)[:, None]
    slot = slot.flatten() if cloud.whole else slot[real]
    sizes = torch.bincount(slot, minlength=_MOST_CLUSTERS * len(total)).reshape(-1, _MOST_CLUSTERS)
    centres = draws("centres").uniform((_MOST_CLUSTERS,))
    order = clusters.argsort(descending=True, stable=True)  # in each round, the samples with a cluster left come first
    planes, mask, rest = cloud.planes[order], cloud.mask[order], cloud.rest[order]
    sizes, centres = sizes[order], centres[order]
    for i in range(_MOST_CLUSTERS if cloud.xyz.shape[1] else 0):
        rows = int((clusters > i).sum())
        if rows == 0:
            break
        whole = cloud.whole and i == 0
        part = Cloud(planes[:rows].transpose(1, 2), rest[:rows], mask[:rows], whole, cloud.boxes[:rows])
        at = pick(part, centres[:rows, i : i + 1])
        centre = planes[:rows].gather(2, at[:, None].expand(-1, 3, -1))[..., 0]
        mask[:rows] &= ~nearest(part, centre, sizes[:rows, i])
    left = torch.empty_like(mask)
    left[order] = mask
    return replace(cloud, mask=left, whole=False)


def add_global(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add 10 .. 50 points (for 1,024), uniform in the unit ball."""
    n = _share(cloud, 10 * (level + 1))
    most = int(n.max()) if n.numel() else 0
    radius, height, turn = draws("add_global").uniform((most, 3)).unbind(2)
    radius, height, turn = radius ** (1 / 3), height * 2 - 1, turn * (2 * math.pi)
    flat = radius * (1 - height.square()).clamp_min(0).sqrt()
    added = torch.stack([flat * turn.cos(), flat * turn.sin(), radius * height], -1)
    return append(cloud, added, None if cloud.whole else torch.arange(most, device=n.device) < n[:, None])


def distinct(cloud: Cloud, m: int, draws: Draws) -> Tensor:
    """Return (B, m) positions of different random points; they repeat only where a cloud has fewer than ``m``."""
    counts = cloud.counts
    u = draws("distinct").uniform((m,))
    taken = torch.empty(len(counts), 0, dtype=torch.int64, device=counts.device)
    for i in range(m):  # the r-th of those not yet taken
        rank = (u[:, i] * (counts - i).clamp_min(1)).to(torch.int64)
        for j in range(i):
            rank += rank >= taken[:, j]
        taken = torch.cat([taken, rank[:, None]], 1).sort(1).values
    shuffled = draws("order").uniform((m,)).argsort(1)
    rank = taken.gather(1, shuffled) % counts.clamp_min(1)[:, None]
    return pick(cloud, (rank + 0.5) / counts.clamp_min(1)[:, None])


def add_local(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add 100 .. 500 points (for 1,024) in 1 to 7 clusters of sigma U(0.075, 0.125) round random points."""
    n = _share(cloud, 100 * (level + 1))
    if cloud.xyz.shape[1] == 0:
        return cloud
    _, owner, real = _cluster_sizes(n, draws)
    at = distinct(cloud, _MOST_CLUSTERS, draws).gather(1, owner)
    sigma = (draws("sigma").uniform((_MOST_CLUSTERS,)) * 0.05 + 0.075).gather(1, owner)
    noise = draws("add_local").coarse_normal((owner.shape[1], 3))
    added = cloud.xyz.gather(1, at[..., None].expand(-1, -1, 3)) + sigma[..., None] * noise
    far = added.square().sum(-1, keepdim=True)
    added = torch.where(far > 1, added / far, added)
    rest = cloud.rest.gather(1, at[..., None].expand(-1, -1, cloud.rest.shape[2]))
    return append(cloud, added, None if cloud.whole else real, rest)


MODELNET_C: dict[str, Rule] = {
    "scale": scale,
    "jitter": jitter,
    "rotate": rotate,
    "drop_global": drop_global,
    "drop_local": drop_local,
    "add_global": add_global,
    "add_local": add_local,
}
