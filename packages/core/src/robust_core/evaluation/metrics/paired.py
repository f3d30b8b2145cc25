"""Two models on the *same* samples: McNemar's exact test and a paired bootstrap.

Intervals of two accuracies overlap long after their difference is clear, since both models fail on the same hard
samples. The paired tests use only the samples on which the models differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from robust_core.checks import check_count, check_same_length
from robust_core.evaluation.metrics.estimate import Array, as_array
from robust_core.random import Seed, resolve_seed, stream

__all__ = ["Paired", "compare_correct", "paired_bootstrap"]


@dataclass(frozen=True)
class Paired:
    """A paired comparison of a with b.

    Attributes:
        difference: mean of a minus mean of b.
        interval: 95 % percentile bootstrap interval of the difference.
        p_value: two-sided exact McNemar.
        only_a: samples that only a gets right.
        only_b: samples that only b gets right.
        n: samples compared.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    only_a: int
    only_b: int
    n: int


def compare_correct(correct_a: Array, correct_b: Array, *, generator: Seed = None) -> Paired:
    """Compare two (N,) boolean vectors over the same samples, in the same order."""
    a, b = as_array(correct_a), as_array(correct_b)
    n = check_count("number of samples", check_same_length(correct_a=len(a), correct_b=len(b)))
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise TypeError(f"correct_a is {a.dtype}, correct_b {b.dtype}; booleans are needed")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    from scipy.stats import binomtest  # only here: importing it takes a second

    p = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    interval = paired_bootstrap(a.astype(np.float64), b.astype(np.float64), generator=generator)
    return Paired((only_a - only_b) / n, interval, float(p), only_a, only_b, n)


def paired_bootstrap(
    a: Array, b: Array, *, n_resamples: int = 2000, confidence: float = 0.95, generator: Seed = None
) -> tuple[float, float]:
    """Return the percentile interval of mean(a - b), the pairs resampled together.

    The mean depends on a resample only through how often each *distinct* difference is drawn, so counts are drawn
    from the multinomial: exact, and independent of N for booleans.
    """
    gaps = as_array(a, np.float64) - as_array(b, np.float64)
    values, counts = np.unique(gaps, return_counts=True)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    draws = stream(resolve_seed(generator), 0, "paired bootstrap")
    left = torch.full((n_resamples,), float(len(gaps)), dtype=torch.float64)
    total, mass = torch.zeros_like(left), float(len(gaps))
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        # the multinomial as a chain of binomials
        share = torch.full_like(left, min(1.0, count / mass))
        drawn = left if count >= mass else torch.binomial(left, share, generator=draws)
        total += value * drawn
        left, mass = left - drawn, mass - count
    tail = (1 - confidence) / 2
    low, high = np.quantile((total / len(gaps)).numpy(), [tail, 1 - tail])
    return float(low), float(high)
