import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from robust_core.data.corruptions import FAMILIES
from robust_core.evaluation import metrics
from robust_core.evaluation.metrics import calibration
from robust_core.evaluation.metrics.certified import certified_accuracy, certified_curve

FEW = settings(deadline=None, derandomize=True, max_examples=30)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (3, 10), (499, 1000)])
def test_shares_carry_the_exact_interval(k, n, confidence):
    found = metrics.share(k, n, confidence=confidence)
    exact = binomtest(k, n).proportion_ci(confidence, method="exact")
    assert found.value == k / n
    assert found.interval == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_share_of_nothing_is_undefined_and_arguments_are_checked():
    assert math.isnan(metrics.share(0, 0).value)
    assert metrics.share(0, 0).as_json() == {"value": None, "interval": None, "n": 0}
    with pytest.raises(ValueError, match="more successes"):
        metrics.share(3, 2)
    with pytest.raises(TypeError, match="booleans"):
        metrics.proportion(np.ones(3))


@pytest.mark.quick
def test_rank_agrees_with_arg_max_ties_included(rng):
    logits = rng.integers(0, 3, (200, 6)).astype(np.float32)
    y = rng.integers(0, 6, 200)
    rank = metrics.label_rank(logits, y)
    assert ((rank == 0) == (logits.argmax(1) == y)).all()
    order = np.argsort(-logits, axis=1, kind="stable")
    assert (np.take_along_axis(order, rank[:, None], 1)[:, 0] == y).all()
    assert metrics.top_k_accuracy(torch.tensor(logits), torch.tensor(y), 6).value == 1


def test_a_row_with_nan_is_wrong_and_labels_out_of_range_are_refused():
    logits = np.array([[np.nan, 0.0], [1.0, 0.0]])
    assert metrics.label_rank(logits, [0, 0]).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        metrics.label_rank(logits, [0, 2])


def test_worst_group_interval_covers_the_true_minimum(rng):
    truth = np.array([0.7, 0.75, 0.8, 0.9])
    covered = 0
    for _ in range(200):
        groups = rng.integers(0, 4, 400)
        estimate, _ = metrics.worst_group_accuracy(rng.random(400) < truth[groups], groups)
        covered += estimate.interval[0] <= 0.7 <= estimate.interval[1]
    assert covered >= 190


# -- calibration ---------------------------------------------------------------------------------------------------


def test_ece_of_a_calibrated_simulator_vanishes_like_one_over_root_n(rng):
    found = []
    for n in (1_000, 100_000):
        confidence = rng.random((20, n))
        correct = rng.random((20, n)) < confidence
        found.append(np.mean([metrics.ece(c, k) for c, k in zip(confidence, correct, strict=True)]))
    assert found[1] < 0.005
    assert found[0] / found[1] == pytest.approx(10, rel=0.25)


@pytest.mark.quick
def test_bins_are_closed_on_the_right():
    diagram = metrics.reliability([0.0, 0.2, 0.2000001, 1.0], [True] * 4, n_bins=5)
    assert diagram.count.tolist() == [2, 1, 0, 0, 1]


@FEW
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_ece_against_a_slow_reference(seed, n_bins):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(50), rng.random(50) < 0.5
    slow = 0.0
    for b in range(n_bins):
        rows = [i for i in range(50) if b / n_bins < confidence[i] <= (b + 1) / n_bins]
        if rows:
            slow += len(rows) / 50 * abs(np.mean(correct[rows]) - np.mean(confidence[rows]))
    assert metrics.ece(confidence, correct, n_bins=n_bins) == pytest.approx(slow, abs=1e-12)


def test_noise_floor_says_what_a_calibrated_model_shows(rng):
    confidence = rng.random(500) * 0.5 + 0.5
    floor, limit = metrics.noise_floor(confidence, generator=1)
    shown = [metrics.ece(confidence, rng.random(500) < confidence) for _ in range(200)]
    assert floor == pytest.approx(np.mean(shown), rel=0.1)
    assert np.mean(np.array(shown) > limit) < 0.12
    assert metrics.noise_floor(confidence, generator=1) == (floor, limit)


