"""Noise: Gaussian, shot, impulse; speckle as an extra. Constants: see each function."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from robust_core.data.corruptions.draws import Draws, Setting

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Add N(0, c^2)."""
    return draws.normal(*x.shape[1:]).mul_(c[0]).add_(x)


CELLS = 1024
"""Cells of the guide table: most draws need one comparison after it."""


@lru_cache(maxsize=8)
def _poisson_table(c: float) -> tuple[Tensor, Tensor, int]:
    """Return the distribution functions of Poisson(c level / 255), flat (256 K), their guide (256 CELLS), and K."""
    k = torch.arange(int(c + 12 * math.sqrt(c) + 30), dtype=torch.float64)
    rate = c * torch.arange(256, dtype=torch.float64)[:, None] / 255
    cdf = torch.exp(torch.special.xlogy(k, rate) - rate - torch.lgamma(k + 1)).cumsum(1)
    cdf[:, -1] = 2  # the search ends here
    cells = (torch.arange(CELLS, dtype=torch.float64) / CELLS).expand(256, -1).contiguous()
    guide = torch.searchsorted(cdf, cells, right=True)
    return cdf.to(torch.float32).flatten(), guide.flatten(), len(k)


def _poisson_of_bytes(level: Tensor, c: float, u: Tensor) -> Tensor:
    """Return Poisson(c level / 255) draws by inverting the distribution function at ``u``: exact, and vectorised."""
    cdf, guide, width = _poisson_table(c)
    level, u = level.flatten(), u.flatten()
    k = guide.take(level * CELLS + (u * CELLS).to(torch.int64))
    start = level * width
    late = (u >= cdf.take(start + k)).nonzero()[:, 0]
    while len(late):
        k[late] += 1
        late = late[u[late] >= cdf.take(start[late] + k[late])]
    return k


def shot_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Poisson(c x) / c.

    On the CPU, images that are bytes (divided by 255) take a table of the 256 distributions; other values, and other
    devices, torch's sampler. Which of them is a property of the image, not of its batch.
    """
    if x.device.type != "cpu":
        return draws.poisson(x * c[0]).div_(c[0])
    scaled = x * 255
    level = scaled.round()
    is_bytes = ((scaled - level).abs() < 1e-4).flatten(1).all(1)
    out = torch.empty_like(x)
    if bool(is_bytes.any()):
        rows = draws.select(is_bytes)
        drawn = _poisson_of_bytes(level[is_bytes].to(torch.int64), c[0], rows.uniform(*x.shape[1:]))
        out[is_bytes] = drawn.reshape(-1, *x.shape[1:]).to(x.dtype).div_(c[0])
    if not bool(is_bytes.all()):
        out[~is_bytes] = draws.select(~is_bytes).poisson(x[~is_bytes] * c[0]).div_(c[0])
    return out


def impulse_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Salt and pepper: a share c of the values becomes 0 or 1, equally often."""
    u = draws.uniform(*x.shape[1:])
    return torch.where(u < c[0], u < c[0] / 2, x)


def speckle_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Add x N(0, c^2)."""
    return draws.normal(*x.shape[1:]).mul_(c[0]).add_(1).mul_(x)
