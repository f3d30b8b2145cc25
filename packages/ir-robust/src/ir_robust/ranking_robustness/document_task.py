"""T5, document attack: owners of irrelevant pages below the top edit them within a budget.

Targets are documents without relevance that the *model itself* ranks in a window below the top: an attacker of another
model would edit other pages. Which places of the window are taken is drawn for the query, the same for every model.
Each target is attacked alone against the untouched list (success, places climbed, entries into the top k, calls of the
ranker); then all edits are put into the list at once, and what that leaves of the model's effectiveness is the drop
rate. No figure is the attack's own word: :func:`ir_robust.attacks.attack_list` scores texts afresh and keeps the
budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ir_robust.attacks.base import DocumentAttack, DocumentResult, WordBudget, attack_list
from ir_robust.formats import ordered
from ir_robust.ranking_robustness.metrics import bootstrap_interval
from ir_robust.ranking_robustness.models import Contestant
from ir_robust.ranking_robustness.session import Kept, Ranked, Rows, Session
from ir_robust.ranking_robustness.tasks import Drop, Outcome, drop_outcome
from ir_robust.text import Words
from robust_core.checks import check_count
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.run import describe
from robust_core.random import derive, stream

__all__ = ["DocumentAttackTask"]


@dataclass(frozen=True)
class DocumentAttackTask:
    """T5: what editing irrelevant documents below the top does.

    Attributes:
        attack: a :class:`ir_robust.attacks.DocumentAttack`, or name -> attack.
        budget: put in place of the attacks' own, so that several are compared at one price; None leaves theirs.
        ranks: first and last place of the window from which targets are taken, from 1.
        n_targets: for each query, at most.
        n_queries: how many queries are attacked, drawn once for all models; None takes all. For models that are slow to
            ask; the drop is that of these queries.
        k: the top that attackers want to reach.
        checks: name -> function of (text before, text after), averaged over edited documents: whether a reader would
            notice, such as a cosine of embeddings or a change of perplexity.
    """

    attack: DocumentAttack | Mapping[str, DocumentAttack]
    budget: WordBudget | None = None
    ranks: tuple[int, int] = (11, 30)
    n_targets: int = 2
    n_queries: int | None = None
    k: int = 10
    checks: Mapping[str, Callable[[str, str], float]] = field(default_factory=dict, repr=False)
    name: str = "document attack"
    title: str = "Document attack"
    headline: str = "drop rate, mean over attacks"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_count("n_targets", self.n_targets)
        if self.n_queries is not None:
            check_count("n_queries", self.n_queries)
        first, last = self.ranks
        if not self.k < first <= last:
            raise ValueError(f"ranks={self.ranks}: a window below the top {self.k} is needed")
        if not self.attacks():
            raise ValueError("attack: at least one is needed")

    def attacks(self) -> dict[str, DocumentAttack]:
        """Return name -> attack, each with the task's budget where it has one."""
        named = self.attack if isinstance(self.attack, Mapping) else {type(self.attack).__name__: self.attack}
        if self.budget is None:
            return dict(named)
        return {name: replace(attack, budget=self.budget) for name, attack in named.items()}  # pyright: ignore

    def about(self) -> dict[str, Any]:
        """Return the settings."""
        attacks = {name: repr(attack) for name, attack in self.attacks().items()}
        return {"attacks": attacks, "ranks": list(self.ranks), "n_targets": self.n_targets,
                "n_queries": self.n_queries, "k": self.k}  # fmt: skip

    def measure(self, session: Session, models: Sequence[Contestant]) -> dict[str, Outcome]:
        """Attack every model."""
        drops: dict[str, list[Drop]] = {who.name: [] for who in models}
        for name, attack in self.attacks().items():
            for who in models:
                drops[who.name].append(self._attacked(session, who, name, attack))
        return {name: drop_outcome(session, found) for name, found in drops.items()}

    def queries(self, session: Session) -> list[str]:
        """Return the queries that are attacked, by name."""
        known = session.source.qids
        order = sorted(known, key=lambda qid: derive(session.seed, "attacked", qid))
        return sorted(order[: self.n_queries])

    def targets(self, session: Session, qid: str, scores: Mapping[str, float]) -> list[str]:
        """Return the documents to attack; each place of the window has a number drawn for the query, least first."""
        first, last = self.ranks
        grades = session.data.qrels[qid]
        seed = derive(session.seed, "targets", qid)
        numbers = torch.rand(last - first + 1, generator=stream(seed, 0, "window")).tolist()
        window = ordered(scores)[first - 1 : last]
        free = [(number, docno) for number, docno in zip(numbers, window, strict=False) if grades.get(docno, 0) <= 0]
        return [docno for _, docno in sorted(free)[: self.n_targets]]

    def _attacked(self, session: Session, who: Contestant, name: str, attack: DocumentAttack) -> Drop:
        clean, split, source = session.clean(who), session.split(), session.source
        qids = self.queries(session)
        places = [i for i, qid in enumerate(source.qids) if qid in set(qids)]
        name_of = "source" if len(qids) == len(source.qids) else "attacked"
        away: dict[str, list[list[float]]] = {measure: [] for measure in session.measures}
        outcomes: list[dict[str, list[dict[str, Any]]]] = []
        for number in range(who.n_trainings):
            found: dict[str, Any] = {}
            for part in who.parts(split):
                own = [qid for qid in qids if part is None or split.part_of[qid] == part]

                def work(qid: str, part: str | None = part, number: int = number) -> list[dict[str, Any]]:
                    ranker = session.ranker(who, source, split, part, number)
                    return self._attack(session, ranker, qid, clean.run(number, qid), attack)

                identity = [describe(attack), describe(self.checks), self.about(), session.seed, session.data.qrels]
                identity += [*session.identity(who, split, part, number), source.sha256, source.lists_sha256]
                asked = {qid: session.data.queries[qid] for qid in own}
                key = f"attack {name} {who.name} {part or ''} {number}"
                found |= session.stored(key, [*identity, asked], own, work)
            outcomes.append({qid: found[qid] for qid in qids})
            self._put_in(session, who, name, number, clean, outcomes[-1], away)
        rows: Rows = {measure: np.array(values) for measure, values in away.items()}
        home = {measure: values[:, places] for measure, values in clean.rows.items()}
        figures, arrays = self._figures(session, name_of, outcomes)
        return Drop(name, (name_of, home), (name_of, rows), figures=figures, arrays=arrays)

    def _attack(
        self, session: Session, ranker: Any, qid: str, scores: Mapping[str, float], attack: DocumentAttack
    ) -> list[dict[str, Any]]:
        targets = self.targets(session, qid, scores)
        docs = {docno: session.data.docs[docno] for docno in scores}
        results = attack_list(
            attack, ranker, session.data.queries[qid], docs, targets, k=self.k, scores=scores,
            generator=derive(session.seed, "attack", qid),
        )  # fmt: skip
        return [self._row(result, docs[result.docno]) for result in results]

    def _row(self, result: DocumentResult, before: str) -> dict[str, Any]:
        edited = result.text != before
        return {
            "docno": result.docno,
            "score": result.score[1],
            "rank": list(result.rank),
            "edits": len(result.edits),
            "words": len(Words.of(before)),
            "n_queries": result.n_queries,
            "text": result.text if edited else None,
            "checks": {name: float(f(before, result.text)) for name, f in self.checks.items() if edited},
        }

    def _put_in(
        self, session: Session, who: Contestant, name: str, number: int, clean: Ranked,
        rows: Mapping[str, list[dict[str, Any]]], away: dict[str, list[list[float]]],
    ) -> None:  # fmt: skip
        run = {qid: clean.run(number, qid) | {row["docno"]: row["score"] for row in rows[qid]} for qid in rows}
        for measure, values in session.measure(session.data, run).items():
            away[measure].append(values)
        scores = {qid: np.array([run[qid][d] for d in clean.lists[qid]]) for qid in run}
        session.kept.append(Kept(f"attack {name}", who.name, str(number), clean.lists, scores))

    def _figures(
        self, session: Session, name_of: str, outcomes: Sequence[Mapping[str, list[dict[str, Any]]]]
    ) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
        """Return figures over targets; their intervals resample queries, since targets of one query are alike."""
        queries = [outcome[qid] for outcome in outcomes for qid in outcome]
        shape = (len(outcomes), len(queries) // len(outcomes))
        targets = [row for rows in queries for row in rows]
        figures: dict[str, Estimate] = {"targets": Estimate(float(len(targets)), None, len(targets))}
        empty = sum(1 for rows in queries if not rows)
        figures["queries without target"] = Estimate(float(empty), None, len(queries))

        def put(label: str, value: Callable[[dict[str, Any]], float]) -> None:
            sums = np.array([sum(value(row) for row in rows) for rows in queries], dtype=np.float64).reshape(shape)
            sizes = np.array([len(rows) for rows in queries], dtype=np.float64).reshape(shape)
            if not sizes.any():
                return
            top, bottom = (session.resamples.means(name_of, part).mean(axis=1) for part in (sums, sizes))
            ratio = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
            figures[label] = Estimate(float(sums.sum() / sizes.sum()), bootstrap_interval(ratio), len(targets))

        put("success", lambda row: row["rank"][1] < row["rank"][0])
        put("boost", lambda row: row["rank"][0] - row["rank"][1])
        put(f"top {self.k}", lambda row: row["rank"][1] <= self.k)
        put("words changed", lambda row: row["edits"] / max(row["words"], 1))
        put("calls", lambda row: row["n_queries"])
        for name in self.checks:
            values = [row["checks"][name] for row in targets if row["checks"]]
            if values:
                figures[f"{name} of edited"] = Estimate(float(np.mean(values)), None, len(values))
        number = [i for i, outcome in enumerate(outcomes) for rows in outcome.values() for _ in rows]
        query = [j for outcome in outcomes for j, rows in enumerate(outcome.values()) for _ in rows]
        ranks = np.array([row["rank"] for row in targets], dtype=np.int64).reshape(-1, 2)
        arrays = {"rank": ranks, "query": np.array(query, dtype=np.int64), "training": np.array(number, dtype=np.int64)}
        return figures, arrays
