"""Words of a text: whatever is replaced, all other letters and all borders stay where they were."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.text import Words, is_word

steady = settings(deadline=None, derandomize=True, max_examples=200)
texts = st.text(st.one_of(st.characters(), st.sampled_from("aB9'’-_. \t\n")), max_size=60)
words = st.from_regex(r"[a-zé0-9]{1,6}('[a-z]{1,2})?", fullmatch=True)


@pytest.mark.quick
@steady
@given(texts)
def test_any_text_comes_back_to_the_letter(text: str) -> None:
    found = Words.of(text)
    assert found.text == text
    assert len(found.gaps) == len(found) + 1
    assert [text[a:b] for a, b in found.spans] == list(found.surfaces)


@steady
@given(texts, st.data())
def test_replacing_words_never_moves_a_border(text: str, data: st.DataObject) -> None:
    found = Words.of(text)
    places = st.sets(st.integers(0, len(found) - 1)) if len(found) else st.just(set())
    edits = {place: data.draw(words) for place in data.draw(places)}
    changed = found.replaced(edits)
    again = Words.of(changed.text)
    assert again == changed
    assert again.gaps == found.gaps
    for place, (old, new) in enumerate(zip(found.words, again.words, strict=True)):
        assert new == edits.get(place, old)


@steady
@given(texts)
def test_every_word_may_be_replaced_by_itself(text: str) -> None:
    found = Words.of(text)
    assert found.replaced(dict(enumerate(found.words))) == found


def test_a_word_that_falls_apart_in_lower_case_is_kept() -> None:
    found = Words.of("İzmir")  # its lower case is i and a combining dot: two pieces
    assert found.words == ("İzmir",)
    assert found.replaced({0: "İzmir"}) == found
    assert Words.of("İzmir").replaced({0: "troy"}).text == "Troy"


def test_capitals_are_handed_on() -> None:
    found = Words.of("NASA's Wing, a slip-stream; I agree")
    assert found.replaced({0: "esa's", 1: "foil", 2: "the", 5: "we"}).text == "Esa's Foil, the slip-stream; We agree"
    assert found.replaced({1: "wing"}) == found
    assert Words.of("NASA, I").replaced({0: "esa", 1: "we"}).text == "ESA, We"
    assert Words.of("Big").replaced({0: "ßa"}).text == "ßa"  # its capital would be two letters
    assert found.lowered([None, "foil", None, None, None, None, None]) == "NASA's foil, a slip-stream; I agree"


def test_words_and_what_is_none() -> None:
    assert Words.of("don’t stop_here: 3.5%").words == ("don’t", "stop", "here", "3", "5")
    assert Words.of("").gaps == ("",)
    assert is_word("rock'n'roll")
    assert not any(map(is_word, ["", "Two", "two words", "'s", "a_b", "x'", *string.punctuation]))


@pytest.mark.parametrize("bad", ["Two", "two words", "", "a-b"])
def test_a_replacement_is_one_word_in_lower_case(bad: str) -> None:
    with pytest.raises(ValueError, match=r"edits\[0\]"):
        Words.of("a b").replaced({0: bad})
    with pytest.raises(IndexError, match="position 2 of a text of 2"):
        Words.of("a b").replaced({2: "c"})
    with pytest.raises(IndexError, match="position -1"):
        Words.of("a b").replaced({-1: "c"})
