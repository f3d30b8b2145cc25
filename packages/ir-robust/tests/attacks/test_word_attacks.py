"""Word substitution and triggers against rankers whose best edit is known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.attacks import Trigger, WordBudget, WordSubstitution, attack_list
from ir_robust.rankers import CallableRanker
from ir_robust.rankers.bag import BagRanker
from ir_robust.rankers.base import Vocabulary, scores_of
from ir_robust.rankers.vectors import WordVectors
from ir_robust.synonyms import SynonymGraph
from ir_robust.text import Words
from robust_core.attacks.tokens import GCG, Beam, Exhaustive, Greedy, NearestPGD, RandomSearch

PAIRS = [("big", "large"), ("big", "huge"), ("quick", "fast"), ("wing", "fin"), ("river", "stream"), ("old", "aged")]
GRAPH = SynonymGraph.from_pairs(PAIRS)
VALUE = {"large": 2.0, "huge": 3.0, "fast": 1.0, "fin": -1.0, "stream": 4.0, "aged": 0.5}
DOC = "The big, QUICK wing; an Old river's bed: a river."
SEARCHES = [Greedy(), Greedy(order="left"), Beam(width=3), Exhaustive()]


class Additive:
    """The sum of fixed values of words; it counts the texts that it is shown."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        self.asked += len(docs)
        return np.array([sum(VALUE.get(word, 0.0) for word in Words.of(doc).words) for doc in docs])


def bag(seed: int = 0) -> BagRanker:
    words = sorted({w for pair in PAIRS for w in pair} | set(Words.of(DOC).words) | {"query", "other", "the"})
    table = torch.randn(len(words) + 2, 8, generator=torch.Generator().manual_seed(seed))
    table[:2] = 0
    return BagRanker(WordVectors(Vocabulary(words), table), dim=8)


def climb(attack, ranker, *, n: int = 12, k: int = 1):
    docs = {"mine": DOC} | {f"r{i}": "nothing here" for i in range(n)}
    scores = {"mine": float(scores_of(ranker, "query", [DOC])[0])} | {f"r{i}": 100.0 + i for i in range(n)}
    return attack_list(attack, ranker, "query", docs, ["mine"], k=k, scores=scores)[0]


@pytest.mark.quick
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'order', '')}")
def test_every_search_finds_the_best_text_of_an_additive_ranker(search) -> None:
    found = climb(WordSubstitution(GRAPH, WordBudget(most=2, share=1.0), search), Additive())
    changed = {edit.new for edit in found.edits}
    if getattr(search, "order", "best") == "left":
        assert len(found.edits) <= 2
        assert found.score[1] > found.score[0]
    else:
        assert changed == {"huge", "stream"}
        assert found.score == (0.0, 7.0)


@pytest.mark.quick
def test_signs_and_capitals_stay_and_the_text_is_still_a_text() -> None:
    found = climb(WordSubstitution(GRAPH, WordBudget(share=1.0), Greedy(n_sweeps=2)), Additive())
    assert found.text == "The huge, FAST wing; an Aged river's bed: a stream."
    assert found.score[1] == 8.5


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 6), st.integers(0, 10_000), st.sampled_from(["random", "greedy", "beam", "pgd", "gcg"]))
def test_the_budget_is_never_exceeded_and_words_come_from_the_table(most: int, seed: int, name: str) -> None:
    search = {
        "random": RandomSearch(10), "greedy": Greedy(), "beam": Beam(width=2), "pgd": NearestPGD(n_steps=2),
        "gcg": GCG(n_steps=2, n_candidates=4, top_k=2),
    }[name]  # fmt: skip
    found = climb(WordSubstitution(GRAPH, WordBudget(share=1.0, most=most), search), bag(seed))
    assert len(found.edits) <= most
    assert all(edit.new in GRAPH.substitutes(edit.old) for edit in found.edits)
    assert found.score[1] >= found.score[0] - 1e-6


