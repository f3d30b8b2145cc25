"""Certificates of a whole list, and how to decide early: the same promises from a fraction of the samples.

Looks at 64, 128, ... and n samples of a document are fixed beforehand. Bounds by betting hold at all looks at once; of
the others each look's have their own share of the budget, half of it the last one's. Either way the bounds of *all*
looks of *all* documents hold jointly with probability 1 - alpha, whichever are taken and in whatever order. So after
each look one may

* certify a K as soon as the inequality holds (:mod:`ir_robust.certdr.certificate`);
* give a K up once the gap is so small that all n samples would hardly certify it: giving up is always sound, and how
  readily is a matter of power alone (``patience`` standard errors);
* go on only with documents that stand in the way of a K still open: those whose interval reaches the middle between
  the last inside and the best attacked outside.

Most documents of a list are far from every K asked for and are done at the first looks. Source: successive elimination
of best-arm identification (Even-Dar, Mannor and Mansour 2006), here for top sets, with an attack's bonus for outsiders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir_robust.attacks.base import WordBudget
from ir_robust.certdr.certificate import TopKCertificate, certify_top_k, order_of, score_bounds, top_k_margin
from ir_robust.certdr.smoothed import Sampler, SmoothedRanker, SmoothedScores
from robust_core.certificates.statistics import split_alpha
from robust_core.checks import check_count, check_number

__all__ = ["certify_list", "looks_of"]

FIRST_LOOK = 64


def looks_of(n: int) -> list[int]:
    """Return 64, 128, ... and ``n``: the sample numbers at which a document may be looked at."""
    found, size = [], FIRST_LOOK
    while size < n:
        found.append(size)
        size *= 2
    return [*found, n]


def certify_list(
    smoothed: SmoothedRanker,
    query: str,
    docs: Sequence[str],
    ks: int | Sequence[int],
    *,
    budget: WordBudget | float | int | None = None,
    alpha: float = 0.05,
    bound: str = "betting",
    rule: str = "per_document",
    selection: str = "union",
    early: bool = True,
    patience: float = 3.0,
    names: Sequence[str] | None = None,
) -> tuple[dict[int, TopKCertificate], SmoothedScores]:
    """Return the certificates of a query and the estimates behind them.

    Args:
        smoothed: what is deployed.
        query: the query.
        docs: the texts of the list.
        ks: which K.
        budget: of the attacker, as of :func:`ir_robust.tables.budget_words`; None lets him change every word.
        alpha: failure probability, joint over documents, looks and K.
        bound: as of :func:`~ir_robust.certdr.certificate.certify_top_k`; ``"exact"`` scores every variant of every
            document.
        rule: likewise.
        selection: likewise; ``"split"`` lets the first fifth of the samples choose and never decides early.
        early: decide early. Without it every document gets all samples.
        patience: standard errors by which a K must be hopeless to be given up.
        names: document numbers, for the order of equals.

    Raises:
        ValueError: an empty list, or an argument that is no choice; scores outside [0, 1].
    """
    wanted = [ks] if isinstance(ks, int) else list(ks)
    check_number("patience", patience, low=0.0)
    if not len(docs):
        raise ValueError("docs: an empty list has no first K; at least one document is needed")
    samplers = [smoothed.sampler(query, doc) for doc in docs]
    devs = np.array([smoothed.table.deviation(sampler.lower, budget) for sampler in samplers])
    settings = {"alpha": alpha, "bound": bound, "rule": rule, "names": names}
    if bound == "exact":
        whole = SmoothedScores.of([sampler.enumerate() for sampler in samplers])
        return certify_top_k(whole, devs, wanted, **settings), whole
    if selection == "split":
        return _split(samplers, smoothed.n_samples, wanted, devs, settings)
    if not early or selection != "union":  # certify_top_k names what selections there are
        whole = SmoothedScores.of([sampler.extend(smoothed.n_samples) for sampler in samplers])
        return certify_top_k(whole, devs, wanted, selection=selection, **settings), whole
    for k in wanted:
        check_count("k", k)
    race = _Race(samplers, smoothed.n_samples, devs, wanted, patience=patience, **settings)
    race.run()
    return {k: race.found[k] for k in wanted}, race.scores


def _split(
    samplers: Sequence[Sampler], n_samples: int, ks: list[int], devs: np.ndarray, settings: dict[str, Any]
) -> tuple[dict[int, TopKCertificate], SmoothedScores]:
    """Let the first samples choose and the others, which are independent of them, certify."""
    choose = max(n_samples // 5, 1)
    if choose == n_samples:
        raise ValueError(f"n_samples={n_samples}: a split needs at least 2")
    first, rest = [], []
    for sampler in samplers:
        early = sampler.extend(choose).copy()
        first.append(early)
        rest.append(sampler.extend(n_samples).since(early))
    chosen, certifying = SmoothedScores.of(first), SmoothedScores.of(rest)
    found = certify_top_k(certifying, devs, ks, selection="split", selected_by=chosen, **settings)
    return found, certifying


class _Race:
    """The state of early decisions on one list."""

    def __init__(
        self,
        samplers: Sequence[Sampler],
        n_samples: int,
        devs: np.ndarray,
        ks: list[int],
        *,
        patience: float,
        alpha: float,
        bound: str,
        rule: str,
        names: Sequence[str] | None,
    ) -> None:
        self.samplers, self.looks, n = samplers, looks_of(n_samples), len(samplers)
        m = len(self.looks)
        check_number("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
        shares: Sequence[float] = [alpha] * m  # bets need no more: they may be looked at whenever one likes
        if bound != "betting":
            shares = split_alpha(alpha, m, weights=[1.0] * (m - 1) + [max(m - 1.0, 1.0)])
        self.alphas = [share / (2 * max(n, 1)) for share in shares]
        self.alpha, self.bound, self.rule, self.names, self.patience = alpha, bound, rule, names, patience
        self.devs, self.open = devs, list(dict.fromkeys(ks))
        self.level = np.full(n, -1)
        self.lower, self.upper = np.zeros(n), np.ones(n)
        self.found: dict[int, TopKCertificate] = {}

    @property
    def scores(self) -> SmoothedScores:
        """Estimates by the samples so far."""
        return SmoothedScores.of([sampler.tally for sampler in self.samplers])

    def run(self) -> None:
        """Sample until every K is certified or given up."""
        rows = np.arange(len(self.samplers))
        while self.open:
            self._look(rows)
            scores = self.scores
            order, hope = order_of(scores.mean, self.names), self._hope(scores)
            active = np.zeros(len(scores), dtype=bool)
            for k in list(self.open):
                active |= self._judge(k, scores, order, hope)
            rows = np.flatnonzero(active)
        spent = int(sum(sampler.tally.n for sampler in self.samplers))
        self.found = {k: TopKCertificate(**{**vars(c), "n_samples": spent}) for k, c in self.found.items()}

    def _look(self, rows: np.ndarray) -> None:
        """Take these documents to their next look."""
        self.level[rows] += 1
        tallies = [self.samplers[i].extend(self.looks[self.level[i]]) for i in rows]
        for level in sorted(set(self.level[rows].tolist())):
            here = self.level[rows] == level
            seen = SmoothedScores.of([t for t, chosen in zip(tallies, here, strict=True) if chosen])
            lower, upper = score_bounds(seen, self.alphas[level], bound=self.bound, planned=self.looks[-1])
            at = rows[here]
            self.lower[at] = np.maximum(self.lower[at], lower)
            self.upper[at] = np.minimum(self.upper[at], upper)

    def _judge(
        self, k: int, scores: SmoothedScores, order: np.ndarray, hope: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """Close K if it can be closed; return (N,) bool, the documents that should be looked at further."""
        inside = np.zeros(len(scores), dtype=bool)
        inside[order[:k]] = True
        margin = top_k_margin(self.lower, self.upper, self.devs, inside, self.rule)
        none = np.zeros(len(scores), dtype=bool)
        if margin <= 0.0 and top_k_margin(*hope, self.devs, inside, self.rule) > 0.0:
            active = self._blocking(scores.mean, inside)
            if active.any():
                return active
        self.open.remove(k)
        outside = self.devs[~inside]
        width = float(np.mean(np.where(inside, scores.mean - self.lower, self.upper - scores.mean)))
        most = float(outside.max()) if len(outside) else 0.0
        top = tuple(order[:k].tolist())
        self.found[k] = TopKCertificate(k, top, margin > 0.0, margin, width, most, self.alpha)
        return none

    def _bonus(self, inside: np.ndarray) -> np.ndarray:
        """Return (N,) what an attack adds: 0 inside."""
        worst = self.devs[~inside].max() if self.rule == "paper" and not inside.all() else self.devs
        return np.where(inside, 0.0, worst)

    def _hope(self, scores: SmoothedScores) -> tuple[np.ndarray, np.ndarray]:
        """Return what all samples would at best give, as far as can be told: lower bounds if inside, upper if not."""
        last = self.looks[-1]
        left = np.where(scores.exact, 0.0, np.maximum(1.0 / scores.n - 1.0 / last, 0.0))
        luck = self.patience * np.sqrt(np.maximum(scores.var, 1e-6) * left)
        above, below = (np.clip(scores.mean + side * luck, 0.0, 1.0) for side in (1, -1))
        if self.bound == "betting":  # what bets amount to at their planned size, about
            log = -np.log(self.alphas[-1]) * ~scores.exact
            width = np.sqrt(2.0 * scores.var * log / last)
            return above - width - 0.5 * log * above / last, below + width + 0.5 * log * (1.0 - below) / last
        final = np.where(scores.exact, scores.n, last)
        lower, _ = score_bounds(
            SmoothedScores(above, scores.var, final, scores.exact), self.alphas[-1], bound=self.bound
        )
        _, upper = score_bounds(
            SmoothedScores(below, scores.var, final, scores.exact), self.alphas[-1], bound=self.bound
        )
        return lower, upper

    def _blocking(self, mean: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Return (N,) bool: unfinished documents that stand in the way of this K."""
        bonus = self._bonus(inside)
        unfinished = np.array([not sampler.tally.exact for sampler in self.samplers])
        unfinished &= self.level < len(self.looks) - 1
        middle = (mean[inside].min() + (mean + bonus)[~inside].max()) / 2
        low, high = self.lower, self.upper + bonus
        reach = np.where(inside, low <= middle, high >= middle) & unfinished
        if reach.any():
            return reach
        # those at the middle are spent: others may still make room for them
        return np.where(inside, low <= high[~inside].max(), high >= low[inside].min()) & unfinished
