"""Detection as a task of perception: what a map of heat and boxes is worth, and frames as columns of training.

Heat is trained by the focal loss of centres (Law and Deng 2018, arXiv 1808.01244, equation 1, α = 2, β = 4), boxes by
the absolute error at the cell of each centre. An attacker, and saliency, climb what is below the focal loss and does
not fade on sure answers: the logit of each box's own centre, and the error of its box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_core.training import Batch
from vision_robust.lidar.boxes import points_in_boxes
from vision_robust.lidar.models.pillars import PillarDetector
from vision_robust.lidar.types import Clouds, Frame

__all__ = ["Detection", "columns_of"]


def columns_of(frames: Sequence[Frame], *, margin: float = 1.0, channels: int = 4) -> dict[str, Tensor]:
    """Return frames as columns of equal size.

    ``x`` (S, N, channels), ``mask`` (S, N), ``boxes`` (S, K, 7), ``y`` (S, K) labels or -1 where a frame has fewer
    boxes or one to be ignored, ``owner`` (S, N) the box that a point lies in and ``region`` (S, N) the one within
    ``margin`` metres, -1 for none.
    """
    if not frames:
        raise ValueError("frames is empty; at least one is needed")
    clouds = Clouds.of([frame.points[:, :channels] for frame in frames])
    k = max(1, max(len(frame.boxes) for frame in frames))
    boxes = torch.zeros(len(frames), k, 7)
    y = torch.full((len(frames), k), -1)
    for i, frame in enumerate(frames):
        boxes[i, : len(frame.boxes)] = frame.boxes
        y[i, : len(frame.boxes)] = torch.where(frame.ignore, -1, frame.labels)
    near = {name: _box_of(clouds, boxes, y >= 0, grow) for name, grow in (("owner", 0.0), ("region", margin))}
    return {"x": clouds.points, "mask": clouds.mask, "boxes": boxes, "y": y, **near}


def _box_of(clouds: Clouds, boxes: Tensor, wanted: Tensor, margin: float) -> Tensor:
    """Return (S, N) the first wanted box that holds each point, or -1; one frame at a time, for its memory."""
    found = torch.full(clouds.mask.shape, -1, dtype=torch.int16)
    for i in range(len(clouds)):
        inside = points_in_boxes(clouds.points[i], boxes[i], margin=margin) & wanted[i] & clouds.mask[i, :, None]
        found[i] = torch.where(inside.any(1), inside.int().argmax(1), -1).to(found.dtype)
    return found


class Detection:
    """``model(points, mask) -> (B, n_classes + 8, H, W)`` as of :class:`~vision_robust.lidar.models.PillarDetector`.

    Args:
        detector: tells grid, classes and how boxes are told; its weights are not used.
        box_weight: of the error of boxes beside the heat.
    """

    def __init__(self, detector: PillarDetector, *, box_weight: float = 1.0) -> None:
        self._detector = (detector,)
        self.box_weight = box_weight

    @property
    def detector(self) -> PillarDetector:
        """Who tells grid and classes."""
        return self._detector[0]

    def wanted(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return heat (B, n_classes, H, W) in [0, 1], boxes as told (B, K, 8), and flat cells (B, K), -1 for none."""
        boxes, y, detector = batch["boxes"], batch["y"], self.detector
        cell, within, inside = detector.grid.cells(boxes[..., :2])
        there = inside & (y >= 0)
        x, z = detector.grid.centres(boxes)
        sigma = (boxes[..., 3:5].amax(-1) / 6).clamp_min(detector.grid.cell)[..., None, None]
        away = (x - boxes[..., 0, None]).square()[..., None, :] + (z - boxes[..., 1, None]).square()[..., None]
        bump = torch.exp(-away / (2 * sigma.square())).masked_fill(~there[..., None, None], 0.0)
        bump = bump.flatten(2).scatter(2, cell[..., None], there[..., None].to(bump.dtype)).reshape_as(bump)
        heat = torch.stack([(bump * (y == c)[..., None, None]).amax(1) for c in range(detector.n_classes)], 1)
        size = boxes[..., 3:6].clamp_min(1e-3).log() - detector.get_buffer("log_size")
        yaw = boxes[..., 6:]
        told = torch.cat([within - 0.5, boxes[..., 2:3], size, yaw.sin(), yaw.cos()], -1)
        return heat, told, torch.where(there, cell, -1)

    def _at(self, outputs: Tensor, cell: Tensor) -> Tensor:
        """Return (B, K, n_classes + 8) outputs at cells."""
        flat = outputs.flatten(2).transpose(1, 2)
        return flat.gather(1, cell.clamp_min(0)[..., None].expand(-1, -1, flat.shape[2]))

    def _box_error(self, at: Tensor, told: Tensor, there: Tensor) -> Tensor:
        error = (at[..., self.detector.n_classes :] - told).abs().sum(-1)
        return (error * there).sum(1)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return (B,) focal loss of the heat plus error of the boxes, over the number of boxes."""
        heat, told, cell = self.wanted(batch)
        logits = outputs[:, : self.detector.n_classes]
        centre = heat == 1
        p = logits.sigmoid()
        hit = -F.logsigmoid(logits) * (1 - p).square()
        miss = -F.logsigmoid(-logits) * p.square() * (1 - heat).pow(4)
        there = cell >= 0
        n = there.sum(1).clamp_min(1)
        focal = torch.where(centre, hit, miss).flatten(1).sum(1)
        return (focal + self.box_weight * self._box_error(self._at(outputs, cell), told, there)) / n

    def gap(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return (B,) minus the logit at each box's centre, plus the error of its box, summed over boxes."""
        _, told, cell = self.wanted(batch)
        at, there = self._at(outputs, cell), cell >= 0
        own = at[..., : self.detector.n_classes].gather(2, batch["y"].clamp_min(0)[..., None])[..., 0]
        return (-own * there).sum(1) + self.box_weight * self._box_error(at, told, there)

    def distance(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return (B,) squared differences of the heat at temperature T, summed over cells, times T²."""
        k = self.detector.n_classes
        apart = (student[:, :k] / temperature).sigmoid() - (teacher[:, :k].detach() / temperature).sigmoid()
        return apart.square().flatten(1).sum(1) * temperature**2
