"""What every corruption is made of: a batch of clouds, its random streams, exact selections of points, frames of size.

Corruptions are functions ``(Cloud, level 0 .. 4, Draws) -> Cloud``. They read the cloud's tensors and never write to
them, and touch ``rest`` (intensity and what else there is) only by adding or removing points, unless they model how a
sensor's returns weaken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from robust_core.random import SampleStreams
from vision_robust.lidar.types import positions

__all__ = [
    "Cloud",
    "Draws",
    "Rule",
    "append",
    "nearest",
    "pick",
    "positions",
    "ranks",
    "rotation",
    "signs",
    "some",
    "unit_box",
    "unit_sphere",
]


@dataclass(frozen=True)
class Cloud:
    """Clouds on their way through a corruption.

    Attributes:
        xyz: (B, N, 3) coordinates.
        rest: (B, N, C - 3) further columns.
        mask: (B, N) which points there are.
        whole: all of them are there, known without looking.
        boxes: (B, K, 7) boxes, of size zero where a sample has fewer.
    """

    xyz: Tensor
    rest: Tensor
    mask: Tensor
    whole: bool
    boxes: Tensor

    @cached_property
    def counts(self) -> Tensor:
        """(B,) int64 number of points of each cloud."""
        b, n = self.mask.shape
        if self.whole:
            return torch.full((b,), n, device=self.mask.device)
        return self.mask.view(torch.uint8).sum(1, dtype=torch.int32).to(torch.int64)  # bytes are added more quickly

    @cached_property
    def planes(self) -> Tensor:
        """(B, 3, N) the coordinates, each in a row: sums and extremes over points are ten times as fast there."""
        return torch.stack(self.xyz.unbind(-1), 1)  # five times as fast as a transposed copy

    def moved(self, xyz: Tensor) -> Cloud:
        """Return the clouds with their points elsewhere."""
        return replace(self, xyz=xyz)

    def in_planes(self, planes: Tensor) -> Cloud:
        """Return the clouds with their points at ``planes`` (B, 3, N)."""
        return replace(self, xyz=planes.transpose(1, 2))

    def without(self, gone: Tensor) -> Cloud:
        """Return the clouds without some of their points (B, N)."""
        left = replace(self, mask=~gone if self.whole else self.mask & ~gone, whole=False)
        if "planes" in self.__dict__:
            left.__dict__["planes"] = self.__dict__["planes"]
        return left


class Draws:
    """The random streams of the samples at work: one for each purpose."""

    def __init__(self, seed: int, index: Tensor, name: str) -> None:
        self._seed, self._index, self._name = seed, index, name

    def __call__(self, purpose: str) -> SampleStreams:
        """Return the streams for ``purpose``."""
        return SampleStreams(self._seed, self._index, f"lidar/{self._name}/{purpose}")

    def select(self, rows: Tensor) -> Draws:
        """Return the draws of some of the samples."""
        return Draws(self._seed, self._index[rows], self._name)


Rule = Callable[[Cloud, int, Draws], Cloud]


def _thresholds(keys: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, 1) the ``k``-th smallest of each row, and (B,) whether the next one is larger."""
    n = keys.shape[1]
    at = np.maximum(k, 1) - 1
    if (at == at[0]).all():  # numpy sorts rows forty times as fast as torch, and cuts them faster still
        cut = np.partition(keys, at[0], axis=1)
        least, rest = cut[:, at[0] : at[0] + 1], cut[:, at[0] + 1 :]
        return least, rest.min(1) > least[:, 0] if rest.shape[1] else np.ones(len(keys), bool)
    ordered = np.sort(keys, axis=1)
    least, after = (np.take_along_axis(ordered, i[:, None], 1) for i in (at, np.minimum(at + 1, n - 1)))
    return least, (after > least)[:, 0] | (at + 1 == n)


