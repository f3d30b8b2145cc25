"""Blurs: defocus, glass, motion, zoom; Gaussian as an extra."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from robust_core.data.corruptions.constants import CONSTANTS
from robust_core.data.corruptions.draws import Draws, Setting
from robust_core.data.corruptions.filters import centre_zoom, convolve, disk, gaussian_blur, line_blur, soft_disk

__all__ = ["defocus_blur", "glass_blur", "motion_blur", "plain_gaussian_blur", "zoom_blur"]


@lru_cache(maxsize=64)
def _defocus_kernel(c: tuple[float, ...], scale: float, small: bool) -> Tensor:
    if not small:
        return disk(*c)
    # a disk on a grid vanishes below one pixel, so the small profile takes a soft disk whose second moment is that
    # of the 32-pixel kernel, scaled; the running maximum undoes the dip at severity 4 that the original's grid makes
    moments = []
    for constant in CONSTANTS["defocus_blur"][1]:
        kernel = disk(*constant)
        line = torch.arange(len(kernel)) - len(kernel) // 2
        moments.append(float((kernel.sum(1) * line**2).sum()))
        if constant == c:
            break
    return soft_disk(2 * math.sqrt(max(moments)) * scale)


def defocus_blur(x: Tensor, c: tuple[float, ...], draws: Draws, setting: Setting) -> Tensor:
    """Correlate with a disk of radius c0, smoothed by a Gaussian of width c1."""
    kernel = _defocus_kernel(c, setting.scale, setting.profile == "small")
    return convolve(x, kernel, "mirror")


@lru_cache(maxsize=16)
def _wavefronts(h: int, w: int, d: int) -> tuple[Tensor, tuple[int, ...]]:
    """Order the displacement steps so that those of one front touch disjoint pixels.

    The original visits pixels from the bottom right, row by row. A step touches its pixel and one at most ``d`` rows
    and columns away, so two steps conflict only within ``2 d`` rows and columns. The front
    ``(2 d + 1) (row from the bottom) + (column from the right)`` puts conflicting steps into fronts in their own order.
    """
    rows, columns = torch.arange(h - d, d, -1), torch.arange(w - d, d, -1)
    front = (torch.arange(len(rows))[:, None] * (2 * d + 1) + torch.arange(len(columns))).reshape(-1)
    pixel = (rows[:, None] * w + columns).reshape(-1)
    order = torch.argsort(front, stable=True)
    return pixel[order], tuple(torch.bincount(front).tolist())


def _displace(source: Tensor, offsets: Tensor, w: int, d: int, h: int, parity: bool) -> Tensor:
    """Apply one pass to (B, H W) source positions; ``offsets`` (B, steps) in the order of the fronts."""
    pixel, sizes = _wavefronts(h, w, d)
    pixel = pixel.to(source.device)
    target = pixel + offsets
    start = 0
    for size in sizes:
        if not size:
            continue
        here, there = pixel[start : start + size], target[:, start : start + size]
        start += size
        arriving = source.gather(1, there)
        if not parity:
            source.scatter_(1, there, source[:, here])
        source[:, here] = arriving
    return source


def glass_blur(x: Tensor, c: tuple[float, ...], draws: Draws, setting: Setting) -> Tensor:
    """Blur by a Gaussian c0, swap pixels locally (distance c1, c2 passes), blur again.

    The original assigns a view and so copies where it means to swap: ``parity=True`` keeps that.
    """
    b, channels, h, w = x.shape
    sigma, d, passes = c[0], max(1, round(c[1])), int(c[2])
    blurred = torch.floor(gaussian_blur(x, sigma) * 255 + 1e-3)
    source = torch.arange(h * w, device=x.device).repeat(b, 1)
    for _ in range(passes):
        n = len(_wavefronts(h, w, d)[0])
        down, right = ((draws.uniform(n) * (2 * d)).to(torch.int64).clamp_max(2 * d - 1) - d for _ in range(2))
        source = _displace(source, down * w + right, w, d, h, setting.parity)
    moved = blurred.reshape(b, channels, -1).gather(2, source[:, None].expand(b, channels, -1)).reshape(x.shape)
    return gaussian_blur(moved / 255, sigma)


def motion_blur(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """One-sided Gaussian (width 2 c0 + 1, sigma c1) along a line at an angle from U(-45, 45) degrees."""
    return line_blur(x, c[0], c[1], draws.uniform(1)[:, 0] * 90 - 45)


def zoom_blur(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """Mean of x and its centre-zooms by 1, 1 + c1, ... below c0 (numpy's arange, as in the original)."""
    factors = np.arange(1, c[0], c[1]).tolist()
    total = x + x  # itself, and its zoom by 1
    for factor in factors[1:]:
        total = total + centre_zoom(x, factor)
    return total / (len(factors) + 1)


def plain_gaussian_blur(x: Tensor, c: tuple[float, ...], _: Draws, __: Setting) -> Tensor:
    """Gaussian of width c."""
    return gaussian_blur(x, c[0])
