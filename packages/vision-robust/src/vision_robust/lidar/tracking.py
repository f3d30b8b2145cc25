"""A Kalman tracker of boxes: detections of frame after frame become tracks with identities.

Buys: a strong tracker without training or compiled code, for any detector. State ``x, y, z, yaw, l, w, h, vx, vy, vz``,
constant velocity per frame, in a frame that does not move: the sensor's pose takes the car's own motion out. All
tracks are filtered at once.

Source: X. Weng, J. Wang, D. Held, K. Kitani 2020, 2008.08063 (AB3DMOT), with the settings of its public code: initial
covariance 10 (velocities 10,000), process noise 1 (velocities 0.01), measurement noise 1; cars by generalised overlap
of at least -0.2 and the best assignment, people greedily at -0.4, cyclists by centres within 2 m.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_number
from vision_robust.lidar.boxes import iou
from vision_robust.lidar.types import Detections, Frame, check_boxes

__all__ = ["SETTINGS", "KalmanTracker", "TrackSettings", "track_sequence", "trails_of"]

_F = np.eye(10)
_F[:3, 7:] = np.eye(3)
_H = np.eye(7, 10)
_P0 = np.diag([10.0] * 7 + [10_000.0] * 3)
_Q = np.diag([1.0] * 7 + [0.01] * 3)
_R = np.eye(7)
_ORDER = [0, 1, 2, 6, 3, 4, 5]
"""Positions in a box (x y z l w h yaw) of the measurement (x y z yaw l w h)."""


@dataclass(frozen=True, kw_only=True)
class TrackSettings:
    """How detections of one class are joined to its tracks.

    Attributes:
        affinity: ``"giou"`` generalised overlap in space, at least ``threshold``; or ``"centre"``, metres between
            centres, at most ``threshold``.
        threshold: of a possible pair.
        assignment: ``"best"`` least total cost, or ``"greedy"`` best pair first.
        min_hits: detections that a track needs before it is told.
        max_age: frames without a detection after which it ends.
    """

    affinity: str = "giou"
    threshold: float = -0.2
    assignment: str = "best"
    min_hits: int = 3
    max_age: int = 2

    def __post_init__(self) -> None:
        check_choice("affinity", self.affinity, ("giou", "centre"))
        check_choice("assignment", self.assignment, ("best", "greedy"))
        check_number("threshold", self.threshold)
        check_count("min_hits", self.min_hits)
        check_count("max_age", self.max_age)


SETTINGS: Mapping[str, TrackSettings] = {
    "Car": TrackSettings(),
    "Pedestrian": TrackSettings(threshold=-0.4, assignment="greedy", min_hits=1, max_age=4),
    "Cyclist": TrackSettings(affinity="centre", threshold=2.0, min_hits=3, max_age=4),
}


def _moved(boxes: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return boxes (N, 7) in the frame that ``pose`` leads to; the turn about the vertical is added to yaw."""
    out = boxes.copy()
    out[:, :3] = boxes[:, :3] @ pose[:3, :3].T + pose[:3, 3]
    out[:, 6] = _wrapped(boxes[:, 6] + math.atan2(pose[1, 0], pose[0, 0]))
    return out


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return (angle + math.pi) % (2 * math.pi) - math.pi


