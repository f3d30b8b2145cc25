"""Pictures of the concept from the user's disk, for attackers without the model before the erasure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_unlearn.pipeline import TextToImage
from robust_core.errors import DataMissingError, MalformedFileError

__all__ = ["SUFFIXES", "read_targets"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_targets(path: str | os.PathLike[str], n: int, parts: TextToImage) -> Tensor:
    """Return (n, C, H, W) pictures in [0, 1] of the size that a pipeline draws, on the CPU.

    Args:
        path: one picture, which serves for every prompt, or a folder with one for each prompt in the order of names.
        n: prompts.
        parts: the pipeline.

    Raises:
        DataMissingError: nothing there.
        MalformedFileError: a file that is no picture.
        ValueError: neither one picture nor n.
    """
    place = Path(path)
    if not place.exists():
        raise DataMissingError(f"{place}: no such picture or folder of pictures")
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
    if len(files) not in (1, n):
        raise ValueError(f"{place}: {len(files)} pictures for {n} prompts; one each is needed, or one for all")
    channels, (_, height, width) = parts.pipe.vae.config.in_channels, parts.latent_shape
    scale = getattr(parts.pipe, "vae_scale_factor", 8)
    found = [_read(file, channels, height * scale, width * scale) for file in files]
    return torch.stack(found * (n if len(found) == 1 else 1))


def _read(file: Path, channels: int, height: int, width: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MalformedFileError(f"{file} is no picture that can be read: {error}") from error
    values = np.asarray(fitted, dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(height, width, channels).transpose(2, 0, 1).copy())
