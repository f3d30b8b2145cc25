"""Rain, snow and fog for sweeps of a car's sensor: which returns are lost, weakened, or come from a drop or the fog.

The only corruptions that change intensity (in [0, 1], the fourth column; 0.5 where there is none), because it decides
whether a return is seen. A return needs a power ``i exp(-2 a r) / r^2`` of at least that of i = 0.9 at 120 m.

As in the published models, a return that is fainter than that already in clear air is lost at every severity.

Rain and snow: the hybrid Monte Carlo model of V. Kilic and others 2021 (LISA), 2107.07004, with Marshall-Palmer drops
and Gunn-Marshall flakes, rates 0.2 .. 7.29 mm/h. Derived here: extinction by particles large against the wavelength
(efficiency 2), which is a closed form instead of a table of Mie coefficients; and the drops of a beam are drawn by
thinning their Poisson process to those strong enough to be seen (a few hundredths a beam instead of hundreds), which
gives the same returns, but for a second visible drop in one beam.

Fog: M. Hahner and others 2021, 2108.05249, attenuation 0.005 .. 0.06 / m. The response of the fog is the published
integral over time, done on a grid of 0.1 m; intensities count in steps of 1 / 255 there; the sensor is the published
one (pulse of 20 ns, overlap from 0.9 to 1 m, target gamma 1e-6). Not modelled: wet ground, spray, beams of several
returns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vision_robust.lidar.corruptions.cloud import Cloud, Draws, Rule

__all__ = ["WEATHER"]

_RATES = (0.20, 0.73, 1.5625, 3.125, 7.29)
_FOG = (0.005, 0.01, 0.02, 0.03, 0.06)
_R_MIN, _R_MAX, _DIVERGENCE, _D_MIN, _ACCURACY = 0.9, 120.0, 3e-3, 0.05, 0.09
_P_MIN = 0.9 / _R_MAX**2
_FAINTEST = 0.005
"""What a reflectance written as 0.00 is taken for: half of what its two digits can tell apart."""


@cache
def _particles(kind: str, rate: float) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """Return (reflection, slope in 1/mm, extinction in 1/m, ranges, expected visible particles up to each range)."""
    index = 1.328 if kind == "rain" else 1.3031
    if kind == "rain":
        density, slope = 8000.0, 4.1 * rate**-0.21
    else:
        density, slope = 7600.0 * rate**-0.87, 2.55 * rate**-0.48
    fresnel = ((index - 1) / (index + 1)) ** 2
    d = _D_MIN
    squared = math.exp(-slope * d) * (d * d / slope + 2 * d / slope**2 + 2 / slope**3)
    extinction = 2 * math.pi / 4 * density * squared * 1e-6
    r = np.linspace(_R_MIN, _R_MAX, 4000)
    area = math.pi * (math.tan(_DIVERGENCE) * r / 2) ** 2
    least = _least_diameter(r, fresnel, extinction)
    rate_of = np.where(np.isfinite(least), density / slope * np.exp(-slope * np.minimum(least, 1e3)) * area, 0.0)
    expected = np.concatenate([[0.0], np.cumsum((rate_of[1:] + rate_of[:-1]) / 2 * np.diff(r))])
    return fresnel, slope, extinction, r, expected


def _least_diameter(r: np.ndarray, fresnel: float, extinction: float) -> np.ndarray:
    """Return the smallest diameter in mm that is seen at range ``r``; infinite where not even a filled beam is."""
    share = _P_MIN * r**2 * np.exp(2 * extinction * r) / fresnel
    return np.where(share <= 1, np.maximum(np.sqrt(share) * 1e3 * math.tan(_DIVERGENCE) * r, _D_MIN), np.inf)


def _intensity(cloud: Cloud) -> Tensor:
    if cloud.rest.shape[2] == 0:
        return torch.full_like(cloud.xyz[..., 0], 0.5)
    return cloud.rest[..., 0].clamp(_FAINTEST, 1)


def _returned(cloud: Cloud, r: Tensor, new_range: Tensor, intensity: Tensor) -> Cloud:
    xyz = cloud.xyz * (new_range / r.clamp_min(1e-9))[..., None]
    rest = cloud.rest
    if rest.shape[2]:
        rest = torch.cat([intensity.to(rest.dtype)[..., None], rest[..., 1:]], -1)
    return replace(cloud, xyz=xyz.to(cloud.xyz.dtype), rest=rest)


def _precipitation(cloud: Cloud, kind: str, level: int, draws: Draws) -> Cloud:
    fresnel, slope, extinction, grid, expected = _particles(kind, _RATES[level])
    r, intensity = cloud.xyz.norm(dim=-1), _intensity(cloud)
    n = r.shape[1]
    u = draws("particles").uniform((n, 3), dtype=torch.float64)
    upto = np.interp(r.double().cpu().numpy(), grid, expected)
    hit = 1 - np.exp(-upto)
    chance, place, size = (u[..., i].cpu().numpy() for i in range(3))
    struck = chance < hit
    at = np.interp(place * upto, expected, grid)
    least = _least_diameter(at, fresnel, extinction)
    diameter = np.where(np.isfinite(least), least, 0) - np.log(size) / slope
    filled = np.minimum((diameter / (1e3 * math.tan(_DIVERGENCE) * at)) ** 2, 1)
    seen = torch.from_numpy(np.where(struck, fresnel * np.exp(-2 * extinction * at) * filled, 0)).to(r.device)
    at = torch.from_numpy(at).to(r.device)
    weakened = intensity * torch.exp(-2 * extinction * r)
    power = weakened / r.square().clamp_min(1e-9)
    particle = seen / at.square()
    spread = _ACCURACY / (2 * power.double() / _P_MIN).clamp_min(1e-12).sqrt()
    noisy = r + spread * draws("range").coarse_normal((n,)).double()
    drop = particle > power
    lost = (power < _P_MIN) & ~drop
    moved = _returned(cloud, r, torch.where(drop, at, noisy.clamp_min(0)), torch.where(drop, seen, weakened.double()))
    return moved.without(lost)


def rain(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Rain of 0.2 .. 7.29 mm an hour."""
    return _precipitation(cloud, "rain", level, draws)


