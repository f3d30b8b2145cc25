"""Exact tests that may stop early: is a Bernoulli mean above ``p0``? Looks and budgets are fixed beforehand.

After ``n_1 < n_2 < ...`` samples one looks at the number of successes and answers "above" once it has reached the
boundary. The budget ``alpha`` is spent over the looks on a fixed schedule (Lan and DeMets 1983), and each boundary is
the smallest count at which the probability of *having crossed by now* stays within what may be spent. That
probability is computed exactly, by carrying the distribution of the count of paths that have not crossed from look to
look; nothing is lost to a union bound over looks or to Ville's inequality. If the mean is below ``p0`` crossing is
less likely still (couple the paths), so the test is valid for the whole hypothesis "at most ``p0``".

The rule stops earlier than the confidence sequences of Voracek (arXiv 2406.17830), at a smaller failure
probability, and its last look nearly has the power of the test with all samples; ``benchmarks/smoothing.py`` has the
comparison. The spending schedule, the square root of logarithmic time, is ours: it was chosen on simulated paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy

from robust_core.checks import check_number

__all__ = ["crossing_boundary", "crossing_probability"]

_ROUNDING = 1e-12
"""More than the error of a tail after one more convolution of probabilities; charged to the budget at every look."""
_RELATIVE = 1e-7
"""Relative part of the budget kept back for rounding of the binomial probabilities."""
_NEGLIGIBLE = 1e-17
"""Mass cut off the lower end at each look; it is charged to the budget too."""


def _binomial(n: int, p: float) -> np.ndarray:
    k = np.arange(n + 1)
    log = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, p) + xlog1py(n - k, -p)
    return np.exp(log)


def _convolve(mass: np.ndarray, step: np.ndarray) -> np.ndarray:
    from scipy.signal import fftconvolve  # only here: importing it takes a second or two

    return fftconvolve(mass, step)


def _spending(p0: float, looks: np.ndarray, alpha: float) -> np.ndarray:
    """Return the share of the budget that may be spent by each look: 1 at the last."""
    # the first look at which anything can be rejected: p0^n <= alpha
    unit = math.log(alpha) / math.log(p0) if p0 < 1 else math.inf
    share = np.sqrt(np.log1p(looks / max(unit, 1.0)) / math.log1p(looks[-1] / max(unit, 1.0)))
    share[-1] = 1.0
    return np.minimum(share, 1.0)


def crossing_boundary(p0: float, looks: Sequence[int], alpha: float) -> np.ndarray:
    """Return the counts at which "the mean is above ``p0``" may be claimed, one for each look.

    Args:
        p0: mean of the hypothesis, in [0, 1].
        looks: (m,) increasing sample sizes at which one looks.
        alpha: probability of ever claiming falsely.

    Returns:
        (m,) int64: claim as soon as the count after ``looks[i]`` samples is at least ``result[i]``;
        ``looks[i] + 1`` where no count suffices.
    """
    check_number("p0", p0, low=0.0, high=1.0)
    check_number("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
    sizes = tuple(int(look) for look in looks)
    if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError("looks: increasing positive sample sizes are needed")
    return np.array(_boundary(float(p0), sizes, float(alpha)), dtype=np.int64)


@lru_cache(maxsize=64)
def _boundary(p0: float, looks: tuple[int, ...], alpha: float) -> tuple[int, ...]:
    if p0 >= 1.0:
        return tuple(look + 1 for look in looks)
    allowed = alpha * (1.0 - _RELATIVE) * _spending(max(p0, 1e-300), np.array(looks, dtype=np.float64), alpha)
    boundary: list[int] = []
    mass, low, spent, before = np.ones(1), 0, 0.0, 0
    for look, budget in zip(looks, allowed, strict=True):
        mass = np.maximum(_convolve(mass, _binomial(look - before, p0)), 0.0)
        before = look
        tail = np.cumsum(mass[::-1])[::-1]  # P(count >= k, not crossed before)
        spent += _ROUNDING + _NEGLIGIBLE
        cut = int(np.count_nonzero(tail > budget - spent))
        boundary.append(low + cut)
        spent += float(tail[cut]) if cut < len(tail) else 0.0
        mass = mass[:cut]
        drop = int(np.searchsorted(np.cumsum(mass), _NEGLIGIBLE))
        mass, low = mass[drop:], low + drop
        if not len(mass):  # the budget exceeds what is left to cross; every further path has crossed
            boundary.extend(0 for _ in looks[len(boundary) :])
            break
    return tuple(boundary)


def crossing_probability(p: float, looks: Sequence[int], boundary: Sequence[int]) -> float:
    """Return the probability that the count of a Bernoulli(``p``) sequence ever reaches the boundary at a look.

    At ``p = p0`` this is the size of the test, above it the power. Correct to about 1e-12.
    """
    check_number("p", p, low=0.0, high=1.0)
    mass, crossed, before = np.ones(1), 0.0, 0
    for look, limit in zip(looks, boundary, strict=True):
        mass = np.maximum(_convolve(mass, _binomial(int(look) - before, p)), 0.0)
        before = int(look)
        crossed += float(mass[int(limit) :].sum())
        mass = mass[: int(limit)]
    return crossed
