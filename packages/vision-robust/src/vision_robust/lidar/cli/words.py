"""Words of ``robust lidar``, checked before anything heavy is imported, and what they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robust_core.errors import DataMissingError, ResourceError
from robust_core.words import check_word

if TYPE_CHECKING:
    from robust_core.data import Dataset
    from vision_robust.lidar.sources import Source

__all__ = ["DATA_HELP", "LAYOUTS", "check_data", "check_out", "levels_of", "named_corruptions", "open_data"]

LAYOUTS = ("BNC", "BCN")
DATA_HELP = "digits, modelnet40:DIR, kitti:DIR, kitti-tracking:DIR or argoverse2:DIR."
SHAPES = ("modelnet-c", "modelnet40-c")
SCENES = ("kitti-c", "kitti-c-object")


def check_data(words: str) -> None:
    """See that ``--data`` names something that is there, without reading it."""
    scheme, _, rest = words.partition(":")
    if words == "digits":
        return
    if scheme == "modelnet40" and rest:
        if not Path(rest).expanduser().is_dir():
            raise DataMissingError(f"--data {words}: no folder {rest}")
        return
    from vision_robust.lidar.sources import check_source

    try:
        check_source(words)
    except ValueError:
        raise ValueError(f"--data {words!r}: give {DATA_HELP}") from None


def check_out(out: Path | None) -> None:
    """See that ``--out`` can be a folder."""
    if out is not None and out.exists() and not out.is_dir():
        raise ResourceError(f"--out {str(out)!r} is a file; a folder is needed")


def levels_of(words: str) -> list[int]:
    """Return severities from words."""
    low, dash, high = words.partition("-")
    try:
        return list(range(int(low), int(high) + 1)) if dash else [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"--severities {words!r}: give levels such as 1,3,5, or a span such as 1-5") from None


def open_data(
    words: str, split: str | None, classes: tuple[str, ...] | None = None, *, train: bool = False
) -> Dataset | Source:
    """Return the data that ``--data`` names; ``train`` chooses the split where none is asked for."""
    if words == "digits":
        return digits(split or ("train" if train else "test"))
    scheme, _, rest = words.partition(":")
    if scheme == "modelnet40":
        from vision_robust.lidar.modelnet import load_modelnet40

        return load_modelnet40(rest, split or ("train" if train else "test"))
    from vision_robust.lidar.sources import open_source

    return open_source(words, split=split, classes=classes)


def digits(split: str) -> Dataset:
    """Return scanned digits as a data set of clouds."""
    from robust_core.data import Dataset
    from vision_robust.lidar.digits import digit_clouds

    check_word("--split", split, ("train", "test"))
    found = digit_clouds(split)
    names = [str(i) for i in range(10)]
    return Dataset(found["x"], found["y"], name=f"digit clouds/{split}", classes=names, domain=(-1.0, 1.0))


def named_corruptions(words: str, *, shapes: bool = False) -> list[str]:
    """Return names of corruptions from names and registries; every one once.

    ``all`` are those of shapes, or of scenes; ``none`` are none.

    Raises:
        ValueError: a word is neither.
    """
    from vision_robust.lidar.corruptions import REGISTRIES, corruptions

    found: list[str] = []
    if words == "none":
        return found
    for word in words.split(","):
        if word == "all":
            found += [name for registry in (SHAPES if shapes else SCENES) for name in corruptions(registry)]
        elif word in REGISTRIES:
            found += corruptions(word)
        elif close := [name for name in corruptions() if name.endswith(f"/{word}")]:
            raise ValueError(f"--corruptions {word!r}: give {' or '.join(close)}")
        else:
            found.append(check_word("--corruptions", word, (*corruptions(), *REGISTRIES, "all")))
    return list(dict.fromkeys(found))
