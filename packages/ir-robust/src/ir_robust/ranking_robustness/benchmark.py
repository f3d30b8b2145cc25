"""The benchmark: models, tasks, one material for all of them, and a report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.measures import parse_measure
from ir_robust.rankers.bm25 import BM25Index
from ir_robust.ranking_robustness.metrics import Resamples, bootstrap_interval, paired_test
from ir_robust.ranking_robustness.models import Contestant, contestants, digest
from ir_robust.ranking_robustness.report import SCHEMA, RobustnessReport, plain
from ir_robust.ranking_robustness.session import Session
from ir_robust.ranking_robustness.tasks import Outcome, Task
from robust_core.checks import check_choice, check_count
from robust_core.claim import versions
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.models import model_device
from robust_core.random import Seed, resolve_seed

__all__ = ["RobustnessBenchmark"]

OnStep = Callable[[str, int, int], None]
HOLLOW = 0.7
"""A win at less than this share of the best mean is flagged."""


class RobustnessBenchmark:
    """Measures models on tasks.

    Args:
        tasks: those of :mod:`.tasks` and :mod:`.document_task`, or the user's own; each name once.
        measures: names that ir-measures knows; the first one is compared, the others are reported.
        candidates: ``"fixed"``: attacked queries re-rank the candidates of the clean ones, so that a drop is the
            re-ranker's; ``"retrieved"``: the first stage is asked again, so that it is the whole pipeline's.
        depth: candidates of each query; None takes the whole corpus.
        first_stage: documents -> what has ``retrieve(collection, depth=)``.
        folds: trainings that leave out a part of the queries each, so that every query is tested unseen.
        n_trainings: trainings of each recipe from different seeds (the literature asks for three).
        n_boot: bootstrap resamples.
        generator: seed of folds, variations, targets, trainings and resamples. No figure depends on the order of
            queries, models or tasks.
    """

    def __init__(
        self, tasks: Sequence[Task], measures: Sequence[str] = ("nDCG@10", "AP@100"), *, candidates: str = "fixed",
        depth: int | None = 100, first_stage: Callable[[Mapping[str, str]], Any] = BM25Index, folds: int = 5,
        n_trainings: int = 1, n_boot: int = 1000, generator: Seed = None,
    ) -> None:  # fmt: skip
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks: {names}; at least one, and each name once, is needed")
        if not measures or len(set(measures)) < len(measures):
            raise ValueError(f"measures={list(measures)}: at least one, and each once, is needed")
        for name in measures:
            parse_measure(name)
        if depth is not None:
            check_count("depth", depth)
        self.tasks, self.measures = tuple(tasks), tuple(measures)
        self.candidates, self.depth = check_choice("candidates", candidates, ("fixed", "retrieved")), depth
        self.first_stage, self.folds = first_stage, check_count("folds", folds, low=2)
        self.n_trainings, self.seed = check_count("n_trainings", n_trainings), resolve_seed(generator)
        self.n_boot = check_count("n_boot", n_boot)

    def run(
        self,
        rankers: Mapping[str, Any],
        data: Collection,
        *,
        run: Run | None = None,
        train: Collection | None = None,
        train_run: Run | None = None,
        resume: str | os.PathLike[str] | None = None,
        command: str = "",
        on_step: OnStep | None = None,
    ) -> RobustnessReport:
        """Measure models.

        Args:
            rankers: name -> ranker, :class:`PerCorpus` or :class:`Trained`.
            data: documents, queries and judgements; queries without anything relevant are left out, for all alike.
            run: candidates of the queries, from the user's own first stage.
            train: recipes learn from this collection instead of other folds of ``data``.
            train_run: its first stage.
            resume: folder for finished blocks: the same call goes on there after an interruption. A recipe or
                callable is known by its name and ``about`` only; after changing its code, take another folder.
            command: how to run this again, for the report.
            on_step: called with (what, done, of how many).

        Raises:
            ValueError: judgements, runs and collections that do not fit together; scores that are NaN.
        """
        started = time.perf_counter()
        if run is not None and self.candidates == "retrieved":
            raise ValueError("candidates='retrieved' asks first_stage again, and run= fixes its lists: leave run out")
        models = contestants(rankers, self.n_trainings)
        if len({plain(who.name) for who in models}) < len(models):
            raise ValueError(f"rankers: names {list(rankers)} do not stay apart as names of files")
        session = Session(
            data, self.measures, self.candidates, self.depth, self.first_stage, self.folds, self.seed,
            Resamples(self.n_boot, self.seed), run, None if train is None else (train, train_run),
            None if resume is None else Path(resume), on_step,
        )  # fmt: skip
        found = {task.name: task.measure(session, models) for task in self.tasks}
        details = [_verdict(task, found[task.name], models, self.seed) for task in self.tasks]
        document = self._document(session, models, found, details, command, time.perf_counter() - started)
        arrays = {
            f"{plain(task)}/{plain(model)}/{'/'.join(map(plain, name.split('/')))}": values
            for task, outcomes in found.items()
            for model, outcome in outcomes.items()
            for name, values in outcome.arrays.items()
        }
        return RobustnessReport(document, arrays, tuple(session.kept))

    def _document(
        self, session: Session, models: Sequence[Contestant], found: Mapping[str, Mapping[str, Outcome]],
        details: list[dict[str, Any]], command: str, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        figures: dict[str, Any] = {}
        for task, outcomes in found.items():
            for model, outcome in outcomes.items():
                interval = bootstrap_interval(outcome.resampled)
                head = Estimate(outcome.headline, interval, len(outcome.per_query))
                for name, figure in {"headline": head, **outcome.figures}.items():
                    figures[f"{task}/{model}/{name}"] = figure.as_json()
        source = session.source
        return {
            "schema": SCHEMA,
            "threat": {task.name: task.about() for task in self.tasks},
            "model": ", ".join(who.name for who in models),
            "model_sha256": digest({who.name: who.sha256 for who in models}),
            "data": session.data.name,
            "data_sha256": session.data.sha256 or source.sha256,
            "n": len(source.qids),
            "seed": self.seed,
            "device": _devices(models),
            "figures": figures,
            "flags": self._flags(session, models, found, details),
            "seconds": round(seconds, 3),
            "versions": versions(),
            "command": command,
            "details": {
                "models": {who.name: {"sha256": who.sha256, "about": who.about, "trainings": who.n_trainings}
                           for who in models},
                "measures": list(self.measures),
                "candidates": self.candidates,
                "depth": self.depth,
                "first_stage": getattr(self.first_stage, "__name__", type(self.first_stage).__name__),
                "own_run": session.given_run is not None,
                "folds": self.folds if session.train is None else None,
                "n_boot": self.n_boot,
                "queries": list(source.qids),
                "left_out": source.dropped,
                "tasks": details,
            },
        }  # fmt: skip

    def _flags(
        self, session: Session, models: Sequence[Contestant], found: Mapping[str, Mapping[str, Outcome]],
        details: Sequence[Mapping[str, Any]],
    ) -> list[str]:  # fmt: skip
        flags = [f"{model}, {flag}" for outcomes in found.values() for model, o in outcomes.items() for flag in o.flags]
        if session.source.dropped:
            flags.append(f"{session.source.dropped} queries without a relevant document were left out, for all models")
        relevant = [
            any(session.data.qrels[qid].get(d, 0) > 0 for d in session.source.lists[qid]) for qid in session.source.qids
        ]
        if not all(relevant):
            flags.append(
                f"{relevant.count(False)} of {len(relevant)} queries have nothing relevant among their candidates: no "
                "re-ranker can serve them"
            )
        return list(dict.fromkeys([*flags, *_hollow(session, models, details)]))


def _hollow(session: Session, models: Sequence[Contestant], details: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the wins of models that have little to lose: a bad ranker varies little and cannot fall far."""
    means = {who.name: float(session.clean(who).rows[session.measures[0]].mean()) for who in models}
    top = max(means.values())
    return [
        f"{task['best']} is best in {task['title'].lower()} at a mean of {means[task['best']]:.3f}, where {top:.3f} is "
        "to be had: a bad ranker has little to lose"
        for task in details
        if task["best"] is not None and means[task["best"]] < HOLLOW * top
    ]


