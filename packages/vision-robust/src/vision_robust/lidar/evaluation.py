"""How perception of points holds up: clean, then under every corruption at every severity, from one call.

    report = evaluate(model, digits_or_modelnet, corruptions=corruptions("modelnet-c"))
    report = evaluate(detector, open_source("kitti:FOLDER"), corruptions=["kitti-c/fog"], severities=(1, 3, 5))
    report.save("report")

A classifier is called as ``model(points (B, N, C), mask (B, N)) -> logits``. A detector has ``detect(points, mask)``,
which returns one :class:`~vision_robust.lidar.types.Detections` for each cloud, labels being positions in the data's
classes. Where frames follow each other, a Kalman tracker follows the detector.

Figures: ``clean/accuracy``; ``NAME@SEVERITY/accuracy`` with exact intervals; ``corrupted/accuracy``, their mean; with
all of ModelNet-C ``mce`` and ``relative_mce`` against DGCNN. For scenes ``ap/CLASS/KIND`` and ``map/KIND``, ``mota``,
``motp``, ``idf1`` in the place of accuracy. Corruptions belong to the cloud: no figure depends on the batch size or the
order.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.claim import versions
from robust_core.data import Dataset
from robust_core.errors import CheckpointError
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.metrics import Estimate, mean, proportion
from robust_core.io import read_json, write_json
from robust_core.models import fingerprint, frozen, model_device
from robust_core.random import Seed, resolve_seed
from vision_robust.lidar.corruptions import corrupt_batch, corrupt_frame
from vision_robust.lidar.corruptions import corruptions as known_corruptions
from vision_robust.lidar.kitti.frames import at_difficulty
from vision_robust.lidar.metrics.detection import IOU, SAMPLINGS, evaluate_detections
from vision_robust.lidar.metrics.robustness import DGCNN, corruption_errors
from vision_robust.lidar.metrics.tracks import TrackingScore, evaluate_tracks
from vision_robust.lidar.pictures import How, SeenFrame, SeenShapes, see_frames, see_shapes
from vision_robust.lidar.sources import Source
from vision_robust.lidar.tracking import track_sequence
from vision_robust.lidar.types import Clouds, Detections, Frame

__all__ = ["SCHEMA", "LidarReport", "evaluate"]

SCHEMA = "robust.lidar-report/1"
CLEAN = "clean"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class LidarReport(DocumentReport):
    """A finished measurement.

    Attributes:
        document: JSON; ``figures`` maps names to {"value", "interval", "n"}.
        shown: frames or shapes under some conditions, with what was found and saliency, for the page.
    """

    schemas = (SCHEMA,)

    shown: Sequence[SeenFrame | SeenShapes] = field(default=())

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from vision_robust.lidar.page import render  # matplotlib is imported for it

        return render(self)


def evaluate(
    model: nn.Module,
    data: Dataset | Source,
    *,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    batch_size: int = 32,
    kinds: Sequence[str] = ("3d", "bev"),
    thresholds: Mapping[str, float] = IOU,
    sampling: str = "exact",
    difficulty: str | None = None,
    min_score: float = 0.3,
    frames: int | None = None,
    generator: Seed = None,
    resume: str | os.PathLike[str] | None = None,
    saliency: bool = True,
    name: str = "",
    command: str = "",
    on_step: Progress | None = None,
) -> LidarReport:
    """Measure ``model`` on ``data``, clean and corrupted.

    Args:
        model: a classifier or a detector; see the module.
        data: a data set of clouds (N, points, 3), or scenes of :func:`vision_robust.lidar.sources.open_source`.
        corruptions: names of :func:`vision_robust.lidar.corruptions.corruptions`.
        severities: of 1 .. 5.
        batch_size: clouds in one pass; no figure depends on it.
        kinds: how boxes are compared, ``"3d"`` and ``"bev"``.
        thresholds: class -> least overlap of a right detection; 0.5 where a class is not named.
        sampling: of average precision, ``"exact"``, or ``"kitti"`` as KITTI's own program counts.
        difficulty: boxes that average precision asks for, ``"easy"``, ``"moderate"`` or ``"hard"`` (KITTI only); all
            that are not marked ``ignore`` when None.
        min_score: detections that the tracker hears. Choose it on clean validation data, once for all noise.
        frames: so many frames of each sequence at most; all when None.
        generator: seed of the corruptions.
        resume: folder for finished conditions; the same call goes on from there.
        saliency: show the robust saliency of the model on the frames or shapes of the report; where it has no
            gradients, or a detector no loss (:class:`~vision_robust.lidar.intact.OwnDetection`), the report says so.
        name: of the model, for the report.
        command: likewise.
        on_step: called with (condition, done, conditions).

    Raises:
        TypeError: the model does not answer as its task needs.
        ValueError: an unknown corruption, severities outside 1 .. 5, no data, a difficulty of data without any.
        CheckpointError: ``resume`` holds conditions of another measurement.
    """
    wanted, levels = _conditions([corruptions] if isinstance(corruptions, str) else corruptions, severities)
    check_count("batch_size", batch_size)
    if frames is not None:
        check_count("frames", frames)
    if not kinds:
        raise ValueError("kinds is empty; give '3d', 'bev' or both")
    check_number("min_score", min_score)
    check_choice("sampling", sampling, SAMPLINGS)
    scenes = isinstance(data, Source)
    if scenes and not callable(getattr(model, "detect", None)):
        raise TypeError(f"model {type(model).__name__} has no detect(points, mask), which scenes need")
    if not len(data):
        raise ValueError("data holds nothing to look at")
    if isinstance(data, Source) and difficulty is not None:  # refused now, not after the first pass
        at_difficulty(next(frames[0] for _, frames in data.sequences if len(frames)), difficulty)
    seed, started = resolve_seed(generator), time.perf_counter()
    told = {"kinds": list(kinds), "thresholds": dict(thresholds), "sampling": sampling, "difficulty": difficulty}
    told |= {"min_score": min_score, "frames": frames}
    identity = _identity(model, data, seed, told if scenes else {})
    run = _Scenes(model, data, told, seed) if isinstance(data, Source) else _Shapes(model, data, batch_size, seed)
    results: dict[str, dict[str, Any]] = {}
    with frozen(model), torch.no_grad():
        for done, (condition, how) in enumerate(wanted.items()):
            if on_step is not None:
                on_step(condition, done, len(wanted))
            results[condition] = _kept(resume, condition, identity, lambda how=how: run.measure(how))
        if on_step is not None:
            on_step("conditions", len(wanted), len(wanted))
        figures = run.figures(results)
        shown, why = run.pictures(_to_show(wanted, figures, run.measure_of), saliency=saliency)
    document = {
        "schema": SCHEMA,
        "threat": None,
        "task": "scenes" if scenes else "shapes",
        "model": name or type(model).__name__,
        "model_sha256": fingerprint(model),
        "data": data.words if isinstance(data, Source) else data.name,
        "data_sha256": None if isinstance(data, Source) else data.sha256,
        "n": run.n,
        "seed": seed,
        "device": str(model_device(model) or "cpu"),
        "figures": {key: value.as_json() for key, value in figures.items()},
        "flags": run.flags(figures),
        "corruptions": list(dict.fromkeys(how[0] for how in wanted.values() if how is not None)),
        "severities": levels,
        "details": told | {"tracked": data.tracked} if isinstance(data, Source) else {},
        "saliency": why or "shown",
        "seconds": round(time.perf_counter() - started, 2),
        "versions": versions(),
        "command": command,
    }
    return LidarReport(document, shown)


def _conditions(names: Sequence[str], severities: Sequence[int]) -> tuple[dict[str, How], list[int]]:
    known, levels = known_corruptions(), sorted({check_count("severities", level, low=0) for level in severities})
    for name in names:
        if name not in known:
            raise ValueError(f"corruptions: no {name!r}; choose of {', '.join(known)}")
    if names and (not levels or levels[0] < 1 or levels[-1] > 5):
        raise ValueError(f"severities={list(severities)}: one or more of 1 .. 5")
    every: dict[str, How] = {CLEAN: None}
    return every | {f"{name}@{level}": (name, level) for name in dict.fromkeys(names) for level in levels}, levels


def _to_show(
    wanted: Mapping[str, How], figures: Mapping[str, Estimate], measure: Callable[[str], str]
) -> dict[str, How]:
    """Return the clean condition, and the hardest severity of the three corruptions that harm most."""
    hardest = {how[0]: (name, how) for name, how in wanted.items() if how is not None}

    def value(name: str) -> float:
        found = figures.get(measure(name))
        return 1.0 if found is None else found.value

    worst = sorted(hardest.values(), key=lambda entry: value(entry[0]))[:3]
    return {CLEAN: None, **dict(worst)}


def _identity(model: nn.Module, data: Dataset | Source, seed: int, told: Mapping[str, Any]) -> str:
    what = _source_identity(data) if isinstance(data, Source) else data.sha256
    return hashlib.sha256(f"{fingerprint(model)}|{what}|{seed}|{sorted(told.items())}".encode()).hexdigest()


def _source_identity(source: Source) -> str:
    """Return what tells data apart: names and lengths of the sequences, and the first frame of each."""
    digest = hashlib.sha256(f"{source.words}|{source.classes}".encode())
    for name, frames in source.sequences:
        digest.update(f"|{name}|{len(frames)}|".encode())
        if len(frames):
            for value in (frames[0].points, frames[0].boxes, frames[0].labels):
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(
    folder: str | os.PathLike[str] | None, condition: str, identity: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what was measured before under the same identity, or measure it and keep it."""
    if folder is None:
        return measure()
    path = Path(folder) / f"{condition.replace('/', '-')}.json"
    if path.is_file():
        document = read_json(path)
        if not isinstance(document, dict) or document.get("identity") != identity:
            raise CheckpointError(f"{path} is of another model, data, seed or setting; give another folder to resume")
        return document["result"]
    path.parent.mkdir(parents=True, exist_ok=True)
    result = measure()
    write_json(path, {"identity": identity, "result": result})
    return result


