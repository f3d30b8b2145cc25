"""The five tasks, each a measurement of every model on one and the same material.

=====  ========================================================================================================
T1     :class:`VarianceTask`: how uneven is a model over queries of the kind it knows?
T2     :class:`UnseenQueryTypeTask`: what is lost on a type of query that training has not shown?
T3     :class:`UnseenCorpusTask`: what is lost on another corpus?
T4     :class:`QueryAttackTask`: what is lost when queries are mistyped or reworded?
T5     :class:`DocumentAttackTask`: what is lost when owners of irrelevant pages edit them?
=====  ========================================================================================================

T2 to T5 are judged by the drop rate ``DR = (P_new - P_ref) / P_ref``, mean over the task's conditions; T1 by the
relative spread ``sqrt(V) / P``, because V alone is least for rankers that are bad everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.perturb.query import QueryPerturbation, operator, sampled
from ir_robust.ranking_robustness.metrics import (
    bootstrap_interval,
    cvar,
    drop_rate,
    failure_rate,
    normalised,
    relative_spread,
    variance,
)
from ir_robust.ranking_robustness.models import Contestant
from ir_robust.ranking_robustness.session import Ranked, Rows, Session
from ir_robust.text import Words
from robust_core.checks import check_count, check_number
from robust_core.evaluation.metrics.estimate import Estimate, mean

__all__ = [
    "Drop",
    "Outcome",
    "QueryAttackTask",
    "Task",
    "UnseenCorpusTask",
    "UnseenQueryTypeTask",
    "VarianceTask",
    "drop_outcome",
    "length_types",
]

TAILS = (0.1, 0.25)
TOO_LOW = 0.05
"""Drop rates that divide by less than this are flagged."""


@dataclass(frozen=True)
class Outcome:
    """What a task found of one model.

    Attributes:
        headline: the figure that is compared.
        resampled: (n_boot,) the same figure of resampled queries, in the same resamples for every model.
        per_query: (Q,) what is tested in pairs: effectiveness as a share of the model's own mean, or as it is (T1).
        figures: everything, by name.
        arrays: per-query values, by name.
        flags: reasons to distrust it.
    """

    headline: float
    resampled: np.ndarray
    per_query: np.ndarray
    figures: dict[str, Estimate]
    arrays: dict[str, np.ndarray]
    flags: tuple[str, ...] = ()


class Task(Protocol):
    """A measurement of every model."""

    @property
    def name(self) -> str:
        """In names of figures."""
        ...

    @property
    def title(self) -> str:
        """In tables."""
        ...

    @property
    def headline(self) -> str:
        """What is compared, in words."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is."""
        ...

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Return model -> what was found."""
        ...

    def about(self) -> dict[str, Any]:
        """Return the settings, as plain JSON."""
        ...


# -- T1 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarianceTask:
    """T1: mean, variance and worst queries on the collection that a model knows.

    Attributes:
        tau: a query at or below it is poorly served.
    """

    tau: float = 0.1
    name: str = "variance"
    title: str = "Performance variance"
    headline: str = "relative spread sqrt(V) / P"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        check_number("tau", self.tau, low=0.0, high=1.0)

    def about(self) -> dict[str, Any]:
        """Return the settings."""
        return {"tau": self.tau}

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Measure every model on its unseen queries."""
        clean = {who.name: session.clean(who) for who in models}
        best = {m: np.max([clean[who.name].rows[m].mean(axis=0) for who in models], axis=0) for m in session.measures}
        return {who.name: self._outcome(session, clean[who.name], best) for who in models}

    def _outcome(self, session: Session, clean: Ranked, best: Mapping[str, np.ndarray]) -> Outcome:
        figures: dict[str, Estimate] = {}
        draws = session.resamples
        for measure, rows in clean.rows.items():
            n = rows.shape[1]
            figures[f"{measure}/mean"] = mean(rows.mean(axis=0), low=0.0, high=1.0)
            interval = bootstrap_interval(draws.variance("source", rows))
            figures[f"{measure}/variance"] = Estimate(variance(rows), interval, n)
            interval = bootstrap_interval(draws.relative_spread("source", rows))
            figures[f"{measure}/spread"] = Estimate(relative_spread(rows), interval, n)
            figures[f"{measure}/failures"] = Estimate(failure_rate(rows, self.tau), None, n)
            for q in TAILS:
                figures[f"{measure}/worst {100 * q:g} %"] = Estimate(cvar(rows, q), None, n)
            if best[measure].any():
                shares = normalised(rows, best[measure])
                figures[f"{measure}/normalised variance"] = Estimate(variance(shares), None, shares.shape[1])
            if len(rows) > 1:
                spread = float(rows.mean(axis=1).std(ddof=1))
                figures[f"{measure}/sd over trainings"] = Estimate(spread, None, len(rows))
        first = clean.rows[session.measures[0]]
        return Outcome(
            relative_spread(first),
            draws.relative_spread("source", first),
            first.mean(axis=0),
            figures,
            {f"clean/{measure}": rows for measure, rows in clean.rows.items()},
        )


