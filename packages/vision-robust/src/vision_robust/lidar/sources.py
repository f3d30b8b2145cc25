"""Data from words: ``kitti:FOLDER``, ``kitti-tracking:FOLDER``, ``argoverse2:FOLDER``, or one sweep in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_core.errors import DataMissingError

if TYPE_CHECKING:
    from vision_robust.lidar.types import Frame

__all__ = ["SCHEMES", "Source", "check_source", "open_source"]

SCHEMES = ("kitti", "kitti-tracking", "argoverse2")
_FILES = (".bin", ".npy")


@dataclass(frozen=True)
class Source:
    """What words meant.

    Attributes:
        words: as they were given.
        classes: names of the labels.
        sequences: (name, frames) of each sequence; frames are read when they are asked for.
        tracked: whether frames follow each other and boxes have identities.
    """

    words: str
    classes: tuple[str, ...]
    sequences: Sequence[tuple[str, Sequence[Frame]]]
    tracked: bool

    def __len__(self) -> int:
        return sum(len(frames) for _, frames in self.sequences)


def check_source(words: str) -> tuple[str, Path]:
    """Return scheme and path, without importing torch or reading a file.

    Raises:
        ValueError: words of no known form.
        DataMissingError: there is nothing at the path.
    """
    scheme, colon, rest = words.partition(":")
    if not colon and Path(words).suffix in _FILES:
        scheme, rest = "file", words
    elif scheme not in SCHEMES or not rest:
        known = ", ".join(f"{name}:FOLDER" for name in SCHEMES)
        raise ValueError(f"data={words!r}: give {known}, or a sweep in a .bin or .npy file")
    path = Path(rest).expanduser()
    if not path.exists():
        raise DataMissingError(f"data={words!r}: {path} is not there")
    return scheme, path


def open_source(words: str, *, split: str | None = None, classes: Sequence[str] | None = None) -> Source:
    """Return the data that ``words`` name.

    Args:
        words: ``kitti:FOLDER`` ...; a ``.bin`` holds rows of four float32, a ``.npy`` an array (N, 3 or more).
        split: ``training`` or ``testing`` of KITTI, ``train``, ``val`` or ``test`` of Argoverse 2; its usual one when
            None.
        classes: names to find; all of the data set's when None.

    Raises:
        ValueError, DataMissingError, MalformedFileError: words, folders or files that are not right.
    """
    scheme, path = check_source(words)
    options: dict[str, Any] = {} if classes is None else {"classes": tuple(classes)}
    if scheme == "file":
        frame = _file(path)
        return Source(words, (), [(path.stem, [frame])], False)
    if split is not None:
        options["split"] = split
    if scheme == "kitti":
        from vision_robust.lidar.kitti import KittiObject

        data = KittiObject(path, **options)
        return Source(words, data.classes, [(path.name, _lazy(data))], False)
    if scheme == "kitti-tracking":
        from vision_robust.lidar.kitti import KittiTracking

        tracks = KittiTracking(path, **options)
        return Source(words, tracks.classes, [(s.name, _lazy(s)) for s in tracks], True)
    from vision_robust.lidar.argoverse import Argoverse2

    logs = Argoverse2(path, **options)
    return Source(words, logs.classes, [(log.name, _lazy(log)) for log in logs], True)


class _Lazy(Sequence):
    """A list of frames that are read one by one."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._frames[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        return self._frames[i % len(self)]


def _lazy(frames: Any) -> Sequence[Frame]:
    return _Lazy(frames)


def _file(path: Path) -> Frame:
    import numpy as np
    import torch

    from robust_core.errors import MalformedFileError
    from vision_robust.lidar.kitti.text import read_points
    from vision_robust.lidar.types import Frame

    if path.suffix == ".bin":
        return Frame(torch.from_numpy(read_points(path)), token=path.stem)
    if not path.is_file():
        raise DataMissingError(f"{path} is missing")
    try:
        points = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise MalformedFileError(f"{path} is no array: {error}") from error
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind != "f":
        raise MalformedFileError(f"{path}: {points.dtype} {points.shape}; floating point (N, 3 or more) is needed")
    if not np.isfinite(points).all():
        raise MalformedFileError(f"{path} holds NaN or infinity")
    return Frame(torch.from_numpy(points.astype(np.float32)), token=path.stem)
