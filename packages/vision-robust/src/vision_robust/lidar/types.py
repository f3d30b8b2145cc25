"""What loaders give, corruptions change and models read: frames, batches of clouds, detections.

Conventions, the same everywhere: metres and radians; x forward, y left, z up, in the frame of the sensor (Argoverse 2:
of the vehicle); a box is ``x, y, z, l, w, h, yaw`` with its *centre*, its length along its own x axis, and yaw about +z
from +x. Points are ``x, y, z, intensity, ...``, float32; shapes without intensity have three columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from robust_core.checks import check_finite

__all__ = ["Clouds", "Detections", "Frame", "check_boxes", "check_cloud", "positions"]

_UNSET = cast("Tensor", None)
"""A default that depends on the other fields: replaced on construction, so that no reader meets None."""


def check_cloud(points: Tensor, *, name: str = "points") -> Tensor:
    """Return ``points`` if it is (N, 3 or more), floating point and finite; N may be 0.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        what = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{name} is {what}; a floating-point tensor (N, 3 or more) is needed")
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; (N, 3 or more) is needed: x, y, z, intensity, ...")
    return check_finite(name, points)


def check_boxes(boxes: Tensor, *, name: str = "boxes") -> Tensor:
    """Return ``boxes`` if it is (K, 7), floating point, finite, with no negative size; K may be 0.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        what = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} is {what}; a floating-point tensor (K, 7) is needed")
    if boxes.ndim != 2 or boxes.shape[1] != 7:
        raise ValueError(f"{name} has shape {tuple(boxes.shape)}; (K, 7) is needed: x, y, z, l, w, h, yaw")
    check_finite(name, boxes)
    if boxes.numel() and bool((boxes[:, 3:6] < 0).any()):
        raise ValueError(f"{name} holds a negative length, width or height")
    return boxes


def positions(chosen: Tensor, most: int) -> Tensor:
    """Return (B, most) positions of the chosen points (B, N) of each cloud in their order, filled up with 0."""
    rows, columns = chosen.nonzero(as_tuple=True)
    if len(columns) == len(chosen) * most:  # none is to be filled up
        return columns.reshape(len(chosen), most)
    counts = chosen.sum(1)
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    out = rows.new_zeros(len(chosen), most)
    out[rows, rank] = columns
    return out


def _empty_boxes() -> Tensor:
    return torch.zeros(0, 7)


@dataclass(frozen=True, eq=False)
class Frame:
    """One sweep of a sensor, and what was annotated in it.

    Attributes:
        points: (N, 4+) float32.
        boxes: (K, 7) float32.
        labels: (K,) int64 positions in ``classes``.
        track_ids: (K,) int64, the same for one object over a sequence; -1 where unknown.
        ignore: (K,) bool, boxes that are neither missed when not found nor wrong when found.
        fields: what else is known of each box, each (K, ...), e.g. ``difficulty``, ``n_points``.
        classes: names of the classes.
        calib: matrices as the data set names them, float64.
        pose: (4, 4) float64, from this frame to one that does not move; the identity where unknown.
        time_s: seconds since the start of the sequence.
        token: name of the frame, unique in its data set.
    """

    points: Tensor
    boxes: Tensor = field(default_factory=_empty_boxes)
    labels: Tensor = _UNSET
    track_ids: Tensor = _UNSET
    ignore: Tensor = _UNSET
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    classes: Sequence[str] = ()
    calib: Mapping[str, Tensor] = field(default_factory=dict)
    pose: Tensor = _UNSET
    time_s: float = 0.0
    token: str = ""

    def __post_init__(self) -> None:
        check_cloud(self.points)
        check_boxes(self.boxes)
        k, device = len(self.boxes), self.boxes.device
        if self.labels is _UNSET:
            if k:
                raise ValueError(f"labels is None; {k} boxes need (K,) int64 labels")
            object.__setattr__(self, "labels", torch.zeros(0, dtype=torch.int64, device=device))
        if self.track_ids is _UNSET:
            object.__setattr__(self, "track_ids", torch.full((k,), -1, dtype=torch.int64, device=device))
        if self.ignore is _UNSET:
            object.__setattr__(self, "ignore", torch.zeros(k, dtype=torch.bool, device=device))
        if self.pose is _UNSET:
            object.__setattr__(self, "pose", torch.eye(4, dtype=torch.float64))
        for name in ("labels", "track_ids", "ignore"):
            if (value := getattr(self, name)).shape != (k,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; ({k},) is needed, one for each box")
        for name, value in self.fields.items():
            if len(value) != k:
                raise ValueError(f"fields[{name!r}] has {len(value)} rows for {k} boxes")

    def select(self, boxes: Tensor) -> Frame:
        """Return the frame with some of its boxes (an index or boolean tensor), and all of its points."""
        kept = {name: getattr(self, name)[boxes] for name in ("boxes", "labels", "track_ids", "ignore")}
        return replace(self, **kept, fields={name: value[boxes] for name, value in self.fields.items()})

    def with_points(self, points: Tensor) -> Frame:
        """Return the frame with other points, for instance corrupted ones."""
        return replace(self, points=points)

    def to(self, device: torch.device | str) -> Frame:
        """Return the frame on a device; calibration and pose stay where they are."""
        moved = {n: getattr(self, n).to(device) for n in ("points", "boxes", "labels", "track_ids", "ignore")}
        return replace(self, **moved, fields={name: value.to(device) for name, value in self.fields.items()})


@dataclass(frozen=True, eq=False)
class Clouds:
    """A batch of clouds of different sizes: what stands where ``mask`` is False means nothing.

    Attributes:
        points: (B, N, C).
        mask: (B, N) bool, which points there are.
    """

    points: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[2] < 3:
            raise ValueError(f"points has shape {tuple(self.points.shape)}; (B, N, 3 or more) is needed")
        if self.mask.shape != self.points.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}; bool {tuple(self.points.shape[:2])} is needed"
            )

    @staticmethod
    def of(clouds: Iterable[Tensor]) -> Clouds:
        """Return clouds (N_i, C) as one batch, filled up with zeros."""
        clouds = list(clouds)
        if not clouds:
            raise ValueError("clouds is empty; at least one cloud (N, C) is needed")
        columns = {cloud.shape[1] if cloud.ndim == 2 else None for cloud in clouds}
        if len(columns) > 1 or None in columns:
            raise ValueError(f"clouds have {sorted(map(str, columns))} columns; all need (N, C) with the same C")
        points = torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True)
        counts = torch.tensor([len(cloud) for cloud in clouds], device=points.device)
        return Clouds(points, torch.arange(points.shape[1], device=points.device) < counts[:, None])

    @staticmethod
    def full(points: Tensor) -> Clouds:
        """Return (B, N, C) points that are all there."""
        return Clouds(points, torch.ones(points.shape[:2], dtype=torch.bool, device=points.device))

    @property
    def counts(self) -> Tensor:
        """(B,) number of points of each cloud."""
        return self.mask.sum(1)

    def __len__(self) -> int:
        return len(self.points)

    def compact(self) -> Clouds:
        """Return the batch with the points of each cloud first, in their order, as short as the longest cloud."""
        counts = self.counts
        longest = int(counts.max()) if len(self) else 0
        if bool(self.mask[:, :longest].sum() == counts.sum()):
            return Clouds(self.points[:, :longest], self.mask[:, :longest])
        order = positions(self.mask, longest)
        points = self.points.gather(1, order[..., None].expand(-1, -1, self.points.shape[2]))
        mask = torch.arange(longest, device=points.device) < counts[:, None]
        return Clouds(torch.where(mask[..., None], points, 0), mask)

    def split(self) -> list[Tensor]:
        """Return the clouds one by one, each (N_i, C)."""
        return [points[mask] for points, mask in zip(self.points, self.mask, strict=True)]


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector or tracker says of one frame.

    Attributes:
        boxes: (M, 7) float32.
        labels: (M,) int64 positions in the classes of the data.
        scores: (M,) higher means surer.
        track_ids: (M,) int64; -1 without a tracker.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    track_ids: Tensor = _UNSET

    def __post_init__(self) -> None:
        check_boxes(self.boxes)
        m = len(self.boxes)
        if self.track_ids is _UNSET:
            object.__setattr__(self, "track_ids", torch.full((m,), -1, dtype=torch.int64, device=self.boxes.device))
        for name in ("labels", "scores", "track_ids"):
            if (value := getattr(self, name)).shape != (m,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; ({m},) is needed, one for each box")
        check_finite("scores", self.scores)

    def select(self, rows: Tensor) -> Detections:
        """Return some of the detections (an index or boolean tensor)."""
        return Detections(self.boxes[rows], self.labels[rows], self.scores[rows], self.track_ids[rows])
