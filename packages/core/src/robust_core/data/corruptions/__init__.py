"""The fifteen common corruptions at five severities, vectorised.

Buys: corruption benchmarks on the user's own images, at any size from 8 pixels, with 1 or 3 channels, fast and
repeatable. Each image's randomness belongs to the
image: the result is a function of (image, seed, index, corruption, severity), whatever the batch, the order, the
number of workers or whatever else was corrupted.

>>> import torch
>>> from robust_core.data.corruptions import corrupt, corruptions
>>> corrupt(torch.rand(4, 3, 32, 32), "fog", 3, generator=0).shape
torch.Size([4, 3, 32, 32])
>>> len(corruptions())
15

Source: D. Hendrycks, T. Dietterich (1903.12261), section 3 and its public code's constants. The rule of each stands
at its function in ``noise``, ``blur``, ``weather`` and ``digital``. Profiles: ``"imagenet"`` (224 px), ``"cifar"``
(32 px), ``"small"`` (CIFAR's with lengths scaled by H / 32; not comparable with published figures).

Differences from the published files: motion blur there is ImageMagick's, so pixels cannot agree; ``frost`` needs the
user's photographs, and without them ``frost_procedural`` stands in under its own name; glass blur swaps pixels
(``parity=True`` copies, as there). JPEG runs in Pillow on the CPU, image by image. Bytes are cut off, not rounded,
as there. The extras (speckle, Gaussian blur, spatter, saturate) never enter a mean corruption error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_inputs
from robust_core.data.corruptions import blur, digital, noise, weather
from robust_core.data.corruptions.constants import (
    ALEXNET_ERRORS,
    CONSTANTS,
    FAMILIES,
    NOT_MONOTONE,
    PROFILES,
    choose_profile,
    constants,
)
from robust_core.data.corruptions.draws import Draws, Setting
from robust_core.errors import DataMissingError
from robust_core.random import Seed, resolve_seed

__all__ = ["ALEXNET_ERRORS", "CONSTANTS", "FAMILIES", "NOT_MONOTONE", "PROFILES", "corrupt", "corruptions"]

Corruption = Callable[[Tensor, tuple[float, ...], Draws, Setting], Tensor]
_FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "frost_procedural": weather.frost_procedural,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.plain_gaussian_blur,
    "spatter": digital.spatter,
    "saturate": digital.saturate,
}
_VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Values (pixels times channels) that are worked on together: what fits the caches, or fills the device."""
_MORE_AT_ONCE = {"glass_blur": 32, "defocus_blur": 6, "gaussian_blur": 6, "fog": 4}
_MORE_AT_ONCE |= {"elastic_transform": 8, "frost_procedural": 8, "spatter": 8}
"""Factor for corruptions of many small steps, or with convolutions, which work on 16 planes at a time."""


def corruptions(*, extras: bool = False, frost_photos: bool = False) -> tuple[str, ...]:
    """Return the names of the fifteen corruptions, in the order of the paper.

    Args:
        extras: add the four that are for validation only.
        frost_photos: the user has photographs: ``"frost"`` takes the place of ``"frost_procedural"``.
    """
    names = [name for family, members in FAMILIES.items() if extras or family != "extra" for name in members]
    return tuple("frost" if frost_photos and name == "frost_procedural" else name for name in names)


@lru_cache(maxsize=4)
def _photographs(folder: str, scale: float, height: int, width: int) -> tuple[Tensor, ...]:
    """Return the photographs of a folder (3, h, w), each at least as large as the images."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise DataMissingError(f"frost={folder!r} holds no .png or .jpg photographs")
    photos = []
    for path in files:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            factor = max(scale, height / image.height, width / image.width)
            size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
            photo = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        photos.append(torch.from_numpy(photo.transpose(2, 0, 1).copy()).to(torch.float32) / 255)
    return tuple(photos)


def _setting(name: str, x: Tensor, profile: str, parity: bool, frost: str | os.PathLike[str] | None) -> Setting:
    h, w = x.shape[-2:]
    scale = min(h, w) / 32 if profile == "small" else 1.0
    if name != "frost":
        return Setting(profile, scale, parity)
    if frost is None:
        raise DataMissingError("frost needs photographs: corrupt(..., frost='FOLDER'), or use 'frost_procedural'")
    photos = _photographs(os.fspath(frost), 1.0 if profile == "imagenet" else 0.2 * scale, h, w)
    return Setting(profile, scale, parity, tuple(p.to(x.device) for p in photos))


def _is_clean(x: Tensor) -> bool:
    """Return whether the batch is in [0, 1], in one pass (NaN fails both comparisons); else the checks name why."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        return False
    low, high = torch.aminmax(x)
    return bool((low >= 0) & (high <= 1))


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    *,
    index: Tensor | None = None,
    generator: Seed = None,
    profile: str | None = None,
    quantise: bool = True,
    parity: bool = False,
    frost: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Return corrupted images, of the shape and dtype of ``x``, in [0, 1].

    Args:
        x: (B, C, H, W) images in [0, 1], C 1 or 3, H and W at least 8.
        name: one of :func:`corruptions` (extras included), or ``"frost"`` with photographs.
        severity: 1 .. 5.
        index: (B,) positions of the images in the original data; ``0 .. B - 1`` when None.
        generator: seed of the run.
        profile: ``"imagenet"``, ``"cifar"`` or ``"small"``; by the shorter side when None: 32 is ``"cifar"``, 128 and
            more ``"imagenet"``, others ``"small"``.
        quantise: cut the result to the 256 levels of a byte, as the published files are.
        parity: keep known quirks of the original code (glass blur copies, 244 for 224, five of six frost photographs).
        frost: folder of frost photographs, for ``"frost"``.

    Raises:
        TypeError, ValueError: an argument is not allowed.
        DataMissingError: there are no frost photographs.
    """
    check_choice("name", name, tuple(_FUNCTIONS))
    if check_count("severity", severity) > 5:
        raise ValueError(f"severity={severity}: choose 1 .. 5")
    if not _is_clean(x):
        check_inputs(x, (0.0, 1.0))
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise ValueError(f"x has shape {tuple(x.shape)}; (B, 1 or 3, H, W) with sides of at least 8 pixels is needed")
    if index is None:
        index = torch.arange(len(x))
    if index.shape != (len(x),) or index.is_floating_point():
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; {len(x)} integers are needed, one for each image"
        )
    profile = choose_profile(profile, x.shape[2], x.shape[3])
    setting = _setting(name, x, profile, parity, frost)
    values = constants(name, severity, profile, min(x.shape[2:]))
    seed = resolve_seed(generator)
    at_once = _VALUES_AT_ONCE.get(x.device.type, 1 << 18) * _MORE_AT_ONCE.get(name, 1)
    rows = max(1, at_once // x[0].numel())
    out = torch.empty_like(x)
    with torch.no_grad():
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            draws = Draws(seed, index[part], f"corruption/{name}/{severity}", x.device)
            result = _FUNCTIONS[name](x[part].to(torch.float32), values, draws, setting)
            slot = out[part] if x.dtype == torch.float32 else torch.empty_like(result)
            torch.clamp(result, 0, 1, out=slot)
            if quantise:  # the last summand keeps a level that rounding put just below itself
                slot.mul_(255).add_(1e-3).floor_().div_(255)
            if x.dtype != torch.float32:
                out[part] = slot
    return out
