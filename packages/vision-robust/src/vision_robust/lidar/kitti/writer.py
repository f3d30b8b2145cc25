"""Frames as a KITTI folder, in the layout of the object or of the tracking benchmark: what any KITTI tool reads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from robust_core.checks import check_choice
from robust_core.io.files import write_atomic
from vision_robust.lidar.kitti.frames import labels_of
from vision_robust.lidar.kitti.text import _EARTH_M, Label
from vision_robust.lidar.types import Frame

__all__ = ["CALIB", "write_kitti"]

_P = np.array([[721.5377, 0, 609.5593, 0], [0, 721.5377, 172.854, 0], [0, 0, 1, 0]])
CALIB: Mapping[str, np.ndarray] = {
    **{f"P{i}": _P for i in range(4)},
    "R0_rect": np.eye(3),
    "Tr_velo_to_cam": np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]]),
    "Tr_imu_to_velo": np.array([[1.0, 0, 0, -0.81], [0, 1, 0, 0.32], [0, 0, 1, -0.8]]),
}
"""A rig as KITTI's, without its small misalignments."""
_DONT_CARE = Label("DontCare", -1, -1, -10, (0, 0, 0, 0), (-1, -1, -1), (-1000, -1000, -1000), -10)
_TRACKING = {"R0_rect": "R_rect", "Tr_velo_to_cam": "Tr_velo_cam", "Tr_imu_to_velo": "Tr_imu_velo"}
_ORIGIN = (49.0, 8.4)


def _calibration(calib: Mapping[str, np.ndarray], tracking: bool) -> str:
    lines = []
    for key, matrix in calib.items():
        name = f"{key}:" if not tracking or key not in _TRACKING else _TRACKING[key]
        lines.append(" ".join([name, *(f"{v:.12e}" for v in matrix.reshape(-1))]))
    return "\n".join(lines) + "\n"


def _line(label: Label) -> str:
    values = (*label.bbox, *label.size_hwl, *label.location, label.rotation_y)
    lead = f"{label.frame} {label.track_id} " if label.frame >= 0 else ""
    truncated = f"{label.truncated:.2f}" if label.truncated >= 0 else "-1"
    return (
        f"{lead}{label.kind} {truncated} {label.occluded} {label.alpha:.4f} {' '.join(f'{v:.4f}' for v in values)}"
        + ("" if label.score is None else f" {label.score:.6f}")
    )


def _oxts(pose: np.ndarray, calib: Mapping[str, np.ndarray]) -> str:
    """Return the line of a pose of the sensor: place and angles of the inertial unit, and 24 zeros."""
    imu = pose @ np.vstack([calib["Tr_imu_to_velo"], [0, 0, 0, 1]])
    lat0, lon0 = _ORIGIN
    scale = math.cos(math.radians(lat0))
    x0 = scale * math.radians(lon0) * _EARTH_M
    y0 = scale * _EARTH_M * math.log(math.tan(math.radians(90 + lat0) / 2))
    lon = math.degrees((x0 + imu[0, 3]) / (scale * _EARTH_M))
    lat = math.degrees(2 * math.atan(math.exp((y0 + imu[1, 3]) / (scale * _EARTH_M)))) - 90
    roll, pitch = math.atan2(imu[2, 1], imu[2, 2]), -math.asin(max(-1.0, min(1.0, imu[2, 0])))
    yaw = math.atan2(imu[1, 0], imu[0, 0])
    return " ".join([f"{lat:.14f} {lon:.14f} {imu[2, 3]:.9f} {roll:.12f} {pitch:.12f} {yaw:.12f}", *["0"] * 24])


def _points(frame: Frame) -> bytes:
    points = frame.points.detach().cpu().numpy().astype("<f4")
    if points.shape[1] < 4:
        points = np.concatenate([points, np.zeros((len(points), 4 - points.shape[1]), "<f4")], 1)
    return points[:, :4].tobytes()


def write_kitti(
    root: str | os.PathLike[str],
    sequences: Iterable[tuple[str, Iterable[Frame]]],
    *,
    layout: str = "object",
    everything: bool = False,
    calib: Mapping[str, np.ndarray] = CALIB,
    on_step: Callable[[str, int, int], None] | None = None,
) -> int:
    """Write sequences of frames below ``root/training``; return how many frames were written.

    Args:
        root: a folder; files that are there are replaced.
        sequences: (name, frames) of each; names are kept by the tracking layout, which numbers frames within them. The
            object layout numbers all frames from ``000000`` on.
        layout: ``"object"`` or ``"tracking"``.
        everything: label also what the camera does not see (KITTI does not).
        calib: matrices by KITTI's keys.
        on_step: called with ("frames", done, 0) after each frame.

    Raises:
        ValueError: a frame whose labels have no class names, or no tracks in the tracking layout; an unknown layout.
    """
    tracking = check_choice("layout", layout, ("object", "tracking")) == "tracking"
    folder, done = Path(root) / "training", 0
    for name in ("velodyne", "calib", "label_02" if tracking else "label_2", *(["oxts"] if tracking else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, frames in sequences:
        lines, motion = [], []
        for number, frame in enumerate(frames):
            if len(frame.boxes) and not frame.classes:
                raise ValueError(f"frame {frame.token!r} has boxes but no classes; KITTI's labels are words")
            if tracking and len(frame.boxes) and int(frame.track_ids.min()) < 0:
                raise ValueError(f"frame {frame.token!r} has track_ids of -1; layout='tracking' needs 0 or more")
            labels = labels_of(frame, calib, everything=everything)
            if tracking:
                (folder / "velodyne" / name).mkdir(exist_ok=True)
                write_atomic(folder / "velodyne" / name / f"{number:06d}.bin", _points(frame))
                lines += [_line(_in_frame(label, number)) for label in labels]
                motion.append(_oxts(frame.pose.numpy(), calib))
            else:
                write_atomic(folder / "velodyne" / f"{done:06d}.bin", _points(frame))
                write_atomic(folder / "calib" / f"{done:06d}.txt", _calibration(calib, False))
                text = "\n".join(map(_line, labels or [_DONT_CARE]))
                write_atomic(folder / "label_2" / f"{done:06d}.txt", text + "\n")
            done += 1
            if on_step is not None:
                on_step("frames", done, 0)
        if tracking:
            text = "\n".join(lines or [_line(_in_frame(_DONT_CARE, 0))])
            write_atomic(folder / "label_02" / f"{name}.txt", text + "\n")
            write_atomic(folder / "calib" / f"{name}.txt", _calibration(calib, True))
            write_atomic(folder / "oxts" / f"{name}.txt", "\n".join(motion) + "\n")
    return done


def _in_frame(label: Label, number: int) -> Label:
    return Label(**{**label.__dict__, "frame": number})
