"""Attack a whole run: who can be pushed into the first K, how far documents climb, and what it looks like to a reader.

    report = attack_run(ranker, data, run, {"spam": TermSpamming()}, k=10)
    report["spam/entry"], report["spam/entered"]      # share of documents, share of queries
    report.save("report")

The documents of a list are ranked by the victim first; those that are attacked stand below K there (so none is an
incumbent) and, where there are judgements, are not relevant: pushing a good page up is no harm. Every query counts the
same, whatever the number of its attacked documents, and intervals resample queries, since documents of one list are not
independent. Each document is attacked alone; ``nDCG`` and the other measures are those of the list in which all its
attacked documents stand as edited.

What a reader would notice: the share of words touched, the cosine of the texts' tf-idf vectors, and how much harder to
predict the text has become for a bigram model of the collection itself (1 is no change).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ir_robust.attacks.base import DocumentAttack, attack_list
from ir_robust.attacks.readers import Readers
from ir_robust.collection import Collection
from ir_robust.evaluation import hash_of, mean_of
from ir_robust.finished import Finished, PathLike
from ir_robust.formats import Run, ordered
from ir_robust.measures import DEFAULT, per_query
from ir_robust.rankers.base import as_ranker, candidates, scores_of
from ir_robust.ranking_robustness.metrics import Resamples, bootstrap_interval, drop_rate
from ir_robust.ranking_robustness.models import digest
from ir_robust.report import RankingReport, new_document
from ir_robust.synonyms import SynonymGraph
from robust_core.checks import check_count
from robust_core.evaluation.metrics.estimate import Estimate, undefined
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = ["attack_run", "targets_of"]

READ = ("changed", "cosine", "perplexity")


def targets_of(
    scores: Mapping[str, float],
    grades: Mapping[str, int],
    *,
    k: int,
    at_most: int | None,
    seed: int,
    qid: str,
) -> list[str]:
    """Return the documents of a list that are attacked: below the first ``k``, not relevant, drawn without favour."""
    able = [docno for docno in ordered(scores)[k:] if grades.get(docno, 0) <= 0]
    if at_most is None or len(able) <= at_most:
        return able
    chosen = torch.randperm(len(able), generator=stream(derive(seed, qid), 0, "targets"))[:at_most].tolist()
    return [able[i] for i in sorted(chosen)]


def attack_run(
    ranker: Any,
    data: Collection,
    run: Run,
    attacks: Mapping[str, DocumentAttack],
    *,
    k: int = 10,
    depth: int | None = 100,
    targets: int | None = 10,
    measures: Sequence[str] = DEFAULT,
    n_boot: int = 2000,
    batch_size: int = 256,
    generator: Seed = None,
    resume: PathLike | None = None,
    name: str | None = None,
    device: str = "cpu",
    command: str = "",
    on_step: Callable[[str, int, int], None] | None = None,
) -> RankingReport:
    """Attack documents of every list of a run.

    Args:
        ranker: the victim; it re-ranks the lists first.
        data: texts, and judgements if there are any.
        run: the lists.
        attacks: name -> attack.
        k: the first K are what an attacker wants to enter.
        depth: documents of each list.
        targets: how many documents of each list are attacked, drawn at random; None takes all.
        measures: of the list before and after, where there are judgements.
        n_boot: bootstrap resamples of the queries.
        batch_size: documents in a call of the ranker.
        generator: seed.
        resume: a file of finished queries; the same call goes on there.
        name: of the ranker in the report.
        device: where it runs, for the report.
        command: how to run this again.
        on_step: called with (what is done, queries done, queries in all).

    Raises:
        ValueError: no attack, no document to attack, queries or documents that the collection does not have.
        BudgetExceededError: an attack overspent.
        CheckpointError: ``resume`` belongs to other work.
    """
    started, seed, victim = time.perf_counter(), resolve_seed(generator), as_ranker(ranker)
    check_count("k", k)
    if not attacks:
        raise ValueError("attacks: at least one is needed")
    lists = candidates(run, data, depth)
    about = {
        "ranker": digest(ranker), "lists": hash_of(run), "data": data.sha256 or digest([data.docs, data.queries]),
        "attacks": {label: digest(attack) for label, attack in attacks.items()}, "k": k, "depth": depth,
        "targets": targets, "seed": seed,
    }  # fmt: skip
    kept = Finished(resume, about)

    def work(qid: str) -> dict[str, Any]:
        query, docs = data.queries[qid], {docno: data.docs[docno] for docno in lists[qid]}
        values = scores_of(victim, query, list(docs.values()), batch_size=batch_size)
        scores = dict(zip(docs, values.tolist(), strict=True))
        grades = data.qrels.get(qid, {})
        chosen = targets_of(scores, grades, k=k, at_most=targets, seed=seed, qid=qid)
        rows: list[dict[str, Any]] = []
        for label, attack in attacks.items():
            found = attack_list(attack, victim, query, docs, chosen, k=k, scores=scores, generator=derive(seed, label))
            rows += [{"attack": label, "qid": qid, **asdict(result)} for result in found]
        return {"scores": scores, "rows": rows}

    def report(done: int, total: int) -> None:
        if on_step is not None:
            on_step("attack", done, total)

    found = kept.work(lists, work, report)
    clean = {qid: row["scores"] for qid, row in found.items()}
    rows = [row for of_query in found.values() for row in of_query["rows"]]
    if not rows:
        raise ValueError(
            f"run: no document below rank {k} that is not relevant in any of {len(lists)} lists of at most {depth} "
            "documents; lower k, or give a longer run"
        )
    readers = Readers(data.docs.values())
    for row in rows:
        row["before"] = data.docs[row["docno"]]
        row |= readers.look(row["before"], row["text"], len(row["edits"]))
    runs = {"clean": clean, **{label: _attacked(clean, rows, label) for label in attacks}}
    resamples = Resamples(n_boot, seed)
    figures, arrays, qids = _figures(rows, list(attacks), k, resamples)
    ranked, useful = _measures(runs, data, measures, resamples)
    figures |= ranked
    threat = {label: describe_attack(attack) for label, attack in attacks.items()}
    document = new_document(
        "attack",
        figures=figures,
        model=name or type(ranker).__name__,
        model_sha256=about["ranker"],
        data=data.name,
        data_sha256=about["data"],
        n=len(lists),
        seed=seed,
        started=started,
        threat=threat,
        device=device,
        flags=_flags(rows, data, qids, len(lists), useful),
        command=command,
        details={
            "k": k,
            "depth": depth,
            "targets": targets,
            "queries": qids,
            "measures": list(measures) if useful else [],
            "attacked_documents": len(rows) // len(attacks),
        },
    )
    return RankingReport(document, arrays, runs, rows)


def describe_attack(attack: DocumentAttack) -> dict[str, Any]:
    """Return what an attack may do, for the report."""
    budget = attack.budget
    kind = " by ".join(type(part).__name__ for part in (attack, getattr(attack, "search", None)) if part is not None)
    found = {"kind": kind, "share": budget.share, "most": budget.most, "insertions": budget.insertions}
    table = getattr(attack, "table", None)
    if isinstance(table, SynonymGraph):
        graph = table.report()
        found["synonyms"] = {"words": graph.words, "edges": graph.edges, "largest": graph.largest}
    return found


def _attacked(clean: Run, rows: Sequence[Mapping[str, Any]], label: str) -> Run:
    """Return the run in which every attacked document stands with its new score."""
    found = {qid: dict(scores) for qid, scores in clean.items()}
    for row in rows:
        if row["attack"] == label:
            found[row["qid"]][row["docno"]] = row["score"][1]
    return found


def _figures(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], k: int, resamples: Resamples
) -> tuple[dict[str, Estimate], dict[str, np.ndarray], list[str]]:
    """Return figures and arrays, (Q,) means over the documents of each query, and the attacked queries."""
    qids = list(dict.fromkeys(row["qid"] for row in rows))
    figures: dict[str, Estimate] = {}
    arrays: dict[str, np.ndarray] = {}
    best: dict[tuple[str, str], int] = {}
    for row in rows:
        key, after = (row["qid"], row["docno"]), row["rank"][1]
        best[key] = min(best.get(key, after), after)
    every = [
        {"qid": row["qid"], "rank": (row["rank"][0], best[row["qid"], row["docno"]])}
        for row in rows
        if row["attack"] == labels[0]
    ]
    for label in labels:
        own = [row for row in rows if row["attack"] == label]
        arrays |= _ranks(label, own, k, qids)
        for what in READ:
            arrays[f"{label}/{what}"] = _by_query(own, lambda row, what=what: row[what], qids)
        arrays[f"{label}/n_queries"] = _by_query(own, lambda row: row["n_queries"], qids)
    if len(labels) > 1:
        arrays |= _ranks("any", every, k, qids)
    shares = ("/success", "/entry", "/entered")
    figures |= {name: mean_of(values, resamples, shares=name.endswith(shares)) for name, values in arrays.items()}
    return figures, arrays, qids


def _ranks(label: str, rows: Sequence[Mapping[str, Any]], k: int, qids: Sequence[str]) -> dict[str, np.ndarray]:
    entry = _by_query(rows, lambda row: row["rank"][1] <= k, qids)
    return {
        f"{label}/success": _by_query(rows, lambda row: row["rank"][1] < row["rank"][0], qids),
        f"{label}/boost": _by_query(rows, lambda row: row["rank"][0] - row["rank"][1], qids),
        f"{label}/entry": entry,
        f"{label}/entered": (entry > 0).astype(np.float64),
    }


def _by_query(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], qids: Sequence[str]
) -> np.ndarray:
    found: dict[str, list[float]] = {qid: [] for qid in qids}
    for row in rows:
        found[row["qid"]].append(float(value(row)))
    return np.array([np.mean(values) for values in found.values()], dtype=np.float64)


def _measures(
    runs: Mapping[str, Run], data: Collection, measures: Sequence[str], resamples: Resamples
) -> tuple[dict[str, Estimate], list[str]]:
    """Return the measures of every run, and what is lost, over judged queries that were ranked."""
    qrels = {qid: data.qrels[qid] for qid in data.judged() if runs["clean"].get(qid)}
    if not qrels:
        return {}, []
    figures: dict[str, Estimate] = {}
    values = {label: per_query(run, qrels, measures) for label, run in runs.items()}
    for label, found in values.items():
        for measure, of_query in found.items():
            rows = np.array(list(of_query.values()))[None]
            figures[f"{label}/{measure}"] = mean_of(rows[0], resamples)
            if label == "clean":
                continue
            before = np.array(list(values["clean"][measure].values()))[None]
            rate = drop_rate(float(before.mean()), float(rows.mean()))
            spread = bootstrap_interval(resamples.drop_rate(("queries", before), ("queries", rows)))
            lost = Estimate(rate, spread, rows.shape[1]) if math.isfinite(rate) else undefined(rows.shape[1])
            figures[f"{label}/{measure}_drop_rate"] = lost
    return figures, list(qrels)


def _flags(
    rows: Sequence[Mapping[str, Any]], data: Collection, attacked: Sequence[str], n: int, useful: Sequence[str]
) -> list[str]:
    flags = []
    if not data.qrels:
        flags.append("no judgements: relevant documents may be among those that were attacked")
    elif len(useful) < n:
        flags.append(f"{n - len(useful)} of {n} queries have no relevant document; measures leave them out")
    if len(attacked) < n:
        flags.append(f"{n - len(attacked)} of {n} lists hold no document to attack below the first K")
    for label in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == label]
        idle = sum(not row["edits"] for row in own)
        if idle == len(own):
            flags.append(f"{label}: changed no document at all; is its table or its budget empty?")
        elif idle > 0.5 * len(own):
            flags.append(f"{label}: left {idle} of {len(own)} documents as they were; its figures speak of few")
    return flags
