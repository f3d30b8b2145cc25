"""Tables: the overlap bound holds for any sets, and is attained where sizes are equal."""

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ir_robust.attacks.base import WordBudget
from ir_robust.synonyms import SynonymGraph
from ir_robust.tables import PerturbationTable, budget_words, deviation

CHAIN = SynonymGraph.from_pairs([("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")])
"""One component of five words in a row."""


def exact_distance(old: tuple[str, ...], new: tuple[str, ...], table: PerturbationTable) -> Fraction:
    """Return the total variation of the noise of two documents, by going through every noisy document."""
    draws = [[dict.fromkeys(table.support(w), Fraction(1, len(table.support(w)))) for w in doc] for doc in (old, new)]
    common = Fraction(0)
    for z in itertools.product(*(sorted({*a, *b}) for a, b in zip(*draws, strict=True))):
        weights = [math.prod(row.get(w, Fraction(0)) for row, w in zip(side, z, strict=True)) for side in draws]
        common += min(weights)
    return 1 - common


def random_table(numbers: list[int], cap: int) -> PerturbationTable:
    """Return a table on five words whose larger components get sets of *unequal* sizes."""
    words = [f"w{i}" for i in range(5)]
    pairs = list(itertools.combinations(words, 2))
    chosen = [pair for pair, number in zip(pairs, numbers, strict=True) if number % 2]
    graph, supports = SynonymGraph.from_pairs(chosen), {}
    for i, word in enumerate(words):
        others = [other for other in graph.component(word) if other != word]
        supports[word] = [word, *others[: numbers[i] % (len(others) + 1)]]
    return PerturbationTable(graph, cap, supports=supports)


@pytest.mark.quick
@given(numbers=st.lists(st.integers(0, 9), min_size=10, max_size=10), cap=st.integers(1, 5), size=st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_the_distance_never_exceeds_the_overlaps(numbers: list[int], cap: int, size: int) -> None:
    table = random_table(numbers, cap)
    old = tuple(f"w{i}" for i in range(size))
    for new in itertools.product(*((word, *table.substitutes(word)) for word in old)):
        bound = 1.0 - math.prod(table.overlap(a, b) for a, b in zip(old, new, strict=True))
        assert float(exact_distance(old, new, table)) <= bound + 1e-12


def test_the_own_size_in_the_denominator_would_be_unsound() -> None:
    graph = SynonymGraph.from_pairs([("a", "b"), ("b", "c")])
    table = PerturbationTable(graph, supports={"a": ["a", "b"], "b": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"supports\['a'\]"):
        PerturbationTable(graph, supports={"a": []})
    distance = exact_distance(("a",), ("b",), table)
    assert distance == Fraction(1, 3)
    assert table.overlap("a", "b") == pytest.approx(2 / 3)
    assert distance > 1 - Fraction(2, 2)  # |P_a & P_b| / |P_a|


def test_large_components_draw_from_the_nearest_words() -> None:
    table = PerturbationTable(CHAIN, cap=3)
    assert table.support("a") == ("a", "b", "c")
    assert table.support("c") == ("b", "c", "d")
    assert table.support("alone") == ("alone",)
    assert table.overlap("a", "b") == 1.0  # b's nearest are a and c
    assert table.overlap("b", "c") == pytest.approx(2 / 3)
    assert table.least_overlap("c") == pytest.approx(2 / 3)
    far = PerturbationTable(CHAIN, cap=2, similarity=lambda word, others: [ord(o) for o in others])
    assert far.support("a") == ("a", "e")
    with pytest.raises(ValueError, match="similarity: one number for each of 4"):
        PerturbationTable(CHAIN, cap=2, similarity=lambda word, others: [1.0]).support("a")


def test_whole_components_leave_nothing_to_attack() -> None:
    table = PerturbationTable(CHAIN, cap=5)
    assert {table.support(word) for word in "abcde"} == {tuple("abcde")}
    assert table.deviation(list("abcde") * 10) == 0.0


def test_a_cap_of_one_is_no_smoothing() -> None:
    table = PerturbationTable(CHAIN, cap=1)
    assert table.support("b") == ("b",)
    assert table.least_overlap("b") == 0.0
    assert table.deviation(["x", "b"]) == 1.0
    assert table.deviation(["x", "y"]) == 0.0  # nothing that could be attacked


def test_the_budget_takes_the_worst_words() -> None:
    table = PerturbationTable(CHAIN, cap=3)
    words = ["c", "x", "c", "a", "c"]
    q = table.least_overlap("c")
    for budget, changed in ((0, 0), (1, 1), (0.4, 2), (0.39, 1), (WordBudget(1.0, most=2), 2), (None, 3), (0.0, 0)):
        expected = 1 - q**changed
        found = table.deviation(words, budget)
        assert expected <= found <= expected + 1e-12 or (found == expected == 0)
    assert table.deviation(words, 0) == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_more_budget_never_means_less_deviation(a: float, b: float, length: int) -> None:
    table = PerturbationTable(CHAIN, cap=2)
    words = [("abcdex"[i % 6]) for i in range(length)]
    low, high = sorted((a, b))
    assert deviation(words, table, low) <= deviation(words, table, high) <= 1.0


def test_attacks_beyond_their_component_are_refused() -> None:
    graph = SynonymGraph.from_pairs([("a", "b"), ("x", "y")])
    with pytest.raises(ValueError, match="'a' may become 'x'"):
        PerturbationTable(graph, attack={"a": ["x"]})
    with pytest.raises(ValueError, match="another component"):
        PerturbationTable(graph, attack={"new": ["a"]})
    assert PerturbationTable(CHAIN, attack={"a": ["e", "a"]}).substitutes("a") == ("e",)
    with pytest.raises(ValueError, match="cap=0"):
        PerturbationTable(graph, 0)


def test_budgets_that_no_certificate_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="insertions"):
        budget_words(9, WordBudget(0.1, insertions=1))
    with pytest.raises(ValueError, match=r"budget=1\.5"):
        budget_words(9, 1.5)
    with pytest.raises(ValueError, match="budget=-1"):
        budget_words(9, -1)
    assert budget_words(9, 20) == 9


def test_the_report_tells_before_anything_is_drawn() -> None:
    report = PerturbationTable(CHAIN, cap=3).report(["a x", "x y", "c c"])
    assert (report.words, report.largest, report.cap, report.loose) == (5, 5, 3, 3)
    assert report.replaceable == pytest.approx(0.5)
    assert report.free == pytest.approx(2 / 3)
    assert "largest component 5" in str(report)


def test_hashes_know_sets_and_attacks() -> None:
    hashes = {
        PerturbationTable(CHAIN, cap=cap, attack=attack).sha256 for cap in (3, 5) for attack in (None, {"a": ["b"]})
    }
    assert len(hashes) == 4
    assert PerturbationTable(CHAIN).sha256 == PerturbationTable(CHAIN).sha256
