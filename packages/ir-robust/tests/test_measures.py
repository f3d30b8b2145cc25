"""Measures are those of trec_eval where nothing is tied, and stay themselves where something is."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.measures import DEFAULT, parse_measure, per_query

NAMES = [*DEFAULT, "P@5", "R@20", "nDCG", "Success@3"]


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 2**31))
def test_without_ties_they_are_those_of_ir_measures(seed: int) -> None:
    draw = np.random.default_rng(seed)
    docs = [f"d{i}" for i in range(30)]
    qrels = {q: {d: int(g) for d, g in zip(docs, draw.integers(-1, 4, 30), strict=True)} for q in "abc"}
    run = {q: {d: float(s) for d, s in zip(docs, draw.permutation(30), strict=True)} for q in "abcx"}
    found = per_query(run, qrels, NAMES)
    assert list(found) == NAMES
    for row in ir_measures.iter_calc([parse_measure(name) for name in NAMES], qrels, run):
        if row.query_id in qrels:
            assert found[str(row.measure)][row.query_id] == pytest.approx(row.value, abs=1e-12)


def test_ties_go_by_falling_number_and_close_scores_are_no_ties() -> None:
    qrels = {"1": {"a": 1, "b": 0}}
    assert per_query({"1": {"a": 1.0, "b": 1.0}}, qrels, ["RR@10"]) == {"RR@10": {"1": 0.5}}
    assert per_query({"1": {"a": 1.0, "A": 1.0}}, qrels, ["RR@10"]) == {"RR@10": {"1": 1.0}}
    close = {"1": {"a": 1.0 + 1e-12, "b": 1.0}}  # one number in 32 bits
    assert per_query(close, qrels, ["RR@10"]) == {"RR@10": {"1": 1.0}}


def test_queries_without_relevant_documents_are_left_out() -> None:
    run = {"1": {"a": 1.0}, "2": {"a": 1.0}, "3": {"a": 1.0}}
    assert per_query(run, {"2": {"a": 0}, "3": {"b": 1}, "1": {"a": 1}}, ["RR@10"])["RR@10"] == {"3": 0.0, "1": 1.0}


def test_two_names_of_one_measure() -> None:
    assert per_query({"1": {"a": 1.0}}, {"1": {"a": 1}}, ["AP", "MAP"]) == {"AP": {"1": 1.0}, "MAP": {"1": 1.0}}


def test_what_cannot_be_measured_is_refused() -> None:
    run, qrels = {"1": {"a": 1.0}}, {"1": {"a": 1}, "2": {"a": 1}, "3": {"b": 1}}
    with pytest.raises(ValueError, match="2 of 3 judged queries have no ranking, '2' first"):
        per_query(run, qrels)
    with pytest.raises(ValueError, match="2 of 3 judged"):
        per_query({**run, "2": {}}, qrels)
    with pytest.raises(ValueError, match="no query has a relevant document"):
        per_query(run, {"1": {"a": 0}})
    with pytest.raises(ValueError, match="query '1' has a score that is NaN"):
        per_query({"1": {"a": float("nan")}}, {"1": {"a": 1}})
    for name in ("goodness@10", "nDCG@", "__import__('os')"):
        with pytest.raises(ValueError, match="ir-measures knows none of that name; try nDCG@10"):
            per_query(run, {"1": {"a": 1}}, [name])