# -- drops -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """One condition: the model where it is at home, and where it is not.

    Attributes:
        condition: name.
        home: (name of the set of queries, values) behind P_ref.
        away: likewise behind P_new; sets of one name hold the same queries.
        known: values of a model that was trained for this condition, or None: what can be had there.
        figures: further ones.
        arrays: further ones.
    """

    condition: str
    home: tuple[str, Rows]
    away: tuple[str, Rows]
    known: Rows | None = None
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def drop_outcome(session: Session, drops: Sequence[Drop]) -> Outcome:
    """Return what several conditions say of one model: their mean drop rate, by the first measure."""
    figures: dict[str, Estimate] = {}
    arrays: dict[str, np.ndarray] = {}
    flags: list[str] = []
    first = session.measures[0]
    heads, resampled, shares = [], [], []
    for drop in drops:
        for measure in session.measures:
            home, away = drop.home[1][measure], drop.away[1][measure]
            rate = drop_rate(float(home.mean()), float(away.mean()))
            draws = session.resamples.drop_rate((drop.home[0], home), (drop.away[0], away))
            key, n = f"{drop.condition}/{measure}", away.shape[1]
            figures[f"{key}/home"] = mean(home.mean(axis=0), low=0.0, high=1.0)
            figures[f"{key}/away"] = mean(away.mean(axis=0), low=0.0, high=1.0)
            figures[f"{key}/drop"] = Estimate(rate, bootstrap_interval(draws), n)
            if drop.known is not None:
                known = drop.known[measure]
                figures[f"{key}/known"] = mean(known.mean(axis=0), low=0.0, high=1.0)
                lost = drop_rate(float(known.mean()), float(away.mean()))
                spread = session.resamples.drop_rate((drop.away[0], known), (drop.away[0], away))
                figures[f"{key}/drop from known"] = Estimate(lost, bootstrap_interval(spread), n)
            arrays[f"{drop.condition}/{measure}"] = away
            if drop.home[0] == drop.away[0]:  # the same queries: what became of each can be shown
                arrays[f"home/{measure}"] = home
            if measure == first:
                heads.append(rate)
                resampled.append(draws)
                own = float(home.mean())
                shares.append(away.mean(axis=0) / own if own > 0 else np.zeros(n))
                if own < TOO_LOW:
                    flags.append(f"{drop.condition}: drop rates divide by a {measure} of {own:.3f}; they say little")
        figures |= {f"{drop.condition}/{name}": value for name, value in drop.figures.items()}
        arrays |= {f"{drop.condition}/{name}": value for name, value in drop.arrays.items()}
    same = len({len(share) for share in shares}) == 1 and len({drop.away[0] for drop in drops}) == 1
    per_query = np.mean(shares, axis=0) if same else np.concatenate(shares)
    headline = float(np.mean(heads)) if all(map(math.isfinite, heads)) else math.nan
    draws = np.mean(resampled, axis=0)
    figures["drop"] = Estimate(headline, bootstrap_interval(draws), len(per_query))
    return Outcome(headline, draws, per_query, figures, arrays, tuple(flags))


# -- T2 ----------------------------------------------------------------------------------------------------------


def length_types(queries: Mapping[str, str], n_types: int = 2) -> dict[str, str]:
    """Return query -> type by its number of words, in classes of about the same size.

    Queries of the same length are of the same type, so classes may differ in size; their names tell the lengths.
    """
    check_count("n_types", n_types, low=2)
    lengths = {qid: len(Words.of(text)) for qid, text in queries.items()}
    cuts = np.quantile(list(lengths.values()), np.linspace(0, 1, n_types + 1)[1:-1], method="lower")
    cuts = sorted({int(cut) for cut in cuts if cut < max(lengths.values())})
    if not cuts:
        raise ValueError("queries: all have the same number of words; length makes no types of them")
    ends = [*cuts, max(lengths.values())]
    starts = [min(lengths.values()), *(cut + 1 for cut in cuts)]
    names = [f"{low}-{high} words" for low, high in zip(starts, ends, strict=True)]
    return {qid: names[int(np.searchsorted(cuts, length))] for qid, length in lengths.items()}


@dataclass(frozen=True)
class UnseenQueryTypeTask:
    """T2: each type of query in turn is kept from training, and tested.

    Home are the queries of the other types, each ranked by a training that has not seen it; away is the type that no
    training of this condition has seen. ``known`` is the model trained on all types. Nothing of the type reaches the
    recipe, so settings cannot be chosen on it either.

    Attributes:
        type_of: query's number -> type, or a function of the query's text.
        least: a type with fewer queries is not held out (its queries stay among the others).
    """

    type_of: Mapping[str, str] | Callable[[str], str] = field(repr=False)
    least: int = 10
    name: str = "query type"
    title: str = "Unseen query type"
    headline: str = "drop rate, mean over types"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        check_count("least", self.least, low=2)

    def about(self) -> dict[str, Any]:
        """Return the settings."""
        return {"least": self.least}

    def types(self, queries: Mapping[str, str], qids: Sequence[str]) -> dict[str, str]:
        """Return query -> type.

        Raises:
            ValueError: a query without a type.
        """
        known = self.type_of
        if not isinstance(known, Mapping):
            return {qid: str(known(queries[qid])) for qid in qids}
        missing = [qid for qid in qids if qid not in known]
        if missing:
            raise ValueError(f"type_of: {len(missing)} of {len(qids)} queries have no type, {missing[0]!r} first")
        return {qid: str(known[qid]) for qid in qids}

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Hold out each type in turn."""
        source = session.source
        types = self.types(source.data.queries, source.qids)
        learned = types | self.types(session.learn.data.queries, session.learn.qids)
        counts = {kind: sum(1 for t in types.values() if t == kind) for kind in sorted(set(types.values()))}
        held = [kind for kind, n in counts.items() if n >= self.least and len(types) - n >= self.least]
        if not held:
            told = ", ".join(f"{kind}: {n}" for kind, n in counts.items())
            raise ValueError(f"type_of: no type and its rest have {self.least} queries each ({told})")
        drops: dict[str, list[Drop]] = {who.name: [] for who in models}
        for kind in held:
            split = session.split(f"without {kind}", lambda qid, kind=kind: learned[qid] != kind)
            others = [qid for qid in source.qids if types[qid] != kind]
            away = [qid for qid in source.qids if types[qid] == kind]
            places = [i for i, qid in enumerate(source.qids) if types[qid] == kind]
            if session.train is not None:  # trained elsewhere: every query of the other types is a test
                split = replace(split, part_of=dict.fromkeys(others, "train"))
            for who in models:
                home = session.cross(who, f"type {kind} home", source.data.queries, source.lists, split)
                found = session.each(who, f"type {kind} away", source, away, split)
                rows = session.clean(who).rows
                known = {m: values[:, places] for m, values in rows.items()} if who.trained else None
                sets = (f"all but {kind}", home.rows), (f"only {kind}", found.rows)
                drops[who.name].append(Drop(kind, *sets, known))
                who.forget(split.name)
        return {name: drop_outcome(session, found) for name, found in drops.items()}


