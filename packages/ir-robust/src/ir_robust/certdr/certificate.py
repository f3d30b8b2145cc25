"""The certificate of a query: no document that stands outside the top K can enter it. One function per inequality.

Write T for the K documents that stand inside and o_d for the most that an attack can add to g(d)
(:func:`ir_robust.tables.deviation`). T is certified if, for bounds that hold jointly with probability 1 - alpha,

    per_document:  min_{t in T} lower(t)  >  max_{d not in T} (upper(d) + o_d)
    paper:         min_{t in T} lower(t)  >  max_{d not in T} upper(d)  +  max_{d not in T} o_d

The first implies what is promised, and T is then the true top K of g: each attacked document is compared with untouched
members of T, so the promise also holds if many outsiders are attacked at once. ``per_document`` certifies whatever
``paper`` does, and more.

*Joint confidence.* T is chosen by the same samples, so each document may turn out on either side: 2N one-sided bounds
share alpha, and all asked K are covered at once (``selection="union"``). With ``"split"`` a part of the samples chooses
and the rest certifies; then a document needs only the sides on which it is used, N bounds for one K. Bounding d_K alone
(N - K + 1 bounds) would not do: that the K-th is above the outsiders does not place the K - 1 before it there. The
paper's code subtracts :func:`mc_error`, a statement about one pair of documents at 90 %.

Bounds: by betting (:mod:`robust_core.certificates.betting`), which heeds how little smoothed scores vary and holds at
all sample numbers at once; Hoeffding's; Chernoff's with the divergence of Bernoulli variables, never wider; empirical
Bernstein's. ``"exact"`` takes the means for g itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir_robust.certdr.smoothed import SmoothedScores
from robust_core.certificates.betting import betting_lower, betting_upper
from robust_core.certificates.statistics import (
    chernoff_lower,
    chernoff_upper,
    empirical_bernstein_lower,
    hoeffding_lower,
    hoeffding_upper,
)
from robust_core.checks import check_choice, check_count, check_number

__all__ = [
    "BOUNDS",
    "RULES",
    "Prediction",
    "TopKCertificate",
    "certified_robust_queries",
    "certify_top_k",
    "mc_error",
    "order_of",
    "predict_top_k",
    "score_bounds",
    "top_k_margin",
]

BOUNDS = ("betting", "bernstein", "chernoff", "hoeffding", "exact")
RULES = ("per_document", "paper")
SELECTIONS = ("union", "split")


@dataclass(frozen=True)
class TopKCertificate:
    """What is promised of a query and a K.

    Attributes:
        k: how many documents stand inside.
        top: their positions in the list, the best first.
        certified: no outsider can enter.
        margin: least distance between inside and attacked outside; positive exactly where certified.
        mc_radius: mean distance from estimates to the bounds used.
        max_deviation: largest o_d of an outsider.
        alpha: failure probability, joint over all documents and all K that were asked together.
        n_samples: noisy documents that were scored for the query.
    """

    k: int
    top: tuple[int, ...]
    certified: bool
    margin: float
    mc_radius: float
    max_deviation: float
    alpha: float
    n_samples: int = 0


def mc_error(n: int, alpha: float = 0.05) -> float:
    """Return what the paper's code subtracts: a two-sided Hoeffding radius at ``alpha`` for each of two scores."""
    check_number("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
    return 2.0 * math.sqrt(math.log(2.0 / alpha) / (2.0 * check_count("n", n)))


def score_bounds(
    scores: SmoothedScores,
    alpha: float | None,
    *,
    bound: str = "betting",
    planned: int | None = None,
    sides: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) lower and (N,) upper bounds of g, *each* of the 2N failing with probability ``alpha`` at most.

    Args:
        scores: estimates.
        alpha: of each one-sided bound; not looked at where ``bound`` is ``"exact"``.
        bound: one of :data:`BOUNDS`.
        planned: sample size that bets are made for, the same at every look; each document's own if None.
        sides: (N,) bool each, where lower and upper bounds by betting are wanted; elsewhere they are 0 and 1.

    Raises:
        ValueError: bets on estimates without their samples, or no ``alpha``.
    """
    check_choice("bound", bound, BOUNDS)
    mean, var, n = scores.mean, scores.var, scores.n
    if bound == "exact" or scores.exact.all():
        return mean.copy(), mean.copy()
    if alpha is None:
        raise ValueError(f"alpha=None: a failure probability is needed for bound={bound!r}")
    pairs: dict[str, Any] = {
        "hoeffding": lambda a: (hoeffding_lower(mean, n, a), hoeffding_upper(mean, n, a)),
        "chernoff": lambda a: (chernoff_lower(mean, n, a), chernoff_upper(mean, n, a)),
        "bernstein": lambda a: (
            empirical_bernstein_lower(mean, var, n, a),
            1.0 - np.asarray(empirical_bernstein_lower(1.0 - mean, var, n, a)),
        ),
    }
    lower, upper = _bets(scores, alpha, planned, sides) if bound == "betting" else pairs[bound](alpha)
    return np.where(scores.exact, mean, lower), np.where(scores.exact, mean, upper)


def _bets(
    scores: SmoothedScores, alpha: float, planned: int | None, sides: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) lower and upper bounds by betting, documents of one sample size at a time."""
    if scores.samples is None:
        raise ValueError("bound='betting' needs the samples; choose 'chernoff' or 'bernstein' for means and variances")
    lower, upper = np.zeros(len(scores)), np.ones(len(scores))
    for side, function, found in ((0, betting_lower, lower), (1, betting_upper, upper)):
        wanted = ~scores.exact if sides is None else ~scores.exact & sides[side]
        for size in np.unique(scores.n[wanted]).tolist():
            rows = np.flatnonzero((scores.n == size) & wanted)
            found[rows] = function(np.stack([scores.samples[i] for i in rows]), alpha, planned=planned)
    return lower, upper


def order_of(mean: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
    """Return positions from best to worst; equals go by falling name, or stay in order without names."""
    if names is None:
        return np.argsort(-mean, kind="stable")
    return np.array(sorted(sorted(range(len(mean)), key=lambda i: names[i], reverse=True), key=lambda i: -mean[i]))


def top_k_margin(
    lower: np.ndarray, upper: np.ndarray, deviations: np.ndarray, inside: np.ndarray, rule: str = "per_document"
) -> float:
    """Return the distance between inside and attacked outside; infinity where nobody stands outside.

    Args:
        lower: (N,) lower bounds of g.
        upper: (N,) upper bounds of g.
        deviations: (N,) o_d.
        inside: (N,) bool.
        rule: one of :data:`RULES`.
    """
    check_choice("rule", rule, RULES)
    if inside.all():
        return math.inf
    if rule == "paper":
        attacked = upper[~inside].max() + deviations[~inside].max()
    else:
        attacked = (upper[~inside] + deviations[~inside]).max()
    # one rounded sum and one rounded difference of numbers of at most 2
    return float(lower[inside].min() - attacked * (1.0 + 2.0**-50))


def certify_top_k(
    scores: SmoothedScores,
    deviations: Sequence[float] | np.ndarray,
    ks: int | Sequence[int],
    *,
    alpha: float = 0.05,
    bound: str = "betting",
    rule: str = "per_document",
    selection: str = "union",
    selected_by: SmoothedScores | None = None,
    names: Sequence[str] | None = None,
) -> dict[int, TopKCertificate]:
    """Return K -> certificate, from estimates of the whole list.

    Args:
        scores: of all N documents.
        deviations: (N,) o_d of the original documents.
        ks: which K; those of at least N have nobody outside, and promise nothing about anyone.
        alpha: failure probability, joint over documents and K.
        bound: one of :data:`BOUNDS`.
        rule: ``"per_document"`` or ``"paper"``.
        selection: ``"union"``, or ``"split"`` with ``selected_by``.
        selected_by: estimates by *independent* samples, which alone choose who stands inside.
        names: document numbers, for the order of equals.

    Raises:
        ValueError: deviations outside [0, 1] or of another number, K below 1, an unknown word, an empty list.
    """
    check_choice("selection", selection, SELECTIONS)
    wanted = [ks] if isinstance(ks, int) else list(ks)
    for k in wanted:
        check_count("k", k)
    devs = np.asarray(deviations, dtype=np.float64)
    if not len(scores) or devs.shape != (len(scores),):
        raise ValueError(f"deviations has shape {devs.shape}; ({len(scores)},), one for each document, is needed")
    if not ((devs >= 0) & (devs <= 1)).all():
        raise ValueError("deviations: o_d lies in [0, 1]")
    if (selection == "split") != (selected_by is not None):
        raise ValueError("selected_by: independent estimates are needed with selection='split', and only there")
    if selected_by is not None and len(selected_by) != len(scores):
        raise ValueError(f"selected_by has {len(selected_by)} documents; {len(scores)} are needed")
    order = order_of((selected_by or scores).mean, names)
    m = _n_bounds(len(scores), wanted) if selected_by is not None else 2 * len(scores)
    exact = bound == "exact" or bool(scores.exact.all())
    check_number("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
    place = np.argsort(order)
    sides = (place < max(wanted, default=0), place >= min(wanted, default=0))  # above every K nobody needs an upper one
    lower, upper = score_bounds(scores, alpha / max(m, 1), bound=bound, sides=sides)
    n_samples = int(scores.n.sum()) + (0 if selected_by is None else int(selected_by.n.sum()))
    found = {}
    for k in wanted:
        inside = np.zeros(len(scores), dtype=bool)
        inside[order[:k]] = True
        margin = top_k_margin(lower, upper, devs, inside, rule)
        outside = devs[~inside]
        found[k] = TopKCertificate(
            k,
            tuple(order[:k].tolist()),
            margin > 0.0,
            margin,
            float(np.mean(np.where(inside, scores.mean - lower, upper - scores.mean))),
            float(outside.max()) if len(outside) else 0.0,
            0.0 if exact else alpha,
            n_samples,
        )
    return found


def _n_bounds(n: int, ks: Sequence[int]) -> int:
    """Return how many one-sided bounds are used where independent samples fix the order: rank r, K above and below."""
    ranks = range(1, n + 1)
    return sum(any(k >= r for k in ks) + any(k < r for k in ks) for r in ranks)


@dataclass(frozen=True)
class Prediction:
    """The top K that is deployed.

    Attributes:
        top: positions of the documents inside, incumbents first.
        entered: positions of outsiders that came in, each surely above the incumbent that it replaced.
        abstained: the samples cannot tell who belongs inside; ``top`` then keeps the incumbents, or the best guess.
    """

    top: tuple[int, ...]
    entered: tuple[int, ...]
    abstained: bool


def predict_top_k(
    scores: SmoothedScores,
    k: int,
    *,
    incumbents: Sequence[int] | None = None,
    alpha: float = 0.001,
    bound: str = "betting",
    names: Sequence[str] | None = None,
) -> Prediction:
    """Return the top K from samples drawn at the time of the query: a document enters only if it is surely better.

    A certificate speaks of g, but what is deployed sees estimates with fresh noise. So incumbents (those inside when
    the query was certified) stay unless an outsider's lower bound is above an incumbent's upper bound. If the bounds
    hold (probability 1 - alpha), whoever enters has a higher g than the one who leaves: from a certified top K,
    attacked documents stay out.

    Args:
        scores: estimates by fresh samples, of the whole list as it is now.
        k: how many stand inside.
        incumbents: positions of those inside so far, K of them; None takes the K best estimates.
        alpha: failure probability of the prediction.
        bound: one of :data:`BOUNDS`.
        names: document numbers, for the order of equals.

    Raises:
        ValueError: another number of incumbents, or positions that are not there.
    """
    n = len(scores)
    check_count("k", k)
    lower, upper = score_bounds(scores, alpha / max(2 * n, 1), bound=bound)
    first = order_of(scores.mean, names)[:k].tolist() if incumbents is None else list(incumbents)
    if len(set(first)) != min(k, n) or any(not 0 <= i < n for i in first):
        raise ValueError(f"incumbents={first}: {min(k, n)} different positions in 0 .. {n - 1} are needed")
    stay = sorted(first, key=lambda i: upper[i])  # the weakest first
    rest = sorted(set(range(n)) - set(first), key=lambda i: -lower[i])  # the surest first
    entered = []
    while stay and rest and lower[rest[0]] > upper[stay[0]]:
        stay.pop(0)
        entered.append(rest.pop(0))
    kept = [i for i in first if i in stay]
    top = (*kept, *entered)
    left = [i for i in range(n) if i not in top]
    sure = not left or min(lower[i] for i in top) > max(upper[i] for i in left)
    return Prediction(top, tuple(entered), not sure)


def certified_robust_queries(certificates: Mapping[str, Mapping[int, TopKCertificate]]) -> dict[int, float]:
    """Return K -> CRQ, the share of queries that are certified.

    Args:
        certificates: query -> K -> certificate; every query must have every K.

    Raises:
        ValueError: no query, or one without some K.
    """
    if not certificates:
        raise ValueError("certificates: at least one query is needed")
    ks = list(next(iter(certificates.values())))
    for qid, found in certificates.items():
        if set(found) != set(ks):
            raise ValueError(f"certificates: query {qid!r} has K {sorted(found)}, others have {sorted(ks)}")
    return {k: float(np.mean([found[k].certified for found in certificates.values()])) for k in ks}
