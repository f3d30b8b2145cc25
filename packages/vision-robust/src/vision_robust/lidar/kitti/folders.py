"""KITTI's object and tracking folders, read as they are unpacked."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from robust_core.checks import check_choice
from robust_core.errors import DataMissingError, MalformedFileError
from vision_robust.lidar.kitti.frames import IMAGE_SIZE, build_frame, in_image
from vision_robust.lidar.kitti.text import (
    CALIBRATION,
    Label,
    read_calibration,
    read_labels,
    read_oxts,
    read_points,
    read_text,
)  # fmt: skip
from vision_robust.lidar.types import Frame

__all__ = ["CLASSES", "KittiObject", "KittiSequence", "KittiTracking"]

CLASSES = ("Car", "Pedestrian", "Cyclist")
_HOW = "from https://www.cvlibs.net/datasets/kitti (or `robust lidar simulate`)"
_FRAME_S = 0.1


def _split_folder(root: str | os.PathLike[str], split: str) -> Path:
    check_choice("split", split, ("training", "testing"))
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataMissingError(f"root={str(root)!r} is no folder; KITTI is {_HOW}")
    for folder in (path / split, path / "object" / split, path / "tracking" / split, path):
        if (folder / "velodyne").is_dir():
            return folder
    raise DataMissingError(f"{path / split / 'velodyne'} is missing: unpack the velodyne point clouds, {_HOW}")


def _image_size(folder: Path, stem: str) -> tuple[int, int]:
    """Return width and height of the image, from its header where it is there."""
    path = folder / f"{stem}.png"
    if not path.is_file():
        return IMAGE_SIZE
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        raise MalformedFileError(f"{path} is no PNG image")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


class KittiObject:
    """The object benchmark: ``training/{velodyne,label_2,calib}/ID.*``, a list of frames.

    Args:
        root: the folder that holds ``training`` and ``testing``.
        split: ``"training"``, or ``"testing"``, which has no labels.
        classes: kinds to find; a label is a position among them.
        ids: names of frames, or a file with one on each line (such as ``ImageSets/val.txt``); all when None.
        camera_view: keep only the points that the left colour camera sees: nothing else is annotated.

    Raises:
        DataMissingError: a folder or file is not there.
        MalformedFileError: a file breaks its format; its name and the line are told.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "training",
        *,
        classes: Sequence[str] = CLASSES,
        ids: Sequence[str] | str | os.PathLike[str] | None = None,
        camera_view: bool = True,
    ) -> None:
        self.folder, self.classes = _split_folder(root, split), tuple(classes)
        self.labelled, self.camera_view = split == "training", camera_view
        if isinstance(ids, str | os.PathLike):
            ids = [line.strip() for line in read_text(Path(ids)) if line.strip()]
        self.ids = tuple(sorted(p.stem for p in (self.folder / "velodyne").glob("*.bin")) if ids is None else ids)
        if not self.ids:
            if next((self.folder / "velodyne").glob("*/*.bin"), None) is not None:
                raise DataMissingError(f"{self.folder / 'velodyne'} holds sequences: it is kitti-tracking:{root}")
            raise DataMissingError(f"{self.folder / 'velodyne'} holds no .bin files; KITTI is {_HOW}")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Frame:
        name = self.ids[i]
        calib = read_calibration(self.folder / "calib" / f"{name}.txt")
        points = read_points(self.folder / "velodyne" / f"{name}.bin")
        labels = read_labels(self.folder / "label_2" / f"{name}.txt") if self.labelled else []
        frame = build_frame(points, labels, calib, self.classes, token=name)
        if not self.camera_view:
            return frame
        size = _image_size(self.folder / "image_2", name)
        return frame.with_points(frame.points[in_image(frame.points, frame.calib, size)])


