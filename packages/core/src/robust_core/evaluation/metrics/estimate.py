"""A figure with its interval and its number of samples: the unit in which everything here is reported.

Shares carry the exact Clopper-Pearson interval, means the Student interval, areas under the ROC curve DeLong's
(see :mod:`.ood`). All at 95 %. Run-to-run spread over training seeds is another thing and never mixed with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy import special
from torch import Tensor

from robust_core.certificates.statistics import clopper_pearson
from robust_core.checks import check_count, check_number

__all__ = ["Array", "Estimate", "as_array", "difference", "mean", "proportion", "undefined"]

Array = Tensor | np.ndarray | Sequence[Any]
"""Whatever holds numbers: a tensor on any device, an array, a list."""


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: the figure; NaN where it is undefined (no sample).
        interval: 95 % interval (low, high), or None where none is known.
        n: number of samples behind it.
    """

    value: float
    interval: tuple[float, float] | None
    n: int

    def as_json(self) -> dict[str, Any]:
        """Return ``{"value", "interval", "n"}``, undefined numbers as null."""
        low_high = None if self.interval is None else [_finite(end) for end in self.interval]
        return {"value": _finite(self.value), "interval": low_high, "n": self.n}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Return what :meth:`as_json` wrote; further keys are passed over.

        A value of null is NaN; an end of an interval that is null is no bound, the infinity on its side.

        Raises:
            KeyError: "value", "interval" or "n" is missing.
            TypeError: one of them is not what :meth:`as_json` writes.
        """
        value, interval, n = entry["value"], entry["interval"], entry["n"]
        ends = (None, None) if interval is None else interval
        if not isinstance(ends, list | tuple) or len(ends) != 2 or not isinstance(n, int):
            raise TypeError(f"interval={interval!r}, n={n!r}: two ends or null, and a count are needed")
        if any(end is not None and not isinstance(end, int | float) for end in (value, *ends)):
            raise TypeError(f"value={value!r}, interval={interval!r}: numbers or null are needed")
        low, high = (limit if end is None else end for limit, end in zip((-math.inf, math.inf), ends, strict=True))
        return cls(math.nan if value is None else value, None if interval is None else (low, high), n)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def as_array(values: Array, dtype: Any = None) -> np.ndarray:
    """Return a numpy array; tensors are detached and copied to the host."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array if dtype is None else array.astype(dtype, copy=False)


def undefined(n: int = 0) -> Estimate:
    """Return the figure that has no value."""
    return Estimate(math.nan, None, n)


def proportion(correct: Array, *, confidence: float = 0.95) -> Estimate:
    """Return the share of True with its exact two-sided Clopper-Pearson interval.

    Args:
        correct: (N,) booleans.
        confidence: of the interval.
    """
    flags = as_array(correct)
    if flags.dtype != np.bool_ or flags.ndim != 1:
        raise TypeError(f"correct is {flags.dtype} of shape {flags.shape}; (N,) booleans are needed")
    return share(int(flags.sum()), len(flags), confidence=confidence)


def share(count: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return ``count`` of ``n`` as :func:`proportion` does."""
    check_count("count", count, low=0)
    check_count("n", n, low=0)
    check_number("confidence", confidence, low=0, high=1, open_low=True, open_high=True)
    if count > n:
        raise ValueError(f"count={count} of n={n}: more successes than trials")
    if n == 0:
        return undefined()
    low, high = clopper_pearson(count, n, 1 - confidence)
    return Estimate(count / n, (float(low), float(high)), n)


def mean(values: Array, *, low: float = -math.inf, high: float = math.inf, confidence: float = 0.95) -> Estimate:
    """Return the mean of (N,) independent values with its Student interval (None below two samples).

    Args:
        values: the values.
        low: least possible value; the interval is cut there.
        high: greatest possible value, likewise.
        confidence: of the interval.
    """
    numbers = as_array(values, np.float64)
    n = len(numbers)
    if n == 0:
        return undefined()
    centre = float(numbers.mean())
    if n < 2 or not np.isfinite(numbers).all():
        return Estimate(centre, None, n)
    half = float(special.stdtrit(n - 1, 0.5 + confidence / 2) * numbers.std(ddof=1) / math.sqrt(n))
    return Estimate(centre, (max(low, centre - half), min(high, centre + half)), n)


def difference(a: Array, b: Array) -> Estimate:
    """Return mean(a - b) of values paired sample by sample, with its Student interval."""
    return mean(as_array(a, np.float64) - as_array(b, np.float64))
