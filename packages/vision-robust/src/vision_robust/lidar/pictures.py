"""What a report shows of an evaluation: a few frames with boxes, tracks and saliency, or a few shapes.

The cost is bounded: the first frames of one sequence, the clean condition and the worst of some corruptions,
:data:`DRAWS` gradients for each picture. A model that lets no gradient through, or a detector without a loss, is shown
without saliency, and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.data import Dataset
from robust_core.models import model_device
from robust_core.random import derive
from robust_core.training import Batch
from vision_robust.lidar.corruptions import corrupt_batch, corrupt_frame
from vision_robust.lidar.intact import (
    Classification,
    Perception,
    TargetedPerturbation,
    columns_of,
    detection_of,
    robust_saliency,
)
from vision_robust.lidar.tracking import track_sequence, trails_of
from vision_robust.lidar.types import Clouds, Detections, Frame

__all__ = ["DRAWS", "SeenFrame", "SeenShapes", "see_frames", "see_shapes"]

DRAWS = 6
_FRAMES, _LOOKED, _SHAPES = 12, 8, 6
_IN_METRES = TargetedPerturbation(("drop", "jitter", "clutter"), sigma=0.1)
_IN_UNITS = TargetedPerturbation(("drop", "jitter", "clutter"), sigma=0.05)

How = tuple[str, int] | None
"""Corruption and severity; None: clean."""


@dataclass(frozen=True, eq=False)
class SeenFrame:
    """A frame under one condition.

    Attributes:
        name: of the condition.
        frame: points as the model got them, and true boxes.
        said: what was found, with the scores that count.
        trails: track -> its path (T, 2) so far, in the frame's coordinates.
        weights: (N,) robust saliency in [0, 1]; None where there is none.
    """

    name: str
    frame: Frame
    said: Detections
    trails: Mapping[int, np.ndarray] = field(default_factory=dict)
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SeenShapes:
    """Some shapes under one condition.

    Attributes:
        name: of the condition.
        clouds: (N_i, 3+) as the model got them.
        truth: the class of each.
        said: what the model takes each for; "nothing" where it gives no finite answer.
        weights: (N_i,) robust saliency in [0, 1] of each; None where there is none.
    """

    name: str
    clouds: Sequence[Tensor]
    truth: Sequence[str]
    said: Sequence[str]
    weights: Sequence[Tensor] | None = None


def _saliency(
    model: nn.Module, task: Perception, batch: Batch, noise: TargetedPerturbation, seed: int
) -> tuple[Tensor | None, str]:
    """Return (B, N) the robust saliency of the model itself, or why there is none."""
    try:
        found = robust_saliency(model, task, batch, noise, n_draws=DRAWS, even=False, seed=derive(seed, "pictures"))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"No saliency is shown: {type(model).__name__} lets no gradient through to its points ({lines[0]})"
    if not bool(found.isfinite().all()):
        return None, f"No saliency is shown: gradients of {type(model).__name__} are not finite"
    return found.cpu(), ""


def _first_frames(sequences: Sequence[tuple[int, Sequence[Frame]]], *, tracked: bool) -> tuple[list[int], list[Frame]]:
    """Return positions in the data and frames: a sequence that ends with the shown frame, or that frame alone."""
    n, frames = next((n, frames) for n, frames in sequences if n)
    if tracked:
        chosen = list(range(min(n, _FRAMES)))
        return chosen, [frames[i] for i in chosen]
    looked = [frames[i] for i in range(min(n, _LOOKED))]
    at = int(np.argmax([int((~frame.ignore).sum()) for frame in looked]))
    return [at], [looked[at]]


def see_frames(
    model: nn.Module,
    sequences: Sequence[tuple[int, Sequence[Frame]]],
    classes: Sequence[str],
    conditions: Mapping[str, How],
    said: Callable[[Frame], Detections],
    *,
    tracked: bool,
    min_score: float,
    saliency: bool,
    seed: int,
) -> tuple[list[SeenFrame], str]:
    """Return one frame under each condition, and why saliency is missing, if it is.

    Args:
        model: who is looked at.
        sequences: (how many, frames) of each.
        classes: of the data.
        conditions: name -> corruption.
        said: asks the model.
        tracked: frames follow each other.
        min_score: of detections that are shown and tracked.
        saliency: whether gradients are to be taken.
        seed: of the corruptions.
    """
    where, clean = _first_frames(sequences, tracked=tracked)
    shown, why = [], "" if saliency else "Saliency was not asked for"
    for name, how in conditions.items():
        frames = clean
        if how is not None:
            frames = [corrupt_frame(f, *how, index=i, generator=seed) for i, f in zip(where, clean, strict=True)]
        found = [said(frame) for frame in frames]
        trails: dict[int, np.ndarray] = {}
        if tracked:
            poses = [frame.pose for frame in frames]
            trails = trails_of(track_sequence(found, classes, poses=poses, min_score=min_score), poses)
        frame, last = frames[-1], found[-1]
        weights = None
        if not why:
            weights, why = _of_frame(model, frame, seed)
        shown.append(SeenFrame(name, frame, last.select(last.scores >= min_score), trails, weights))
    return shown, why


def _of_frame(model: nn.Module, frame: Frame, seed: int) -> tuple[Tensor | None, str]:
    if not len(frame.points):
        return None, ""
    try:
        task = detection_of(model)
    except TypeError as error:
        return None, f"No saliency is shown: {error}"
    most = getattr(model, "n_classes", None)
    known = frame if not isinstance(most, int) else frame.select(frame.labels < most)
    columns = columns_of([known], channels=frame.points.shape[1])
    device = model_device(model) or torch.device("cpu")
    batch = {name: value.to(device) for name, value in columns.items()}
    found, why = _saliency(model, task, batch, _IN_METRES, seed)
    return (None if found is None else found[0]), why


def see_shapes(
    model: nn.Module, data: Dataset, conditions: Mapping[str, How], *, saliency: bool, seed: int
) -> tuple[list[SeenShapes], str]:
    """Return some shapes under each condition, and why saliency is missing, if it is."""
    rows = np.unique(np.linspace(0, len(data) - 1, _SHAPES).round().astype(int)).tolist()
    batch, device = data.batch(rows), model_device(model) or torch.device("cpu")
    x, y, index = batch["x"].to(device), batch["y"].to(device), torch.tensor(rows)
    names = [data.classes[k] if k < len(data.classes) else str(k) for k in range(max(data.n_classes or 0, 1))]
    shown, why = [], "" if saliency else "Saliency was not asked for"
    for name, how in conditions.items():
        clouds = Clouds.full(x) if how is None else corrupt_batch(x, *how, index=index, generator=seed).compact()
        logits = model(clouds.points, clouds.mask)
        said = torch.where(logits.isfinite().all(1), logits.argmax(1), -1).tolist()
        weights = None
        if not why:
            part = {"x": clouds.points, "mask": clouds.mask, "y": y, "index": index.to(device)}
            found, why = _saliency(model, Classification(), part, _IN_UNITS, seed)
            weights = None if found is None else [w[m] for w, m in zip(found, clouds.mask.cpu(), strict=True)]
        told = ["nothing" if k < 0 else names[k] if k < len(names) else str(k) for k in said]
        truth = [names[k] for k in y.tolist()]
        shown.append(SeenShapes(name, [c.cpu() for c in clouds.split()], truth, told, weights))
    return shown, why