def _asked(model: Any, points: torch.Tensor, mask: torch.Tensor, hint: str = "") -> Any:
    """Return what a user's model says; where it fails, say on what."""
    try:
        return model(points, mask)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the model fails on points {tuple(points.shape)} and their mask: {error}{hint}") from error


class _Shapes:
    """Classification of clouds of equal size."""

    def __init__(self, model: nn.Module, data: Dataset, batch_size: int, seed: int) -> None:
        self.model, self.data, self.batch_size, self.seed = model, data, batch_size, seed
        self.n = len(data)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        device = model_device(self.model) or torch.device("cpu")
        for start in range(0, self.n, self.batch_size):
            rows = range(start, min(start + self.batch_size, self.n))
            batch = self.data.batch(rows)
            yield batch["x"].to(device), batch["y"].to(device), torch.tensor(rows)

    def measure(self, how: How) -> dict[str, Any]:
        """Return which clouds are recognised."""
        right: list[bool] = []
        for x, y, rows in self._batches():
            clouds = (
                Clouds.full(x) if how is None else corrupt_batch(x, *how, index=rows, generator=self.seed).compact()
            )
            logits = _asked(
                self.model, clouds.points, clouds.mask, "; the layout of one without mask is 'BNC' or 'BCN'"
            )
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(y):
                raise TypeError(f"model returns {type(logits).__name__}; (B, n_classes) logits are needed")
            # NaN wins every maximum, and is no answer
            right += ((logits.argmax(1) == y) & logits.isfinite().all(1)).tolist()
        return {"right": right}

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
        """Return accuracies, their mean over corruptions, and the corruption errors where all are there."""
        right = {name: np.array(result["right"], bool) for name, result in results.items()}
        found = {f"{name}/accuracy": proportion(flags) for name, flags in right.items()}
        worse = [flags for name, flags in right.items() if name != CLEAN]
        if worse:
            share = np.mean(worse, 0)  # of each cloud, over corruptions
            same = share.min() == share.max() and share[0] in (0.0, 1.0)  # Student's interval would have no width
            found["corrupted/accuracy"] = proportion(share == 1) if same else mean(share, low=0.0, high=1.0)
        if all(f"{name}@{level}" in right for name in DGCNN for level in range(1, 6)):
            accuracy = {name: [float(right[f"{name}@{k}"].mean()) for k in range(1, 6)] for name in DGCNN}
            errors = corruption_errors(accuracy, float(right[CLEAN].mean()))
            found["mce"] = Estimate(errors.mce, None, self.n)
            found["relative_mce"] = Estimate(errors.relative_mce, None, self.n)
        return found

    def flags(self, figures: Mapping[str, Estimate]) -> list[str]:
        """Return reasons to doubt the figures."""
        flags = []
        if self.n < 100:
            flags.append(f"only {self.n} clouds: intervals are wide")
        if "mce" in figures and not self.data.name.startswith("modelnet40"):
            flags.append(
                f"mce is relative to DGCNN on ModelNet-C, and these are {self.data.name}: only its order means much"
            )
        classes = self.data.n_classes
        if classes and figures[f"{CLEAN}/accuracy"].value < 2.0 / classes:
            flags.append(
                "clean accuracy is near chance: do points stand as the network expects them (unit sphere, axes)?"
            )
        return flags

    def measure_of(self, condition: str) -> str:
        """Return the name of the figure that says how hard a condition is."""
        return f"{condition}/accuracy"

    def pictures(self, conditions: Mapping[str, How], *, saliency: bool) -> tuple[list[SeenShapes], str]:
        """Return some shapes under the conditions, and why saliency is missing."""
        return see_shapes(self.model, self.data, conditions, saliency=saliency, seed=self.seed)