def snow(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Snow of 0.2 .. 7.29 mm an hour (as water)."""
    return _precipitation(cloud, "snow", level, draws)


@cache
def _fog_response(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for targets at 0, 0.1, .. 30 m where the fog's echo is strongest, and how strong; beyond, it stays so."""
    step, half_c = 0.1, 299_792_458.0 / 2
    pulse = half_c * 2 * 2e-8  # it lasts twice its half-power width
    r = np.arange(step, 40, step)
    overlap = np.clip((r - 0.9) / 0.1, 0, 1)
    back = np.exp(-2 * alpha * r) / r**2 * overlap
    shape = np.sin(np.pi * np.arange(0, pulse, step) / pulse) ** 2
    distance, strength = [], []
    for target in np.arange(0, 30 + step / 2, step):
        echo = np.convolve(np.where(r <= target, back, 0), shape)[: len(r)] * (step / half_c)
        best = int(echo.argmax())
        distance.append(r[best])
        strength.append(echo[best])
    return np.array(distance), np.array(strength)


def fog(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Fog with an attenuation of 0.005 .. 0.06 / m: visibility of 600 .. 50 m."""
    alpha = _FOG[level]
    r, intensity = cloud.xyz.norm(dim=-1), _intensity(cloud)
    distance, strength = (torch.from_numpy(t).to(r.device) for t in _fog_response(alpha))
    cell = (r * 10).round().to(torch.int64).clamp(0, len(distance) - 1)
    beta, target = 0.046 / (math.log(20) / alpha), 1e-6 / math.pi
    soft = (strength[cell].double() * intensity * r.square() * (beta / target)).clamp(max=1).to(r.dtype)
    hard = (intensity * torch.exp(-2 * alpha * r) * 255).round() / 255
    noise = draws("fog").uniform((r.shape[1],)) * 2 - 1
    echo = distance[cell].to(r.dtype) * r / (r + noise).clamp_min(0.1)
    fogged = (soft > hard) & (r > 0.1)
    lost = (hard <= 0) & ~fogged
    return _returned(cloud, r, torch.where(fogged, echo, r), torch.where(fogged, soft, hard)).without(lost)


WEATHER: dict[str, Rule] = {"rain": rain, "snow": snow, "fog": fog}
