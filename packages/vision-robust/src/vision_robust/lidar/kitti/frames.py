"""From KITTI's terms to a frame's and back: camera to sensor, bottom to centre, ``rotation_y`` to yaw, image boxes.

``X_sensor = (R0 Tr)^-1 X_camera``; ``yaw = -rotation_y - pi / 2``; a label's place is the bottom of its box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_choice
from vision_robust.lidar.boxes import box_corners, wrap_angle
from vision_robust.lidar.kitti.text import Label
from vision_robust.lidar.types import Frame

__all__ = ["DIFFICULTIES", "NEIGHBOURS", "at_difficulty", "build_frame", "image_boxes", "in_image", "sensor_to_camera"]

DIFFICULTIES = ("easy", "moderate", "hard")
_LIMITS = ((40.0, 0, 0.15), (25.0, 1, 0.3), (25.0, 2, 0.5))
NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
"""What looks so alike that finding it is no mistake, and missing it neither."""
IMAGE_SIZE = (1242, 375)
_NEAREST_M = 0.1


def _square(matrix: np.ndarray) -> np.ndarray:
    out = np.eye(4)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def sensor_to_camera(calib: Mapping[str, np.ndarray | Tensor]) -> np.ndarray:
    """Return (4, 4) float64 from the sensor's frame to the rectified camera's."""
    return _square(np.asarray(calib["R0_rect"])) @ _square(np.asarray(calib["Tr_velo_to_cam"]))


def _difficulty(label: Label) -> int:
    height = label.bbox[3] - label.bbox[1]
    for i, (least, occluded, truncated) in enumerate(_LIMITS):
        if height >= least and 0 <= label.occluded <= occluded and 0 <= label.truncated <= truncated:
            return i
    return -1


def _boxes(labels: Sequence[Label], calib: Mapping[str, np.ndarray]) -> np.ndarray:
    if not labels:
        return np.zeros((0, 7))
    place = np.array([(*label.location, 1.0) for label in labels])
    centre = (place @ np.linalg.inv(sensor_to_camera(calib)).T)[:, :3]
    h, w, length = np.array([label.size_hwl for label in labels]).T
    centre[:, 2] += h / 2
    yaw = -np.array([label.rotation_y for label in labels]) - math.pi / 2
    yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
    return np.column_stack([centre, length, w, h, yaw])


def build_frame(
    points: np.ndarray, labels: Sequence[Label], calib: Mapping[str, np.ndarray], classes: Sequence[str],
    *, pose: np.ndarray | None = None, time_s: float = 0.0, token: str = "",
) -> Frame:  # fmt: skip
    """Return the frame of points and labels; kinds that are neither classes nor their neighbours are left out.

    ``ignore`` marks neighbours (vans, people who sit) and what is too small, hidden or cut off for any difficulty.
    """
    known = {name: i for i, name in enumerate(classes)}
    owner = {label: known.get(label, known.get(NEIGHBOURS.get(label, ""), -1)) for label in {x.kind for x in labels}}
    kept = [label for label in labels if owner[label.kind] >= 0 and label.kind != "DontCare"]
    difficulty = torch.tensor([_difficulty(label) for label in kept], dtype=torch.int64)
    neighbour = torch.tensor([label.kind not in known for label in kept], dtype=torch.bool)
    return Frame(
        points=torch.from_numpy(points),
        boxes=torch.from_numpy(_boxes(kept, calib)).to(torch.float32),
        labels=torch.tensor([owner[label.kind] for label in kept], dtype=torch.int64),
        track_ids=torch.tensor([label.track_id for label in kept], dtype=torch.int64),
        ignore=neighbour | (difficulty < 0),
        fields={
            "difficulty": difficulty,
            "neighbour": neighbour,
            "truncated": torch.tensor([label.truncated for label in kept], dtype=torch.float32),
            "occluded": torch.tensor([label.occluded for label in kept], dtype=torch.int64),
            "image_box": torch.tensor([label.bbox for label in kept], dtype=torch.float32).reshape(-1, 4),
        },
        classes=tuple(classes),
        calib={key: torch.from_numpy(value) for key, value in calib.items()},
        pose=torch.eye(4, dtype=torch.float64) if pose is None else torch.from_numpy(pose),
        time_s=time_s,
        token=token,
    )


def at_difficulty(frame: Frame, difficulty: str) -> Frame:
    """Return the frame with ``ignore`` as the benchmark has it at ``"easy"``, ``"moderate"`` or ``"hard"``.

    Raises:
        ValueError: another word, or a frame that is not KITTI's.
    """
    level = DIFFICULTIES.index(check_choice("difficulty", difficulty, DIFFICULTIES))
    if "difficulty" not in frame.fields:
        raise ValueError(f"difficulty={difficulty!r}: frame {frame.token!r} tells no difficulties; KITTI's do")
    found = frame.fields["difficulty"]
    return replace(frame, ignore=frame.fields["neighbour"] | (found < 0) | (found > level))


def _projected(xyz: Tensor, calib: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels u, v and depth of points (..., 3); those behind the camera are taken at its nearest plane."""
    to_camera = torch.from_numpy(sensor_to_camera(calib))
    camera = xyz.detach().cpu().double() @ to_camera[:3, :3].T + to_camera[:3, 3]
    depth = camera[..., 2]
    camera = torch.cat([camera[..., :2], depth.clamp_min(_NEAREST_M)[..., None]], -1)
    p2 = torch.as_tensor(calib["P2"], dtype=torch.float64)
    image = camera @ p2[:, :3].T + p2[:, 3]
    return image[..., 0] / image[..., 2], image[..., 1] / image[..., 2], depth


