"""Corruptions of point clouds at five severities, vectorised: three registries under one name space.

Buys: ModelNet-C, ModelNet40-C and KITTI-C style corruptions of the user's own clouds, as tensors or numpy arrays, on
any device, fast and repeatable. Each cloud's randomness belongs to the cloud: the result is a function of (cloud, seed,
index, corruption, severity), whatever the batch, its padding or its order. Nothing is changed in place, only
coordinates are disturbed (weather also weakens the intensity that decides what is seen), the dtype stays, and a cloud
may be empty.

>>> import torch
>>> from vision_robust.lidar.corruptions import corrupt, corrupt_batch, corruptions
>>> sweep = torch.rand(2000, 4) * 40
>>> corrupt(sweep, "kitti-c/gaussian", 3, generator=0).shape
torch.Size([2000, 4])
>>> corrupt_batch(torch.rand(8, 1024, 3), "modelnet-c/drop_global", 5).compact().points.shape
torch.Size([8, 256, 3])
>>> corruptions("modelnet-c")[:2]
('modelnet-c/scale', 'modelnet-c/jitter')

Sources and constants stand in ``shapes`` (ModelNet-C), ``shapes40`` (ModelNet40-C), ``driving`` and ``weather``
(KITTI-C style). Traps of the public files that are not repeated: noise on every column, edits in place, global seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_finite
from robust_core.random import Seed, resolve_seed
from vision_robust.lidar.corruptions.cloud import Cloud, Draws, Rule
from vision_robust.lidar.corruptions.driving import KITTI_C, OBJECT
from vision_robust.lidar.corruptions.shapes import MODELNET_C
from vision_robust.lidar.corruptions.shapes40 import MODELNET40_C
from vision_robust.lidar.corruptions.weather import WEATHER
from vision_robust.lidar.types import Clouds, Frame, check_boxes, check_cloud

__all__ = ["REGISTRIES", "corrupt", "corrupt_batch", "corrupt_frame", "corruptions"]

REGISTRIES = ("modelnet-c", "modelnet40-c", "kitti-c", "kitti-c-object")
"""``kitti-c-object`` are the corruptions inside boxes; the names begin with ``kitti-c/``, as the others of KITTI-C."""

_FAMILIES: dict[str, tuple[str, dict[str, Rule]]] = {
    "modelnet-c": ("modelnet-c", MODELNET_C),
    "modelnet40-c": ("modelnet40-c", MODELNET40_C),
    "kitti-c": ("kitti-c", KITTI_C | WEATHER),
    "kitti-c-object": ("kitti-c", OBJECT),
}
_RULES = {f"{prefix}/{name}": rule for prefix, rules in _FAMILIES.values() for name, rule in rules.items()}
_POINTS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Points that are worked on together: what fits the caches, or fills the device."""

Points = TypeVar("Points", Tensor, np.ndarray)


def corruptions(registry: str | None = None) -> tuple[str, ...]:
    """Return the names of all corruptions, or of those of one of :data:`REGISTRIES`."""
    if registry is None:
        return tuple(_RULES)
    check_choice("registry", registry, REGISTRIES)
    prefix, rules = _FAMILIES[registry]
    return tuple(f"{prefix}/{name}" for name in rules)


