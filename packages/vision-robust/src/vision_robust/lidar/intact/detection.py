"""Detection as a task of perception: what a map of heat and boxes is worth, and frames as columns of training.

Heat is trained by the focal loss of centres (Law and Deng 2018, arXiv 1808.01244, equation 1, α = 2, β = 4), boxes by
the absolute error at the cell of each centre. An attacker, and saliency, climb what is below the focal loss and does
not fade on sure answers: the logit of each box's own centre, and the error of its box.

A detector of your own brings its loss with it (:class:`OwnDetection`); :func:`detection_of` finds out which it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.training import Batch
from vision_robust.lidar.boxes import points_in_boxes
from vision_robust.lidar.intact.tasks import Perception
from vision_robust.lidar.models.pillars import PillarDetector
from vision_robust.lidar.types import Clouds, Frame

__all__ = ["Detection", "OwnDetection", "columns_of", "detection_of"]


def columns_of(frames: Sequence[Frame], *, margin: float = 1.0, channels: int = 4) -> dict[str, Tensor]:
    """Return frames as columns of equal size.

    ``x`` (S, N, channels), ``mask`` (S, N), ``boxes`` (S, K, 7), ``y`` (S, K) labels or -1 where a frame has fewer
    boxes or one to be ignored, ``owner`` (S, N) the box that a point lies in and ``region`` (S, N) the one within
    ``margin`` metres, -1 for none.

    Raises:
        ValueError: no frame, or none with a point.
    """
    if not any(len(frame.points) for frame in frames):
        raise ValueError(f"frames holds {len(frames)} frames and no point; at least one is needed")
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


class OwnDetection:
    """Detection by any network that brings its own loss.

    ``model(points (B, N, C), mask (B, N))`` returns whatever it likes; ``model.loss(outputs, boxes (B, K, 7), labels
    (B, K))`` returns (B,) losses, labels being -1 where there is no box. It may also have ``gap(outputs, boxes,
    labels)``, what an attacker and saliency climb, where the loss fades on sure answers; and ``distance(student,
    teacher, temperature)`` between two outputs, (B,) each. Without them the loss is climbed, and the distance is the
    mean squared difference, summed over the tensors of the outputs. All three read outputs, never weights: a student's
    methods judge its teacher, too.

    Args:
        detector: the network.

    Raises:
        TypeError: it has no loss.
    """

    def __init__(self, detector: nn.Module) -> None:
        if not callable(getattr(detector, "loss", None)):
            raise TypeError(
                f"{type(detector).__name__} has no loss(outputs, boxes (B, K, 7), labels (B, K)) -> (B,), outputs as "
                "of forward(points, mask); without one a detector can be neither trained nor asked which points matter"
            )
        self._detector: tuple[Any] = (detector,)  # in a tuple: its weights are no state of the task

    def _called(self, name: str, outputs: Any, *arguments: Any) -> Tensor:
        value = getattr(self._detector[0], name)(outputs, *arguments)
        if not isinstance(value, Tensor) or value.ndim != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{type(self._detector[0]).__name__}.{name}() returns {got}; (B,) is needed, one a cloud")
        return value

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the detector's own losses."""
        return self._called("loss", outputs, batch["boxes"], batch["y"])

    def gap(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the detector's own gap, or its loss."""
        name = "gap" if callable(getattr(self._detector[0], "gap", None)) else "loss"
        return self._called(name, outputs, batch["boxes"], batch["y"])

    def distance(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Return the detector's own distance, or the mean squared difference of all tensors of the outputs."""
        if callable(getattr(self._detector[0], "distance", None)):
            return self._called("distance", student, teacher, temperature)
        a, b = list(_tensors(student)), list(_tensors(teacher))
        if not a or [t.shape for t in a] != [t.shape for t in b]:
            raise TypeError(
                f"student and teacher ({type(self._detector[0]).__name__}) answer in different forms; give it a "
                "distance(student, teacher, temperature) -> (B,), or leave distillation out (kappa=0)"
            )
        return torch.stack([(p - q.detach()).square().flatten(1).mean(1) for p, q in zip(a, b, strict=True)]).sum(0)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors (B, ...) of nested outputs, in their order."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.ndim:
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)


def detection_of(model: nn.Module) -> Perception:
    """Return the task of a detector: :class:`Detection` of the bundled one, :class:`OwnDetection` of any other.

    Raises:
        TypeError: it brings no loss.
    """
    return Detection(model) if isinstance(model, PillarDetector) else OwnDetection(model)
