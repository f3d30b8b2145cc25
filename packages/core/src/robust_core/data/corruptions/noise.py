"""Noise: Gaussian, shot, impulse; speckle as an extra. Constants: see each function."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_core.data.corruptions.draws import Draws, Setting

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Add N(0, c^2)."""
    return draws.normal(*x.shape[1:]).mul_(c[0]).add_(x)


def shot_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Poisson(c x) / c."""
    return draws.poisson(x * c[0]).div_(c[0])


def impulse_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Salt and pepper: a share c of the values becomes 0 or 1, equally often."""
    u = draws.uniform(*x.shape[1:])
    return torch.where(u < c[0], (u < c[0] / 2).to(x.dtype), x)


def speckle_noise(x: Tensor, c: tuple[float, ...], draws: Draws, _: Setting) -> Tensor:
    """Add x N(0, c^2)."""
    return draws.normal(*x.shape[1:]).mul_(c[0]).add_(1).mul_(x)