def corrupt(
    points: Points,
    name: str,
    severity: int,
    *,
    boxes: Tensor | np.ndarray | None = None,
    index: int = 0,
    generator: Seed = None,
) -> Points:
    """Return one corrupted cloud (M, C), of the kind (tensor or array) and dtype of ``points``.

    Args:
        points: (N, 3+) coordinates and further columns: shapes in the unit sphere, sweeps in metres.
        name: one of :func:`corruptions`.
        severity: 1 .. 5.
        boxes: (K, 7), for corruptions of objects.
        index: position of the cloud in its data; it picks the random stream.
        generator: seed of the run.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    if isinstance(points, np.ndarray):
        there = None if boxes is None else torch.from_numpy(np.array(boxes))
        tensor = torch.from_numpy(np.array(points))
        return corrupt(tensor, name, severity, boxes=there, index=index, generator=generator).numpy()
    check_cloud(points)
    if isinstance(boxes, np.ndarray):
        boxes = torch.from_numpy(boxes)
    where = torch.tensor([check_count("index", index, low=0)], device=points.device)
    found = corrupt_batch(
        points[None], name, severity, boxes=None if boxes is None else [boxes], index=where, generator=generator
    )
    return found.points[0][found.mask[0]]


def corrupt_frame(frame: Frame, name: str, severity: int, *, index: int = 0, generator: Seed = None) -> Frame:
    """Return the frame with its points corrupted; its boxes stay."""
    points = corrupt(frame.points, name, severity, boxes=frame.boxes, index=index, generator=generator)
    return frame.with_points(points)


def corrupt_batch(
    clouds: Clouds | Tensor,
    name: str,
    severity: int,
    *,
    boxes: Sequence[Tensor] | None = None,
    index: Tensor | None = None,
    generator: Seed = None,
) -> Clouds:
    """Return corrupted clouds; points that were dropped are still there, with ``mask`` False (see ``compact``).

    Args:
        clouds: a batch, or a tensor (B, N, 3+) whose points are all there.
        name: one of :func:`corruptions`.
        severity: 1 .. 5.
        boxes: (K_i, 7) of each cloud, for corruptions of objects.
        index: (B,) positions of the clouds in the original data; ``0 .. B - 1`` when None.
        generator: seed of the run.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    rule = _RULES[check_choice("name", name, tuple(_RULES))]
    if check_count("severity", severity) > 5:
        raise ValueError(f"severity={severity}: choose 1 .. 5")
    points, mask = _opened(clouds)
    b, n = points.shape[:2]
    if index is None:
        index = torch.arange(b, device=points.device)
    if index.shape != (b,) or index.is_floating_point():
        raise ValueError(f"index is {index.dtype} {tuple(index.shape)}; {b} integers are needed, one for each cloud")
    padded = _padded_boxes(name, boxes, points)
    seed, work = resolve_seed(generator), points.to(torch.promote_types(points.dtype, torch.float32))
    whole = mask is None
    mask = torch.ones(b, n, dtype=torch.bool, device=points.device) if mask is None else mask
    rows = max(1, _POINTS_AT_ONCE.get(points.device.type, 1 << 17) // max(n, 1))
    parts = []
    with torch.no_grad():
        for start in range(0, b, rows):
            part = slice(start, start + rows)
            draws = Draws(seed, index[part].to(points.device), f"{name}/{severity}")
            cloud = Cloud(work[part, :, :3], work[part, :, 3:], mask[part], whole, padded[part])
            parts.append(rule(cloud, severity - 1, draws))
        return _joined(parts, points)


def _opened(clouds: Clouds | Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (B, N, C) points and the mask, or None where all are there."""
    if isinstance(clouds, Clouds):
        points, mask = clouds.points, clouds.mask
    else:
        points, mask = clouds, None
    if not isinstance(points, Tensor) or not points.is_floating_point() or points.ndim != 3 or points.shape[2] < 3:
        what = f"{points.dtype} {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"clouds is {what}; floating-point clouds (B, N, 3 or more) are needed")
    if mask is None or bool(mask.all()):
        check_finite("points", points)
        return points, None
    points = torch.where(mask[..., None], points, 0)
    check_finite("points", points)
    return points, mask


def _padded_boxes(name: str, boxes: Sequence[Tensor] | None, points: Tensor) -> Tensor:
    """Return (B, K, 7) boxes, filled up with boxes of no size."""
    if name not in corruptions("kitti-c-object"):
        return points.new_zeros(len(points), 0, 7)
    if boxes is None or len(boxes) != len(points):
        got = "None" if boxes is None else f"{len(boxes)} entries"
        raise ValueError(f"boxes is {got}; {name} needs the boxes (K, 7) of each of the {len(points)} clouds")
    checked = [check_boxes(b, name=f"boxes[{i}]").to(points) for i, b in enumerate(boxes)]
    if not checked:
        return points.new_zeros(0, 0, 7)
    return torch.nn.utils.rnn.pad_sequence(checked, batch_first=True)


def _joined(parts: Sequence[Cloud], points: Tensor) -> Clouds:
    """Return the worked parts as one batch of the dtype of ``points``; parts may differ in length."""
    if not parts:
        return Clouds(points.clone(), points.new_zeros(points.shape[:2], dtype=torch.bool))
    b, longest = len(points), max(part.mask.shape[1] for part in parts)
    even = all(part.mask.shape[1] == longest for part in parts)
    make = points.new_empty if even else points.new_zeros
    out = make(b, longest, points.shape[2])
    mask = torch.zeros(b, longest, dtype=torch.bool, device=points.device)
    start = 0
    for part in parts:
        stop, n = start + part.mask.shape[0], part.mask.shape[1]
        out[start:stop, :n, :3] = part.xyz
        out[start:stop, :n, 3:] = part.rest
        mask[start:stop, :n] = part.mask
        start = stop
    return Clouds(out, mask)
