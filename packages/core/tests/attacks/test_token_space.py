# pyright: reportArgumentType=false
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.attacks.tokens import TokenSpace, count_texts, insert_slots, stack_tokens

TOKENS = 7


@st.composite
def spaces(draw):
    """Two texts with a list of candidates for each place, as plain lists beside the space."""
    texts = draw(st.lists(st.lists(st.integers(0, TOKENS - 1), min_size=4, max_size=4), min_size=2, max_size=2))
    lists = st.lists(st.integers(0, TOKENS - 1), max_size=4, unique=True)
    choices = draw(st.lists(st.lists(lists, min_size=4, max_size=4), min_size=2, max_size=2))
    budgets = draw(st.lists(st.integers(0, 4), min_size=2, max_size=2))
    space = TokenSpace.lists(torch.tensor(texts), choices, budget=torch.tensor(budgets))
    return texts, choices, budgets, space


def all_texts(text, choices, budget):
    """By brute force: every text that may be written."""
    options = [sorted({own, *extra}) for own, extra in zip(text, choices, strict=True)]
    return [new for new in product(*options) if sum(a != b for a, b in zip(new, text, strict=True)) <= budget]


@given(spaces())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_membership_and_counts_are_those_of_brute_force(case):
    texts, choices, budgets, space = case
    every = torch.cartesian_prod(*[torch.arange(TOKENS)] * 4)
    for row in range(2):
        allowed = set(all_texts(texts[row], choices[row], budgets[row]))
        inside = space.contains(torch.full((len(every),), row), every)
        assert {tuple(ids) for ids in every[inside].tolist()} == allowed
        assert count_texts(space)[row] == len(allowed)


@given(spaces())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_alternatives_are_the_candidates_without_the_original(case):
    texts, choices, _, space = case
    for row in range(2):
        found = {}
        for slot, place in enumerate(space.where[row].tolist()):
            n = int(space.n_alternatives[row, slot])
            line = torch.full((n,), row)
            found[place] = space.alternative(line, torch.full((n,), place), torch.arange(n)).tolist()
        found.pop(-1, None)
        expected = {t: [c for c in choices[row][t] if c != texts[row][t]] for t in range(4)}
        assert found == {place: tokens for place, tokens in expected.items() if tokens}
    part = space.rows(torch.tensor([1]))
    assert torch.equal(part.n_alternatives, space.n_alternatives[1:])
    assert torch.equal(part.where, space.where[1:])


@pytest.mark.quick
def test_three_ways_to_say_the_same():
    ids = torch.tensor([[0, 1, 2, 5]])
    editable = torch.tensor([[False, True, True, False]])
    whole = TokenSpace.vocabulary(ids, editable, 6, banned=[0, 5], budget=1)
    table = torch.tensor([[1, 2, 3, 4]] * 6)
    rows = TokenSpace.substitutes(ids, table, editable=editable, budget=1)
    lists = TokenSpace.lists(ids, [[[], [1, 2, 3, 4], [1, 2, 3, 4]]], budget=1)
    every = torch.cartesian_prod(*[torch.arange(6)] * 4)
    row = torch.zeros(len(every), dtype=torch.int64)
    assert count_texts(whole) == count_texts(rows) == count_texts(lists) == [1 + 3 + 3]
    assert torch.equal(whole.contains(row, every), rows.contains(row, every))
    assert torch.equal(whole.contains(row, every), lists.contains(row, every))
    assert TokenSpace.vocabulary(ids, editable, 6, allowed=torch.tensor([3])).table.tolist() == [[3]]


