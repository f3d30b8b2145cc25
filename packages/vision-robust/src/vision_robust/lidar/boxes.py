"""Rotated boxes in batched tensors: overlap in bird's-eye view and in space, generalised overlap, points inside, NMS.

Buys: what detectors and trackers of point clouds need, without a compiled operator, on any device, differentiable
almost everywhere, and no Python loop over boxes. All shapes broadcast: ``paired_iou`` takes any leading shape, and
:func:`iou` is the matrix of all pairs.

The overlap of two rotated rectangles A and B is exact and needs neither sorting by angle nor tolerances. In B's own
axes B is ``[-l/2, l/2] x [-w/2, w/2]``. Clamping each coordinate sends a point to the nearest point of B; it leaves
B's inside alone, moves what is outside along segments that never meet that inside, and so keeps the winding number of
A's border about every point inside B. The area that the clamped border encloses is therefore the area of A and B.
Between the four parameters at which an edge crosses B's lines the clamped edge is straight, so that six points an edge
and the shoelace formula are enough. Everything is continuous in the boxes: degenerate cases are not special.

Sources: generalised IoU: Rezatofighi and others 2019, 1902.09630, with the hull in bird's-eye view times the joint
height as the enclosing body (Weng and others 2020, 2008.08063). The clamping argument is derived above.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_finite, check_number
from vision_robust.lidar.types import check_boxes

__all__ = [
    "bev_corners",
    "bev_intersection",
    "box_corners",
    "iou",
    "nms",
    "paired_iou",
    "points_in_boxes",
    "wrap_angle",
]

_PAIRS_AT_ONCE = 1 << 15
_TRIPLES = [(i, k, j) for i, k, j in itertools.combinations(range(8), 3)]


def wrap_angle(angle: Tensor) -> Tensor:
    """Return angles in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def bev_corners(boxes: Tensor) -> Tensor:
    """Return (..., 4, 2) corners of boxes (..., 7) seen from above, counter-clockwise from the front left."""
    half = boxes[..., None, 3:5] / 2
    local = half * half.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    x, y = local.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1) + boxes[..., None, :2]


def box_corners(boxes: Tensor) -> Tensor:
    """Return (..., 8, 3) corners of boxes (..., 7): the four below, then the four above."""
    flat = bev_corners(boxes)
    low, high = boxes[..., 2] - boxes[..., 5] / 2, boxes[..., 2] + boxes[..., 5] / 2
    levels = [torch.cat([flat, z[..., None, None].expand(*flat.shape[:-1], 1)], -1) for z in (low, high)]
    return torch.cat(levels, -2)