def test_temperature_recovers_the_scale_of_the_logits(rng):
    logits = rng.normal(size=(20_000, 4)) * 2
    p = np.exp(calibration.log_probabilities(logits))
    y = (p.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert metrics.fit_temperature(logits * 3, y) == pytest.approx(3, rel=0.05)


@pytest.mark.quick
def test_nll_and_brier_by_hand():
    logits = np.log([[0.5, 0.25, 0.25]])
    assert metrics.negative_log_likelihood(logits, [1])[0] == pytest.approx(math.log(4))
    assert metrics.brier(logits, [1])[0] == pytest.approx(0.25 + 0.75**2 + 0.0625)


def test_adaptive_and_class_wise_ece_of_an_oracle_are_zero():
    p = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    assert metrics.classwise_ece(p, [0, 1, 2, 0, 1, 2]) == 0
    assert metrics.adaptive_ece(np.ones(6), np.ones(6, dtype=bool)) == 0


@pytest.mark.quick
def test_risk_coverage_of_a_perfect_ranking_and_of_ties():
    coverage, risk = metrics.risk_coverage([0.9, 0.8, 0.7, 0.1], [True, True, True, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == [0, 0, 0, 0.25]
    _, flat = metrics.risk_coverage([0.5] * 4, [False, True, True, True])
    assert flat.tolist() == [0.25] * 4
    assert metrics.aurc([0.5] * 4, [False, True, True, True]) == 0.25


def test_confidence_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="probabilities, not logits"):
        metrics.ece([3.0], [True])


# -- open sets -----------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(0, 10_000), st.booleans())
def test_open_set_figures_equal_sklearn(seed, ties):
    rng = np.random.default_rng(seed)
    known, unknown = rng.normal(size=40), rng.normal(size=25) + 1
    if ties:
        known, unknown = known.round(), unknown.round()
    truth, scores = np.r_[np.zeros(40), np.ones(25)], np.r_[known, unknown]
    found = metrics.ood_figures(known, unknown)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found["auroc"].value == pytest.approx(roc_auc_score(truth, scores))
    assert found["fpr95"].value == min(f for f, t in zip(fpr, tpr, strict=True) if t >= 0.95)
    assert found["aupr_out"].value == pytest.approx(average_precision_score(truth, scores))
    assert found["aupr_in"].value == pytest.approx(average_precision_score(1 - truth, -scores))
    pairs = (unknown[:, None] > known).mean() + 0.5 * (unknown[:, None] == known).mean()
    assert found["auroc"].value == pytest.approx(pairs)


def test_delong_interval_covers(rng):
    truth = 0.7602499  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    hits = 0
    for _ in range(200):
        low, high = metrics.auroc(rng.normal(size=80), rng.normal(size=60) + 1).interval
        hits += low <= truth <= high
    assert 180 <= hits <= 199


def test_scores_without_an_order_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.ood_figures([np.nan], [1.0])
    with pytest.raises(ValueError, match="at least one of each"):
        metrics.ood_figures([], [1.0])


# -- corruptions, shift --------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_mce_of_the_reference_itself_is_one(rng):
    names = [n for family, members in FAMILIES.items() if family != "extra" for n in members]
    errors = {n: (rng.random(5) * 0.5 + 0.3).tolist() for n in names}
    own = metrics.Reference("ours", 0.1, errors)
    assert metrics.mce(errors, own) == pytest.approx(1)
    assert metrics.relative_mce(errors, 0.1, own) == pytest.approx(1)
    half = {n: [e / 2 for e in values] for n, values in errors.items()}
    assert metrics.mce(half, own) == pytest.approx(0.5)
    alexnet = metrics.ALEXNET_IMAGENET
    assert metrics.mce(alexnet.errors, alexnet) == 1
    with pytest.raises(ValueError, match="frost_procedural"):
        metrics.mce(errors, alexnet)  # procedural frost is not what AlexNet met
    with pytest.raises(ValueError, match="15 corruptions"):
        metrics.mce({"fog": 0.3}, own)


@pytest.mark.parametrize(("domain", "forward", "back"), [("logit", logit, expit)])
def test_baseline_recovers_slope_and_intercept(domain, forward, back):
    x = np.array([0.6, 0.7, 0.8, 0.9, 0.95, 0.97])
    y = back(0.8 * forward(x) - 0.5)
    line = metrics.fit_baseline(x.tolist(), y.tolist(), domain=domain)
    assert (line.slope, line.intercept) == pytest.approx((0.8, -0.5))
    assert line.effective_robustness(0.85, float(back(0.8 * forward(0.85) - 0.5)) + 0.03) == pytest.approx(0.03)
    assert line.in_range(0.85)
    assert not line.in_range(0.99)
    low, high = line.band([0.7, 0.9], n_resamples=50)
    assert np.allclose(low, high)  # points exactly on a line leave nothing to resample


def test_baselines_must_be_five_and_differ():
    with pytest.raises(ValueError, match="at least 5"):
        metrics.fit_baseline([0.5] * 4, [0.5] * 4)
    with pytest.raises(ValueError, match="same accuracy"):
        metrics.fit_baseline([0.5] * 5, [0.5] * 5)
    with pytest.raises(ValueError, match="acc_id=1"):
        metrics.fit_baseline([0.5, 0.6, 0.7, 0.8, 1.0], [0.5] * 5)


# -- certificates, pairs -------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_certified_curve_is_the_staircase_of_certified_accuracy():
    radius = np.array([0.0, 0.5, 0.5, 1.0, 2.0])
    correct = np.array([False, True, False, True, True])
    levels, accuracy = certified_curve(radius, correct)
    assert levels.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert accuracy.tolist() == [certified_accuracy(radius, correct, r).value for r in levels]
    assert metrics.average_certified_radius(radius, correct).value == pytest.approx((0.5 + 1 + 2) / 5)


@pytest.mark.quick
def test_mcnemar_uses_the_discordant_pairs_only():
    a = np.array([True] * 9 + [False] * 1 + [True] * 90)
    b = np.array([False] * 9 + [True] * 1 + [True] * 90)
    found = metrics.compare_correct(a, b)
    assert found.p_value == pytest.approx(binomtest(9, 10, 0.5).pvalue)
    assert (found.only_a, found.only_b, found.n) == (9, 1, 100)
    assert found.difference == pytest.approx(0.08)
    assert found.interval[0] < 0.08 < found.interval[1]
    assert metrics.compare_correct(a, a).p_value == 1


def test_paired_bootstrap_matches_a_plain_one(rng):
    a, b = rng.integers(0, 4, 200) / 3, rng.integers(0, 3, 200) / 2
    gaps = a - b
    plain = np.quantile(gaps[rng.integers(0, 200, (4000, 200))].mean(1), [0.025, 0.975])
    assert metrics.paired_bootstrap(a, b, n_resamples=4000) == pytest.approx(tuple(plain), abs=0.01)
    assert metrics.paired_bootstrap(a, b, generator=3) == metrics.paired_bootstrap(a, b, generator=3)
