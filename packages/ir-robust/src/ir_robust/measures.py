"""Measures of a run, each by ir-measures, with the two doors shut through which wrong figures usually come.

Ties: tools disagree on the order of equal scores, and trec_eval rounds scores to 32 bits first. Runs are therefore put
in order here (:func:`ir_robust.formats.ordered`) and handed over as ranks. Missing queries: providers leave them out of
the mean or count them as 0; here a judged query without a ranking is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np

from ir_robust.formats import Qrels, ordered

__all__ = ["DEFAULT", "check_ids", "parse_measure", "per_query"]

DEFAULT = ("nDCG@10", "AP@100", "RR@10")


def parse_measure(name: str) -> ir_measures.Measure:
    """Return the measure of ir-measures that ``name`` means.

    Raises:
        ValueError: no such measure.
    """
    try:
        return ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError, KeyError):
        raise ValueError(f"measure {name!r}: ir-measures knows none of that name; try {', '.join(DEFAULT)}") from None


def check_ids(run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the queries on which a run can be measured: those with a relevant document.

    Raises:
        ValueError: no query has one, or some of them have no ranking.
    """
    useful = [qid for qid, grades in qrels.items() if any(grade > 0 for grade in grades.values())]
    if not useful:
        raise ValueError("qrels: no query has a relevant document")
    missing = [qid for qid in useful if not run.get(qid)]
    if missing:
        raise ValueError(
            f"run: {len(missing)} of {len(useful)} judged queries have no ranking, {missing[0]!r} first; measures "
            "would be means over others. Rank them, or leave their judgements out"
        )
    return useful


def per_query(
    run: Mapping[str, Mapping[str, float]], qrels: Qrels, measures: Sequence[str] = DEFAULT
) -> dict[str, dict[str, float]]:
    """Return measure -> query -> value, for every query that has a relevant document, in the order of ``qrels``.

    Args:
        run: query -> document -> score; scores must be finite.
        qrels: query -> document -> grade.
        measures: names that ir-measures knows.

    Raises:
        ValueError: a measure of no known name, queries without a ranking, a score that is not finite.
    """
    useful = check_ids(run, qrels)
    wanted = {str(name): parse_measure(name) for name in measures}
    ranks: dict[str, dict[str, float]] = {}
    for qid in useful:
        scores = np.fromiter(run[qid].values(), dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"run: query {qid!r} has a score that is NaN or infinite")
        ranks[qid] = {docno: float(-rank) for rank, docno in enumerate(ordered(run[qid]))}
    judged = {qid: dict(qrels[qid]) for qid in useful}
    found: dict[ir_measures.Measure, dict[str, float]] = {measure: {} for measure in wanted.values()}
    for row in ir_measures.iter_calc(list(found), judged, ranks):
        found[row.measure][row.query_id] = float(row.value)
    for name, measure in wanted.items():
        lost = [qid for qid in useful if qid not in found[measure]]
        if lost:
            raise ValueError(f"measure {name!r}: gave no value for {len(lost)} queries, {lost[0]!r} first")
    return {name: {qid: found[measure][qid] for qid in useful} for name, measure in wanted.items()}
