"""KITTI's files one by one: points, calibration by key, labels, ego motion; broken ones are refused by name, line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robust_core.errors import DataMissingError, MalformedFileError
from robust_core.io.files import read_bytes

__all__ = ["CALIBRATION", "Label", "read_calibration", "read_labels", "read_oxts", "read_points", "read_text"]

_MOST_BYTES = 1 << 30
_SHAPES = {f"P{i}": (3, 4) for i in range(4)}
_SHAPES |= {"R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4), "Tr_imu_to_velo": (3, 4)}
_SPELLINGS = {"R_rect": "R0_rect", "Tr_velo_cam": "Tr_velo_to_cam", "Tr_imu_velo": "Tr_imu_to_velo"}
"""How the tracking benchmark names what the object benchmark names otherwise."""
CALIBRATION = ("P2", "R0_rect", "Tr_velo_to_cam")
"""What a frame cannot be read without."""
_FIELDS = "type truncated occluded alpha left top right bottom height width length x y z rotation_y score".split()


@dataclass(frozen=True)
class Label:
    """One line of a label file, in KITTI's own terms: rectified camera, bottom centre, ``rotation_y``."""

    kind: str
    truncated: float
    occluded: int
    alpha: float
    bbox: tuple[float, float, float, float]
    size_hwl: tuple[float, float, float]
    location: tuple[float, float, float]
    rotation_y: float
    score: float | None = None
    frame: int = -1
    track_id: int = -1


