"""The list keeps the budget, not the attack: what comes back is read as the fewest edits, and scored afresh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.attacks.base import Edit, WordBudget, attack_list, check_budget, edits_between, rank_among
from ir_robust.rankers.base import Ranker
from ir_robust.text import Words
from robust_core.errors import BudgetExceededError
from robust_core.random import Seed

steady = settings(deadline=None, derandomize=True, max_examples=100)
short = st.lists(st.sampled_from("abc"), max_size=7)


def count(query: str, docs: Sequence[str]) -> list[float]:
    return [float(Words.of(doc).words.count(query)) for doc in docs]


@dataclass
class Writes:
    """Writes what it is told to."""

    text: str
    budget: WordBudget

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        return self.text, 3


def slow_distance(old: list[str], new: list[str]) -> int:
    if not old or not new:
        return len(old) + len(new)
    same = slow_distance(old[1:], new[1:])
    if old[0] == new[0]:
        return same
    return 1 + min(same, slow_distance(old[1:], new), slow_distance(old, new[1:]))


@steady
@given(short, short)
def test_edits_are_the_fewest_and_lead_from_one_text_to_the_other(old: list[str], new: list[str]) -> None:
    edits = edits_between(" ".join(old), " ".join(new))
    assert len(edits) == slow_distance(old, new)
    assert apply(old, edits) == new


def apply(old: list[str], edits: Sequence[Edit]) -> list[str]:
    before: dict[int, list[str]] = {}
    found: dict[int, str] = dict(enumerate(old))
    for edit in edits:
        if not edit.old:
            before.setdefault(edit.position, []).append(edit.new)
            continue
        assert found[edit.position] == edit.old
        found[edit.position] = edit.new
    pieces = [[*before.get(i, []), found.get(i, "")] for i in range(len(old) + 1)]
    return [word for piece in pieces for word in piece if word]


@steady
@given(short, st.data())
def test_whatever_is_within_the_budget_passes(old: list[str], data: st.DataObject) -> None:
    budget = WordBudget(1.0, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2)))
    new = list(old)
    places = st.sets(st.integers(0, max(len(old) - 1, 0)), max_size=budget.words(len(old)))
    for place in data.draw(places):
        new[place] = data.draw(st.sampled_from("abcd"))
    for _ in range(data.draw(st.integers(0, budget.insertions))):
        new.insert(data.draw(st.integers(0, len(new))), data.draw(st.sampled_from("abcd")))
    edits = check_budget(" ".join(old), " ".join(new), budget)
    assert apply(old, edits) == new


@pytest.mark.quick
def test_budgets_count_words() -> None:
    assert [WordBudget(0.1).words(n) for n in (0, 9, 10, 19, 30)] == [0, 0, 1, 1, 3]
    assert WordBudget(0.29).words(100) == 29  # not 28, to which the product rounds
    assert WordBudget(1.0, 2).words(50) == 2
    wrong: list[dict[str, Any]] = [{"share": 1.1}, {"share": float("nan")}, {"most": -1}, {"insertions": -1}]
    for words in wrong:
        with pytest.raises(ValueError, match=next(iter(words))):
            WordBudget(**words)
    old = "one two three four"
    assert check_budget(old, "one 2 three four", WordBudget(0.25)) == (Edit(1, "two", "2"),)
    assert check_budget(old, "zero one two three", WordBudget(0.25, insertions=1))  # one added, one deleted
    with pytest.raises(BudgetExceededError, match="changed 2 words of 1 allowed and added 0 of 0"):
        check_budget(old, "one 2 3 four", WordBudget(0.25))
    with pytest.raises(BudgetExceededError, match="added 1 of 0"):
        check_budget(old, "one two three four five", WordBudget(1.0))


@pytest.mark.parametrize(
    "after",
    ["One two, three", "one two three", "one two,  three", "one two, three!", "one TWO, three", "☃one two, three"],
)
def test_signs_and_capitals_are_no_free_channel(after: str) -> None:
    with pytest.raises(BudgetExceededError, match="words may change"):
        check_budget("one two, three", after, WordBudget(1.0))


def test_signs_go_with_words_that_are_added_or_deleted() -> None:
    budget = WordBudget(0.5, insertions=2)
    assert check_budget("one two, three", "zero: one two, three", budget)
    assert check_budget("one two, three", "one, three", budget)
    assert check_budget("one (two) three", "one three. Four!", budget)
    assert check_budget("5% off", "5% off at 1/2", WordBudget(0.0, insertions=3))
    assert check_budget("rose 5%", Words.of("rose 5%").with_inserted(2, ["again"]).text, budget)
    with pytest.raises(BudgetExceededError, match="brought in ' ☃☃☃☃☃ '"):
        check_budget("one two", "zero ☃☃☃☃☃ one two", budget)
    with pytest.raises(BudgetExceededError, match="brought in '☃'"):
        check_budget("one two three", "☃two three", budget)


def test_ranks_among_equals() -> None:
    scores = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert [rank_among(scores, d) for d in "abcd"] == [1, 3, 2, 4]
    assert rank_among(scores, "d", 2.0) == 2
    assert rank_among(scores, "a", 2.0) == 3
    assert scores["d"] == 1.0


def test_the_list_scores_afresh_and_keeps_the_others() -> None:
    docs = {"a": "w w w x", "b": "w w x y", "c": "x y x z", "d": "w x x x"}
    asked: list[str] = []

    def ranker(query: str, texts: Sequence[str]) -> list[float]:
        asked.extend(texts)
        return count(query, texts)

    found = attack_list(Writes("w w w z", WordBudget(0.75)), ranker, "w", docs, ["c", "d"], k=2)
    assert [(r.docno, r.rank, r.boost) for r in found] == [("c", (4, 1), 3), ("d", (3, 1), 2)]
    assert [r.score for r in found] == [(0.0, 3.0), (1.0, 3.0)]
    assert found[0].edits == (Edit(0, "x", "w"), Edit(1, "y", "w"), Edit(2, "x", "w"))
    assert found[0].n_queries == 3
    assert asked == [*docs.values(), "w w w z", "w w w z"]
    idle = attack_list(Writes(docs["c"], WordBudget(0.0)), count, "w", docs, ["c"])
    assert (idle[0].edits, idle[0].rank, idle[0].score) == ((), (4, 4), (0.0, 0.0))
    with pytest.raises(BudgetExceededError, match="changed 3 words of 2"):
        attack_list(Writes("w w w z", WordBudget(0.5)), count, "w", docs, ["c"])


def test_an_attack_sees_its_rivals_and_a_seed_of_its_own() -> None:
    seen: dict[str, Any] = {}

    class Looks(Writes):
        def __call__(
            self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
        ) -> tuple[str, int]:
            seen[doc] = (list(rivals), k, generator)
            return doc, 0

    docs = {"a": "w w", "b": "w", "c": "x"}
    look = Looks("", WordBudget())
    attack_list(look, count, "w", docs, ["a", "b", "c"], k=1, generator=5)
    assert seen["x"][:2] == ([2.0, 1.0], 1)
    alone = seen["x"]
    assert len({seed for *_, seed in seen.values()}) == 3
    attack_list(look, count, "w", docs, ["c"], k=1, generator=5)
    assert seen["x"] == alone


def test_wrong_lists_are_refused() -> None:
    attack, docs = Writes("", WordBudget()), {"a": "w", "b": "x"}
    with pytest.raises(ValueError, match="targets: 'z' is not among the 2"):
        attack_list(attack, count, "w", docs, ["z"])
    with pytest.raises(ValueError, match="scores: of 1 documents"):
        attack_list(attack, count, "w", docs, ["a"], scores={"a": 1.0})
    with pytest.raises(ValueError, match="k=0"):
        attack_list(attack, count, "w", docs, ["a"], k=0)
    with pytest.raises(TypeError, match="score\\(query, docs\\)"):
        attack_list(attack, 3, "w", docs, ["a"])
