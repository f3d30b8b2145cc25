"""Argoverse 2, sensor data set, in its own folders: a list of logs, each a list of frames in the car's frame.

``LOG/sensors/lidar/TIMESTAMP.feather``, ``LOG/annotations.feather``, ``LOG/city_SE3_egovehicle.feather``. Coordinates
are half floats there and float32 here; points of both stacked sensors come in the car's frame, as the boxes do.
Intensity, a byte there, is divided by 255; a fifth column is the laser's number, a sixth seconds since the sweep began.

Needs pyarrow (extra ``lidar``), nothing else. Source: B. Wilson and others 2021, 2301.00493, and its description of the
format; licence of the data: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_core.errors import DataMissingError, MalformedFileError, optional_import
from vision_robust.lidar.types import Frame

__all__ = ["CLASSES", "Argoverse2", "Argoverse2Log"]

CLASSES = (
    "REGULAR_VEHICLE PEDESTRIAN BICYCLIST MOTORCYCLIST WHEELED_RIDER BOLLARD CONSTRUCTION_CONE SIGN "
    "CONSTRUCTION_BARREL STOP_SIGN MOBILE_PEDESTRIAN_CROSSING_SIGN LARGE_VEHICLE BUS BOX_TRUCK TRUCK "
    "VEHICULAR_TRAILER TRUCK_CAB "
    "SCHOOL_BUS ARTICULATED_BUS MESSAGE_BOARD_TRAILER BICYCLE MOTORCYCLE WHEELED_DEVICE WHEELCHAIR STROLLER DOG"
).split()
"""The evaluated categories, in the order of the benchmark."""
_HOW = "from https://www.argoverse.org/av2.html (sensor data set)"
_SWEEP = ("x", "y", "z", "intensity", "laser_number", "offset_ns")
_QUATERNION = ("qw", "qx", "qy", "qz")
_PLACE = ("tx_m", "ty_m", "tz_m")
_SIZE = ("length_m", "width_m", "height_m")
_BOXES = ("timestamp_ns", "track_uuid", "category", *_SIZE, *_QUATERNION, *_PLACE, "num_interior_pts")


def _table(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """Return columns of a feather file as numpy arrays.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: it is no feather file, lacks a column, or has a row without a value.
    """
    if not path.is_file():
        raise DataMissingError(f"{path} is missing; Argoverse 2 is {_HOW}")
    feather = optional_import("pyarrow.feather", extra="lidar", package="vision-robust")
    arrow = optional_import("pyarrow", extra="lidar", package="vision-robust")
    try:
        table = feather.read_table(path)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise MalformedFileError(f"{path} is no whole feather file: {' '.join(str(error).split())[:200]}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise MalformedFileError(f"{path}: column {missing[0]!r} is missing; found {', '.join(table.column_names)}")
    found = {}
    for name in columns:
        column = table.column(name)
        if column.null_count:
            row = column.to_pylist().index(None)
            raise MalformedFileError(f"{path}: row {row}, column {name!r} has no value")
        found[name] = column.to_numpy()
    return found


def _numbers(path: Path, table: dict[str, Any], columns: Sequence[str]) -> np.ndarray:
    """Return columns as (N, len(columns)) finite float64."""
    for name in columns:
        if table[name].dtype.kind not in "fiu":
            raise MalformedFileError(f"{path}: column {name!r} holds {table[name].dtype}; numbers are needed")
    values = np.stack([table[name].astype(np.float64) for name in columns], 1)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise MalformedFileError(f"{path}: row {row}, column {columns[column]!r} is NaN or infinite")
    return values


def _rotations(quaternions: np.ndarray) -> np.ndarray:
    """Return (N, 3, 3) rotations of quaternions (N, 4), the real part first, of any length."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))  # fmt: skip
    return np.stack(rows, 1).reshape(-1, 3, 3)


