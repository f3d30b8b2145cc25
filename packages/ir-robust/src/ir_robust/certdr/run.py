"""Certify a user's run: re-rank its lists by the smoothed ranker, and say for which queries and K nobody can enter."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from ir_robust.attacks.base import WordBudget
from ir_robust.certdr.certificate import TopKCertificate
from ir_robust.certdr.early import certify_list
from ir_robust.certdr.smoothed import SmoothedRanker, Squash
from ir_robust.collection import Collection
from ir_robust.finished import Finished
from ir_robust.formats import Run
from ir_robust.rankers.base import as_ranker, candidates, scores_of
from ir_robust.tables import PerturbationTable
from robust_core.certificates.statistics import clopper_pearson
from robust_core.checks import check_count
from robust_core.models import fingerprint
from robust_core.random import Seed, resolve_seed

__all__ = ["SCHEMA", "certify_run", "fit_squash"]

SCHEMA = "robust.certdr/1"
PathLike = str | os.PathLike[str]


def fit_squash(ranker: Any, data: Collection, run: Run, *, depth: int | None = 100, batch_size: int = 256) -> Squash:
    """Return the map to [0, 1] that fits the clean scores of a run; fixed before anything is drawn."""
    judge = as_ranker(ranker)
    scores = [
        scores_of(judge, data.queries[qid], [data.docs[d] for d in docnos], batch_size=batch_size)
        for qid, docnos in candidates(run, data, depth).items()
    ]
    return Squash.of(np.concatenate(scores) if scores else [])


def certify_run(
    ranker: Any,
    table: PerturbationTable,
    data: Collection,
    run: Run,
    ks: Sequence[int] = (1, 5, 10),
    *,
    budget: WordBudget | float | int | None = None,
    n_samples: int = 1000,
    alpha: float = 0.05,
    squash: Squash | str | None = "fit",
    depth: int | None = 100,
    bound: str = "betting",
    rule: str = "per_document",
    selection: str = "union",
    early: bool = True,
    batch_size: int | None = None,
    generator: Seed = None,
    resume: PathLike | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Return a report: the share of certified queries for each K, a row for each query, and the smoothed run.

    Args:
        ranker: any ranker or callable.
        table: sets to draw from, and what the attacker may write.
        data: texts of queries and documents.
        run: the lists that are re-ranked.
        ks: which K.
        budget: words that the attacker may change, as of :func:`ir_robust.tables.budget_words`; None: all of them.
        n_samples: noisy documents for each document, at most.
        alpha: failure probability of each query's certificates together.
        squash: map of scores to [0, 1]; ``"fit"`` fits it to the run's clean scores, None takes scores as they are.
        depth: documents of each list that are kept; those below are not in the race, attacked or not.
        bound: as of :func:`~ir_robust.certdr.certificate.certify_top_k`.
        rule: likewise.
        selection: likewise.
        early: decide early, see :mod:`ir_robust.certdr.early`.
        batch_size: noisy documents in one call of the ranker.
        generator: seed.
        resume: a file of finished queries, written as they finish; where it is there, they are not done again.
        on_step: called with ("certify", queries done, queries in all).

    Returns:
        ``{"schema", "threat", "settings", "figures": {"CRQ@K": {"value", "interval", "n"}, ...}, "queries": [row, ...],
        "run", "n_scores", "seconds"}``. A row is ``{"qid", "n_documents", "n_scores", "deviation", "certificates":
        {"K": {"certified", "margin", "mc_radius", "max_deviation", "top"}}}``; margins are None where nobody stands
        outside, and such a query counts as certified.

    Raises:
        ValueError: an empty run, queries or documents that the collection does not have, scores outside [0, 1].
        CheckpointError: ``resume`` belongs to other settings.
    """
    for k in ks:
        check_count("k", k)
    lists, started = candidates(run, data, depth), time.perf_counter()
    if not lists or not ks:
        raise ValueError(f"run of {len(lists)} queries, {len(ks)} values of K: at least one of each is needed")
    fitted = fit_squash(ranker, data, run, depth=depth) if squash == "fit" else squash
    if isinstance(fitted, str):
        raise ValueError(f"squash={fitted!r}: 'fit', a Squash or None is needed")
    smoothed = SmoothedRanker(
        ranker, table, n_samples, squash=fitted, batch_size=batch_size, generator=resolve_seed(generator)
    )
    settings = {
        "ks": list(ks),
        "n_samples": n_samples,
        "alpha": alpha,
        "bound": bound,
        "rule": rule,
        "selection": selection,
        "early": early,
        "depth": depth,
        "squash": None if fitted is None else asdict(fitted),
        "seed": smoothed.seed,
    }
    threat = {
        "table_sha256": table.sha256,
        "cap": table.cap,
        "words": len(table.graph.neighbours),
        "largest_component": table.graph.report().largest,
        "budget": asdict(budget) if isinstance(budget, WordBudget) else budget,
    }
    judge = getattr(ranker, "network", ranker)
    model = fingerprint(judge) if isinstance(judge, nn.Module) else type(ranker).__name__
    about = {"threat": threat, "settings": settings, "model": model, "lists": _hash(lists, data)}
    options = {"budget": budget, "alpha": alpha, "bound": bound, "rule": rule, "selection": selection, "early": early}

    def certify(qid: str) -> dict[str, Any]:
        docnos = lists[qid]
        texts = [data.docs[docno] for docno in docnos]
        found, scores = certify_list(smoothed, data.queries[qid], texts, list(ks), names=docnos, **options)
        row = _row(qid, docnos, found, scores.n_queries)
        return {**row, "scores": dict(zip(docnos, scores.mean.tolist(), strict=True))}

    step = None if on_step is None else partial(on_step, "certify")
    rows = list(Finished(resume, about).work(lists, certify, step).values())
    return {
        "schema": SCHEMA,
        "threat": threat,
        "settings": settings,
        "figures": {f"CRQ@{k}": _share(rows, str(k), alpha=0.05) for k in ks},
        "queries": [{key: value for key, value in row.items() if key != "scores"} for row in rows],
        "run": {row["qid"]: row["scores"] for row in rows},
        "n_scores": sum(row["n_scores"] for row in rows),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _row(qid: str, docnos: Sequence[str], found: Mapping[int, TopKCertificate], n_scores: int) -> dict[str, Any]:
    certificates = {
        str(k): {
            "certified": c.certified,
            "margin": c.margin if np.isfinite(c.margin) else None,
            "mc_radius": c.mc_radius,
            "max_deviation": c.max_deviation,
            "top": [docnos[i] for i in c.top],
        }
        for k, c in found.items()
    }
    deviation = max((c.max_deviation for c in found.values()), default=0.0)
    return {
        "qid": qid,
        "n_documents": len(docnos),
        "n_scores": n_scores,
        "deviation": deviation,
        "certificates": certificates,
    }


def _share(rows: Sequence[Mapping[str, Any]], k: str, *, alpha: float) -> dict[str, Any]:
    hits, n = sum(row["certificates"][k]["certified"] for row in rows), len(rows)
    low, high = clopper_pearson(hits, n, alpha)
    return {"value": hits / n, "interval": [float(low), float(high)], "n": n}


def _hash(lists: Mapping[str, Sequence[str]], data: Collection) -> str:
    """Return a hash of everything that is read: queries, and documents in their order."""
    digest = hashlib.sha256()
    for qid, docnos in lists.items():
        row = [qid, data.queries[qid], [[docno, data.docs[docno]] for docno in docnos]]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