def _smallest(keys: Tensor, k: Tensor) -> Tensor:
    """Return (B, N) bool, True at the ``k`` (B,) smallest of each row of float or integer keys; of equals, the first.

    A threshold found by partition takes a quarter of the time of a sort. Rows in which the threshold is not unique (a
    collision of random keys, points that coincide) are sorted after all.
    """
    if keys.numel() == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    if keys.device.type == "cpu":
        least, clear = _thresholds(keys.numpy(), k.numpy())
        chosen, off = torch.from_numpy(keys.numpy() <= least), torch.from_numpy(np.nonzero(~clear)[0])
    else:
        chosen = keys <= keys.sort(1).values.gather(1, (k - 1).clamp_min(0)[:, None])
        off = (chosen.sum(1) != k).nonzero()[:, 0]
    if len(off):
        order = keys[off].argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order)
        )
        chosen[off] = place < k[off, None]
    return chosen if bool((k > 0).all()) else chosen & (k > 0)[:, None]


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 where ``mask`` is True, 0 elsewhere; numpy widens booleans five times as fast as torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().astype({torch.int32: np.int32}.get(dtype, np.float32)))
    return mask.to(dtype)


def some(cloud: Cloud, k: Tensor, streams: SampleStreams) -> Tensor:
    """Return (B, N) bool, exactly ``k`` (B,) of each cloud's points, drawn without replacement."""
    keys = streams.words32((cloud.mask.shape[1],))
    if not cloud.whole:  # the largest number where no point is, the smallest elsewhere, by going over the end
        least = _as_numbers(cloud.mask, torch.int32).add_(torch.iinfo(torch.int32).max)
        keys = torch.maximum(keys, least)
    chosen = _smallest(keys, k.clamp(max=cloud.counts))
    return chosen if cloud.whole else chosen & cloud.mask


def pick(cloud: Cloud, u: Tensor) -> Tensor:
    """Return (B, M) positions of the points with ranks ``floor(u * count)``, u (B, M) in (0, 1); 0 if empty."""
    counts = cloud.counts
    rank = (u * counts[:, None]).to(torch.int64).clamp(max=(counts[:, None] - 1).clamp_min(0))
    if cloud.whole:
        return rank
    below = cloud.mask.cumsum(1, dtype=torch.int32)
    at = torch.searchsorted(below, (rank + 1).to(torch.int32))
    return at.clamp(max=max(cloud.mask.shape[1] - 1, 0))


def _squares(planes: Tensor, centre: Tensor | None = None) -> Tensor:
    """Return (B, N) squared distances of planes (B, 3, N) to ``centre`` (B, 3), or to 0; a sum over three is slow."""
    total = None
    for i in range(3):
        part = planes[:, i] if centre is None else planes[:, i] - centre[:, i, None]
        total = part * part if total is None else total.addcmul_(part, part)
    return cast("Tensor", total)


def nearest(cloud: Cloud, centre: Tensor, k: Tensor) -> Tensor:
    """Return (B, N) bool, the ``k`` (B,) points of each cloud that are nearest to ``centre`` (B, 3)."""
    distance = _squares(cloud.planes, centre)
    if not cloud.whole:
        far = _as_numbers(cloud.mask, distance.dtype).reciprocal_().sub_(1)  # 0, or infinity: choosing takes ten times
        distance.add_(far)
    chosen = _smallest(distance, k.clamp(max=cloud.counts))
    return chosen if cloud.whole else chosen & cloud.mask