def read_text(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        DataMissingError: there is none.
        MalformedFileError: it is not text.
    """
    if not path.is_file():
        raise DataMissingError(f"{path} is missing")
    try:
        return read_bytes(path, max_bytes=_MOST_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise MalformedFileError(f"{path}: byte {error.start} is no text") from error


def _numbers(path: Path, line: int, words: list[str]) -> list[float]:
    values = []
    for i, word in enumerate(words, start=1):
        try:
            value = float(word)
        except ValueError:
            raise MalformedFileError(f"{path}:{line}: {word!r} (value {i}) is no number") from None
        if not math.isfinite(value):
            raise MalformedFileError(f"{path}:{line}: value {i} is {word}; finite numbers are needed")
        values.append(value)
    return values


def read_points(path: Path, columns: int = 4) -> np.ndarray:
    """Return (N, columns) float32 points of a ``.bin``: x, y, z, reflectance.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: it ends inside a point, or holds NaN or infinity.
    """
    if not path.is_file():
        raise DataMissingError(f"{path} is missing")
    data = read_bytes(path, max_bytes=_MOST_BYTES)
    size = 4 * columns
    if len(data) % size:
        raise MalformedFileError(
            f"{path}: {len(data)} bytes are no multiple of {size} ({columns} float32 for each point); "
            f"it ends inside point {len(data) // size}"
        )
    points = np.frombuffer(data, "<f4").reshape(-1, columns).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(points).all(1))
    if len(bad):
        raise MalformedFileError(f"{path}: point {bad[0]} holds NaN or infinity ({len(bad)} of {len(points)} do)")
    return points


def read_calibration(path: Path, needed: tuple[str, ...] = CALIBRATION) -> dict[str, np.ndarray]:
    """Return the matrices of a calibration file by key, float64; keys of the tracking files are renamed.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: a key is missing or stands twice, or a matrix has the wrong number of values.
    """
    found: dict[str, np.ndarray] = {}
    for number, line in enumerate(read_text(path), start=1):
        words = line.replace(":", " ", 1).split()
        if not words:
            continue
        key = _SPELLINGS.get(words[0], words[0])
        if key not in _SHAPES:
            continue
        if key in found:
            raise MalformedFileError(f"{path}:{number}: key {words[0]!r} stands twice")
        values, shape = _numbers(path, number, words[1:]), _SHAPES[key]
        if len(values) != shape[0] * shape[1]:
            raise MalformedFileError(
                f"{path}:{number}: key {words[0]!r} has {len(values)} values; {shape[0]} x {shape[1]} are needed"
            )
        found[key] = np.array(values).reshape(shape)
    for key in needed:
        if key not in found:
            raise MalformedFileError(f"{path}: key {key!r} is missing; found {', '.join(found) or 'none'}")
    return found


def read_labels(path: Path, *, tracking: bool = False, last: int | None = None) -> list[Label]:
    """Return the lines of a label file, ``DontCare`` included.

    Args:
        path: the file.
        tracking: each line begins with frame and track id.
        last: number of the last frame that there is; any when None.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: it is empty (KITTI writes a ``DontCare`` line where nothing is annotated), or a line has
            another number of fields, a field that is no number, or a negative size; a frame after the last, no track
            (-1, except of ``DontCare``), or a track that stood in this frame before.
    """
    lines = read_text(path)
    lead = 2 if tracking else 0
    labels, known = [], {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (15 + lead, 16 + lead):
            raise MalformedFileError(
                f"{path}:{number}: {len(words)} fields; {15 + lead} are needed, {16 + lead} with a score: "
                f"{' '.join((['frame', 'track_id'] if tracking else []) + _FIELDS[:-1])} [score]"
            )
        label = _label(path, number, words, lead)
        labels.append(label)
        if last is not None and label.frame > last:
            raise MalformedFileError(
                f"{path}:{number}: frame {label.frame}; the last sweep is {last}: are all unpacked?"
            )
        if not tracking or label.kind == "DontCare":
            continue
        if label.track_id < 0:
            raise MalformedFileError(f"{path}:{number}: {label.kind} has track {label.track_id}; 0 or more is needed")
        before = known.setdefault((label.frame, label.track_id), number)
        if before != number:
            raise MalformedFileError(
                f"{path}:{number}: track {label.track_id} stands in frame {label.frame} twice, first in line {before}"
            )
    if not labels:
        raise MalformedFileError(f"{path}:1: the file is empty; where nothing is annotated, a DontCare line is needed")
    return labels


def _label(path: Path, number: int, words: list[str], lead: int) -> Label:
    values = _numbers(path, number, [*words[:lead], *words[lead + 1 :]])
    frame, track = (int(values[0]), int(values[1])) if lead else (-1, -1)
    rest, kind = values[lead:], words[lead]
    size = (rest[7], rest[8], rest[9])
    if kind != "DontCare" and min(size) < 0:
        raise MalformedFileError(f"{path}:{number}: height, width, length are {size}; none may be negative")
    if lead and (frame < 0 or frame != values[0] or track != values[1]):
        raise MalformedFileError(f"{path}:{number}: frame {words[0]}, track {words[1]}; whole numbers are needed")
    return Label(kind, rest[0], int(rest[1]), rest[2], (rest[3], rest[4], rest[5], rest[6]), size,
                 (rest[10], rest[11], rest[12]), rest[13], rest[14] if len(rest) == 15 else None, frame,
                 track)  # fmt: skip


_EARTH_M = 6378137.0


def read_oxts(path: Path) -> np.ndarray:
    """Return (T, 4, 4) poses of the inertial unit, from its frame to that of the first line's place and the compass.

    Latitude and longitude become metres by Mercator's projection at the first latitude, as in KITTI's own tools.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: a line has fewer than six values, or one that is no number.
    """
    rows = []
    for number, line in enumerate(read_text(path), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 6:
            raise MalformedFileError(f"{path}:{number}: {len(words)} values; lat lon alt roll pitch yaw ... are needed")
        rows.append(_numbers(path, number, words)[:6])
    if not rows:
        raise MalformedFileError(f"{path}:1: the file is empty")
    lat, lon, alt, roll, pitch, yaw = np.array(rows).T
    scale = math.cos(math.radians(lat[0]))
    x = scale * np.radians(lon) * _EARTH_M
    y = scale * _EARTH_M * np.log(np.tan(np.radians(90 + lat) / 2))
    poses = np.zeros((len(lat), 4, 4))
    poses[:, 3, 3] = 1
    poses[:, :3, 3] = np.stack([x, y, alt], 1) - np.array([x[0], y[0], alt[0]])
    (cr, cp, cy), (sr, sp, sy) = (np.stack([f(a) for a in (roll, pitch, yaw)]) for f in (np.cos, np.sin))
    poses[:, 0, :3] = np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr], 1)
    poses[:, 1, :3] = np.stack([sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr], 1)
    poses[:, 2, :3] = np.stack([-sp, cp * sr, cp * cr], 1)
    return poses
