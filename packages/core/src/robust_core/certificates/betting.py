"""Bounds of the mean of values in [0, 1] that heed their variance and hold at every sample size at once.

Someone bets against "the mean is at most m": each value multiplies his wealth by ``1 + min(b_i, c / m) (x_i - m)``,
where the stake b_i may depend on earlier values only. If the mean is at most m, his wealth is a supermartingale, and
exceeds ``1 / alpha`` at *any* time with probability at most alpha (Ville 1939). It falls in m, so the values of m that
are refuted are an interval from 0: its upper end is a lower bound of the mean. Sampling may stop at any moment, for any
reason, and the best bound of all moments counts.

Where values vary little the bound is far nearer to the mean than empirical Bernstein's: the part that does not shrink
with the variance is about ``ln(1 / alpha) m / (c n)`` instead of ``7 ln(2 / alpha) / 3n``.

Source: Waudby-Smith and Ramdas (JRSS B 2024), "Estimating means of bounded random variables by betting", section 4.
Stakes are ours: theirs for a fixed sample size, ``sqrt(2 ln(1 / alpha) / (variance n))``, kept up to a quarter of a
planned size and then falling with the square root of the sample number, which costs 13 % at the end and nothing before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robust_core.certificates.statistics import Numbers, _alpha, _read, _write

__all__ = ["betting_lower", "betting_upper"]

SHARE = 0.8
"""c: at most this share of the wealth is lost at one value."""
PRIOR = 0.05
"""Variance that is assumed with the weight of one value."""
MOST = 100.0
"""Largest stake."""
NEAR = 1e-5
"""How near to the exact bound one goes, from the safe side."""
_BLOCK = 1 << 17
_FACTORS = 32


def betting_lower(x: Numbers, alpha: float, *, planned: int | None = None) -> Any:
    """Return (...,) lower bounds of the means of independent values, each of the same mean.

    Args:
        x: (..., n) values in [0, 1] in the order in which they were drawn, n >= 1.
        alpha: failure probability over the whole sequence, whenever one looks.
        planned: sample size that the stakes are made for; n if None. *Bounds at several sizes hold at once only if they
            are asked for with the same* ``planned``.

    Raises:
        ValueError: no values, or some outside [0, 1].
    """
    values, device = _values(x)
    return _write(_lower(values, _alpha(alpha), planned), device)


def betting_upper(x: Numbers, alpha: float, *, planned: int | None = None) -> Any:
    """Return the upper counterpart of :func:`betting_lower`."""
    values, device = _values(x)
    return _write(1.0 - _lower(1.0 - values, _alpha(alpha), planned), device)


def _values(x: Numbers) -> tuple[np.ndarray, Any]:
    (values,), device = _read(x=x)
    if values.ndim < 1 or not values.shape[-1]:
        raise ValueError(f"x has shape {values.shape}; (..., n) with at least one value is needed")
    if values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError("x: the bound is for values in [0, 1]; rescale them first")
    return values, device


def _lower(x: np.ndarray, alpha: float, planned: int | None) -> np.ndarray:
    n = x.shape[-1]
    if planned is not None and planned < n:
        raise ValueError(f"planned={planned}: at least the {n} values that are there")
    rows = x.reshape(-1, n)
    step = max(1, _BLOCK // n)
    parts = [_solve(rows[i : i + step], alpha, planned or n) for i in range(0, len(rows), step)]
    return (np.concatenate(parts) if parts else np.empty(0)).reshape(x.shape[:-1])


def _stakes(x: np.ndarray, log: float, planned: int) -> np.ndarray:
    """Return (R, n) stakes, each from the values before it."""
    number = np.arange(1, x.shape[1] + 1)
    mean = (0.5 + np.cumsum(x, 1)) / (number + 1)
    spread = np.cumsum((x - mean) ** 2, 1)
    variance = np.concatenate([np.full((len(x), 1), PRIOR), (PRIOR + spread[:, :-1]) / number[1:]], 1)
    return np.minimum(np.sqrt(2.0 * log / (variance * np.maximum(number, planned / 4))), MOST)


def _bracket(x: np.ndarray, log: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (R,) two guesses between which the bound usually lies."""
    n, mean = x.shape[1], x.mean(1)
    width = np.sqrt(2.0 * x.var(1) * log / n) + log * mean / n
    return np.maximum(mean - 2.0 * width, 0.0), np.maximum(mean - 0.7 * width, 0.0)


def _solve(x: np.ndarray, alpha: float, planned: int) -> np.ndarray:
    """Return (R,) the largest m known to be refuted."""
    log, n = -math.log(alpha), x.shape[1]
    stakes = _stakes(x, log, planned)
    if extra := -x.shape[1] % _FACTORS:  # stakes of 0 leave the wealth alone
        x, stakes = (np.pad(part, ((0, 0), (0, extra))) for part in (x, stakes))
    level = log * (1.0 + 1e-9) + 1e-9  # more than a sum of logarithms loses to rounding

    def excess(m: np.ndarray) -> np.ndarray:
        limit = SHARE / np.maximum(m, 1e-9)
        factor = x - m[:, None]
        factor *= np.minimum(stakes, limit[:, None])
        factor += 1.0
        return np.log(factor.reshape(len(x), -1, _FACTORS).prod(2)).sum(1) - level

    low, high = _bracket(x[:, :n], log)
    at_low, at_high = excess(low), excess(high)
    wide = at_high >= 0.0  # the guess failed: nothing is won from an m above all values
    if wide.any():
        high = np.where(wide, x.max(1), high)
        at_high = np.where(wide, excess(high), at_high)
    deep = at_low < 0.0
    if deep.any():
        low = np.where(deep, 0.0, low)
        at_low = np.where(deep, excess(low), at_low)
    at_high = np.minimum(at_high, -1e-9)
    none, last = at_low < 0.0, np.zeros(len(x))
    for turn in range(40):  # false position, halving the weight of an end that stays (Illinois)
        middle = high - at_high * (high - low) / np.minimum(at_high - at_low, -1e-300)
        if turn % 6 == 0:
            middle = 0.5 * (low + high)
        middle = np.clip(middle, low, high)
        found = excess(middle)
        up = found >= 0.0
        at_high = np.where(up, np.where(last > 0, at_high / 2, at_high), found)
        at_low = np.where(up, found, np.where(last < 0, at_low / 2, at_low))
        low, high, last = np.where(up, middle, low), np.where(up, high, middle), np.where(up, 1.0, -1.0)
        if float(np.where(none, 0.0, high - low).max()) < NEAR:
            break
    return np.where(none, 0.0, low)
