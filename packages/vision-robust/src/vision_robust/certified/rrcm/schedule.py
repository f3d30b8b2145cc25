"""Noise levels and schedules: the grid of Karras et al., its growth in training, the decay of the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust_core.checks import check_count, check_number

__all__ = ["ConsistencySchedule", "KarrasGrid", "TargetEmaSchedule"]


@dataclass(frozen=True)
class KarrasGrid:
    """Noise levels from the noisiest to the cleanest: ``t_i = (a + i / (n - 1) (b - a))^rho``.

    ``a`` and ``b`` are the ``1 / rho``-th powers of the largest and the smallest level (Karras et al. 2022, arXiv
    2206.00364, eq. 5). Levels are in the units of the *normalised* inputs.

    Args:
        sigma_min: smallest level, above 0.
        sigma_max: largest level.
        rho: curvature; the larger, the more levels are small.
        n: number of levels, at least 2.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    n: int = 81

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, low=0, open_low=True)
        check_number("sigma_max", self.sigma_max, low=self.sigma_min, open_low=True)
        check_number("rho", self.rho, low=0, open_low=True)
        check_count("n", self.n, low=2)

    def with_n(self, n: int) -> KarrasGrid:
        """Return the same range cut into ``n`` levels."""
        return self if n == self.n else replace(self, n=n)

    def __getitem__(self, i: int) -> float:
        """Return level ``i``, 0 being the noisiest; the ends are exact."""
        if not 0 <= i < self.n:
            raise IndexError(f"i={i}: the grid has levels 0 .. {self.n - 1}")
        if i in (0, self.n - 1):
            return self.sigma_min if i else self.sigma_max
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + i / (self.n - 1) * (low - high)) ** self.rho

    def levels(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return (n,) all levels, strictly decreasing."""
        return torch.tensor([self[i] for i in range(self.n)], dtype=dtype)

    def nearest(self, t: float) -> float:
        """Return the level closest to ``t``.

        Raises:
            ValueError: ``t`` lies outside the grid.
        """
        if not self.sigma_min <= t <= self.sigma_max:
            raise ValueError(
                f"t={t:g}: the grid spans [{self.sigma_min:g}, {self.sigma_max:g}]; t is sigma / std, the noise in "
                "units of the normalised inputs"
            )
        return min((self[i] for i in range(self.n)), key=lambda level: abs(level - t))


@dataclass(frozen=True)
class ConsistencySchedule:
    """Number of grid levels in step k of K: ``N(k) = min(start 2^ceil(k / K'), end) + 1``.

    ``K' = ceil(K / log2(ceil(end / start) + 1))``, so that the grid doubles at k = 1 already and has ``start + 1``
    levels at k = 0 only. ``total_steps=None`` is the limit of many steps, a function of the share k / K alone.

    Args:
        total_steps: K.
        start: levels at first, less one.
        end: levels at last, less one.
    """

    total_steps: int | None = None
    start: int = 20
    end: int = 80

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps)
        check_count("start", self.start)
        check_count("end", self.end, low=self.start)

    def size(self, step: int) -> int:
        """Return N(step).

        Raises:
            ValueError: ``total_steps`` is None.
        """
        if self.total_steps is None:
            raise ValueError("total_steps=None: ask at(share), or say how many steps there are")
        doubling = math.ceil(self.total_steps / math.log2(math.ceil(self.end / self.start) + 1))
        return self._grown(math.ceil(step / doubling))

    def at(self, share: float) -> int:
        """Return N at a share k / K of training."""
        if self.total_steps is not None:
            return self.size(round(share * self.total_steps))
        return self._grown(math.ceil(share * math.log2(math.ceil(self.end / self.start) + 1)))

    def _grown(self, doublings: int) -> int:
        return min(self.start * 2 ** min(doublings, 64), self.end) + 1


@dataclass(frozen=True)
class TargetEmaSchedule:
    """Decay of the target's running average: from ``low`` to ``high`` as training goes on.

    ``e = sqrt(share (high^2 - low^2) + low^2)``, ``c = 2 / (1 + exp(-sharpness (e - low) / (high - low))) - 1``, decay
    ``c high + (1 - c) low``.

    Args:
        low: decay at the start.
        high: decay that is approached.
        sharpness: the paper's A: 15 for CIFAR-10, 10 for ImageNet.
    """

    low: float = 0.99
    high: float = 0.9999
    sharpness: float = 15.0

    def __post_init__(self) -> None:
        check_number("low", self.low, low=0, high=1)
        check_number("high", self.high, low=self.low, high=1)
        check_number("sharpness", self.sharpness, low=0, open_low=True)

    def at(self, share: float) -> float:
        """Return the decay at a share k / K of training, in [low, high]."""
        if self.high == self.low:
            return self.low
        share = min(max(share, 0.0), 1.0)
        e = math.sqrt(share * (self.high**2 - self.low**2) + self.low**2)
        c = 2 / (1 + math.exp(-self.sharpness * (e - self.low) / (self.high - self.low))) - 1
        return min(max(c * self.high + (1 - c) * self.low, self.low), self.high)
