"""Filters that corruptions share: borders, blurs, zooms and bilinear sampling, batched.

Every result belongs to its image alone: sums run over filter taps or matrix rows in an order that the batch does not
change. Border names follow scipy: ``"nearest"`` (aaa|abc), ``"reflect"`` (cba|abc), ``"mirror"`` (cb|abc).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["bilinear", "border", "centre_zoom", "convolve", "disk", "gaussian_blur", "line_blur", "luminance", "plasma"]

MOST_TAPS = 41
"""Longer Gaussian kernels are applied as matrices, whose cost does not grow with their length."""


def border(index: Tensor, n: int, mode: str) -> Tensor:
    """Return positions inside 0 .. n - 1 for positions anywhere."""
    if mode == "nearest":
        return index.clamp(0, n - 1)
    if index.device.type == "cpu":  # the usual case costs no division; elsewhere, asking would wait for the device
        low, high = (int(t) for t in torch.aminmax(index))
        if low >= 0 and high < n:
            return index
        if mode == "reflect" and -n <= low and high < 2 * n:
            index = torch.where(index < 0, -1 - index, index)
            return torch.where(index >= n, 2 * n - 1 - index, index)
        if mode == "mirror" and -n < low and high < 2 * n - 1:
            index = index.abs()
            return torch.minimum(index, 2 * n - 2 - index)
    if mode == "mirror":
        index = index.remainder(max(2 * n - 2, 1))
        return torch.minimum(index, 2 * n - 2 - index)
    index = index.remainder(2 * n)
    return torch.minimum(index, 2 * n - 1 - index)


def _pad(x: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """Return (..., H + 2 rows, W + 2 columns)."""
    if rows:
        reach = torch.arange(-rows, x.shape[-2] + rows, device=x.device)
        x = x.index_select(-2, border(reach, x.shape[-2], mode))
    if columns:
        reach = torch.arange(-columns, x.shape[-1] + columns, device=x.device)
        x = x.index_select(-1, border(reach, x.shape[-1], mode))
    return x


def convolve(x: Tensor, kernel: Tensor, mode: str) -> Tensor:
    """Correlate each channel of (B, C, H, W) with one kernel (h, w), h and w odd."""
    height, width = kernel.shape
    b, c = x.shape[:2]
    padded = _pad(x, height // 2, width // 2, mode)
    planes = padded.reshape(1, b * c, *padded.shape[-2:])
    if b * c == 1:  # a single plane takes another routine, whose sums round differently
        planes = planes.expand(1, 2, -1, -1)
    weight = kernel.to(x).expand(planes.shape[1], 1, height, width)
    return functional.conv2d(planes, weight, groups=planes.shape[1])[:, : b * c].reshape(b, c, *x.shape[-2:])


def _gaussian(sigma: float, radius: int) -> Tensor:
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()


@lru_cache(maxsize=32)
def _gaussian_matrix(n: int, sigma: float, radius: int, mode: str) -> Tensor:
    """Return (n, n): row i holds the weights of all pixels in the blurred pixel i."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    rows = torch.arange(n)[:, None]
    positions = border(rows + torch.arange(-radius, radius + 1), n, mode)
    weights = _gaussian(sigma, radius).expand(n, -1)
    return matrix.scatter_add_(1, positions, weights).to(torch.float32)


