"""Certificates hold against every document that an attacker can write, and no more is claimed than can be."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ir_robust.certdr import (
    SmoothedScores,
    TopKCertificate,
    certified_robust_queries,
    certify_top_k,
    mc_error,
    predict_top_k,
    score_bounds,
)
from ir_robust.synonyms import SynonymGraph
from ir_robust.tables import PerturbationTable


def estimates(mean: list[float], n: int = 1000, var: float = 0.01) -> SmoothedScores:
    size = len(mean)
    return SmoothedScores(np.array(mean), np.full(size, var), np.full(size, n), np.zeros(size, dtype=bool))


def of_samples(samples: np.ndarray) -> SmoothedScores:
    """Return the estimates of (n, N) samples."""
    n, size = samples.shape
    none = np.zeros(size, dtype=bool)
    return SmoothedScores(samples.mean(0), samples.var(0, ddof=1), np.full(size, n), none, 0, tuple(samples.T))


def additive(words: tuple[str, ...], table: PerturbationTable, numbers: dict[str, float]) -> float:
    """Return g in closed form for f(z) = mean of numbers[z_i]."""
    return float(np.mean([np.mean([numbers[w] for w in table.support(word)]) for word in words]))


# -- the theorem --


@pytest.mark.quick
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_document_moves_further_than_the_deviation(seed: int, length: int, cap: int, changes: int) -> None:
    draw = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(6)]
    pairs = [pair for pair in itertools.combinations(words, 2) if draw.random() < 0.4]
    table = PerturbationTable(SynonymGraph.from_pairs(pairs), cap)
    numbers = dict(zip(words, draw.random(6), strict=True))
    document = tuple(draw.choice(words, length))
    allowed = min(changes, length)
    before, most = additive(document, table, numbers), table.deviation(document, allowed)
    for other in itertools.product(*((word, *table.substitutes(word)) for word in document)):
        if sum(a != b for a, b in zip(document, other, strict=True)) <= allowed:
            assert abs(additive(other, table, numbers) - before) <= most + 1e-12


def test_the_worst_function_attains_the_deviation() -> None:
    table = PerturbationTable(SynonymGraph.from_pairs([("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]), cap=3)
    old, new = ("c", "c"), ("d", "d")  # equal sizes, and d is c's worst substitute
    assert table.overlap("c", "d") == table.least_overlap("c")
    supports = [[set(table.support(w)) for w in doc] for doc in (old, new)]
    worst = set(itertools.product(*supports[1])) - set(itertools.product(*supports[0]))  # f = 1 there, else 0
    gain = len(worst) / math.prod(map(len, supports[1])) - 0.0
    assert gain == pytest.approx(table.deviation(old), abs=1e-12)
    assert gain > table.deviation(old, 1)


def test_an_exhaustive_attacker_breaks_no_certificate() -> None:
    """Every document that he can write, for every outsider, on closed-form scores; others he does break."""
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(8)]
    held = broken = 0
    for _ in range(60):
        pairs = [pair for pair in itertools.combinations(words, 2) if draw.random() < 0.15]
        table = PerturbationTable(SynonymGraph.from_pairs(pairs), int(draw.integers(2, 6)))
        numbers = dict(zip(words, draw.random(8) ** 3, strict=True))
        docs = [tuple(draw.choice(words, 4)) for _ in range(6)]
        scores = np.array([additive(doc, table, numbers) for doc in docs])
        devs = [table.deviation(doc, 2) for doc in docs]
        found = certify_top_k(SmoothedScores.closed_form(scores), devs, [1, 2, 3], bound="exact")
        for k, certificate in found.items():
            outside = set(range(6)) - set(certificate.top)
            best = max(
                additive(other, table, numbers)
                for i in outside
                for other in itertools.product(*((w, *table.substitutes(w)) for w in docs[i]))
                if sum(a != b for a, b in zip(docs[i], other, strict=True)) <= 2
            )
            enters = best >= scores[list(certificate.top)].min()
            assert not (certificate.certified and enters), k
            held += certificate.certified
            broken += enters
    assert held > 20
    assert broken > 20


# -- rules, bounds, sides --


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.integers(0, 10**6), st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_the_rule_per_document_certifies_whatever_the_papers_does(mean: list[float], seed: int, k: int) -> None:
    devs = np.random.default_rng(seed).random(len(mean)) * 0.2
    for bound in ("hoeffding", "bernstein", "exact"):
        scores = estimates(mean, 5000)
        fine = certify_top_k(scores, devs, k, bound=bound)[k]
        rough = certify_top_k(scores, devs, k, bound=bound, rule="paper")[k]
        assert fine.margin >= rough.margin
        assert fine.certified or not rough.certified


@pytest.mark.quick
@pytest.mark.parametrize(("n", "error"), [(1000, 0.0859), (2000, 0.0607), (10_000, 0.0272), (100_000, 0.0086)])
def test_the_papers_error_is_two_radii_at_five_percent(n: int, error: float) -> None:
    assert mc_error(n) == pytest.approx(error, abs=5e-5)


def test_hoeffding_radii_are_those_of_the_formula() -> None:
    lower, upper = score_bounds(estimates([0.5] * 7, 1000), 0.05 / 14, bound="hoeffding")
    radius = math.sqrt(math.log(14 / 0.05) / 2000)
    np.testing.assert_allclose(upper - 0.5, radius, rtol=1e-9)
    np.testing.assert_allclose(0.5 - lower, radius, rtol=1e-9)
    margin = certify_top_k(estimates([0.8] + [0.5] * 6), [0.0] * 7, 1, bound="hoeffding")[1].margin
    assert margin == pytest.approx(0.3 - 2 * radius, abs=1e-9)


def test_bounds_that_heed_the_variance_are_narrower() -> None:
    scores = estimates([0.5, 0.02], 1000, var=1e-4)
    widths = {
        b: np.subtract(*score_bounds(scores, 1e-3, bound=b)[::-1]) for b in ("hoeffding", "chernoff", "bernstein")
    }
    assert (widths["chernoff"] <= widths["hoeffding"]).all()
    assert widths["chernoff"][1] < 0.5 * widths["hoeffding"][1]
    assert widths["bernstein"][0] < 0.5 * widths["hoeffding"][0]
    assert (np.subtract(*score_bounds(scores, None, bound="exact")) == 0).all()


@given(st.integers(0, 10**6))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_less_attack_and_more_samples_never_lose_a_certificate(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mean, devs = draw.random(6).tolist(), draw.random(6) * 0.1
    for bound in ("hoeffding", "chernoff"):
        margins = [certify_top_k(estimates(mean, n), devs, 2, bound=bound)[2].margin for n in (100, 1000, 10_000)]
        assert margins == sorted(margins)
        by_attack = [certify_top_k(estimates(mean), devs * s, 2, bound=bound)[2].margin for s in (1.0, 0.5, 0.0)]
        assert by_attack == sorted(by_attack)


def test_ties_and_missing_outsiders() -> None:
    tie = SmoothedScores.closed_form([0.5, 0.5, 0.1])
    found = certify_top_k(tie, [0.0] * 3, [1, 2, 3], bound="exact", names=["a", "b", "c"])
    assert found[1].top == (1,)  # equals go by falling number
    assert not found[1].certified
    assert found[2].certified
    assert found[3].margin == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deviations": [0.1]}, "deviations has shape"),
        ({"deviations": [0.1, math.nan]}, "o_d lies in"),
        ({"ks": 0}, "k=0"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"bound": "normal"}, "bound='normal'"),
        ({"bound": "betting"}, "needs the samples"),
        ({"rule": "mine"}, "rule='mine'"),
        ({"selection": "all"}, "selection='all'"),
        ({"selection": "split"}, "selected_by"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"scores": estimates([0.1, 0.9]), "deviations": [0.0, 0.0], "ks": 1, "bound": "chernoff", **change}
    with pytest.raises(ValueError, match=message):
        certify_top_k(**arguments)


def test_scores_outside_the_unit_interval_are_no_scores() -> None:
    for bad in ([1.2], [math.nan], [-0.1]):
        with pytest.raises(ValueError, match="squash"):
            estimates(bad)


# -- joint confidence --


def wrong(certificate: TopKCertificate, truth: np.ndarray, devs: np.ndarray) -> bool:
    inside = np.zeros(len(truth), dtype=bool)
    inside[list(certificate.top)] = True
    return certificate.certified and truth[inside].min() <= (truth + devs)[~inside].max()


@pytest.mark.parametrize("bound", ["hoeffding", "chernoff", "bernstein", "betting"])
def test_false_certificates_are_as_rare_as_promised(bound: str) -> None:
    """Known Bernoulli and Beta scorers whose gap is just absent: any certificate of K = 2 is false."""
    draw, alpha, n, runs = np.random.default_rng(3), 0.3, 60, 250
    truth, devs = np.array([0.8, 0.62, 0.5, 0.1]), np.array([0.0, 0.0, 0.13, 0.0])
    false = 0
    for _ in range(runs):
        samples = (
            draw.binomial(1, truth, (n, 4)).astype(float)
            if bound in ("hoeffding", "chernoff")
            else draw.beta(truth * 30, (1 - truth) * 30, (n, 4))
        )
        found = certify_top_k(of_samples(samples), devs, [1, 2, 3], alpha=alpha, bound=bound)
        false += any(wrong(certificate, truth, devs) for certificate in found.values())
    assert false / runs <= alpha
    assert wrong(TopKCertificate(2, (0, 1), True, 0.1, 0.0, 0.0, alpha), truth, devs)


def test_a_split_needs_fewer_bounds_and_trusts_only_its_own_half() -> None:
    chosen, certifying = estimates([0.9, 0.5, 0.4, 0.1], 100), estimates([0.9, 0.2, 0.6, 0.1], 900)
    split = certify_top_k(certifying, [0.0] * 4, [1], selection="split", selected_by=chosen, bound="hoeffding")[1]
    union = certify_top_k(certifying, [0.0] * 4, [1], bound="hoeffding")[1]
    assert split.mc_radius == pytest.approx(math.sqrt(math.log(4 / 0.05) / 1800), rel=1e-9)
    assert union.mc_radius == pytest.approx(math.sqrt(math.log(8 / 0.05) / 1800), rel=1e-9)
    two = certify_top_k(certifying, [0.0] * 4, [2], selection="split", selected_by=chosen, bound="chernoff")[2]
    assert two.top == (0, 1)  # chosen by the first samples, whatever the others say
    assert not two.certified
    # two values of K: documents between them stand on both sides
    both = certify_top_k(certifying, [0.0] * 4, [1, 3], selection="split", selected_by=chosen, bound="hoeffding")[1]
    assert both.mc_radius == pytest.approx(math.sqrt(math.log(6 / 0.05) / 1800), rel=1e-9)


# -- what is deployed --


def test_incumbents_stay_unless_someone_is_surely_better() -> None:
    close = estimates([0.5, 0.52, 0.2])
    kept = predict_top_k(close, 1, incumbents=[0], bound="bernstein")
    assert (kept.top, kept.entered, kept.abstained) == ((0,), (), True)
    assert predict_top_k(close, 1, bound="bernstein").top == (1,)
    moved = predict_top_k(estimates([0.3, 0.9, 0.2]), 1, incumbents=[0], bound="bernstein")
    assert (moved.top, moved.entered, moved.abstained) == ((1,), (1,), False)
    both = predict_top_k(estimates([0.6, 0.1, 0.9, 0.61]), 2, incumbents=[0, 1], bound="bernstein")
    assert (both.top, both.entered, both.abstained) == ((0, 2), (2,), True)
    assert predict_top_k(estimates([0.4, 0.5]), 5, bound="bernstein").top == (1, 0)
    with pytest.raises(ValueError, match="incumbents="):
        predict_top_k(close, 2, incumbents=[0], bound="bernstein")
    with pytest.raises(ValueError, match="different positions"):
        predict_top_k(close, 2, incumbents=[0, 3], bound="bernstein")


def test_fresh_noise_lets_nobody_into_a_certified_top() -> None:
    """The attacked outsider sits right below the certified gap; plain ranking by samples would let him in."""
    draw, n = np.random.default_rng(5), 200
    truth = np.array([0.60, 0.595, 0.2])  # g of the K-th, g of the attacked one: still below, as certified
    plain = guarded = 0
    for _ in range(120):
        samples = draw.binomial(1, truth, (n, 3)).astype(float)
        scores = of_samples(samples)
        plain += 1 in predict_top_k(scores, 1).top
        guarded += 1 in predict_top_k(scores, 1, incumbents=[0], alpha=0.01).top
    assert plain > 24
    assert guarded == 0


def test_the_share_of_certified_queries() -> None:
    def row(*held: bool) -> dict[int, TopKCertificate]:
        return {k: TopKCertificate(k, (0,), value, 0.0, 0.0, 0.0, 0.05) for k, value in zip((1, 5), held, strict=True)}

    assert certified_robust_queries({"a": row(True, False), "b": row(True, True)}) == {1: 1.0, 5: 0.5}
    with pytest.raises(ValueError, match="at least one query"):
        certified_robust_queries({})
    with pytest.raises(ValueError, match="query 'b' has K"):
        certified_robust_queries({"a": row(True, False), "b": {1: row(True, True)[1]}})
