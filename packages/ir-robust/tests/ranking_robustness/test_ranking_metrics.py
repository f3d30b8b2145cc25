"""The numbers of the benchmark, against closed forms and slow references."""

from __future__ import annotations

import itertools
import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from ir_robust.measures import per_query
from ir_robust.ranking_robustness import (
    cvar,
    drop_rate,
    failure_rate,
    mean_value,
    normalised,
    paired_test,
    rank_boost,
    relative_spread,
    top_k_entry,
    variance,
)
from ir_robust.ranking_robustness.metrics import Resamples, bootstrap_interval

values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=40)
@given(values=values, q=st.floats(0.01, 1))
def test_statistics_are_what_numpy_says(values, q):
    array = np.array(values)
    assert math.isclose(variance(values), array.var(), abs_tol=1e-15)
    assert math.isclose(mean_value(values), array.mean())
    assert failure_rate(values, 0.3) == (array <= 0.3).mean()
    fine = np.repeat(np.sort(array), 1000)[: max(round(q * 1000 * len(array)), 1)]
    assert abs(cvar(values, q) - fine.mean()) < 2e-2
    assert math.isclose(cvar(values, 1.0), array.mean(), abs_tol=1e-12)
    assert cvar(values, q) <= array.mean() + 1e-12


def test_constants_and_closed_forms():
    assert variance([0.4] * 7) < 1e-30
    assert relative_spread([0.4] * 7) < 1e-15
    assert cvar([0.0, 0.2, 0.4, 1.0], 0.25) == 0.0
    assert math.isclose(cvar([0.0, 0.2, 0.4, 1.0], 0.375), 0.1 / 1.5)
    assert drop_rate(0.7, 0.7) == 0
    assert math.isclose(drop_rate(0.5, 0.4), -0.2)
    assert math.isnan(drop_rate(0.0, 0.4))
    assert math.isnan(relative_spread([0.0, 0.0]))
    np.testing.assert_allclose(normalised([0.2, 0.0, 0.3], [0.4, 0.0, 0.3]), [[0.5, 1.0]])
    assert variance({"a": 0.0, "b": 1.0}) == 0.25


def test_trainings_are_judged_one_by_one():
    """Averaging values first would hide that each training fails on half of the queries."""
    rows = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert variance(rows) == 0.25
    assert variance(rows.mean(axis=0)) == 0
    assert failure_rate(rows) == 0.5
    assert cvar(rows, 0.5) == 0


@pytest.mark.parametrize("bad", [[], [math.nan], [[[0.1]]]])
def test_what_makes_no_statistic_is_refused(bad):
    with pytest.raises(ValueError, match="values"):
        variance(bad)
    for call in (lambda: cvar([0.1], 0.0), lambda: drop_rate(-0.1, 0.2), lambda: normalised([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match=r"is needed|holds"):
            call()


def test_values_are_those_of_the_library():
    run = {"1": {"a": 3.0, "b": 2.0, "c": 1.0}, "2": {"a": 1.0, "b": 2.0, "c": 3.0}}
    qrels = {"1": {"b": 2, "c": 1}, "2": {"a": 1, "c": 0}}
    own = per_query(run, qrels, ["nDCG@10", "AP@100"])
    for measure in own:
        theirs = {m.query_id: m.value for m in ir_measures.iter_calc([ir_measures.parse_measure(measure)], qrels, run)}
        assert own[measure] == pytest.approx(theirs)
        assert math.isclose(variance(own[measure]), np.var(list(theirs.values())))


def test_places_climbed_and_entries():
    before, after = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 3.0, "b": 2.0, "c": 4.0}
    assert rank_boost(before, after, "c") == 2
    assert rank_boost(after, before, "c") == -2
    assert top_k_entry(before, after, "c", 1)
    assert not top_k_entry(before, after, "c", 3)
    assert not top_k_entry(before, after, "a", 1)
    tied = {"a": 1.0, "b": 1.0}
    assert rank_boost(tied, {"a": 1.0, "b": 0.5}, "b") == -1  # equals go by falling number: b was first


def test_the_bootstrap_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 12)), rng.random((2, 12))
    draws = Resamples(200, 3)
    weights = draws.weights("source", 12)
    assert weights.sum(axis=1) == pytest.approx(1)
    assert (weights * 12) % 1 == pytest.approx(0)
    slow = [(after @ w).mean() / (before @ w).mean() - 1 for w in weights]
    np.testing.assert_allclose(draws.drop_rate(("source", before), ("source", after)), slow, rtol=1e-12)
    spread = [np.mean([math.sqrt(w @ r**2 - (w @ r) ** 2) / (w @ r) for r in before]) for w in weights]
    np.testing.assert_allclose(draws.relative_spread("source", before), spread, rtol=1e-9)
    variances = [np.mean([w @ r**2 - (w @ r) ** 2 for r in before]) for w in weights]
    np.testing.assert_allclose(draws.variance("source", before), variances, rtol=1e-9)


def test_resamples_belong_to_sets_of_queries():
    one, other = Resamples(50, 1), Resamples(50, 1)
    other.weights("elsewhere", 9)
    np.testing.assert_array_equal(one.weights("source", 9), other.weights("source", 9))
    assert (one.weights("source", 9) != one.weights("elsewhere", 9)).any()


def test_the_interval_of_a_ratio_covers_it():
    """Ratio of means 0.5, from correlated pairs: 95 % of intervals, within three standard errors of 300 trials."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        before = rng.beta(1, 2, 80)
        after = before * rng.random(80)
        found = Resamples(300, trial).drop_rate(("q", before[None]), ("q", after[None]))
        low, high = bootstrap_interval(found) or (math.nan, math.nan)
        hits += low <= -0.5 <= high
    assert 0.95 - 0.05 < hits / 300 <= 1


def test_a_ratio_that_is_often_undefined_has_no_interval():
    before = np.zeros((1, 20))
    before[0, 0] = 0.5
    found = Resamples(400, 0).drop_rate(("q", before), ("q", before))
    assert bootstrap_interval(found) is None
    assert bootstrap_interval(np.full(5, math.nan)) is None
    assert bootstrap_interval(np.zeros(100)) == (0.0, 0.0)


def test_paired_tests_against_scipy_and_every_sign_pattern():
    rng = np.random.default_rng(2)
    a, b = rng.random(9), rng.random(9) + 0.2
    found = paired_test(a, b, n_flips=40_000)
    assert math.isclose(found.p_t, ttest_rel(a, b).pvalue, rel_tol=1e-9)
    assert math.isclose(found.difference, (a - b).mean())
    patterns = np.array(list(itertools.product((-1, 1), repeat=9))) @ (a - b) / 9
    exact = (np.abs(patterns) >= abs((a - b).mean()) * (1 - 1e-12)).mean()
    assert abs(found.p_randomisation - exact) < 4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-4
    same = paired_test(a, a)
    assert (same.p_t, same.p_randomisation, same.difference) == (1.0, 1.0, 0.0)
    assert paired_test({"x": 0.1, "y": 0.5}, {"y": 0.5, "x": 0.1}).difference == 0
    with pytest.raises(ValueError, match="queries"):
        paired_test({"x": 0.1}, {"y": 0.1})
    with pytest.raises(ValueError, match="queries"):
        paired_test([0.1, 0.2], [0.1])
