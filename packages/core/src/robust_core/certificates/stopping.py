"""When to stop sampling an image: the plans behind :class:`robust_core.certificates.smoothing.Smoothing`.

A plan fixes, before anything is drawn, the sample numbers at which one looks and what each look may conclude. It
then only sees counts. Stopping *without* a claim is always sound; every claim draws on the budget ``alpha`` of its row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from robust_core.certificates.sequential import crossing_boundary
from robust_core.certificates.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    hoeffding_lower,
    hoeffding_upper,
    normal_cdf_upper,
    normal_quantile_lower,
    split_alpha,
)
from robust_core.certificates.votes import CHUNK, chunk_sizes, fine_chunk_sizes

__all__ = [
    "SOFT_LEVELS",
    "Evidence",
    "FixedPlan",
    "Plan",
    "RadiusPlan",
    "SoftPlan",
    "TolerancePlan",
    "doubling_looks",
    "gaussian_radius",
]

SOFT_LEVELS = 2**20
"""Soft votes are rounded down to multiples of 2**-20 so that their sums are exact whatever the order."""


@dataclass
class Evidence:
    """What is known of the rows of a run, row-aligned numpy arrays; all a plan reads and writes.

    Attributes:
        total: successes, or sum of soft votes in units of ``1 / SOFT_LEVELS``.
        square: sum of the squares of soft votes, in units of ``1 / SOFT_LEVELS**2``; zero for hard votes.
        p_lower: best lower bound of the vote of the class so far.
        level: number of asked radii that are certified.
        done: no more samples are needed.
    """

    total: np.ndarray
    square: np.ndarray
    p_lower: np.ndarray
    level: np.ndarray
    done: np.ndarray


def gaussian_radius(p_lower: np.ndarray, sigma: float) -> np.ndarray:
    """Return ``sigma * Phi^-1(p_lower)`` rounded down, 0 where p_lower is 1/2 or less (Cohen et al., theorem 1)."""
    radius = np.nextafter(sigma * np.asarray(normal_quantile_lower(p_lower)), -np.inf)
    return np.where((p_lower > 0.5) & (radius > 0), radius, 0.0)


def _halting(looks: Sequence[int], least: int, give_up: float) -> np.ndarray | None:
    """Return the failures at which a row is hopeless, at each look.

    A row that all samples would certify in half of the cases succeeds at the rate ``least / n``; it is given up
    with probability ``give_up`` at most.
    """
    n = looks[-1]
    if least > n:
        return np.zeros(len(looks), dtype=np.int64)
    if give_up == 0:
        return None
    return crossing_boundary(1.0 - least / n, looks, give_up)


@dataclass
class Plan:
    """Looks and the chunks between them.

    Attributes:
        looks: increasing sample numbers, each at the end of a chunk; the last is all samples.
        sizes: sizes of the chunks.
        purpose: name of the random streams, apart from those of other plans.
    """

    looks: list[int]
    sizes: list[int]
    purpose: str
    soft: bool = field(default=False, init=False)

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """Draw conclusions for ``rows`` after ``looks[i]`` samples."""
        raise TypeError("use one of the plans")


def doubling_looks(n: int) -> list[int]:
    """Return 256, 512, ... and ``n``: looks that fit the chunks of ``chunk_sizes``."""
    looks, size = [], CHUNK
    while size < n:
        looks.append(size)
        size *= 2
    return [*looks, n]


class FixedPlan(Plan):
    """All samples for every row, apart from hopeless ones; the bound is Clopper-Pearson at ``n``."""

    def __init__(self, n: int, alpha: float, give_up: float) -> None:
        super().__init__(doubling_looks(n), chunk_sizes(n), "smoothing/estimation")
        self.alpha = alpha
        least = bisect_left(range(n + 1), True, key=lambda k: bool(clopper_pearson_lower(k, n, alpha) > 0.5))
        self.hopeless = _halting(self.looks, least, give_up)

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """See :meth:`Plan.look`."""
        count, n = evidence.total[rows], self.looks[i]
        if i == len(self.looks) - 1:
            evidence.p_lower[rows] = clopper_pearson_lower(count, n, self.alpha)
            evidence.done[rows] = True
        elif self.hopeless is not None:
            evidence.done[rows] = n - count >= self.hopeless[i]


class TolerancePlan(Plan):
    """Stop once more samples cannot enlarge the radius by more than a share ``tolerance`` (at the present rate).

    Looks double; half of the budget belongs to the last one, the rest is split evenly. Each bound holds, so the
    best of them is reported.
    """

    def __init__(self, n: int, alpha: float, tolerance: float, give_up: float) -> None:
        super().__init__(doubling_looks(n), chunk_sizes(n), "smoothing/estimation")
        m = len(self.looks)
        self.alphas = split_alpha(alpha, m, weights=[1.0] * (m - 1) + [max(m - 1.0, 1.0)])
        self.tolerance, self.give_up = tolerance, give_up

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """See :meth:`Plan.look`."""
        count, seen, n = evidence.total[rows], self.looks[i], self.looks[-1]
        bound = np.maximum(evidence.p_lower[rows], clopper_pearson_lower(count, seen, self.alphas[i]))
        evidence.p_lower[rows] = bound
        if seen == n:
            evidence.done[rows] = True
            return
        rate = count / seen
        hope = self._at_end(count + (n - seen) * np.minimum(rate + np.sqrt(rate * (1 - rate) / seen), 1.0))
        done = gaussian_radius(bound, 1.0) >= (1.0 - self.tolerance) * gaussian_radius(hope, 1.0)
        if self.give_up > 0:
            best = np.asarray(clopper_pearson_upper(count, seen, self.give_up / len(self.looks)))
            hopeless = self._at_end(count + (n - seen) * best) <= 0.5
            done = np.where(bound > 0.5, done, hopeless)
        else:
            done &= bound > 0.5
        evidence.done[rows] = done

    def _at_end(self, count: np.ndarray) -> np.ndarray:
        n = self.looks[-1]
        return np.asarray(clopper_pearson_lower(np.minimum(np.ceil(count), n), n, self.alphas[-1]))


class RadiusPlan(Plan):
    """Is the radius at least ``r``? For every ``r`` of an increasing grid, stopping as soon as that is known.

    ``R >= r`` means that the vote is at least ``Phi(r / sigma)``, one exact sequential test for each r. The
    hypotheses are nested and a radius counts only together with all smaller ones, so that a false claim must
    pass the test of the *smallest* false radius: the whole grid costs one ``alpha``.
    """

    def __init__(self, n: int, alpha: float, radii: Sequence[float], sigma: float, give_up: float) -> None:
        sizes = fine_chunk_sizes(n)
        ends = np.cumsum(sizes).tolist()
        looks = [ends[0]]
        for end in ends[1:]:
            if end >= 1.03 * looks[-1] or end == n:
                looks.append(end)
        super().__init__(looks, sizes, "smoothing/sequential")
        levels = np.asarray(normal_cdf_upper(np.asarray(radii, dtype=np.float64) / sigma)).tolist()
        passing = [crossing_boundary(p0, looks, alpha) for p0 in levels]
        # a larger radius never passes on fewer successes than a smaller one: raising a boundary is safe
        self.passing = np.maximum.accumulate(np.stack(passing), axis=0)
        hopeless = [_halting(looks, int(row[-1]), give_up) for row in self.passing]
        never = np.full(len(looks), n + 1, dtype=np.int64)
        self.hopeless = np.stack([never if row is None else row for row in [*hopeless, never]])
        self.levels = np.array([0.0, *levels])

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """See :meth:`Plan.look`."""
        count, seen = evidence.total[rows], self.looks[i]
        passed = (count[:, None] >= self.passing[None, :, i]).sum(1)
        level = np.maximum(evidence.level[rows], passed)
        evidence.level[rows] = level
        evidence.p_lower[rows] = self.levels[level]
        failures = seen - count
        done = (level == len(self.passing)) | (failures >= self.hopeless[level, i]) | (seen == self.looks[-1])
        evidence.done[rows] = done


class SoftPlan(Plan):
    """All samples of soft votes in [0, 1]; the bound is empirical Bernstein's or Hoeffding's, the better of both.

    Each of the two has half of the budget.
    """

    def __init__(self, n: int, alpha: float, give_up: float) -> None:
        super().__init__(doubling_looks(n), chunk_sizes(n), "smoothing/soft")
        self.soft = True
        self.alpha, self.give_up = alpha, give_up

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """See :meth:`Plan.look`."""
        n = self.looks[i]
        mean = evidence.total[rows] / (n * float(SOFT_LEVELS))
        if i < len(self.looks) - 1:
            if self.give_up > 0:
                upper = np.asarray(hoeffding_upper(mean, n, self.give_up / (len(self.looks) - 1)))
                evidence.done[rows] = upper < 0.5
            return
        square = evidence.square[rows] / (n * float(SOFT_LEVELS) ** 2)
        # rounding up by far more than float64 loses: the variance only widens the bound
        variance = np.clip(square - mean**2, 0.0, None) * (n / max(n - 1, 1)) + 1e-12
        bernstein = empirical_bernstein_lower(mean, variance, n, self.alpha / 2)
        evidence.p_lower[rows] = np.maximum(bernstein, hoeffding_lower(mean, n, self.alpha / 2))
        evidence.done[rows] = True
