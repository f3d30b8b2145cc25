"""Average precision of boxes in space or from above, with the 40 recall positions of KITTI's benchmark since 2019.

``AP = 1/40 sum_{i = 1 .. 40} max_{r >= i/40} p(r)``: recall 0 is left out, which the older 11 positions counted, so
that one right detection was worth 1/11 (A. Simonelli and others 2019, 1905.12365). Detections are matched from the
surest on, each to the free box that it overlaps most; boxes marked ``ignore`` take what overlaps nothing else.

KITTI's own program counts otherwise, and ``sampling="kitti"`` counts as it does, for comparison with its table:
precision is sampled at 41 scores at most, whose recalls are the nearest to 0, 1/40 .. 1; above each score boxes choose
in their order, each the free detection that it overlaps most; a box to be ignored takes one detection only; what is
lower than 25 pixels in the picture (40 where ``difficulty="easy"``) is no mistake, where the frame's calibration tells.
On 40 random sets of 60 to 900 boxes the exact figures lay 0.7 points below in the mean and 1.8 at most; below 40 boxes
KITTI's cannot reach 1 at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_core.checks import check_choice, check_count, check_number, check_same_length
from vision_robust.lidar.boxes import iou
from vision_robust.lidar.kitti.frames import at_difficulty, image_boxes
from vision_robust.lidar.types import Detections, Frame

__all__ = ["IOU", "SAMPLINGS", "AveragePrecision", "average_precision", "evaluate_detections"]

SAMPLINGS = ("exact", "kitti")

IOU: Mapping[str, float] = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
"""The overlaps that KITTI asks of its classes; others are asked for 0.5."""


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision, and the curve behind it.

    Attributes:
        value: in [0, 1]; NaN without boxes to find.
        precision: (M,) after each counted detection, the surest first; with KITTI's sampling, at each sampled score.
        recall: (M,) likewise.
        scores: (M,) likewise.
        n_boxes: boxes to find.
    """

    value: float
    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    n_boxes: int


def _match(overlap: np.ndarray, ignore: np.ndarray, threshold: float) -> np.ndarray:
    """Return (M,) 1 right, 0 wrong, -1 not counted, for detections in order and overlaps (M, K)."""
    free = np.ones(overlap.shape[1], bool)
    out = np.zeros(len(overlap), np.int64)
    for i, row in enumerate(overlap):
        candidates = np.where(free & ~ignore, row, -1.0)
        best = int(candidates.argmax()) if len(candidates) else -1
        if best >= 0 and candidates[best] >= threshold:
            free[best], out[i] = False, 1
        elif bool((row[ignore] >= threshold).any()):
            out[i] = -1
    return out


@dataclass(frozen=True)
class _Scene:
    """One class in one frame: ``overlap`` (M, K), ``ignore`` (K,), and (M,) of detections, the surest first."""

    overlap: np.ndarray
    ignore: np.ndarray
    scores: np.ndarray
    low: np.ndarray

    def taken(self, free: np.ndarray, threshold: float, *, surest: bool) -> np.ndarray:
        """Return (T, K) which of the ``free`` (T, M) detections each box takes in its turn, -1 for none.

        It is the surest one that overlaps enough, or else the one that overlaps most and is not low; ``free`` loses it.
        """
        taken = np.full((len(free), len(self.ignore)), -1)
        for k, overlap in enumerate(self.overlap.T if len(self.scores) else ()):
            worth = self.scores if surest else np.where(self.low, 0.0, overlap)
            worth = np.where(free & (overlap > threshold), worth, -np.inf)
            best = worth.argmax(1)
            rows = np.flatnonzero(np.isfinite(worth.max(1)))
            taken[rows, k] = best[rows]
            free[rows, best[rows]] = False
        return taken

    def right(self, taken: np.ndarray) -> np.ndarray:
        """Return (T, K) whether the box is one to find, and what it took is not low."""
        return (taken >= 0) & ~self.ignore & ~np.append(self.low, False)[taken]


def _scene(frame: Frame, said: Detections, label: int, kind: str, least_px: float) -> _Scene:
    there, mine = frame.labels == label, said.select(said.labels == label)
    mine = mine.select(mine.scores.argsort(descending=True, stable=True))
    overlap = iou(mine.boxes, frame.boxes[there].to(mine.boxes), kind=kind).cpu().numpy()
    low = np.zeros(len(overlap), bool)
    if least_px and frame.calib:
        image, _ = image_boxes(mine.boxes.cpu(), frame.calib)
        low = (image[:, 3] - image[:, 1] < least_px).numpy()
    return _Scene(overlap, frame.ignore[there].cpu().numpy(), mine.scores.double().cpu().numpy(), low)


