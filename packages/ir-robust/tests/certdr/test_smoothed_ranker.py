"""The smoothed ranker: exact where it can be, the same in every grouping, blind to capitals and to substitutions."""

import itertools
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ir_robust.certdr import (
    NoiseAugment,
    PerturbationTable,
    RepresentativeRanker,
    SmoothedRanker,
    SmoothedScores,
    Squash,
    SynonymGraph,
)
from ir_robust.rankers.base import Vocabulary
from ir_robust.text import Words

GRAPH = SynonymGraph.from_pairs(
    [("fast", "quick"), ("quick", "rapid"), ("wing", "vane"), ("air", "gas"), ("gas", "vapour"), ("air", "vapour")]
)
TABLE = PerturbationTable(GRAPH)
DOC = "The Fast wing: AIR flows rapid, 3.5 times as quick. Fast fast wing gas air vapour!"
NUMBERS = {"fast": 0.9, "quick": 0.1, "rapid": 0.4, "wing": 0.7, "vane": 0.2, "air": 0.3, "gas": 0.8, "vapour": 0.5}


class Additive:
    """Scores the mean of numbers of words, through texts only."""

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        return np.array([np.mean([NUMBERS.get(word, 0.0) for word in Words.of(doc).words] or [0.0]) for doc in docs])


class AdditiveByNumber(Additive):
    """The same, by the numbers of words."""

    def __init__(self) -> None:
        self.vocabulary = Vocabulary(list(NUMBERS))
        self.table = torch.tensor([0.0, 0.0, *NUMBERS.values()], dtype=torch.float64)

    def score_words(self, query: str, words: Tensor) -> Tensor:
        return self.table[words].sum(1) / (words != Vocabulary.PAD).sum(1).clamp_min(1)


def closed_form(doc: str) -> float:
    means = [np.mean([NUMBERS.get(w, 0.0) for w in TABLE.support(word)]) for word in Words.of(doc).words]
    return float(np.mean(means))


@pytest.mark.quick
@pytest.mark.parametrize("ranker", [Additive(), AdditiveByNumber(), Additive().score])
def test_estimates_converge_to_the_closed_form(ranker: object) -> None:
    found = SmoothedRanker(ranker, TABLE, 4000, squash=None)("q", [DOC])
    assert not found.exact[0]
    assert found.mean[0] == pytest.approx(closed_form(DOC), abs=5 * np.sqrt(found.var[0] / 4000) + 1e-6)
    assert found.n.tolist() == [4000]
    assert found.n_queries == 4000


def test_samples_by_number_are_those_by_text() -> None:
    by_text = SmoothedRanker(Additive(), TABLE, 300, squash=None)
    by_number = SmoothedRanker(AdditiveByNumber(), TABLE, 300, squash=None)
    a, b = by_text("q", [DOC, "wing"]), by_number("q", [DOC, "wing"])
    np.testing.assert_allclose(a.mean, b.mean, atol=2e-6)  # one level of rounding
    np.testing.assert_allclose(a.var, b.var, atol=1e-5)


def test_few_variants_are_scored_one_by_one() -> None:
    smoothed = SmoothedRanker(Additive(), TABLE, 100, squash=None, batch_size=7)
    found = smoothed("q", ["Fast wing", "no synonym here", ""])
    assert found.exact.all()
    assert found.n.tolist() == [6, 1, 1]
    assert found.mean[0] == pytest.approx(closed_form("fast wing"), abs=2e-6)
    assert found.var.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="variants; at most 5"):
        smoothed.sampler("q", "Fast wing").enumerate(limit=5)
    assert isinstance(smoothed("q", []), SmoothedScores)


