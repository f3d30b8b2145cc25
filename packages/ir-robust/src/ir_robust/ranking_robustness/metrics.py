"""The numbers of the benchmark, on the per-query values that :func:`ir_robust.measures.per_query` gives.

M(q) is the effectiveness of a query, P its mean over Q queries. Statistics of one model take (Q,) values, or (R, Q) for
R trainings of one recipe: each training is judged alone and the statistic averaged, so that averaging values over
trainings never hides a bad query.

* ``V = sum (M(q) - P)^2 / Q``: :func:`variance`; :func:`relative_spread` is ``sqrt(V) / P``, since V alone rewards a
  ranker that is bad everywhere; :func:`normalised` divides by a reference of each query first (VNAP);
* mean of the worst share of queries: :func:`cvar`; share of queries at or below tau: :func:`failure_rate`;
* ``DR = (P_new - P_ref) / P_ref``: :func:`drop_rate`, with the bootstrap interval of the ratio in
  :func:`bootstrap_interval` (a ratio of means is no mean: its interval is not that of a difference);
* places climbed and entries into the top: :func:`rank_boost`, :func:`top_k_entry`;
* two models on the same queries: :func:`paired_test`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ir_robust.attacks.base import rank_among
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, resolve_seed, stream

__all__ = [
    "PairedTest",
    "Resamples",
    "bootstrap_interval",
    "cvar",
    "drop_rate",
    "failure_rate",
    "mean_value",
    "normalised",
    "paired_test",
    "rank_boost",
    "relative_spread",
    "top_k_entry",
    "variance",
]

Values = Mapping[str, float] | Sequence[float] | np.ndarray
"""Query -> value, or the values alone."""
UNDEFINED_SHARE = 0.025
"""A ratio has no interval where more resamples than this leave it undefined."""


def _rows(values: Values) -> np.ndarray:
    """Return (R, Q) float64, refusing what no statistic can be made of."""
    array = np.asarray(list(values.values()) if isinstance(values, Mapping) else values, dtype=np.float64)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values of shape {array.shape}: (Q,) or (R, Q) with at least one query are needed")
    if not np.isfinite(array).all():
        raise ValueError("values hold NaN or infinity")
    return array


def mean_value(values: Values) -> float:
    """Return P."""
    return float(_rows(values).mean())


def variance(values: Values) -> float:
    """Return V, the population variance over queries (mean over trainings); compare it at comparable P only."""
    return float(_rows(values).var(axis=1).mean())


def relative_spread(values: Values) -> float:
    """Return ``sqrt(V) / P`` (mean over trainings); NaN where P is 0."""
    rows = _rows(values)
    means = rows.mean(axis=1)
    return float(np.mean(rows.std(axis=1) / means)) if (means > 0).all() else math.nan


def normalised(values: Values, reference: Values) -> np.ndarray:
    """Return (R, Q') values divided by a reference of each query; queries whose reference is 0 are left out.

    Args:
        values: of a model.
        reference: (Q,) per query, usually the best of all compared models: with it, AP becomes the "normalised AP" of
            the benchmark, in which hard queries weigh as much as easy ones.
    """
    rows, best = _rows(values), _rows(reference)[0]
    if rows.shape[1] != len(best):
        raise ValueError(f"reference holds {len(best)} queries, values {rows.shape[1]}")
    kept = best > 0
    if not kept.any():
        raise ValueError("reference is 0 for every query")
    return rows[:, kept] / best[kept]


def cvar(values: Values, q: float = 0.1) -> float:
    """Return the mean of the worst share ``q`` of queries; a query on the border counts for its part of the share.

    Args:
        values: M(q).
        q: in (0, 1]; 1 gives the mean.
    """
    check_number("q", q, low=0.0, high=1.0, open_low=True)
    rows = np.sort(_rows(values), axis=1)
    weights = np.clip(q * rows.shape[1] - np.arange(rows.shape[1]), 0.0, 1.0)
    return float((rows @ weights / weights.sum()).mean())


def failure_rate(values: Values, tau: float = 0.1) -> float:
    """Return the share of queries with ``M(q) <= tau``."""
    check_number("tau", tau)
    return float((_rows(values) <= tau).mean())


def drop_rate(p_ref: float, p_new: float) -> float:
    """Return ``(p_new - p_ref) / p_ref``: 0 is no loss, -0.2 a loss of a fifth; NaN where ``p_ref`` is 0."""
    check_number("p_ref", p_ref, low=0.0)
    check_number("p_new", p_new, low=0.0)
    return (p_new - p_ref) / p_ref if p_ref > 0 else math.nan


def rank_boost(before: Mapping[str, float], after: Mapping[str, float], docno: str) -> int:
    """Return how many places a document climbed from one list to the other; negative where it fell."""
    return rank_among(before, docno) - rank_among(after, docno)


def top_k_entry(before: Mapping[str, float], after: Mapping[str, float], docno: str, k: int = 10) -> bool:
    """Return whether a document that stood below the first ``k`` stands among them now."""
    check_count("k", k)
    return rank_among(before, docno) > k >= rank_among(after, docno)


class Resamples:
    """Bootstrap resamples of sets of queries, the same for every model and every statistic: differences are paired.

    Args:
        n_boot: resamples.
        generator: seed; a set's resamples depend on the seed, its name and its size alone.
    """

    def __init__(self, n_boot: int = 1000, generator: Seed = None) -> None:
        self.n_boot, self._seed = check_count("n_boot", n_boot), resolve_seed(generator)
        self._weights: dict[tuple[str, int], np.ndarray] = {}

    def weights(self, name: str, n: int) -> np.ndarray:
        """Return (n_boot, n): the share that each query has in each resample; rows sum to 1."""
        if (name, n) not in self._weights:
            draws = stream(self._seed, n, f"bootstrap/{name}")
            rows = torch.randint(n, (self.n_boot, n), generator=draws).numpy()
            counts = np.zeros((self.n_boot, n))
            np.add.at(counts, (np.arange(self.n_boot)[:, None], rows), 1.0)
            self._weights[name, n] = counts / n
        return self._weights[name, n]

    def means(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return (n_boot, R) means of (R, Q) values."""
        return self.weights(name, rows.shape[1]) @ rows.T

    def relative_spread(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return (n_boot,) of :func:`relative_spread`; NaN where a mean is 0."""
        first, second = self.means(name, rows), self.means(name, rows**2)
        spread = np.sqrt(np.maximum(second - first**2, 0.0))
        return np.divide(spread, first, out=np.full_like(spread, math.nan), where=first > 0).mean(axis=1)

    def variance(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return (n_boot,) of :func:`variance`."""
        return np.maximum(self.means(name, rows**2) - self.means(name, rows) ** 2, 0.0).mean(axis=1)

    def drop_rate(self, ref: tuple[str, np.ndarray], new: tuple[str, np.ndarray]) -> np.ndarray:
        """Return (n_boot,) drop rates of means over trainings; sets of one name are resampled together."""
        before, after = self.means(*ref).mean(axis=1), self.means(*new).mean(axis=1)
        return np.divide(after - before, before, out=np.full_like(before, math.nan), where=before > 0)


def bootstrap_interval(resampled: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of (n_boot,) resampled figures, or None where too many are undefined."""
    good = resampled[np.isfinite(resampled)]
    if len(good) < (1 - UNDEFINED_SHARE) * len(resampled) or not len(good):
        return None
    tail = (1 - check_number("confidence", confidence, low=0, high=1, open_low=True, open_high=True)) / 2
    low, high = np.quantile(good, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same queries.

    Attributes:
        difference: mean of a - b.
        p_t: two-sided paired t-test.
        p_randomisation: two-sided, by flipping the signs of the differences (Fisher); no normality assumed.
        n: queries.
    """

    difference: float
    p_t: float
    p_randomisation: float
    n: int


def paired_test(a: Values, b: Values, *, n_flips: int = 10_000, generator: Seed = None) -> PairedTest:
    """Test whether two models differ on the same queries.

    Args:
        a: query -> value, or (Q,) or (R, Q) values (averaged over trainings).
        b: likewise, of the same queries.
        n_flips: random sign patterns.
        generator: seed of the sign patterns.

    Raises:
        ValueError: different queries.
    """
    check_count("n_flips", n_flips)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            raise ValueError(f"a and b hold {len(set(a) ^ set(b))} queries that the other does not have")
        b = {qid: b[qid] for qid in a}
    first, second = _rows(a).mean(axis=0), _rows(b).mean(axis=0)
    if len(first) != len(second):
        raise ValueError(f"a holds {len(first)} queries, b {len(second)}")
    gaps = first - second
    if not gaps.any():
        return PairedTest(0.0, 1.0, 1.0, len(gaps))
    p_t = math.nan
    if len(gaps) > 1:
        from scipy.stats import ttest_1samp  # only here: importing it takes a second

        p_t = float(np.asarray(ttest_1samp(gaps, 0.0))[1]) if np.ptp(gaps) > 0 else 0.0
    draws = stream(resolve_seed(generator), len(gaps), "sign flips")
    signs = torch.randint(2, (n_flips, len(gaps)), generator=draws).numpy() * 2.0 - 1.0
    found = np.abs(signs @ gaps) / len(gaps)
    # the observed pattern is one of the patterns; sums in another order may differ in the last bits
    p = (1 + (found >= abs(gaps.mean()) * (1 - 1e-12)).sum()) / (n_flips + 1)
    return PairedTest(float(gaps.mean()), p_t, float(p), len(gaps))