@pytest.mark.parametrize("position", ["prefix", "suffix", "middle", "spread"])
@pytest.mark.parametrize("k", [1, 3])
def test_new_places_leave_the_text_in_order(position, k):
    ids, lengths = stack_tokens([[1, 10, 11, 12, 13, 2], [1, 20, 2]], fill=2)
    ids = torch.cat([ids, torch.full((2, 4), 2)], 1)
    longer, editable = insert_slots(ids, k, position, fill=9, start=1, end=lengths - 1, length=10)
    assert longer.shape == (2, 10)
    assert editable.sum(1).tolist() == [k, k]
    assert (longer[editable] == 9).all()
    for row in range(2):
        rest = longer[row][~editable[row]]
        assert torch.equal(rest, ids[row, : len(rest)])
        assert not editable[row, 0]  # the mark before the text stays in front
    places = editable[0].nonzero()[:, 0].tolist()
    expected = {
        ("prefix", 1): [1],
        ("prefix", 3): [1, 2, 3],
        ("suffix", 1): [5],
        ("suffix", 3): [5, 6, 7],
        ("middle", 1): [3],
        ("middle", 3): [3, 4, 5],
        ("spread", 1): [3],
        ("spread", 3): [2, 4, 6],
    }
    assert places == expected[position, k]


def test_replacing_marks_the_text_itself():
    ids = torch.tensor([[1, 10, 11, 2], [1, 20, 2, 2]])
    same, editable = insert_slots(ids, 1, "replace", fill=9, start=1, end=torch.tensor([3, 2]))
    assert torch.equal(same, ids)
    assert editable.tolist() == [[False, True, False, False]] * 2
    with pytest.raises(ValueError, match="k=2"):
        insert_slots(ids, 2, "replace", fill=9, start=1, end=torch.tensor([3, 2]))


def test_texts_that_do_not_fit_are_refused():
    ids = torch.tensor([[1, 10, 11, 2, 2]])
    assert insert_slots(ids, 1, fill=9, start=1, end=3, length=5).ids.tolist() == [[1, 9, 10, 11, 2]]
    with pytest.raises(ValueError, match="length=5: a text needs 6"):
        insert_slots(ids, 2, fill=9, start=1, end=3, length=5)


IDS = torch.tensor([[0, 1, 2]])
EDIT = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: TokenSpace.vocabulary(IDS.float(), EDIT, 4), TypeError, "int64"),
        (lambda: TokenSpace.vocabulary(IDS[0], EDIT[0], 4), ValueError, "shape"),
        (lambda: TokenSpace.vocabulary(IDS[:0], EDIT[:0], 4), ValueError, "non-empty"),
        (lambda: TokenSpace.vocabulary(IDS - 1, EDIT, 4), ValueError, "start at 0"),
        (lambda: TokenSpace.vocabulary(IDS, EDIT.long(), 4), ValueError, "bool"),
        (lambda: TokenSpace.vocabulary(IDS, EDIT, 4, banned=[4]), ValueError, "banned"),
        (lambda: TokenSpace.vocabulary(IDS, EDIT, 4, banned=range(4)), ValueError, "no token is left"),
        (lambda: TokenSpace.vocabulary(IDS, EDIT, 4, budget=-1), ValueError, "budget"),
        (lambda: TokenSpace.vocabulary(IDS, EDIT, 4, budget=torch.tensor([1, 2])), ValueError, "budget"),
        (lambda: TokenSpace.substitutes(IDS, torch.tensor([[1, 1]] * 3)), ValueError, "repeats"),
        (lambda: TokenSpace.substitutes(IDS, torch.tensor([[-1, 1]] * 3)), ValueError, "-1 before"),
        (lambda: TokenSpace.substitutes(IDS, torch.tensor([[1, -1]] * 2)), ValueError, "row for each"),
        (lambda: TokenSpace(IDS, IDS, torch.tensor([[1]])), ValueError, "slots"),
        (lambda: TokenSpace.lists(IDS, [[], []]), ValueError, "texts"),
        (lambda: insert_slots(IDS, 1, "after", fill=0), ValueError, "position"),
        (lambda: insert_slots(IDS, 1, fill=0, start=2, end=1), ValueError, "start"),
        (lambda: insert_slots(IDS, 1, fill=0, length=9), ValueError, "fill them up"),
        (lambda: stack_tokens([], 0), ValueError, "empty"),
    ],
)
def test_bad_spaces_are_one_clear_error(build, error, says):
    with pytest.raises(error, match=says):
        build()
