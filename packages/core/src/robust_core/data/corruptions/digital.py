"""Digital: contrast, elastic transform, pixelate, JPEG; saturation and spatter as extras."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_core.data.corruptions.draws import Draws, Setting
from robust_core.data.corruptions.filters import bilinear, convolve, gaussian_blur

__all__ = ["contrast", "elastic_transform", "jpeg_compression", "pixelate", "saturate", "spatter"]


def contrast(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """(x - mean) c + mean, the mean of each channel of each image."""
    mean = x.to(torch.float64).mean((2, 3), keepdim=True).to(x.dtype)
    return (x - mean) * c[0] + mean


def _affine_positions(draws: Draws, h: int, w: int, reach: float) -> tuple[Tensor, Tensor]:
    """Return source rows and columns (B, H, W) of an affine map; three points move by U(-reach, reach)."""
    centre, side = np.array([w // 2, h // 2]), min(h, w) // 3
    start = centre + side * np.array([[1, 1], [1, -1], [-1, -1]])
    source = torch.tensor(start, dtype=torch.float64, device=draws.device)
    target = source + (draws.uniform(3, 2).to(torch.float64) * 2 - 1) * reach
    ones = torch.ones(*target.shape[:2], 1, dtype=torch.float64, device=draws.device)
    back = torch.linalg.solve(torch.cat([target, ones], 2), source.expand_as(target))  # (B, 3, 2): target -> source
    columns, rows = torch.arange(w, device=draws.device), torch.arange(h, device=draws.device)[:, None]
    x, y = (
        back[:, 0, i, None, None] * columns + back[:, 1, i, None, None] * rows + back[:, 2, i, None, None]
        for i in (0, 1)
    )
    return y, x


def elastic_transform(x: Tensor, c: tuple[float, ...], draws: Draws, setting: Setting) -> Tensor:
    """Random affine map (three points by U(-c2, c2)), then displacement c0 Gaussian(U(-1, 1), c1).

    The constants are shares of the side; the original code takes 244 for 224 (``parity=True``).
    """
    h, w = x.shape[-2:]
    side = 244 if setting.parity and setting.profile == "imagenet" else min(h, w)
    rows, columns = _affine_positions(draws, h, w, c[2] * side)
    x = bilinear(x, rows.to(x.dtype), columns.to(x.dtype), "mirror")
    if c[0] == 0:
        return x
    field = draws.uniform(2, h, w) * 2 - 1
    field = gaussian_blur(field, c[1] * side, truncate=3, mode="reflect") * (c[0] * side)
    rows = torch.arange(h, dtype=x.dtype, device=x.device)[:, None] + field[:, 0]
    columns = torch.arange(w, dtype=x.dtype, device=x.device) + field[:, 1]
    return bilinear(x, rows, columns, "reflect")


@lru_cache(maxsize=64)
def _box_rows(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return the first row and the height of each of ``m`` boxes over ``n`` rows, by Pillow's rule."""
    step = n / m
    edges = [(int((i + 0.5) * step - step / 2 + 0.5), int((i + 0.5) * step + step / 2 + 0.5)) for i in range(m)]
    first, last = torch.tensor(edges).T
    return first, last.clamp_max(n) - first


def _box_down(x: Tensor, share: float) -> Tensor:
    """Average the boxes of the last dimension, in bytes (0 .. 255)."""
    n = x.shape[-1]
    first, count = (t.to(x.device) for t in _box_rows(n, int(n * share)))
    sums = torch.nn.functional.pad(x.cumsum(-1), (1, 0))  # whole numbers below 2**24: exact in float32
    total = sums.index_select(-1, first + count).sub_(sums.index_select(-1, first))
    return total.div_(count).add_(0.5).floor_()


def pixelate(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """Average boxes down to a share c of the side, and repeat them, in bytes as Pillow's BOX filter does."""
    h, w = x.shape[-2:]
    small = _box_down((x * 255).add_(0.5).floor_(), c[0])
    small = _box_down(small.transpose(2, 3).contiguous(), c[0]).transpose(2, 3).div_(255)
    rows, columns = (
        ((torch.arange(n, device=x.device, dtype=torch.float64) + 0.5) * (m / n)).to(torch.int64)
        for n, m in ((h, small.shape[-2]), (w, small.shape[-1]))
    )
    return small.index_select(3, columns).index_select(2, rows)


def jpeg_compression(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """Baseline JPEG of quality c, by Pillow (libjpeg) image by image on the CPU, as in the original."""
    images = (x * 255).add_(0.5).to(torch.uint8).cpu().permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty_like(images)
    for row, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if x.shape[1] == 1 else image).save(file, "JPEG", quality=int(c[0]))
        with Image.open(file, formats=("JPEG",)) as decoded:
            out[row] = np.asarray(decoded).reshape(image.shape)
    return torch.from_numpy(out).to(x.device).permute(0, 3, 1, 2).contiguous().to(x.dtype).div_(255)


def saturate(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """HSV saturation c0 s + c1, clipped; grey pixels (hue 0) turn towards red where c1 > 0, as in the original."""
    if x.shape[1] != 3:
        raise ValueError(f"saturate needs 3 channels, x has {x.shape[1]}")
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    saturation = chroma / value.clamp_min(1e-12)
    wanted = (saturation * c[0] + c[1]).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device, dtype=x.dtype).reshape(1, 3, 1, 1)
    shape = torch.where(chroma > 0, (value - x) / chroma.clamp_min(1e-12), red)
    return value * (1 - wanted * shape)


def spatter(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Splashes: drops of N(c0, c1) blurred by c2 and cut at c3, as water (c5 = 0) or mud (c5 = 1).

    Mud is the original's rule. Water is reconstructed: the original shades its drops by an edge detector and
    histogram equalisation in bytes; here an emboss kernel shades them, scaled to the same peak c4.
    """
    layer = gaussian_blur(draws.normal(1, *x.shape[2:]) * c[1] + c[0], c[2])
    if c[5]:
        mask = gaussian_blur((layer > c[3]).to(x.dtype), c[4])
        mask = torch.where(mask < 0.8, 0, mask)
        colour = torch.tensor([63 / 255, 42 / 255, 20 / 255], device=x.device, dtype=x.dtype)
    else:
        layer = torch.where(layer < c[3], 0, layer)
        emboss = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
        shade = layer * (0.5 + convolve(layer, emboss, "mirror").clamp(0, 1))
        mask = shade / shade.amax((1, 2, 3), keepdim=True).clamp_min(1e-12) * c[4]
        colour = torch.tensor([175 / 255, 238 / 255, 238 / 255], device=x.device, dtype=x.dtype)
    colour = colour.mean().reshape(1, 1, 1, 1) if x.shape[1] == 1 else colour.reshape(1, 3, 1, 1)
    return (x * (1 - mask) if c[5] else x) + mask * colour