class KittiSequence:
    """One sequence of the tracking benchmark, a list of frames with track ids and ego motion; see KittiTracking."""

    def __init__(
        self, folder: Path, name: str, classes: Sequence[str], labelled: bool, camera_view: bool, ego_motion: bool
    ) -> None:
        self.name, self.classes, self.camera_view = name, tuple(classes), camera_view
        self._folder = folder
        self._files = sorted((folder / "velodyne" / name).glob("*.bin"))
        if not self._files:
            raise DataMissingError(f"{folder / 'velodyne' / name} holds no .bin files; KITTI is {_HOW}")
        for path in self._files:
            if not path.stem.isdigit():
                raise MalformedFileError(f"{path}: the name of a sweep is its number, such as 000000.bin")
        last = max(int(path.stem) for path in self._files)
        needed = (*CALIBRATION, "Tr_imu_to_velo") if ego_motion else CALIBRATION
        self.calib = read_calibration(folder / "calib" / f"{name}.txt", needed)
        self._labels: dict[int, list[Label]] = {}
        path = folder / "label_02" / f"{name}.txt"
        for label in read_labels(path, tracking=True, last=last) if labelled else []:
            self._labels.setdefault(label.frame, []).append(label)
        self._poses = self._ego_motion() if ego_motion else None

    def _ego_motion(self) -> np.ndarray:
        """Return (T, 4, 4) from the sensor's frame to that of its first sweep."""
        path = self._folder / "oxts" / f"{self.name}.txt"
        if not path.is_file():
            raise DataMissingError(f"{path} is missing: tracks need the car's motion; or give ego_motion=False")
        imu = read_oxts(path)
        from_sensor = np.linalg.inv(np.vstack([self.calib["Tr_imu_to_velo"], [0, 0, 0, 1]]))
        poses = imu @ from_sensor
        return np.linalg.inv(poses[0]) @ poses

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Frame:
        path = self._files[i]
        number = int(path.stem)
        if self._poses is not None and number >= len(self._poses):
            raise MalformedFileError(
                f"{self._folder / 'oxts' / self.name}.txt:{len(self._poses)}: it ends before frame {number}"
            )
        pose = None if self._poses is None else self._poses[number]
        frame = build_frame(read_points(path), self._labels.get(number, []), self.calib, self.classes, pose=pose,
                            time_s=number * _FRAME_S, token=f"{self.name}/{path.stem}")  # fmt: skip
        if not self.camera_view:
            return frame
        size = _image_size(self._folder / "image_02" / self.name, path.stem)
        return frame.with_points(frame.points[in_image(frame.points, frame.calib, size)])


class KittiTracking:
    """The tracking benchmark: a list of sequences, each a list of frames, one for each sweep.

    The sensor skipped sweeps (177 to 180 of sequence ``0001``) whose frames are annotated nevertheless; those labels
    are left out. A label after the last sweep is refused, and so is a track that stands in one frame twice.

    Args:
        root: the folder that holds ``training`` and ``testing``.
        split: ``"training"``, or ``"testing"``, which has no labels.
        classes: kinds to find.
        sequences: names such as ``"0000"``; all when None.
        camera_view: keep only the points that the left colour camera sees: nothing else is annotated.
        ego_motion: read ``oxts`` and give each frame its pose; without it every pose is the identity, and tracks
            drift with the car.

    Raises:
        DataMissingError: a folder or file is not there.
        MalformedFileError: a file breaks its format; its name and the line are told.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "training",
        *,
        classes: Sequence[str] = CLASSES,
        sequences: Sequence[str] | None = None,
        camera_view: bool = True,
        ego_motion: bool = True,
    ) -> None:
        self.folder, self.classes = _split_folder(root, split), tuple(classes)
        found = sorted(p.name for p in (self.folder / "velodyne").iterdir() if p.is_dir())
        self.names = tuple(found if sequences is None else sequences)
        if not self.names:
            if next((self.folder / "velodyne").glob("*.bin"), None) is not None:
                raise DataMissingError(f"{self.folder / 'velodyne'} holds no sequences but frames: it is kitti:{root}")
            raise DataMissingError(f"{self.folder / 'velodyne'} holds no sequences; KITTI is {_HOW}")
        self._options = (split == "training", camera_view, ego_motion)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[KittiSequence]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> KittiSequence:
        return KittiSequence(self.folder, self.names[i], self.classes, *self._options)