def _devices(models: Sequence[Contestant]) -> str:
    modules = [who.model for who in models if isinstance(who.model, nn.Module)]
    return ", ".join(sorted({str(model_device(module) or "cpu") for module in modules})) or "cpu"


def _verdict(task: Task, found: Mapping[str, Outcome], models: Sequence[Contestant], seed: int) -> dict[str, Any]:
    """Return a task with its best model and the paired comparisons."""
    sign = 1.0 if task.higher_is_better else -1.0
    known = {name: sign * o.headline for name, o in found.items() if math.isfinite(o.headline)}
    best = max(sorted(known), key=lambda name: known[name]) if known else None
    paired = [_pair(found, a.name, b.name, seed) for a, b in combinations(models, 2)]
    clear = best is not None and all(_beats(sign, pair, best) for pair in paired if best in (pair["a"], pair["b"]))
    return {
        "name": task.name,
        "title": task.title,
        "headline": task.headline,
        "higher_is_better": task.higher_is_better,
        "best": best,
        "clear": clear and len(found) > 1,
        "paired": paired,
    }


def _pair(found: Mapping[str, Outcome], a: str, b: str, seed: int) -> dict[str, Any]:
    one, other = found[a], found[b]
    gap = one.headline - other.headline
    test = paired_test(one.per_query, other.per_query, generator=seed)
    interval = bootstrap_interval(one.resampled - other.resampled)
    return {
        "a": a,
        "b": b,
        "difference": gap if math.isfinite(gap) else None,
        "interval": None if interval is None else list(interval),
        "p_t": test.p_t if math.isfinite(test.p_t) else None,
        "p_randomisation": test.p_randomisation,
        "n": test.n,
    }


def _beats(sign: float, pair: Mapping[str, Any], best: str) -> bool:
    if pair["interval"] is None:
        return False
    low, high = pair["interval"]
    ahead = sign if pair["a"] == best else -sign
    return low > 0 if ahead > 0 else high < 0