@given(st.integers(1, 40), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_results_depend_on_no_grouping(batch_size: int, seed: int) -> None:
    docs = [DOC, DOC.replace("wing", "air"), DOC + " gas gas"]
    whole = SmoothedRanker(AdditiveByNumber(), TABLE, 100, squash=None, generator=seed)("q", docs)
    parts = SmoothedRanker(AdditiveByNumber(), TABLE, 100, squash=None, batch_size=batch_size, generator=seed)
    assert parts("q", docs[::-1]).mean.tolist() == whole.mean.tolist()[::-1]
    sampler = parts.sampler("q", docs[0])
    sampler.extend(37)
    assert sampler.extend(100).mean == whole.mean[0]


def test_seeds_queries_and_documents_have_their_own_noise() -> None:
    texts = SmoothedRanker(Additive(), TABLE, squash=None).variants("q", DOC, 0, 20)
    assert texts == SmoothedRanker(Additive(), TABLE, squash=None, batch_size=3).variants("q", DOC, 0, 20)
    others = [
        SmoothedRanker(Additive(), TABLE, squash=None, generator=1).variants("q", DOC, 0, 20),
        SmoothedRanker(Additive(), TABLE, squash=None).variants("p", DOC, 0, 20),
        SmoothedRanker(Additive(), TABLE, squash=None).variants("q", DOC, 20, 40),
    ]
    assert all(texts != other for other in others)


def test_draws_keep_the_text_but_for_the_words() -> None:
    for text in SmoothedRanker(Additive(), TABLE, squash=None).variants("q", DOC, 0, 30):
        words, original = Words.of(text), Words.of(DOC)
        assert words.gaps == original.gaps
        for new, old in zip(words.surfaces, original.surfaces, strict=True):
            assert new in TABLE.support(old.lower()) if old.lower() in GRAPH else new == old


def test_draws_are_uniform() -> None:
    smoothed = SmoothedRanker(Additive(), TABLE, squash=None, generator=7)
    picks = smoothed.sampler("q", DOC).picks(0, 6000)
    sampler = smoothed.sampler("q", DOC)
    for column, support in zip(picks.T, sampler.supports, strict=True):
        counts = torch.bincount(column, minlength=len(support)).double()
        chi2 = float(((counts - 6000 / len(support)) ** 2 / (6000 / len(support))).sum())
        assert chi2 < 20.0


def test_an_attack_inside_components_changes_nothing_at_all() -> None:
    """With exact scores: every document that the attacker can write, in any capitals, has the same g."""
    smoothed = SmoothedRanker(Additive(), TABLE, squash=None)
    scores = set()
    for words in itertools.product(("fast", "quick", "rapid"), ("wing", "vane"), ("Air", "GAS", "vapour")):
        scores.add(smoothed.sampler("q", " ".join(words)).enumerate().mean)
    assert len(scores) == 1
    assert TABLE.deviation(["fast", "wing", "air"]) == 0.0


def test_capitals_hide_nothing_where_sets_are_unequal() -> None:
    """A word whose set is itself alone is written in lower case all the same: its synonym's set knows it so."""
    graph = SynonymGraph.from_pairs([("wing", "vane")])
    table = PerturbationTable(graph, supports={"wing": ["wing"], "vane": ["wing", "vane"]})
    smoothed = SmoothedRanker(lambda query, docs: [float("Wing" in doc) for doc in docs], table, squash=None)
    assert smoothed("q", ["A Wing", "A Vane"]).mean.tolist() == [0.0, 0.0]
    assert NoiseAugment(table).text("1", "A Wing") == "A wing"


def test_scores_must_lie_in_the_unit_interval_or_be_squashed() -> None:
    def raw(query: str, docs: Sequence[str]) -> list[float]:
        return [7.0] * len(docs)

    with pytest.raises(ValueError, match=r"scores in \[7, 7\]"):
        SmoothedRanker(raw, TABLE, squash=None)("q", [DOC])
    squashed = SmoothedRanker(raw, TABLE, squash=Squash(7.0, 2.0))("q", [DOC])
    assert squashed.mean[0] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="ranker: the score of document"):
        SmoothedRanker(lambda q, docs: [float("nan")] * len(docs), TABLE)("q", [DOC])
    with pytest.raises(ValueError, match="temperature=0"):
        Squash(temperature=0.0)
    fitted = Squash.of(np.linspace(-3, 5, 101))
    assert fitted(torch.tensor([-2.6, 1.0, 4.6])).tolist() == pytest.approx([0.05, 0.5, 0.95], abs=1e-3)
    with pytest.raises(ValueError, match="n_samples=0"):
        SmoothedRanker(raw, TABLE, 0)


def test_rankers_that_are_no_fixed_function_are_refused() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))

        def score(self, query: str, docs: Sequence[str]) -> Tensor:
            return torch.zeros(len(docs))

    with pytest.raises(ValueError, match=r"'layer\.1' draws at random"):
        SmoothedRanker(Network(), TABLE)
    with pytest.raises(TypeError, match="half precision"):
        SmoothedRanker(Network().eval().half(), TABLE)
    assert SmoothedRanker(Network().eval(), TABLE)("q", ["wing"]).mean[0] == 0.5


def test_noise_augmentation_draws_every_word_from_its_set() -> None:
    augment = NoiseAugment(TABLE, generator=3)
    docs = {"1": DOC, "2": DOC, "3": ""}
    noisy = augment(docs)
    assert noisy == NoiseAugment(TABLE, generator=3)(dict(reversed(docs.items()))) | {}
    assert noisy["1"] != noisy["2"]
    assert noisy["3"] == ""
    assert noisy != augment(docs, copy=1)
    assert noisy != NoiseAugment(TABLE, generator=4)(docs)
    for new, old in zip(Words.of(noisy["1"]).surfaces, Words.of(DOC).surfaces, strict=True):
        assert new in TABLE.support(old.lower()) if old.lower() in GRAPH else new == old


def test_representatives_make_attacked_documents_equal() -> None:
    plain = RepresentativeRanker(Additive(), PerturbationTable(GRAPH, cap=1))
    assert plain.text("The RAPID vane, fast!") == "The quick vane, quick!"
    docs = ["gas gas gas wing", "wing vane", "the air", "the gas"]
    found = plain.certify("q", docs, [1, 2, 3], names=["1", "2", "3", "4"])
    assert [found[k].certified for k in (1, 2, 3)] == [True, True, False]  # "the air" and "the gas" read the same
    assert plain.score("q", ["Quick Wing"]).tolist() == plain.score("q", ["rapid vane"]).tolist()