# -- T3 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnseenCorpusTask:
    """T3: the same trained model on another corpus.

    Corpora differ in difficulty, so a drop rate alone says little: compare it between models, and with ``reference``
    compare with the same recipe trained on the other corpus (by folds).

    Attributes:
        corpora: name -> collection with judgements.
        runs: name -> first stage; the benchmark's own where there is none.
        reference: train recipes on the other corpora too.
    """

    corpora: Mapping[str, Collection] = field(repr=False)
    runs: Mapping[str, Run] = field(default_factory=dict, repr=False)
    reference: bool = False
    name: str = "corpus"
    title: str = "Unseen corpus"
    headline: str = "drop rate, mean over corpora"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora: at least one collection beside the first is needed")

    def about(self) -> dict[str, Any]:
        """Return the settings."""
        return {"corpora": {name: [data.name, data.sha256] for name, data in self.corpora.items()}}

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Rank the other corpora."""
        drops: dict[str, list[Drop]] = {who.name: [] for who in models}
        for name, data in self.corpora.items():
            corpus = session.corpus(data, self.runs.get(name))
            native = session.elsewhere(data, self.runs.get(name)) if self.reference else None
            for who in models:
                home = session.clean(who).rows
                away = session.each(who, f"corpus {name}", corpus, corpus.qids, session.split())
                known = native.clean(who).rows if native is not None and who.trained else None
                drops[who.name].append(Drop(name, ("source", home), (f"corpus {name}", away.rows), known))
        return {name: drop_outcome(session, found) for name, found in drops.items()}


# -- T4 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueryAttackTask:
    """T4: queries mistyped, reworded, shuffled; every model gets the same variations.

    Attributes:
        operators: of :mod:`ir_robust.perturb.query`, or functions query -> query.
        n_draws: variations of each query, each measured.
        worst_of: if given, that many variations, of which the worst for the model counts (or the query as it is,
            where all of them help): an attacker who sees the effectiveness, instead of chance.
    """

    operators: tuple[Any, ...]
    n_draws: int = 1
    worst_of: int | None = None
    name: str = "query attack"
    title: str = "Query attack"
    headline: str = "drop rate, mean over operators"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "operators", tuple(operator(op) for op in self.operators))
        check_count("n_draws", self.n_draws)
        if self.worst_of is not None:
            check_count("worst_of", self.worst_of)
        names = [op.name for op in self.operators]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"operators: {names}; at least one, and each name once, is needed")

    def about(self) -> dict[str, Any]:
        """Return the settings."""
        return {"operators": [repr(op) for op in self.operators], "n_draws": self.n_draws, "worst_of": self.worst_of}

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Rank the variations."""
        drops: dict[str, list[Drop]] = {who.name: [] for who in models}
        for op in self.operators:
            draws = _variations(session, op, self.worst_of or self.n_draws)
            same = [draw[qid] == session.data.queries[qid] for draw in draws for qid in session.source.qids]
            unchanged = {"unchanged queries": Estimate(float(np.mean(same)), None, len(same))}
            lists = [session.lists_for(draw) for draw in draws]
            for who in models:
                clean = session.clean(who).rows
                rows = [
                    session.cross(who, f"query {op.name} {i}", draw, lists[i], session.split()).rows
                    for i, draw in enumerate(draws)
                ]
                away = _worst(clean, rows, session.measures) if self.worst_of else _stacked(rows)
                drops[who.name].append(Drop(op.name, ("source", clean), ("source", away), figures=unchanged))
        return {name: drop_outcome(session, found) for name, found in drops.items()}


def _variations(session: Session, op: QueryPerturbation, n_draws: int) -> list[dict[str, str]]:
    queries = session.data.queries
    found: dict[str, list[str]] = {}
    for qid in session.source.qids:
        found[qid] = sampled(op, qid, queries[qid], n_draws, generator=session.seed)
        if not all(len(Words.of(text)) for text in found[qid]):
            raise ValueError(f"operator {op.name!r} left no word of query {qid!r}: {queries[qid][:60]!r}")
    return [{qid: texts[draw] for qid, texts in found.items()} for draw in range(n_draws)]


def _stacked(rows: Sequence[Rows]) -> Rows:
    return {measure: np.concatenate([row[measure] for row in rows]) for measure in rows[0]}


def _worst(clean: Rows, rows: Sequence[Rows], measures: Sequence[str]) -> Rows:
    """Return the values at the variation that is worst by the first measure, the clean query among them."""
    tried = [clean, *rows]
    chosen = np.argmin([row[measures[0]] for row in tried], axis=0)
    return {m: np.take_along_axis(np.array([row[m] for row in tried]), chosen[None], axis=0)[0] for m in measures}