def in_image(points: Tensor, calib: Mapping[str, Tensor], size: tuple[int, int] = IMAGE_SIZE) -> Tensor:
    """Return (N,) which points the left colour camera sees; only there is KITTI annotated."""
    u, v, depth = _projected(points[:, :3], calib)
    seen = (depth > 0) & (u >= 0) & (u < size[0]) & (v >= 0) & (v < size[1])
    return seen.to(points.device)


def image_boxes(
    boxes: Tensor, calib: Mapping[str, Tensor], size: tuple[int, int] = IMAGE_SIZE
) -> tuple[Tensor, Tensor]:
    """Return (K, 4) left, top, right, bottom in pixels inside the image, and (K,) the share that was cut off.

    A box that the camera does not see at all has no area and a share of 1.
    """
    u, v, depth = _projected(box_corners(boxes), calib)
    limit = torch.tensor([size[0] - 1.0, size[1] - 1.0], dtype=torch.float64)
    whole = torch.stack([u.amin(1), v.amin(1), u.amax(1), v.amax(1)], 1)
    cut = torch.minimum(whole.clamp_min(0), limit.repeat(2))
    area, rest = ((b[:, 2] - b[:, 0]).clamp_min(0) * (b[:, 3] - b[:, 1]).clamp_min(0) for b in (whole, cut))
    unseen = (depth.amax(1) <= _NEAREST_M) | (rest <= 0)
    share = torch.where(unseen, torch.ones_like(area), 1 - rest / area.clamp_min(1e-9))
    return torch.where(unseen[:, None], torch.zeros_like(cut), cut), share


def labels_of(frame: Frame, calib: Mapping[str, np.ndarray], *, everything: bool = False) -> list[Label]:
    """Return the label lines of a frame: what the camera sees of it, or everything.

    Visibility (``fields["visible"]``) becomes KITTI's levels; a box marked ``ignore`` is written as of unknown
    occlusion, which no difficulty counts.
    """
    tensors = {key: torch.from_numpy(value) for key, value in calib.items()}
    if len(frame.boxes) == 0:
        return []
    image, cut = image_boxes(frame.boxes, tensors)
    boxes = frame.boxes.detach().cpu().double().numpy()
    bottom = np.column_stack([boxes[:, :2], boxes[:, 2] - boxes[:, 5] / 2, np.ones(len(boxes))])
    place = bottom @ sensor_to_camera(calib).T
    turn = wrap_angle(-torch.from_numpy(boxes[:, 6]) - math.pi / 2).numpy()
    visible = frame.fields.get("visible", torch.ones(len(boxes))).tolist()
    labels = []
    for i, box in enumerate(boxes):
        if float(cut[i]) >= 1 and not everything:
            continue
        hidden = 3 if bool(frame.ignore[i]) else int(sum(visible[i] < limit for limit in (0.8, 0.5)))
        alpha = turn[i] - math.atan2(place[i, 0], place[i, 2])
        labels.append(Label(
            frame.classes[int(frame.labels[i])], float(cut[i]), hidden,
            (alpha + math.pi) % (2 * math.pi) - math.pi, tuple(image[i].tolist()),
            (box[5], box[4], box[3]), (place[i, 0], place[i, 1], place[i, 2]), float(turn[i]),
            track_id=int(frame.track_ids[i]),
        ))  # fmt: skip
    return labels
