"""Weather: snow, frost, fog, brightness."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_core.data.corruptions.draws import Draws, Setting
from robust_core.data.corruptions.filters import centre_zoom, gaussian_blur, line_blur, luminance, plasma

__all__ = ["brightness", "fog", "frost", "frost_procedural", "frost_texture", "snow"]


def snow(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Whiten the image and add two layers of motion-blurred flakes.

    The layer is N(c0, c1) magnified c2 times, zero below c3, stored in bytes, blurred along a line (c4, c5) at an
    angle from U(-135, -45) degrees; then x <- c6 x + (1 - c6) max(x, 1.5 grey(x) + .5), plus the layer and the layer
    turned by 180 degrees.
    """
    layer = draws.normal(1, *x.shape[2:]) * c[1] + c[0]
    layer = centre_zoom(layer, c[2])
    layer = torch.where(layer < c[3], 0, layer).clamp(0, 1)
    layer = torch.floor(layer * 255) / 255
    layer = line_blur(layer, c[4], c[5], draws.uniform(1)[:, 0] * 90 - 135)
    layer = torch.floor(layer * 255 + 0.5) / 255
    white = torch.maximum(x, luminance(x) * 1.5 + 0.5)
    return c[6] * x + (1 - c[6]) * white + layer + layer.flip(2, 3)


def frost(x: Tensor, c: tuple[float, ...], draws: Draws, setting: Setting) -> Tensor:
    """c0 x + c1 (random crop of a frost photograph); the original draws among five of its six photographs."""
    h, w = x.shape[-2:]
    photos = setting.frost[:5] if setting.parity and len(setting.frost) > 5 else setting.frost
    u = draws.uniform(3).tolist()
    crops = []
    for which, top, left in u:
        photo = photos[min(int(which * len(photos)), len(photos) - 1)]
        top, left = int(top * (photo.shape[1] - h + 1)), int(left * (photo.shape[2] - w + 1))
        crops.append(photo[:, top : top + h, left : left + w])
    layer = torch.stack(crops)
    return c[0] * x + c[1] * (luminance(layer) if x.shape[1] == 1 else layer)


def frost_texture(draws: Draws, h: int, w: int) -> Tensor:
    """Return (B, 3, H, W) procedural frost: bluish-white ridges of plasma of uneven thickness.

    No photograph is shipped; the brightness (mean about .5) is that of a frosted window, the shapes are not.
    """
    n = 1 << (max(h, w) - 1).bit_length()
    fine = plasma(draws.uniform(n, n), 1.5)[:, None, :h, :w]
    thick = plasma(draws.uniform(n, n), 2.2)[:, None, :h, :w]
    ridges = 1 - (2 * fine - 1).abs()
    ice = gaussian_blur(0.3 + 0.7 * ridges * (0.5 + 0.5 * thick), 0.6)
    tint = torch.tensor([0.88, 0.95, 1.0], device=ice.device).reshape(1, 3, 1, 1)
    return ice * tint


def frost_procedural(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """c0 x + c1 (procedural frost): our stand-in for photographs, under a name of its own."""
    layer = frost_texture(draws, *x.shape[-2:])
    layer = luminance(layer) if x.shape[1] == 1 else layer
    return layer.mul_(c[1]).add_(c[0] * x)


def fog(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """(x + c0 plasma(decay c1)) max(x) / (max(x) + c0), on a map of the next power of two."""
    h, w = x.shape[-2:]
    n = 1 << (max(h, w) - 1).bit_length()
    top = x.amax((1, 2, 3), keepdim=True)
    mist = plasma(draws.uniform(n, n), c[1])[:, None, :h, :w]
    return (x + c[0] * mist).mul_(top / (top + c[0]))


def brightness(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """HSV value + c: hue and saturation stay, so every channel is scaled by the same factor."""
    value = x.amax(1, keepdim=True)
    raised = (value + c[0]).clamp(0, 1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised.expand_as(x))
