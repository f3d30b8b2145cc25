"""Measure runs side by side: means with bootstrap intervals, bad queries, paired tests against the first one.

    report = evaluate_runs({"bm25": read_run("bm25.trec"), "mine": read_run("mine.trec")}, read_qrels("qrels.txt"))
    report.save("report")

The mean hides whom a ranker serves badly, so beside it stand the variance over queries, the mean of the worst tenth and
the share of queries that get next to nothing. Every difference is paired by query: both runs answer the same ones.

A flag says what no interval can: that many of the documents in the top ten were never judged (a measure counts them as
wrong, whatever they are), that many scores are equal, or that queries had to be left out.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence

import numpy as np

from ir_robust.formats import Qrels, Run, ordered
from ir_robust.measures import DEFAULT, per_query
from ir_robust.ranking_robustness.metrics import (
    Resamples,
    bootstrap_interval,
    cvar,
    failure_rate,
    mean_value,
    paired_test,
    variance,
)
from ir_robust.report import RankingReport, new_document
from robust_core.checks import check_count
from robust_core.evaluation.metrics.estimate import Estimate, share
from robust_core.random import Seed, resolve_seed

__all__ = ["compare", "evaluate_runs", "hash_of", "mean_of"]

_NAME = re.compile(r"[\w.@=+-]{1,80}")
TOP = 10
"""How deep the flags look."""
QUERIES = "queries"


def hash_of(value: Mapping[str, Mapping[str, float]]) -> str:
    """Return a SHA-256 of a run or of judgements, whatever their order of lines."""
    digest = hashlib.sha256()
    for qid in sorted(value):
        for docno in sorted(value[qid]):
            digest.update(f"{qid} {docno} {float(value[qid][docno])!r}\n".encode())
    return digest.hexdigest()


def mean_of(values: np.ndarray, resamples: Resamples, *, shares: bool = False) -> Estimate:
    """Return the mean of (Q,) values with its percentile interval over resampled queries.

    Args:
        values: one for each query.
        resamples: of the queries.
        shares: values are shares; where all of them are 0 or 1 the interval is the exact one (Clopper-Pearson), since
            resamples of one and the same answer give no other.
    """
    rows = np.asarray(values, dtype=np.float64)[None]
    if shares and np.isin(rows, (0.0, 1.0)).all():
        return share(int(rows.sum()), rows.shape[1])
    return Estimate(mean_value(rows), bootstrap_interval(resamples.means(QUERIES, rows)[:, 0]), rows.shape[1])


def compare(
    values: np.ndarray, other: np.ndarray, resamples: Resamples, *, generator: Seed = None
) -> tuple[Estimate, float]:
    """Return the mean of ``values - other`` with its paired interval, and the p-value of the randomisation test."""
    found = paired_test(values, other, generator=generator)
    return mean_of(np.asarray(values) - np.asarray(other), resamples), found.p_randomisation


def evaluate_runs(
    runs: Mapping[str, Run],
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT,
    *,
    tau: float = 0.1,
    worst: float = 0.1,
    n_boot: int = 2000,
    generator: Seed = None,
    model: str | None = None,
    model_sha256: str | None = None,
    data: str = "judgements",
    data_sha256: str | None = None,
    device: str = "cpu",
    command: str = "",
) -> RankingReport:
    """Return the measures of runs over the same queries; the first run is what the others are compared with.

    Args:
        runs: name -> run; each must rank every query that has a relevant document.
        qrels: judgements.
        measures: as ir-measures names them.
        tau: a query with a value at or below it counts as failed.
        worst: share of queries whose mean is reported apart.
        n_boot: bootstrap resamples of the queries.
        generator: seed of the bootstrap and of the tests.
        model: for the report; the last run's name if None.
        model_sha256: likewise; the hash of the last run if None.
        data: for the report.
        data_sha256: likewise; the hash of the judgements if None.
        device: where the ranker ran.
        command: how to run this again.

    Raises:
        ValueError: no run, judged queries without a ranking, a measure of no known name.
    """
    started, seed = time.perf_counter(), resolve_seed(generator)
    check_count("number of runs", len(runs))
    strange = next((name for name in runs if not _NAME.fullmatch(name)), None)
    if strange is not None:
        raise ValueError(f"runs: {strange!r} is to name a file; letters, digits and . @ = + - are allowed")
    if not measures:
        raise ValueError("measures: at least one is needed, such as nDCG@10")
    names, resamples = list(runs), Resamples(n_boot, seed)
    found = {name: per_query(run, qrels, measures) for name, run in runs.items()}
    qids = list(next(iter(found[names[0]].values())))
    arrays, figures, tests = {}, {}, {}
    for name in names:
        for measure in dict.fromkeys(map(str, measures)):
            values = np.array(list(found[name][measure].values()))
            arrays[f"{name}/{measure}"] = values
            figures |= _figures(f"{name}/{measure}", values, resamples, tau, worst)
            if name != names[0]:
                first = arrays[f"{names[0]}/{measure}"]
                gain, p_value = compare(values, first, resamples, generator=seed)
                figures[f"{name}/{measure}_gain"] = gain
                tests[f"{name}/{measure}"] = {"p": p_value, "better": int((values > first).sum())}
                tests[f"{name}/{measure}"] |= {"worse": int((values < first).sum())}
    judged = {name: _judged(run, qrels, qids) for name, run in runs.items()}
    arrays |= {f"{name}/judged": values for name, values in judged.items()}
    figures |= {f"{name}/judged@{TOP}": mean_of(values, resamples, shares=True) for name, values in judged.items()}
    document = new_document(
        "evaluation",
        figures=figures,
        model=model or names[-1],
        model_sha256=model_sha256 or hash_of(runs[names[-1]]),
        data=data,
        data_sha256=data_sha256 or hash_of(qrels),
        n=len(qids),
        seed=seed,
        started=started,
        device=device,
        flags=_flags(runs, qrels, qids, judged),
        command=command,
        details={
            "runs": names,
            "measures": list(dict.fromkeys(map(str, measures))),
            "queries": qids,
            "tests": tests,
            "tau": tau,
            "worst": worst,
            "n_boot": n_boot,
        },
    )
    return RankingReport(document, arrays, dict(runs))


def _figures(label: str, values: np.ndarray, resamples: Resamples, tau: float, worst: float) -> dict[str, Estimate]:
    rows, n = values[None], len(values)
    spread = bootstrap_interval(resamples.variance(QUERIES, rows))
    return {
        label: mean_of(values, resamples),
        f"{label}_variance": Estimate(variance(values), spread, n),
        f"{label}_worst": Estimate(cvar(values, worst), None, n),
        f"{label}_failed": Estimate(
            failure_rate(values, tau), mean_of(values <= tau, resamples, shares=True).interval, n
        ),
    }


def _judged(run: Run, qrels: Qrels, qids: Sequence[str]) -> np.ndarray:
    """Return for each query the share of its first ten documents that somebody judged."""
    shares = []
    for qid in qids:
        top = ordered(run[qid])[:TOP]
        shares.append(sum(docno in qrels[qid] for docno in top) / len(top))
    return np.array(shares)


def _flags(runs: Mapping[str, Run], qrels: Qrels, qids: Sequence[str], judged: Mapping[str, np.ndarray]) -> list[str]:
    flags = []
    left = len(qrels) - len(qids)
    if left:
        flags.append(f"{left} of {len(qrels)} queries have no relevant document: no measure says anything of them")
    first, *others = runs
    for name in others:
        here, there = judged[name].mean(), judged[first].mean()
        if here < there - 0.05:
            flags.append(
                f"{name}: {100 * here:.0f} % of its first {TOP} documents were ever judged, against "
                f"{100 * there:.0f} % of {first}'s; measures count the others as wrong, so its figures are lower bounds"
            )
    for name, run in runs.items():
        tied = float(np.mean([_tied(run[qid]) for qid in qids]))
        if tied > 0.1:
            flags.append(
                f"{name}: {100 * tied:.0f} % of neighbours among its first {TOP} have equal scores; their order goes "
                "by document number, as in trec_eval"
            )
    short = [name for name, run in runs.items() if np.mean([len(run[qid]) < TOP for qid in qids]) > 0.1]
    flags += [f"{name}: more than a tenth of the queries have fewer than {TOP} documents" for name in short]
    return flags


def _tied(scores: Mapping[str, float]) -> float:
    top = np.array([scores[docno] for docno in ordered(scores)[: TOP + 1]])
    return float((np.diff(top) == 0).mean()) if len(top) > 1 else 0.0