def gaussian_blur(x: Tensor, sigma: float, *, truncate: float = 4.0, mode: str = "nearest") -> Tensor:
    """Blur (B, C, H, W) as scipy's ``gaussian_filter`` does."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    if 2 * radius + 1 <= MOST_TAPS:
        kernel = _gaussian(sigma, radius)
        return convolve(convolve(x, kernel[:, None], mode), kernel[None], mode)
    b, c, h, w = x.shape
    planes = x.reshape(b * c, h, w)
    down = _gaussian_matrix(h, sigma, radius, mode).to(x.device).expand(b * c, h, h)
    across = _gaussian_matrix(w, sigma, radius, mode).to(x.device).T.expand(b * c, w, w)
    return torch.bmm(torch.bmm(down, planes), across).reshape(x.shape)


def disk(radius: float, alias: float) -> Tensor:
    """Return the defocus kernel: a disk on a grid -8 .. 8 (or to its radius), smoothed by a small Gaussian."""
    reach = 8 if radius <= 8 else int(radius)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).to(torch.float64)
    small = (
        _gaussian(alias, 1 if radius <= 8 else 2)
        .to(torch.float32)
        .outer(_gaussian(alias, 1 if radius <= 8 else 2).to(torch.float32))
    )
    kernel = convolve((inside / inside.sum()).to(torch.float32)[None, None], small, "mirror")[0, 0]
    keep = min(reach, int(radius) + 2)  # beyond, the kernel is zero
    return kernel[reach - keep : reach + keep + 1, reach - keep : reach + keep + 1]


def soft_disk(radius: float) -> Tensor:
    """Return a disk of any radius above 0, its mass shared among the four nearest pixels: fair below one pixel."""
    n = 64
    line = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
    u, v = (radius * t[(line[:, None] ** 2 + line**2) <= 1] for t in torch.meshgrid(line, line, indexing="ij"))
    reach = math.ceil(radius) + 1
    grid = torch.arange(-reach, reach + 1, dtype=torch.float64)
    rows, columns = ((1 - (grid - t[:, None]).abs()).clamp_min(0) for t in (u, v))
    return rows.T @ columns / len(u)


def line_blur(x: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:
    """Blur (B, C, H, W) along a line: one-sided Gaussian weights, one angle (B,) in degrees for each image."""
    taps = round(2 * radius) + 1
    weights = torch.exp(-0.5 * (torch.arange(taps, dtype=torch.float64) / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    steps = torch.arange(taps, device=x.device)
    radians = torch.deg2rad(angle.to(torch.float64))[:, None]
    down, right = (torch.ceil(steps * t - 0.5).to(torch.int64) for t in (radians.sin(), radians.cos()))
    reach = taps - 1
    b, c, h, w = x.shape
    padded = _pad(x, reach, reach, "nearest")
    width = padded.shape[-1]
    base = (torch.arange(h, device=x.device)[:, None] * width + torch.arange(w, device=x.device)).reshape(1, -1)
    start = (reach + down) * width + reach + right
    flat = padded.reshape(b, c, -1)
    total = torch.zeros(b, c, h * w, dtype=x.dtype, device=x.device)
    for tap, weight in enumerate(weights):
        taken = flat.gather(2, (base + start[:, tap : tap + 1])[:, None].expand(b, c, -1))
        total += taken.mul_(weight)
    return total.reshape(x.shape)


def centre_zoom(x: Tensor, factor: float) -> Tensor:
    """Magnify the centre of (B, C, H, W), bilinearly, and keep the size."""
    h, w = x.shape[-2:]
    crop_h, crop_w = math.ceil(h / factor), math.ceil(w / factor)
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    size = (round(crop_h * factor), round(crop_w * factor))
    x = x[..., top : top + crop_h, left : left + crop_w]
    x = functional.interpolate(x, size, mode="bilinear", align_corners=True)
    top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
    return x[..., top : top + h, left : left + w]


def bilinear(x: Tensor, rows: Tensor, columns: Tensor, mode: str) -> Tensor:
    """Return (B, C, H, W) read from ``x`` at fractional positions (B, H, W)."""
    b, c, h, w = x.shape
    flat = x.reshape(b, c, h * w)
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    r = [border(top.to(torch.int64) + i, h, mode) * w for i in (0, 1)]
    s = [border(left.to(torch.int64) + i, w, mode) for i in (0, 1)]

    def take(i: int, j: int) -> Tensor:
        return flat.gather(2, (r[i] + s[j]).reshape(b, 1, -1).expand(b, c, -1)).reshape(b, c, *rows.shape[1:])

    above = take(0, 0) * (1 - right) + take(0, 1) * right
    below = take(1, 0) * (1 - right) + take(1, 1) * right
    return above * (1 - down) + below * down


def luminance(x: Tensor) -> Tensor:
    """Return the grey image (B, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    return (0.299 * x[:, :1] + 0.587 * x[:, 1:2]) + 0.114 * x[:, 2:]


def plasma(uniform: Tensor, decay: float) -> Tensor:
    """Return diamond-square fractals (B, n, n) in [0, 1] from (B, n, n) uniform draws, n a power of two.

    The amplitude of the displacement is the *square* of a number that starts at 100 and is divided by ``decay`` at
    each halving of the step, as in the original code; the map is periodic.
    """
    n = uniform.shape[-1]
    noise = (uniform * 2).sub_(1)
    field = torch.zeros_like(noise)
    step, wobble = n, 100.0
    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        squares = (slice(None), slice(half, None, step), slice(half, None, step))
        field[squares] = (pairs + pairs.roll(-1, 2)) / 4 + wobble**2 * noise[squares]
        centres = field[squares]
        edges = (slice(None), slice(None, None, step), slice(half, None, step))
        field[edges] = (centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)) / 4 + wobble**2 * noise[edges]
        sides = (slice(None), slice(half, None, step), slice(None, None, step))
        field[sides] = (centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)) / 4 + wobble**2 * noise[sides]
        step, wobble = half, wobble / decay
    field -= field.amin((1, 2), keepdim=True)
    return field.div_(field.amax((1, 2), keepdim=True))
