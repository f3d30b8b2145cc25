"""How well things were followed: CLEAR-MOT (MOTA, MOTP, identity switches) and IDF1.

``MOTA = 1 - (misses + false positives + switches) / objects`` may be negative. In each frame, pairs of the frame before
that still hold are kept first; the rest is assigned at the least total distance. A switch is counted when an object is
matched to another track than the last one that it was matched to, however long ago. ``IDF1 = 2 IDTP / (objects +
hypotheses)``, where IDTP is the greatest number of frames that a one-to-one assignment of whole tracks explains.

Sources: K. Bernardin, R. Stiefelhagen 2008; E. Ristani and others 2016, 1609.01775. The figures are those of
py-motmetrics on its own data, which the tests check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from robust_core.checks import check_choice, check_number, check_same_length
from vision_robust.lidar.boxes import iou
from vision_robust.lidar.types import Detections, Frame

__all__ = ["Moment", "TrackingScore", "evaluate_tracks", "score_tracks"]


@dataclass(frozen=True, eq=False)
class Moment:
    """One frame of a sequence to be scored.

    Attributes:
        objects: (K,) identities of what is there.
        hypotheses: (M,) identities of what was said.
        distance: (K, M); infinite or NaN where a pair is out of the question.
        ignore: (K,) objects that count neither when missed nor when found; None: all count.
    """

    objects: np.ndarray
    hypotheses: np.ndarray
    distance: np.ndarray
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class TrackingScore:
    """Counts over one or many sequences (``+`` joins them), and the figures made of them."""

    objects: int = 0
    hypotheses: int = 0
    matches: int = 0
    misses: int = 0
    false_positives: int = 0
    switches: int = 0
    distance: float = 0.0
    id_true: int = 0

    def __add__(self, other: TrackingScore) -> TrackingScore:
        return TrackingScore(**{name: value + getattr(other, name) for name, value in self.__dict__.items()})

    @property
    def mota(self) -> float:
        """Multiple-object tracking accuracy; NaN without objects."""
        wrong = self.misses + self.false_positives + self.switches
        return 1 - wrong / self.objects if self.objects else float("nan")

    @property
    def motp(self) -> float:
        """Mean distance of matched pairs; NaN without any."""
        return self.distance / self.matches if self.matches else float("nan")

    @property
    def idf1(self) -> float:
        """F1 of identities; NaN where there is nothing on either side."""
        total = self.objects + self.hypotheses
        return 2 * self.id_true / total if total else float("nan")

    @property
    def id_precision(self) -> float:
        """Share of hypotheses whose identity is right."""
        return self.id_true / self.hypotheses if self.hypotheses else float("nan")

    @property
    def id_recall(self) -> float:
        """Share of objects that are followed under the right identity."""
        return self.id_true / self.objects if self.objects else float("nan")

    def figures(self) -> dict[str, float]:
        """Return the figures by name."""
        names = ("mota", "motp", "idf1", "id_precision", "id_recall", "switches", "misses", "false_positives")
        return {name: float(getattr(self, name)) for name in (*names, "objects")}


@dataclass
class _Memory:
    """What is remembered from frame to frame: each object's last match, and who was seen together how often."""

    last: dict[int, int] = field(default_factory=dict)
    together: dict[tuple[int, int], int] = field(default_factory=dict)


def _assigned(moment: Moment, memory: _Memory) -> list[tuple[int, int]]:
    """Return the matched pairs (row, column): those that go on first, then the cheapest assignment of the rest."""
    cost = np.where(np.isfinite(moment.distance), moment.distance, np.inf)
    if moment.ignore is not None:
        cost[moment.ignore] = np.inf
    column = {int(h): j for j, h in enumerate(moment.hypotheses)}
    pairs = []
    for i, o in enumerate(moment.objects):
        j = column.get(memory.last.get(int(o), -1), -1)
        if j >= 0 and np.isfinite(cost[i, j]):
            pairs.append((i, j))
            cost[i, :] = np.inf
            cost[:, j] = np.inf
    possible = np.isfinite(cost)
    if possible.any():
        dear = 2.0 * float(np.abs(cost[possible]).max()) * min(cost.shape) + 1.0  # more matches are always better
        rows, columns = linear_sum_assignment(np.where(possible, cost, dear))
        pairs += [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if possible[i, j]]
    return pairs