class KalmanTracker:
    """The tracks of one class; :meth:`update` takes the detections of the next frame.

    Args:
        settings: how they are joined.
        first_id: identity of the first track; one more for each further.
    """

    def __init__(self, settings: TrackSettings | None = None, *, first_id: int = 1) -> None:
        self.settings = settings or TrackSettings()
        self.mean, self.covariance = np.zeros((0, 10)), np.zeros((0, 10, 10))
        self.ids, self.hits, self.unseen = (np.zeros(0, np.int64) for _ in range(3))
        self.scores = np.zeros(0)
        self.next_id, self.frames = first_id, 0

    def _predict(self) -> None:
        self.mean = self.mean @ _F.T
        self.mean[:, 3] = _wrapped(self.mean[:, 3])
        self.covariance = _F @ self.covariance @ _F.T + _Q
        self.unseen += 1

    def _boxes(self) -> np.ndarray:
        boxes = np.empty((len(self.mean), 7))
        boxes[:, _ORDER] = self.mean[:, :7]
        boxes[:, 3:6] = np.maximum(boxes[:, 3:6], 0.01)
        return boxes

    def _pairs(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions of detections and of tracks that belong together."""
        none = np.zeros(0, np.int64)
        if len(boxes) == 0 or len(self.mean) == 0:
            return none, none
        mine = self._boxes()
        if self.settings.affinity == "giou":
            cost = -iou(torch.from_numpy(boxes), torch.from_numpy(mine), kind="giou").numpy()
            limit = -self.settings.threshold
        else:
            cost = np.linalg.norm(boxes[:, None, :3] - mine[None, :, :3], axis=-1)
            limit = self.settings.threshold
        if self.settings.assignment == "best":
            rows, columns = linear_sum_assignment(cost)
        else:
            rows, columns = _greedy(cost)
        fits = cost[rows, columns] <= limit
        return rows[fits], columns[fits]

    def _correct(self, at: np.ndarray, boxes: np.ndarray) -> None:
        """Update tracks ``at`` with their boxes; an orientation that is more than 90 degrees off is turned round."""
        measured = boxes[:, _ORDER].copy()
        measured[:, 3] = _wrapped(measured[:, 3])
        off = np.abs(_wrapped(measured[:, 3] - self.mean[at, 3]))
        self.mean[at, 3] = _wrapped(self.mean[at, 3] + np.where(off > math.pi / 2, math.pi, 0))
        innovation = measured - self.mean[at] @ _H.T
        innovation[:, 3] = _wrapped(innovation[:, 3])
        p = self.covariance[at]
        gain = p @ _H.T @ np.linalg.inv(_H @ p @ _H.T + _R)
        self.mean[at] += (gain @ innovation[..., None])[..., 0]
        self.mean[at, 3] = _wrapped(self.mean[at, 3])
        self.covariance[at] = p - gain @ _H @ p

    def update(self, boxes: Tensor, scores: Tensor, *, pose: Tensor | np.ndarray | None = None) -> Detections:
        """Return the boxes of all tracks that are told after this frame, in its frame, with identities.

        Args:
            boxes: (M, 7) detections.
            scores: (M,).
            pose: (4, 4) from this frame to one that does not move; the identity when None.

        Raises:
            ValueError: shapes do not agree, or a number is not finite.
        """
        check_boxes(boxes)
        if scores.shape != (len(boxes),):
            raise ValueError(f"scores has shape {tuple(scores.shape)}; ({len(boxes)},) is needed, one for each box")
        place = np.eye(4) if pose is None else np.asarray(pose, np.float64)
        if place.shape != (4, 4) or not np.isfinite(place).all() or abs(np.linalg.det(place[:3, :3])) < 1e-6:
            raise ValueError(f"pose={place.tolist()}: a finite rigid motion (4, 4) is needed")
        found = _moved(boxes.detach().cpu().double().numpy(), place)
        score = scores.detach().cpu().double().numpy()
        self.frames += 1
        self._predict()
        rows, columns = self._pairs(found)
        self._correct(columns, found[rows])
        self.hits[columns] += 1
        self.unseen[columns], self.scores[columns] = 0, score[rows]
        self._begin(np.setdiff1d(np.arange(len(found)), rows), found, score)
        s = self.settings
        told = (self.unseen < s.max_age) & ((self.hits >= s.min_hits) | (self.frames <= s.min_hits))
        out = _moved(self._boxes()[told], np.linalg.inv(place))
        result = Detections(
            torch.from_numpy(out).to(boxes), torch.zeros(int(told.sum()), dtype=torch.int64, device=boxes.device),
            torch.from_numpy(self.scores[told]).to(scores), torch.from_numpy(self.ids[told]).to(boxes.device),
        )  # fmt: skip
        self._keep(self.unseen < s.max_age)
        return result

    def _begin(self, rows: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> None:
        n = len(rows)
        fresh = np.zeros((n, 10))
        fresh[:, :7] = boxes[rows][:, _ORDER]
        self.mean = np.concatenate([self.mean, fresh])
        self.covariance = np.concatenate([self.covariance, np.broadcast_to(_P0, (n, 10, 10))])
        self.ids = np.concatenate([self.ids, np.arange(self.next_id, self.next_id + n)])
        self.hits = np.concatenate([self.hits, np.ones(n, np.int64)])
        self.unseen = np.concatenate([self.unseen, np.zeros(n, np.int64)])
        self.scores = np.concatenate([self.scores, scores[rows]])
        self.next_id += n

    def _keep(self, alive: np.ndarray) -> None:
        for name in ("mean", "covariance", "ids", "hits", "unseen", "scores"):
            setattr(self, name, getattr(self, name)[alive])


def _greedy(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of pairs, the cheapest first, none used twice."""
    rows, columns = [], []
    used_rows, used_columns = set(), set()
    for place in np.argsort(cost, axis=None, kind="stable"):
        i, j = divmod(int(place), cost.shape[1])
        if i not in used_rows and j not in used_columns:
            used_rows.add(i)
            used_columns.add(j)
            rows.append(i)
            columns.append(j)
    return np.array(rows, np.int64), np.array(columns, np.int64)


def track_sequence(
    detections: Iterable[Detections],
    classes: Sequence[str],
    *,
    poses: Iterable[Tensor] | None = None,
    settings: Mapping[str, TrackSettings] = SETTINGS,
    min_score: float = 0.0,
) -> list[Detections]:
    """Return the tracks of a whole sequence, frame by frame; identities are unique over classes.

    Args:
        detections: of each frame.
        classes: names of the labels; classes without settings are tracked as cars.
        poses: (4, 4) of each frame; without them the sensor is taken to stand still.
        settings: by class.
        min_score: weaker detections are left out. Choose it on clean validation data, once for all noise levels.

    Raises:
        ValueError: fewer poses than frames, no classes, or labels that are none of them.
    """
    if not classes:
        raise ValueError("classes is empty; the name of each label is needed")
    trackers = [KalmanTracker(settings.get(name)) for name in classes]
    stride = len(classes)
    places = None if poses is None else iter(poses)
    out = []
    for i, said in enumerate(detections):
        pose = None
        if places is not None and (pose := next(places, None)) is None:
            raise ValueError(f"poses end before frame {i}; one is needed for each frame")
        if len(said.labels) and not 0 <= int(said.labels.min()) <= int(said.labels.max()) < stride:
            raise ValueError(
                f"labels of frame {i} are {sorted(set(said.labels.tolist()))}; 0 .. {stride - 1} are known"
            )
        sure = said.select(said.scores >= min_score)
        parts = []
        for label, tracker in enumerate(trackers):
            mine = sure.select(sure.labels == label)
            told = tracker.update(mine.boxes, mine.scores, pose=pose)
            parts.append(Detections(told.boxes, told.labels + label, told.scores, told.track_ids * stride + label))
        columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "labels", "scores", "track_ids")]
        out.append(Detections(*columns))
    return out


def trails_of(seen: Sequence[Frame | Detections], poses: Sequence[Tensor]) -> dict[int, np.ndarray]:
    """Return identity -> path (T, 2) of each track of the last entry, in metres of its own frame.

    Args:
        seen: boxes with ``track_ids``, frame by frame.
        poses: (4, 4) of each, from its frame to one that does not move.
    """
    here = np.linalg.inv(np.asarray(poses[-1], np.float64))
    paths: dict[int, list[np.ndarray]] = {int(i): [] for i in seen[-1].track_ids if int(i) >= 0}
    for said, pose in zip(seen, poses, strict=True):
        shift = here @ np.asarray(pose, np.float64)
        centres = said.boxes[:, :3].detach().cpu().double().numpy() @ shift[:3, :3].T + shift[:3, 3]
        for identity, centre in zip(said.track_ids.tolist(), centres, strict=True):
            if identity in paths:
                paths[identity].append(centre[:2])
    return {identity: np.stack(path) for identity, path in paths.items()}
