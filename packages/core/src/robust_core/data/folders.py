"""Image folders: one sub-folder for each class, read when they are needed.

Buys: data sets of any size by their path. Preprocessing is explicit and recorded: ``size=None`` takes
images as they are stored (all must have one size); ``size=s`` resizes the shorter side to ``round(s * 256 /
224)`` (bilinear with antialiasing) and crops the centre. Images that are ``s`` by ``s`` already are never
touched: preparing ImageNet-C a second time is a known way to wrong figures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_core.checks import check_choice
from robust_core.data.dataset import Dataset, to_unit_tensor
from robust_core.errors import DataMissingError, UntrustedFileError

__all__ = ["FolderImages", "image_folder", "is_image_folder"]

FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "BMP": (".bmp",), "WEBP": (".webp",), "PPM": (".pgm", ".ppm")}
_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}


class FolderImages:
    """Image files as lazily read inputs.

    Args:
        files: the image files.
        size: side of the square images that are returned, or None to keep them as stored.
        mode: ``"RGB"`` or ``"L"``.
    """

    def __init__(self, files: list[Path], size: int | None, mode: str) -> None:
        self.files, self.size, self.mode = files, size, mode
        self.stored = self._open(0).size if size is None else None

    def __len__(self) -> int:
        return len(self.files)

    def _open(self, position: int) -> Image.Image:
        path = self.files[position]
        try:
            with Image.open(path, formats=tuple(FORMATS)) as image:
                return image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UntrustedFileError(f"{path} could not be read as an image: {error}") from error

    def read(self, position: int) -> Tensor:
        """Return one image (C, H, W) in [0, 1]."""
        image = self._open(position)
        if self.size is None:
            if image.size != self.stored:
                raise ValueError(
                    f"{self.files[position]} is {image.size[0]}x{image.size[1]}, others are "
                    f"{self.stored[0]}x{self.stored[1]}; give size=, e.g. load(path, size=224)"  # pyright: ignore
                )
        elif image.size != (self.size, self.size):
            image = resize_and_crop(image, self.size)
        return to_unit_tensor(image)

    def identify(self, position: int) -> bytes:
        """Return the bytes of the file."""
        return self.files[position].read_bytes()


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``round(size * 256 / 224)`` and take the central ``size`` x ``size`` pixels."""
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _classes(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _split_folder(path: Path, split: str) -> Path | None:
    return next((path / name for name in SPLITS.get(split, ()) if (path / name).is_dir()), None)


def is_image_folder(path: Path) -> bool:
    """Return whether ``path`` holds class folders of images, or splits of them."""
    folders = [f for split in SPLITS if (f := _split_folder(path, split))] or [path]
    return any(next(iter(_images(c)), None) for folder in folders for c in _classes(folder))


def image_folder(path: Path, split: str | None, *, size: int | None = None, mode: str = "RGB") -> Dataset:
    """Return the images of ``path/CLASS/*`` or ``path/SPLIT/CLASS/*``.

    Args:
        path: the folder.
        split: ``"train"``, ``"test"`` (also finds ``val``) or ``"all"``; None is the training part where
            there are parts, else everything.
        size: see the module's text.
        mode: ``"RGB"`` or ``"L"`` (grey).

    Raises:
        DataMissingError: the split is not there.
        ValueError: a class is empty, or an argument is not allowed.
    """
    check_choice("mode", mode, ("RGB", "L"))
    parts = {name: folder for name in SPLITS if (folder := _split_folder(path, name))}
    wanted = check_choice("split", split or ("train" if parts else "all"), ("train", "test", "all"))
    if wanted != "all" and wanted not in parts:
        raise DataMissingError(f"{path} has no {wanted!r} folder; use split='all' and divide it yourself: subset(rows)")
    roots = list(parts.values()) if parts and wanted == "all" else [parts.get(wanted, path)]
    names = sorted({c.name for folder in roots for c in _classes(folder)})
    files: list[Path] = []
    labels: list[int] = []
    for folder in roots:
        for c in _classes(folder):
            found = _images(c)
            if not found:
                raise ValueError(f"class {c.name!r} in {folder} has no image ({', '.join(_SUFFIXES)})")
            files += found
            labels += [names.index(c.name)] * len(found)
    if not files:
        raise DataMissingError(f"{path} holds no class folders with images")
    how = "as stored" if size is None else f"shorter side to {round(size * 256 / 224)} (bilinear), centre crop {size}"
    return Dataset(
        FolderImages(files, size, mode),
        torch.from_numpy(np.array(labels, dtype=np.int64)),
        name=path.name if wanted == "all" else f"{path.name}/{wanted}",
        classes=names,
        preprocessing=f"{mode}, {how}",
    )