def average_precision(
    frames: Sequence[Frame],
    detections: Sequence[Detections],
    label: int,
    *,
    threshold: float = 0.7,
    kind: str = "3d",
    recall_positions: int = 40,
    sampling: str = "exact",
    difficulty: str | None = None,
) -> AveragePrecision:
    """Return the average precision of one class over all frames.

    Args:
        frames: what is there.
        detections: what was said of each frame.
        label: the class.
        threshold: least overlap of a right detection.
        kind: ``"3d"`` or ``"bev"``.
        recall_positions: 40, evenly spaced up to 1.
        sampling: ``"exact"``, or ``"kitti"`` as KITTI's program counts.
        difficulty: ``"easy"``, ``"moderate"`` or ``"hard"`` says which boxes of KITTI's frames are to be found; those
            that are not marked ``ignore`` when None.

    Raises:
        ValueError: lengths differ, an argument is out of range, or frames without difficulties where one is asked for.
    """
    check_same_length(frames=len(frames), detections=len(detections))
    check_choice("kind", kind, ("3d", "bev"))
    check_number("threshold", threshold, low=0, high=1, open_low=True)
    check_count("recall_positions", recall_positions)
    check_choice("sampling", sampling, SAMPLINGS)
    if difficulty is not None:
        frames = [at_difficulty(frame, difficulty) for frame in frames]
    least_px = 0 if sampling == "exact" else 40 if difficulty == "easy" else 25
    scenes = [_scene(*pair, label, kind, least_px) for pair in zip(frames, detections, strict=True)]
    n_boxes = sum(int((~scene.ignore).sum()) for scene in scenes)
    if sampling == "kitti":
        return _kitti(scenes, n_boxes, threshold, recall_positions)
    outcome = np.concatenate([np.zeros(0, np.int64), *(_match(s.overlap, s.ignore, threshold) for s in scenes)])
    score = np.concatenate([np.zeros(0), *(scene.scores for scene in scenes)])
    order = np.argsort(-score, kind="stable")
    order = order[outcome[order] >= 0]
    right = np.cumsum(outcome[order])
    precision = right / np.arange(1, len(order) + 1)
    recall = right / n_boxes if n_boxes else np.full(len(order), np.nan)
    value = _area(precision, recall, recall_positions) if n_boxes else float("nan")
    return AveragePrecision(value, precision, recall, score[order], n_boxes)


def _kitti(scenes: Sequence[_Scene], n_boxes: int, threshold: float, positions: int) -> AveragePrecision:
    """Return average precision as KITTI's program has it; position 0 is sampled, and left out of the mean."""
    found = [np.zeros(0)]
    for scene in scenes:
        taken = scene.taken(np.ones((1, len(scene.scores)), bool), threshold, surest=True)
        found.append(scene.scores[taken[scene.right(taken)]])
    bars = _sampled(-np.sort(-np.concatenate(found)), n_boxes, positions)
    right, wrong = np.zeros(len(bars)), np.zeros(len(bars))
    for scene in scenes:
        free = scene.scores >= bars[:, None]
        right += scene.right(scene.taken(free, threshold, surest=False)).sum(1)
        wrong += (free & ~scene.low).sum(1)
    precision = right / np.maximum(right + wrong, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    value = float(best[1 : positions + 1].sum() / positions) if n_boxes else float("nan")
    return AveragePrecision(value, precision, right / max(n_boxes, 1), bars, n_boxes)


def _sampled(scores: np.ndarray, n_boxes: int, positions: int) -> np.ndarray:
    """Return the scores, of right detections by falling score, whose recall is the nearest to 0, 1/positions .. 1."""
    chosen, wanted, last = [], 0.0, len(scores) - 1
    for i, score in enumerate(scores):
        if i < last and (i + 2) / n_boxes - wanted < wanted - (i + 1) / n_boxes:
            continue  # the next one is nearer
        chosen.append(score)
        wanted += 1 / positions
    return np.array(chosen)


def _area(precision: np.ndarray, recall: np.ndarray, positions: int) -> float:
    """Return the mean, over recalls 1/positions .. 1, of the best precision at that recall or beyond."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    wanted = np.arange(1, positions + 1) / positions
    at = np.searchsorted(recall, wanted - 1e-12)
    return float(np.append(best, 0.0)[at].mean())


def evaluate_detections(
    frames: Sequence[Frame],
    detections: Sequence[Detections],
    *,
    thresholds: Mapping[str, float] = IOU,
    kinds: Sequence[str] = ("3d", "bev"),
    sampling: str = "exact",
    difficulty: str | None = None,
) -> dict[str, float]:
    """Return ``ap/CLASS/KIND`` for each class that occurs, and ``map/KIND``, their mean; see :func:`average_precision`.

    Raises:
        ValueError: frames name different classes, or none; as :func:`average_precision`.
    """
    names = {frame.classes for frame in frames if frame.classes}
    if len(names) != 1:
        raise ValueError(f"frames name {len(names)} different lists of classes; one is needed")
    figures: dict[str, float] = {}
    for kind in kinds:
        values = []
        for label, name in enumerate(next(iter(names))):
            found = average_precision(
                frames, detections, label, threshold=thresholds.get(name, 0.5), kind=kind, sampling=sampling,
                difficulty=difficulty,
            )  # fmt: skip
            if found.n_boxes:
                figures[f"ap/{name}/{kind}"] = found.value
                values.append(found.value)
        figures[f"map/{kind}"] = float(np.mean(values)) if values else float("nan")
    return figures