def score_tracks(moments: Iterable[Moment]) -> TrackingScore:
    """Return the score of one sequence.

    Raises:
        ValueError: a distance has the wrong shape, or an identity stands twice in one frame.
    """
    memory = _Memory()
    total = TrackingScore()
    for moment in moments:
        total = total + _one(moment, memory)
    pairs = list(memory.together)
    rows = {o: i for i, o in enumerate(dict.fromkeys(o for o, _ in pairs))}
    columns = {h: j for j, h in enumerate(dict.fromkeys(h for _, h in pairs))}
    count = np.zeros((len(rows), len(columns)))
    for (o, h), n in memory.together.items():
        count[rows[o], columns[h]] = n
    best = linear_sum_assignment(-count) if count.size else ([], [])
    return total + TrackingScore(id_true=int(count[best].sum()) if count.size else 0)


def _one(moment: Moment, memory: _Memory) -> TrackingScore:
    k, m = len(moment.objects), len(moment.hypotheses)
    if np.shape(moment.distance) != (k, m):
        raise ValueError(f"distance has shape {np.shape(moment.distance)}; ({k}, {m}) is needed")
    for name, ids in (("objects", moment.objects), ("hypotheses", moment.hypotheses)):
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{name} holds an identity twice in one frame")
    pairs = _assigned(moment, memory)
    ignore = np.zeros(k, bool) if moment.ignore is None else moment.ignore
    possible = np.isfinite(moment.distance)
    excused = np.zeros(m, bool) | possible[ignore].any(axis=0)
    excused[[j for _, j in pairs]] = False  # what found a real object is counted
    switches, distance = 0, 0.0
    for i, j in pairs:
        o, h = int(moment.objects[i]), int(moment.hypotheses[j])
        switches += o in memory.last and memory.last[o] != h
        memory.last[o] = h
        distance += float(moment.distance[i, j])
    for i, j in zip(*np.nonzero(possible & ~ignore[:, None] & ~excused[None]), strict=True):
        pair = int(moment.objects[i]), int(moment.hypotheses[j])
        memory.together[pair] = memory.together.get(pair, 0) + 1
    objects, hypotheses = int((~ignore).sum()), m - int(excused.sum())
    return TrackingScore(
        objects, hypotheses, len(pairs), objects - len(pairs), hypotheses - len(pairs), switches, distance
    )


def evaluate_tracks(
    frames: Sequence[Frame],
    tracks: Sequence[Detections],
    *,
    label: int | None = None,
    kind: str = "centre",
    threshold: float = 2.0,
) -> TrackingScore:
    """Return the score of the tracks of one sequence.

    Args:
        frames: what is there, with ``track_ids``.
        tracks: what a tracker said of each frame.
        label: the class; None: all, and only pairs of one class can match.
        kind: ``"centre"`` metres between centres seen from above, or ``"3d"``, ``"bev"``: one minus the overlap.
        threshold: greatest distance of a match: metres, or for overlaps the *least overlap*.

    Raises:
        ValueError: lengths differ, or tracks have no identities.
    """
    check_same_length(frames=len(frames), tracks=len(tracks))
    check_choice("kind", kind, ("centre", "3d", "bev"))
    check_number("threshold", threshold, low=0)
    moments = []
    for frame, said in zip(frames, tracks, strict=True):
        there = slice(None) if label is None else frame.labels == label
        mine = said if label is None else said.select(said.labels == label)
        boxes, ids = frame.boxes[there].double().cpu(), frame.track_ids[there].cpu().numpy()
        if (len(ids) and ids.min() < 0) or (len(mine.track_ids) and int(mine.track_ids.min()) < 0):
            raise ValueError("track_ids holds -1; every box needs the identity of what it belongs to")
        others = mine.boxes.double().cpu()
        if kind == "centre":
            distance = np.linalg.norm(boxes[:, None, :2].numpy() - others[None, :, :2].numpy(), axis=-1)
            possible = distance <= threshold
        else:
            overlap = iou(boxes, others, kind=kind).numpy()
            distance, possible = 1 - overlap, overlap >= threshold
        possible &= frame.labels[there].cpu().numpy()[:, None] == mine.labels.cpu().numpy()[None]
        distance = np.where(possible, distance, np.inf)
        ignore = frame.ignore[there].cpu().numpy()
        moments.append(Moment(ids, mine.track_ids.cpu().numpy(), distance, ignore))
    return score_tracks(moments)