def ranks(group: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of each point in its group by ``key``, and the size of its group, both (B, N) int64.

    Args:
        group: (B, N) int64, at least 0.
        key: (B, N) int32 or non-negative float32 (whose bits are ordered as its values).
    """
    b, n = group.shape
    bits = (key.contiguous().view(torch.int32) if key.is_floating_point() else key).to(torch.int64)
    n_groups = int(group.max()) + 1 if group.numel() else 1
    owner = (torch.arange(b, device=group.device)[:, None] * n_groups + group).reshape(-1)
    order = ((owner << 32) + (bits - torch.iinfo(torch.int32).min).reshape(-1)).argsort(stable=True)
    sizes = torch.bincount(owner, minlength=b * n_groups)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(b * n, device=group.device) - first[owner[order]]
    return rank.reshape(b, n), sizes[owner].reshape(b, n)


def append(cloud: Cloud, xyz: Tensor, present: Tensor | None = None, rest: Tensor | None = None) -> Cloud:
    """Return the clouds with points (B, M, 3) added; ``present`` (B, M) says which; ``rest`` is 0 when None."""
    b, m = xyz.shape[:2]
    if rest is None:
        rest = cloud.rest.new_zeros(b, m, cloud.rest.shape[2])
    new = torch.ones(b, m, dtype=torch.bool, device=xyz.device) if present is None else present
    return replace(
        cloud,
        xyz=torch.cat([cloud.xyz, xyz.to(cloud.xyz.dtype)], 1),
        rest=torch.cat([cloud.rest, rest], 1),
        mask=torch.cat([cloud.mask, new], 1),
        whole=cloud.whole and present is None,
    )


def rotation(angles: Tensor) -> Tensor:
    """Return (B, 3, 3) matrices ``Rx, Ry, Rz`` of angles (B, 3), multiplied as ``Rz Ry Rx``."""
    cos, sin = angles.cos(), angles.sin()
    one, zero = torch.ones_like(cos[:, 0]), torch.zeros_like(cos[:, 0])

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, -1).reshape(-1, 3, 3)

    (cx, cy, cz), (sx, sy, sz) = cos.unbind(1), sin.unbind(1)
    rx = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    ry = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    rz = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return rz @ ry @ rx


def transformed(cloud: Cloud, matrix: Tensor) -> Cloud:
    """Return the clouds with rows ``p M`` for matrices (B, 3, 3); written out, so that no batch size changes a bit."""
    m = matrix.to(cloud.xyz.dtype)[..., None]  # (B, 3, 3, 1)
    x, y, z = (cloud.planes[:, i : i + 1] for i in range(3))
    return cloud.in_planes((x * m[:, 0]).addcmul_(y, m[:, 1]).addcmul_(z, m[:, 2]))


def unit_sphere(cloud: Cloud) -> Cloud:
    """Return the clouds moved to their centroid and scaled to a greatest distance of 1 from it."""
    if cloud.mask.shape[1] == 0:
        return cloud
    planes, there = cloud.planes, cloud.mask[:, None]
    if cloud.whole:
        planes = planes - planes.mean(-1, keepdim=True)
    else:
        total = torch.where(there, planes, 0).sum(-1, keepdim=True)
        planes = planes - total / cloud.counts.clamp_min(1)[:, None, None]
    far = _squares(planes)[:, None]
    if not cloud.whole:
        far = torch.where(there, far, 0)
    return cloud.in_planes(planes.div_(far.amax(-1, keepdim=True).sqrt_().clamp_min_(1e-12)))


def unit_box(cloud: Cloud) -> Cloud:
    """Return the clouds with their bounding box centred at 0 and its longest side scaled to 2."""
    if cloud.mask.shape[1] == 0:
        return cloud
    planes, there = cloud.planes, cloud.mask[:, None]
    if cloud.whole:
        low, high = planes.amin(-1, keepdim=True), planes.amax(-1, keepdim=True)
    else:
        low = torch.where(there, planes, torch.inf).amin(-1, keepdim=True)
        high = torch.where(there, planes, -torch.inf).amax(-1, keepdim=True)
        empty = (cloud.counts == 0)[:, None, None]
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    side = (high - low).amax(1, keepdim=True).clamp_min_(1e-12)
    return cloud.in_planes((planes - (low + high) / 2).mul_(2 / side))


def signs(cloud: Cloud, streams: SampleStreams) -> Tensor:
    """Return (B, 3, N) draws from {-1, +1}."""
    words = streams.words32((cloud.mask.shape[1],))
    bits = torch.stack([(words >> i) & 1 for i in (8, 16, 24)], 1)
    return bits.to(cloud.xyz.dtype).mul_(2).sub_(1)
