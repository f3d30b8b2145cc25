"""Variations of queries: what must change changes, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.perturb import (
    Compose,
    DropWords,
    Paraphrase,
    RemoveStopWords,
    Rewrite,
    Shuffle,
    Synonyms,
    Typos,
    operator,
    sampled,
    typos_of,
    worst_of,
)
from ir_robust.perturb.query import KEYBOARD, TYPOS
from ir_robust.text import Words

QUERY = "What are the effects of Large swept wings, in order to reduce drag?"
TABLE = {"large": ["big", "huge"], "drag": ["resistance"], "wings": ["wings", "no word"]}
OPERATORS = [Typos(2), Synonyms(TABLE, 2), DropWords(2), Shuffle(), RemoveStopWords(), Paraphrase(2)]
texts = st.lists(
    st.sampled_from("a of Drag wing-tip swept BOUNDARY layer's flow x2 über naïve 1957".split()), max_size=9
)
seeds = st.integers(0, 2**40)


def different(a: str, b: str) -> int:
    """Words that differ between two texts of as many words."""
    return sum(x != y for x, y in zip(Words.of(a).surfaces, Words.of(b).surfaces, strict=True))


def edit_distance(a: str, b: str) -> int:
    """Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours."""
    d = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
    return d[len(a), len(b)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", TYPOS)
@pytest.mark.parametrize("word", ["wing", "aaaa", "boundary", "naïve"])
def test_a_typo_is_one_edit_that_spares_the_first_letter(kind, word):
    found = typos_of(word, kind)
    assert len(set(found)) == len(found)
    for other in found:
        assert other[0] == word[0]
        assert other != word
        assert edit_distance(word, other) == 1
        assert len(other) - len(word) == {"delete": -1, "insert": 1}.get(kind, 0)
    if kind == "keyboard":
        changed = [(a, b) for other in found for a, b in zip(word, other, strict=True) if a != b]
        assert all(b in KEYBOARD[a] for a, b in changed)


def test_all_swaps_and_deletions_are_found():
    assert set(typos_of("wing", "swap")) == {"wnig", "wign"}
    assert set(typos_of("wing", "delete")) == {"wng", "wig", "win"}
    assert typos_of("aaaa", "swap") == ()
    assert len(typos_of("wing", "insert")) == len({"wing"[:i] + c + "wing"[i:] for i in (1, 2, 3, 4) for c in KEYBOARD})
    assert typos_of("fly", "delete") == ()
    assert typos_of("don't", "delete") == ()
    assert typos_of("1957", "swap") == ()


def test_neighbours_on_the_keyboard_are_mutual():
    assert all(a in KEYBOARD[b] for a, near in KEYBOARD.items() for b in near)
    assert set(KEYBOARD["g"]) == set("fhtyvb")
    assert set(KEYBOARD["q"]) == set("wa")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(words=texts, n=st.integers(0, 6), seed=seeds)
def test_exactly_n_words_are_mistyped(words, n, seed):
    query = " ".join(words)
    able = [w for w in Words.of(query).words if any(typos_of(w, kind) for kind in TYPOS)]
    found = Typos(n)(query, seed)
    assert different(query, found) == min(n, len(able))
    assert found == Typos(n)(query, seed)
    assert Words.of(found).gaps == Words.of(query).gaps


@pytest.mark.parametrize("op", [Typos(0), Synonyms(TABLE, 0), DropWords(0), Paraphrase(0)], ids=lambda op: op.name)
def test_nothing_asked_is_nothing_done(op):
    assert op(QUERY, 3) == QUERY


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
@pytest.mark.parametrize("query", ["", "?!", "drag"])
def test_what_cannot_be_changed_stays(op, query):
    found = op(query, 1)
    assert found == query if len(Words.of(query)) == 0 else len(Words.of(found)) == 1


def test_words_are_dropped_and_one_always_stays():
    assert len(Words.of(DropWords(3)(QUERY, 5))) == len(Words.of(QUERY)) - 3
    assert len(Words.of(DropWords(99)(QUERY, 5))) == 1


def test_stop_words_go_and_a_query_of_nothing_else_stays():
    assert Words.of(RemoveStopWords()("What is the drag of a wing?")).words == ("what", "drag", "wing")
    assert RemoveStopWords()("of the") == "of the"


@settings(deadline=None, derandomize=True, max_examples=25)
@given(words=texts, seed=seeds)
def test_a_shuffle_keeps_the_words_and_moves_some(words, seed):
    query = ", ".join(words)
    before, after = Words.of(query), Words.of(Shuffle()(query, seed))
    assert sorted(before.surfaces) == sorted(after.surfaces)
    assert before.gaps == after.gaps
    assert len(set(before.surfaces)) < 2 or before.surfaces != after.surfaces


def test_synonyms_come_from_the_table_with_the_capitals_of_the_word():
    found = Synonyms(TABLE, 9)(QUERY, 0)
    assert different(QUERY, found) == 2
    assert "resistance" in found
    assert "Big" in found or "Huge" in found


def test_rules_reword_and_each_is_used_once():
    assert Paraphrase()("What is the drag of wings?", 0) in {"drag of wings", "What is the wings drag?"}
    assert Paraphrase(9)("lift and drag", 4) == "drag and lift"
    assert Paraphrase(2, rules=((r"\bdrag\b", ""),))("drag", 0) == "drag"


def test_a_function_of_the_user_is_an_operator():
    assert operator(str.upper)("drag", 1) == "DRAG"
    drawn = Rewrite(lambda query, seed: f"{query} {seed}")
    assert drawn("drag", 7) == "drag 7"
    with pytest.raises(TypeError, match="gave int"):
        operator(len)("drag", 1)
    with pytest.raises(TypeError, match="cannot be called"):
        operator(3)


def test_operators_one_after_another_draw_apart():
    both = Compose((Typos(1), Typos(1)))
    assert both.name == "1 typo + 1 typo"
    assert both(QUERY, 1) == both(QUERY, 1)
    assert {different(QUERY, both(QUERY, seed)) for seed in range(20)} == {1, 2}


def test_a_query_has_draws_of_its_own():
    op = Typos(1)
    draws = sampled(op, "7", QUERY, 5, generator=1)
    assert draws == sampled(op, "7", QUERY, 9, generator=1)[:5]
    assert len(set(draws)) > 1
    assert draws != sampled(op, "8", QUERY, 5, generator=1)


def test_the_worst_variation_is_taken_or_none_where_all_help():
    value = lambda text: float(different(QUERY, text) == 0)  # noqa: E731
    text, worth, asked = worst_of(Typos(1), QUERY, value, m=4, generator=0)
    assert worth == 0
    assert text != QUERY
    assert asked <= 5
    assert worst_of(Typos(1), QUERY, lambda text: 1 - value(text), m=4)[0] == QUERY


@pytest.mark.parametrize(
    "make",
    [
        lambda: Typos(-1),
        lambda: Typos(1, ()),
        lambda: Typos(1, ("flip",)),
        lambda: DropWords(-1),
        lambda: Paraphrase(-2),
    ],
)
def test_settings_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match=r"is needed|choose one"):
        make()