class Argoverse2Log:
    """One log: a list of annotated frames; see :class:`Argoverse2`."""

    def __init__(self, folder: Path, classes: Sequence[str], labelled: bool) -> None:
        self.folder, self.name, self.classes, self.labelled = folder, folder.name, tuple(classes), labelled
        files = sorted((folder / "sensors" / "lidar").glob("*.feather"))
        wrong = [p for p in files if not p.stem.isdigit()]
        if wrong:
            raise MalformedFileError(f"{wrong[0]}: the name of a sweep is its time in ns, such as 315968867659956000")
        self.times_ns = tuple(sorted(int(p.stem) for p in files))
        if not self.times_ns:
            raise DataMissingError(f"{folder / 'sensors' / 'lidar'} holds no .feather files; Argoverse 2 is {_HOW}")

    @cached_property
    def _poses(self) -> dict[int, np.ndarray]:
        path = self.folder / "city_SE3_egovehicle.feather"
        table = _table(path, ("timestamp_ns", *_QUATERNION, *_PLACE))
        turns, places = _rotations(_numbers(path, table, _QUATERNION)), _numbers(path, table, _PLACE)
        poses = np.tile(np.eye(4), (len(turns), 1, 1))
        poses[:, :3, :3], poses[:, :3, 3] = turns, places
        return dict(zip(table["timestamp_ns"].tolist(), poses, strict=True))

    @cached_property
    def _annotations(self) -> dict[str, Any]:
        """Return the boxes of the whole log, one array for each field, sorted by nothing."""
        path = self.folder / "annotations.feather"
        table = _table(path, _BOXES)
        turns = _rotations(_numbers(path, table, _QUATERNION))
        yaw = np.arctan2(turns[:, 1, 0], turns[:, 0, 0])
        size = _numbers(path, table, _SIZE)
        bad = np.flatnonzero((size < 0).any(1))
        if len(bad):
            raise MalformedFileError(f"{path}: row {bad[0]} has a negative size")
        seen: dict[tuple[int, str], int] = {}
        for row, (time, uuid) in enumerate(zip(table["timestamp_ns"].tolist(), table["track_uuid"], strict=True)):
            if time not in self._poses:
                raise MalformedFileError(
                    f"{path}: row {row}, timestamp_ns {time} is no time of this log, as its poses tell"
                )
            if (before := seen.setdefault((time, uuid), row)) != row:
                raise MalformedFileError(
                    f"{path}: row {row}, track_uuid {uuid} stands at {time} twice, first in row {before}"
                )
        tracks = {uuid: i for i, uuid in enumerate(sorted(set(table["track_uuid"].tolist())))}
        known = {name: i for i, name in enumerate(self.classes)}
        return {
            "time": table["timestamp_ns"],
            "boxes": np.column_stack([_numbers(path, table, _PLACE), size, yaw]).astype(np.float32),
            "label": np.array([known.get(c, -1) for c in table["category"]], np.int64),
            "track": np.array([tracks[u] for u in table["track_uuid"]], np.int64),
            "n_points": _numbers(path, table, ("num_interior_pts",))[:, 0].astype(np.int64),
        }

    def __len__(self) -> int:
        return len(self.times_ns)

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Frame:
        time = self.times_ns[i]
        path = self.folder / "sensors" / "lidar" / f"{time}.feather"
        sweep = _numbers(path, _table(path, _SWEEP), _SWEEP)
        scale = np.array([1, 1, 1, 1 / 255, 1, 1e-9])
        if time not in self._poses:
            raise MalformedFileError(f"{self.folder / 'city_SE3_egovehicle.feather'}: no pose at {time}")
        frame = Frame(
            torch.from_numpy((sweep * scale).astype(np.float32)),
            classes=self.classes,
            pose=torch.from_numpy(self._poses[time]),
            time_s=(time - self.times_ns[0]) * 1e-9,
            token=f"{self.name}/{time}",
        )
        if not self.labelled:
            return frame
        a = self._annotations
        mine = (a["time"] == time) & (a["label"] >= 0)
        n_points = torch.from_numpy(a["n_points"][mine])
        return Frame(
            frame.points, torch.from_numpy(a["boxes"][mine]), torch.from_numpy(a["label"][mine]),
            torch.from_numpy(a["track"][mine]), n_points == 0, {"n_points": n_points}, self.classes,
            pose=frame.pose, time_s=frame.time_s, token=frame.token,
        )  # fmt: skip


class Argoverse2:
    """A split of the sensor data set: a list of logs, each a list of frames, one for each sweep.

    Excerpts of a log keep its whole table of annotations beside a few sweeps; boxes at other times of the log are left
    out. A box at a time that the log's poses do not know is refused, and so is a track that stands at one time twice.

    Args:
        root: the folder that holds ``train``, ``val`` and ``test``, or one with logs in it.
        split: ``"train"``, ``"val"`` or ``"test"`` (without annotations).
        classes: categories to find; a label is a position among them. Boxes without points in them are marked
            ``ignore``.
        logs: names of logs; all when None.

    Raises:
        DataMissingError: a folder or file is not there.
        MalformedFileError: a file breaks its format; its name, the column and the row are told.
        MissingExtraError: pyarrow is not installed (when a frame is read).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "val",
        *,
        classes: Sequence[str] = CLASSES,
        logs: Sequence[str] | None = None,
    ) -> None:
        path = Path(root).expanduser()
        folder = path / split if (path / split).is_dir() else path
        found = sorted(p.parents[1].name for p in folder.glob("*/sensors/lidar")) if folder.is_dir() else []
        self.folder, self.classes, self._labelled = folder, tuple(classes), split != "test"
        self.names = tuple(found if logs is None else logs)
        if not self.names:
            raise DataMissingError(f"{folder} holds no LOG/sensors/lidar; Argoverse 2 is {_HOW}")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Argoverse2Log]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Argoverse2Log:
        return Argoverse2Log(self.folder / self.names[i], self.classes, self._labelled)
