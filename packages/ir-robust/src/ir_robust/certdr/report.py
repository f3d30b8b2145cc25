"""A certified run as a report: CRQ@K beside the attacker that is assumed and the price that smoothing has.

report = certify_report(ranker, table, data, run, ks=(1, 5, 10), budget=0.1)
report["CRQ@10"], report["smoothed/nDCG@10_gain"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ir_robust.attacks.base import WordBudget
from ir_robust.certdr.run import certify_run
from ir_robust.collection import Collection
from ir_robust.evaluation import compare, mean_of
from ir_robust.formats import Run
from ir_robust.measures import DEFAULT, per_query
from ir_robust.rankers.base import rerank
from ir_robust.ranking_robustness.metrics import Resamples
from ir_robust.ranking_robustness.models import digest
from ir_robust.report import RankingReport, new_document
from ir_robust.tables import PerturbationTable
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.random import Seed, resolve_seed

__all__ = ["certify_report"]

SHOWN = 1000
"""Documents on which the table is judged before anything is drawn."""


def certify_report(
    ranker: Any,
    table: PerturbationTable,
    data: Collection,
    run: Run,
    ks: Sequence[int] = (1, 5, 10),
    *,
    budget: WordBudget | float | int | None = None,
    measures: Sequence[str] = DEFAULT,
    depth: int | None = 100,
    n_boot: int = 2000,
    generator: Seed = None,
    source: str = "a table",
    threshold: float | None = None,
    edges: str = "given",
    name: str | None = None,
    device: str = "cpu",
    command: str = "",
    **settings: Any,
) -> RankingReport:
    """Certify every list of a run, and report it.

    Args:
        ranker: any ranker or callable.
        table: what the attacker may write, and what the smoother draws from.
        data: texts, and judgements if there are any.
        run: the lists.
        ks: which K.
        budget: words that the attacker may change, as of :func:`ir_robust.certdr.certify_run`.
        measures: of the plain and of the smoothed lists, where there are judgements.
        depth: documents of each list.
        n_boot: bootstrap resamples of the queries.
        generator: seed.
        source: where the synonyms come from, for the report.
        threshold: of their similarity, if there is one, for the report.
        edges: which of them count, for the report.
        name: of the ranker in the report.
        device: where it runs, for the report.
        command: how to run this again.
        settings: further arguments of :func:`ir_robust.certdr.certify_run`.
    """
    started, seed = time.perf_counter(), resolve_seed(generator)
    found = certify_run(ranker, table, data, run, ks, budget=budget, depth=depth, generator=seed, **settings)
    smoothed: Run = found["run"]
    figures = {label: Estimate.from_json(figure) for label, figure in found["figures"].items()}
    arrays = {
        f"certified@{k}": np.array([row["certificates"][str(k)]["certified"] for row in found["queries"]]) for k in ks
    }
    arrays["n_scores"] = np.array([row["n_scores"] for row in found["queries"]])
    arrays["deviation"] = np.array([row["deviation"] for row in found["queries"]], dtype=np.float64)
    runs, used = {"smoothed": smoothed}, []
    qrels = {qid: data.qrels[qid] for qid in data.judged() if smoothed.get(qid)}
    if qrels:
        runs["plain"] = rerank(ranker, data, run, depth=depth)
        used, resamples = list(measures), Resamples(n_boot, seed)
        values = {label: per_query(runs[label], qrels, measures) for label in ("plain", "smoothed")}
        for measure in used:
            for label, of_run in values.items():
                arrays[f"{label}/{measure}"] = np.array(list(of_run[measure].values()))
                figures[f"{label}/{measure}"] = mean_of(arrays[f"{label}/{measure}"], resamples)
            gain, _ = compare(arrays[f"smoothed/{measure}"], arrays[f"plain/{measure}"], resamples, generator=seed)
            figures[f"smoothed/{measure}_gain"] = gain
    document = new_document(
        "certificate",
        figures=figures,
        model=name or type(ranker).__name__,
        model_sha256=digest(ranker),
        data=data.name,
        data_sha256=data.sha256 or digest([data.docs, data.queries]),
        n=len(found["queries"]),
        seed=seed,
        started=started,
        threat={**found["threat"], "budget_text": _budget_text(budget)},
        device=device,
        flags=_flags(found, table, data),
        command=command,
        details={
            "settings": {**found["settings"], "ks": list(ks)},
            "table": _about(table, data, budget, source, threshold, edges),
            "queries": found["queries"],
            "n_scores": found["n_scores"],
            "measures": used,
        },
    )
    return RankingReport(document, arrays, runs)


def _budget_text(budget: WordBudget | float | int | None) -> str:
    if budget is None:
        return "any number of words"
    if isinstance(budget, WordBudget):
        most = "" if budget.most is None else f", at most {budget.most}"
        return f"{100 * budget.share:g} % of the words{most}"
    return f"{budget} words" if isinstance(budget, int) else f"{100 * budget:g} % of the words"


def _about(
    table: PerturbationTable, data: Collection, budget: Any, source: str, threshold: float | None, edges: str
) -> dict[str, Any]:
    graph = table.graph.report()
    texts = [text for _, text in zip(range(SHOWN), data.docs.values(), strict=False)]
    told = table.report(texts, budget)
    sizes = np.array(graph.sizes)
    borders = [(2, 2), (3, 10), (11, 100), (101, np.inf)]
    return {
        "source": source,
        "threshold": threshold,
        "kind": edges,
        "edges": graph.edges,
        "words": graph.words,
        "largest": graph.largest,
        "sizes": [int(((sizes >= low) & (sizes <= high)).sum()) for low, high in borders],
        "cap": table.cap,
        "loose": told.loose,
        "replaceable": told.replaceable,
        "deviation": told.deviation,
        "free": told.free,
    }


def _flags(found: dict[str, Any], table: PerturbationTable, data: Collection) -> list[str]:
    flags = []
    alone = sum(
        any(c["margin"] is None and c["certified"] for c in row["certificates"].values()) for row in found["queries"]
    )
    if alone:
        flags.append(
            f"{alone} of {len(found['queries'])} queries are certified for some K because nobody stands below it in "
            "their list; give longer lists"
        )
    if table.graph.report().words == 0:
        flags.append("the table holds no synonym: the certificate says that unedited documents stay where they are")
    if not data.qrels:
        flags.append("no judgements: what smoothing costs is not measured, and CRQ alone favours coarse rankers")
    return flags