def test_random_search_is_no_better_than_greedy_and_greedy_no_better_than_all() -> None:
    for seed in range(5):
        budget = WordBudget(share=1.0, most=2)
        gains = [
            climb(WordSubstitution(GRAPH, budget, search), bag(seed)).score[1]
            for search in (RandomSearch(4), Greedy(n_sweeps=2), Exhaustive())
        ]
        assert gains[0] <= gains[2] + 1e-6
        assert gains[1] <= gains[2] + 1e-6
        assert gains[1] >= gains[0] - 1e-6


def test_texts_asked_of_the_victim_are_counted() -> None:
    ranker = Additive()
    attack = WordSubstitution(GRAPH, WordBudget(share=1.0), Greedy())
    _, n_queries = attack(ranker, "query", DOC, np.full(12, 100.0), 1)
    assert n_queries == ranker.asked > 5


def test_an_attack_stops_where_it_has_won() -> None:
    near, far = np.full(12, 0.5), np.full(12, 100.0)
    attack = WordSubstitution(GRAPH, WordBudget(share=1.0), Greedy(order="left"))
    text, few = attack(Additive(), "query", DOC, near, 1)
    _, many = attack(Additive(), "query", DOC, far, 1)
    assert few < many
    assert Additive().score("query", [text])[0] > 0.5


def test_nothing_is_done_where_nothing_may_be_or_need_be_done() -> None:
    rivals = np.full(3, 100.0)
    for attack in (
        WordSubstitution(GRAPH, WordBudget(share=0.0)),
        WordSubstitution(SynonymGraph.from_pairs([("a1", "b1")]), WordBudget(share=1.0)),
        Trigger(["fast"], WordBudget(insertions=0)),
        Trigger([], WordBudget(insertions=2)),
    ):
        assert attack(Additive(), "query", DOC, rivals, 1) == (DOC, 0)
    assert WordSubstitution(GRAPH, WordBudget(share=1.0))(Additive(), "query", DOC, rivals, 10) == (DOC, 0)


@pytest.mark.quick
def test_gradients_of_word_rankers_lead_to_better_words() -> None:
    better = 0
    for seed in range(8):
        ranker = bag(seed)
        found = climb(WordSubstitution(GRAPH, WordBudget(share=1.0, most=3), NearestPGD(n_rounds=3)), ranker)
        best = climb(WordSubstitution(GRAPH, WordBudget(share=1.0, most=3), Exhaustive()), ranker)
        gain, most = found.score[1] - found.score[0], best.score[1] - best.score[0]
        better += gain > 0.5 * most > 0
    assert better >= 6


def test_a_surrogate_guides_and_the_victim_decides() -> None:
    victim = bag(3)
    hidden = CallableRanker(victim.score)
    attack = WordSubstitution(GRAPH, WordBudget(share=1.0, most=2), NearestPGD(n_rounds=2), surrogate=victim)
    assert climb(attack, hidden).score[1] > climb(attack, hidden).score[0]
    wrong = WordSubstitution(GRAPH, WordBudget(share=1.0, most=2), NearestPGD(n_rounds=2), surrogate=bag(4))
    found = climb(wrong, hidden)
    assert found.score[1] >= found.score[0]
    with pytest.raises(ValueError, match="gradients"):
        climb(WordSubstitution(GRAPH, WordBudget(share=1.0), NearestPGD()), hidden)


def test_a_trigger_goes_in_front_and_only_where_it_helps() -> None:
    attack = Trigger(["river", "stream", "fin"], WordBudget(share=0.0, insertions=2), Greedy(n_sweeps=2))
    found = climb(attack, Additive())
    assert found.text == "stream stream " + DOC
    assert found.score[1] - found.score[0] == 8.0
    useless = Trigger(["fin"], WordBudget(share=0.0, insertions=2))
    assert climb(useless, Additive()).text == DOC
    quoted = Trigger(["stream"], WordBudget(share=0.0, insertions=1))(
        Additive(), "query", '"Old" wing', np.full(3, 9.0), 1
    )[0]
    assert quoted == 'stream "Old" wing'


def test_candidates_of_a_trigger_may_follow_from_the_query() -> None:
    attack = Trigger(lambda query: Words.of(query).words, WordBudget(share=0.0, insertions=1))
    text, _ = attack(Additive(), "fast stream", DOC, np.full(3, 99.0), 1)
    assert text.startswith("stream ")