class _Scenes:
    """Detection, and tracking where frames follow each other."""

    def __init__(self, model: nn.Module, source: Source, told: Mapping[str, Any], seed: int) -> None:
        self.model, self.source, self.told, self.seed = model, source, told, seed
        most = told["frames"]
        self.sequences = [
            (len(frames) if most is None else min(most, len(frames)), frames) for _, frames in source.sequences
        ]
        self.n = sum(n for n, _ in self.sequences)

    def _played(self, how: How) -> Iterator[tuple[list[Frame], list[Detections]]]:
        """Yield the annotations of each sequence, and what was said; points are let go of, frame by frame."""
        start = 0
        for n, frames in self.sequences:
            seen: list[Frame] = []
            said: list[Detections] = []
            for i in range(n):
                frame = frames[i]
                if how is not None:
                    frame = corrupt_frame(frame, *how, index=start + i, generator=self.seed)
                said.append(self._said(frame))
                seen.append(frame.with_points(frame.points[:0]))
            start += n
            yield seen, said

    def _said(self, frame: Frame) -> Detections:
        device = model_device(self.model) or torch.device("cpu")
        points = frame.points.to(device)
        mask = torch.ones(1, len(points), dtype=torch.bool, device=device)
        found = _asked(self.model.detect, points[None], mask)
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], Detections):
            raise TypeError("detect() returns one Detections for each cloud, in a list")
        said = found[0]
        if said.labels.is_floating_point():
            raise TypeError(f"detect() gives labels of {said.labels.dtype}; integers are needed")
        wrong = [k for k in said.labels.unique().tolist() if not 0 <= k < len(self.source.classes)]
        if wrong:
            raise ValueError(f"detect() gives label {wrong[0]}; the data has {self.source.classes}, from 0 on")
        return Detections(said.boxes.cpu(), said.labels.cpu(), said.scores.cpu())

    def measure(self, how: How) -> dict[str, Any]:
        """Return AP by class and kind, and what tracking adds up to."""
        frames: list[Frame] = []
        said: list[Detections] = []
        total: TrackingScore | None = None
        for sequence, found in self._played(how):
            frames, said = frames + sequence, said + found
            if self.source.tracked:
                score = self._tracked(sequence, found)
                total = score if total is None else total + score
        how_counted = {name: self.told[name] for name in ("thresholds", "kinds", "sampling", "difficulty")}
        values = evaluate_detections(frames, said, **how_counted)
        if total is not None:
            values |= {key: value for key, value in total.figures().items() if key in ("mota", "motp", "idf1")}
        finite = {key: float(value) for key, value in values.items() if np.isfinite(value)}
        return {"figures": finite, "boxes": sum(int((~f.ignore).sum()) for f in frames)}

    def _tracked(self, frames: Sequence[Frame], said: Sequence[Detections]) -> TrackingScore:
        poses = [frame.pose for frame in frames]
        tracks = track_sequence(said, self.source.classes, poses=poses, min_score=self.told["min_score"])
        return evaluate_tracks(frames, tracks)

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
        """Return AP and tracking of each condition, and their means over corruptions."""
        found: dict[str, Estimate] = {}
        for name, result in results.items():
            found |= {f"{name}/{key}": Estimate(value, None, self.n) for key, value in result["figures"].items()}
        worse = [result["figures"] for name, result in results.items() if name != CLEAN]
        for key in worse[0] if worse else ():
            if all(key in figures for figures in worse):
                found[f"corrupted/{key}"] = Estimate(float(np.mean([f[key] for f in worse])), None, self.n)
        return found

    def flags(self, figures: Mapping[str, Estimate]) -> list[str]:
        """Return reasons to doubt the figures."""
        flags = [] if self.n >= 50 else [f"only {self.n} frames: average precision varies much from drive to drive"]
        precision = [e.value for name, e in figures.items() if name.startswith(f"{CLEAN}/ap/")]
        if not precision:
            flags.append("the frames hold no box to find: there is no precision, and every detection is wrong")
        elif max(precision) < 0.01:
            flags.append("clean AP is nothing: do boxes, axes and the order of classes agree with the data's?")
        return flags

    def measure_of(self, condition: str) -> str:
        """Return the name of the figure that says how hard a condition is."""
        return f"{condition}/map/{self.told['kinds'][0]}"

    def pictures(self, conditions: Mapping[str, How], *, saliency: bool) -> tuple[list[SeenFrame], str]:
        """Return a frame under the conditions, and why saliency is missing."""
        return see_frames(
            self.model, self.sequences, self.source.classes, conditions, self._said, tracked=self.source.tracked,
            min_score=self.told["min_score"], saliency=saliency, seed=self.seed,
        )  # fmt: skip
