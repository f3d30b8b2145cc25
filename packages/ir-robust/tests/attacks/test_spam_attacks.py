"""Spam: what goes in, what the budget is, and what BM25's saturation leaves of it."""

from __future__ import annotations

import numpy as np
import pytest

from ir_robust.attacks import WordBudget, attack_list
from ir_robust.attacks.spam import Deletion, SentenceInjection, TermSpamming, relevant_sentences
from ir_robust.collection import Collection
from ir_robust.perturb import delete_words, insert_sentence, sentences_of, spam_terms
from ir_robust.rankers import BM25Index, BM25Ranker
from ir_robust.text import Words
from robust_core.errors import BudgetExceededError

DOC = "The boundary layer grows. It separates, at the rear; so drag rises!"
DOCS = {
    "a": "Drag of a swept wing at high speed, and the drag of its tips.",
    "b": DOC,
    "c": "A shock stands before the blunt body. Heat goes into the wing.",
    "d": "Panels flutter. Nothing else is known of them here.",
}
QUERY = "drag of a swept wing"


def ranker(b: float = 0.75) -> BM25Ranker:
    return BM25Ranker(BM25Index(DOCS, b=b))


@pytest.mark.quick
def test_terms_stand_where_they_were_put():
    assert spam_terms(DOC, ["wing", "drag"]) == f"wing drag {DOC}"
    assert spam_terms(DOC, ["wing", "drag"], "tail") == f"{DOC} wing drag"
    mixed = spam_terms(DOC, ["wing", "wing", "drag"], "random", generator=3)
    words, left = Words.of(mixed).words, list(Words.of(DOC).words)
    assert len(words) == len(left) + 3
    assert sorted(words) == sorted([*left, "wing", "wing", "drag"])
    assert spam_terms("", ["wing"]) == "wing"
    assert spam_terms(DOC, []) == DOC


def test_sentences_are_split_put_in_and_put_together_again():
    assert sentences_of("One is. Two? - !! Three") == ["One is.", "Two? - !!", "Three"]
    assert " ".join(sentences_of(DOC)) == DOC
    assert insert_sentence(DOC, "Wings are swept.") == f"Wings are swept. {DOC}"
    assert insert_sentence(DOC, "Wings are swept.", "tail") == f"{DOC} Wings are swept."
    places = {insert_sentence(DOC, "Wings are swept.", "random", generator=seed) for seed in range(20)}
    assert len(places) == 3
    assert any("grows. Wings are swept. It" in text for text in places)
    assert delete_words(DOC, [1, 2]) == "The grows. It separates, at the rear; so drag rises!"


def test_a_repeated_term_adds_no_more_than_its_saturation():
    """tf / (tf + k1 (1 - b + b |d| / avgdl)): to 1 where length does not count, else to 1 / (1 + k1 b / avgdl)."""
    for b in (0.0, 0.75):
        judge = ranker(b)
        index = judge.index
        limit = index.idf["wing"] / (1 + index.k1 * b / index.mean_length)
        scores = [float(judge.score("wing", [spam_terms("", ["wing"] * r)])[0]) for r in (1, 10, 1000, 100_000)]
        assert all(np.diff(scores) > 0)
        assert scores[-1] < limit + 1e-12
        np.testing.assert_allclose(scores[-1], limit, rtol=2e-4)
        assert limit <= index.idf["wing"] * (index.k1 + 1)  # the textbook's form has this factor more


def test_edits_of_a_query_leave_documents_without_its_words_alone():
    judge = ranker()
    before, after = judge.score("drag of wing", list(DOCS.values())), judge.score("drsg of wing", list(DOCS.values()))
    without = np.array(["drag" not in Words.of(doc).words for doc in DOCS.values()])
    np.testing.assert_array_equal(before[without], after[without])
    assert (before[~without] > after[~without]).all()


@pytest.mark.parametrize("place", ["head", "tail", "random", "best"])
def test_spam_climbs_within_its_budget(place):
    attack = TermSpamming(WordBudget(share=0.0, insertions=4), place=place)
    (found,) = attack_list(attack, ranker(), QUERY, DOCS, ["d"], k=1)
    assert found.boost > 0
    assert len(found.edits) == 4
    assert not any(edit.old for edit in found.edits)
    assert found.n_queries == (4 if place == "best" else 0)


def test_spam_is_bounded_by_times_and_budget():
    many = WordBudget(share=0.0, insertions=100)
    text, _ = TermSpamming(many, times=2)(ranker(), "swept wing", DOC, np.zeros(0), 1)
    assert text == f"swept wing swept wing {DOC}"
    plain, _ = TermSpamming(many, times=1, stop_words=frozenset({"of", "a"}))(ranker(), QUERY, DOC, np.zeros(0), 1)
    assert plain == f"drag swept wing {DOC}"
    assert TermSpamming(WordBudget(share=0.5))(ranker(), QUERY, DOC, np.zeros(0), 1) == (DOC, 0)
    with pytest.raises(BudgetExceededError):
        attack_list(_Greedy(), ranker(), QUERY, DOCS, ["d"])


class _Greedy:
    budget = WordBudget(share=0.0, insertions=2)

    def __call__(self, ranker, query, doc, rivals, k, *, generator=None):
        return spam_terms(doc, ["wing"] * 3), 0


def test_a_sentence_of_a_relevant_document_goes_in_if_it_fits_and_helps():
    data = Collection(DOCS, {"1": QUERY}, {"1": {"a": 1}})
    known = relevant_sentences(data)
    assert known == {QUERY: ["Drag of a swept wing at high speed, and the drag of its tips."]}
    attack = SentenceInjection(known, WordBudget(share=0.0, insertions=14))
    (found,) = attack_list(attack, ranker(), QUERY, DOCS, ["d"], k=1)
    assert found.text.startswith("Drag of a swept wing")
    assert found.boost > 0
    assert found.n_queries == 2
    short = SentenceInjection(known, WordBudget(share=0.0, insertions=5))
    assert short(ranker(), QUERY, DOC, np.zeros(0), 1) == (DOC, 0)
    worse = SentenceInjection(lambda query: ["Panels flutter."])
    assert worse(ranker(), QUERY, DOCS["a"], np.zeros(0), 1)[0] == DOCS["a"]


def test_deletion_takes_the_words_that_cost_most():
    per_word = {"flutter": -5.0, "known": -3.0, "nothing": 2.0}
    judge = lambda query, docs: [sum(per_word.get(w, 0.0) for w in Words.of(d).words) for d in docs]  # noqa: E731
    docs = {"d": DOCS["d"], "e": "other"}
    (one,) = attack_list(Deletion(WordBudget(share=0.12)), judge, "panels", docs, ["d"])
    assert [edit.old for edit in one.edits] == ["flutter"]
    (more,) = attack_list(Deletion(WordBudget(share=1.0)), judge, "panels", docs, ["d"])
    assert more.score[1] == 2.0
    assert {"panels", "nothing"} <= set(Words.of(more.text).words)


def test_words_added_before_a_capital_are_counted_as_added():
    attack = TermSpamming(WordBudget(share=0.0, insertions=2))
    (found,) = attack_list(attack, ranker(), "the wing", DOCS, ["b"])
    assert sorted(edit.new for edit in found.edits) == ["the", "wing"]