def points_in_boxes(points: Tensor, boxes: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return (..., N, K) whether each of the points (..., N, 3+) is in each of the boxes (..., K, 7), border included.

    Args:
        points: any number of points; columns after the third are not read.
        boxes: boxes.
        margin: metres by which every side is moved outwards.
    """
    shift = points[..., :, None, :3] - boxes[..., None, :, :3]
    cos, sin = boxes[..., None, :, 6].cos(), boxes[..., None, :, 6].sin()
    x = shift[..., 0] * cos + shift[..., 1] * sin
    y = shift[..., 1] * cos - shift[..., 0] * sin
    half = boxes[..., None, :, 3:6] / 2 + margin
    return (x.abs() <= half[..., 0]) & (y.abs() <= half[..., 1]) & (shift[..., 2].abs() <= half[..., 2])


def bev_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return (...) areas common to rectangles ``a`` and ``b`` (..., 7), pair by pair, seen from above."""
    shift = a[..., :2] - b[..., :2]
    cos, sin = b[..., 6].cos(), b[..., 6].sin()
    centre = torch.stack([shift[..., 0] * cos + shift[..., 1] * sin, shift[..., 1] * cos - shift[..., 0] * sin], -1)
    turn = a[..., 6] - b[..., 6]
    axis = torch.stack([turn.cos(), turn.sin()], -1)
    along, across = axis * a[..., 3:4] / 2, torch.stack([-axis[..., 1], axis[..., 0]], -1) * a[..., 4:5] / 2
    start = torch.stack([along + across, across - along, -along - across, along - across], -2) + centre[..., None, :]
    step = torch.stack([-2 * along, -2 * across, 2 * along, 2 * across], -2)  # (..., 4, 2) edges, counter-clockwise
    half = b[..., None, 3:5] / 2
    still = step == 0  # an edge along an axis never crosses its lines: any parameter will do
    slope = torch.where(still, torch.ones_like(step), step)
    crossings = torch.cat([(-half - start) / slope, (half - start) / slope], -1).clamp(0, 1)
    t = crossings.sort(-1).values
    t = torch.cat([torch.zeros_like(t[..., :1]), t, torch.ones_like(t[..., :1])], -1)  # (..., 4, 6)
    path = start[..., None, :] + t[..., None] * step[..., None, :]
    limit = half[..., None, :]
    x, y = torch.minimum(torch.maximum(path, -limit), limit).unbind(-1)
    twice = (x[..., :-1] * y[..., 1:] - x[..., 1:] * y[..., :-1]).sum((-1, -2))
    return (twice / 2).clamp_min(0)


def _hull_area(a: Tensor, b: Tensor) -> Tensor:
    """Return (...) areas of the convex hulls of pairs of rectangles, seen from above.

    Over the sorted abscissas of the eight corners, the hull's upper border at one is the greatest of the chords between
    a corner to its left and one to its right; it is straight in between. Ties need no care.
    """
    origin = torch.cat([a[..., :2], a.new_zeros(*a.shape[:-1], 5)], -1)
    corners = torch.cat([bev_corners(a - origin), bev_corners(b - origin)], -2)
    x, order = corners[..., 0].sort(-1)
    y = corners[..., 1].gather(-1, order)
    left, middle, right = (torch.tensor(c, device=x.device) for c in zip(*_TRIPLES, strict=True))
    width = x[..., right] - x[..., left]
    share = torch.where(width > 0, (x[..., middle] - x[..., left]) / width.clamp_min(1e-30), torch.zeros_like(width))
    chords = y[..., left] + share * (y[..., right] - y[..., left])
    index = middle.expand(chords.shape)
    upper = y.scatter_reduce(-1, index, chords, "amax")
    lower = y.scatter_reduce(-1, index, chords, "amin")
    gap = upper - lower
    return ((gap[..., 1:] + gap[..., :-1]) * (x[..., 1:] - x[..., :-1])).sum(-1) / 2


def _of_one_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of boxes (..., 7) of one dtype, each pair shrunk by the power of two that brings its sizes below 1.

    Overlaps stay the same (parallel boxes: to the last bit or so), and volumes of vast boxes do not overflow.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    largest = torch.maximum(a[..., 3:6].amax(-1), b[..., 3:6].amax(-1)).detach()
    part, power = torch.frexp(largest)
    shrink = torch.where(power > 0, part / largest, 1)[..., None]  # a quotient is exact, ldexp's power is not
    return torch.cat([a[..., :6] * shrink, a[..., 6:]], -1), torch.cat([b[..., :6] * shrink, b[..., 6:]], -1)


def paired_iou(a: Tensor, b: Tensor, *, kind: str = "3d") -> Tensor:
    """Return (...) overlaps of boxes ``a`` and ``b`` (..., 7), pair by pair.

    Args:
        a: boxes.
        b: boxes; leading shapes broadcast.
        kind: ``"3d"`` intersection over union of volumes, ``"bev"`` of areas seen from above, ``"giou"`` generalised
            in space, in [-1, 1]: negative for boxes apart, the more the farther.
    """
    check_choice("kind", kind, ("3d", "bev", "giou"))
    a, b = _of_one_size(*torch.broadcast_tensors(a, b))
    area_a, area_b = a[..., 3] * a[..., 4], b[..., 3] * b[..., 4]
    common = torch.minimum(bev_intersection(a, b), torch.minimum(area_a, area_b))
    tiny = torch.finfo(a.dtype).tiny
    if kind == "bev":
        return common / (area_a + area_b - common).clamp_min(tiny)
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    common = common * (top - bottom).clamp_min(0)
    union = area_a * a[..., 5] + area_b * b[..., 5] - common
    overlap = common / union.clamp_min(tiny)
    if kind == "3d":
        return overlap
    roof = torch.maximum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    floor = torch.minimum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    body = torch.maximum(_hull_area(a, b) * (roof - floor), union).clamp_min(tiny)
    return overlap - (body - union) / body


def iou(a: Tensor, b: Tensor, *, kind: str = "3d") -> Tensor:
    """Return (N, M) overlaps of every box of ``a`` (N, 7) with every box of ``b`` (M, 7); see :func:`paired_iou`.

    Only pairs whose circumscribed circles meet are worked on, unless ``kind`` is ``"giou"``.
    """
    check_choice("kind", kind, ("3d", "bev", "giou"))
    check_boxes(a, name="a")
    check_boxes(b, name="b")
    out = a.new_zeros(len(a), len(b), dtype=torch.promote_types(a.dtype, b.dtype))
    if kind == "giou":
        rows, columns = (i.reshape(-1) for i in torch.meshgrid(
            torch.arange(len(a), device=a.device), torch.arange(len(b), device=a.device), indexing="ij"))  # fmt: skip
    else:
        reach = a[:, None, 3:5].norm(dim=-1) / 2 + b[None, :, 3:5].norm(dim=-1) / 2
        rows, columns = ((a[:, None, :2] - b[None, :, :2]).square().sum(-1) <= reach.square()).nonzero(as_tuple=True)
    for i, j in zip(rows.split(_PAIRS_AT_ONCE), columns.split(_PAIRS_AT_ONCE), strict=True):
        out[i, j] = paired_iou(a[i], b[j], kind=kind)
    return out


def nms(
    boxes: Tensor, scores: Tensor, threshold: float = 0.1, *, labels: Tensor | None = None, kind: str = "bev"
) -> Tensor:
    """Return the positions of the boxes that greedy non-maximum suppression keeps, best first.

    Greedy suppression is the only fixed point of "kept = overlaps no kept box of a higher score", which is reached from
    any start in as many rounds as the longest chain of suppressions: a loop over that depth, not over boxes.

    Args:
        boxes: (N, 7).
        scores: (N,); of equal scores the first stands first.
        threshold: a box goes if it overlaps a better one by more than this.
        labels: (N,) boxes of different labels leave each other alone; None: one label.
        kind: ``"bev"`` or ``"3d"``.
    """
    check_number("threshold", threshold, low=0, high=1)
    check_boxes(boxes)
    if scores.shape != (len(boxes),):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; ({len(boxes)},) is needed, one for each box")
    check_finite("scores", scores)
    if labels is not None and labels.shape != scores.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; ({len(boxes)},) is needed, one for each box")
    order = scores.argsort(descending=True, stable=True)
    chosen = boxes[order].detach()
    beats = (iou(chosen, chosen, kind=kind) > threshold).triu(1)
    if labels is not None:
        beats &= labels[order][:, None] == labels[order][None, :]
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        after = ~(beats & kept[:, None]).any(0)
        if torch.equal(after, kept):
            return order[kept]
        kept = after
