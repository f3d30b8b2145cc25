"""BM25 is bm25s's, on free texts too; scores that make no ranking are refused."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ir_robust.collection import Collection, load_collection
from ir_robust.measures import per_query
from ir_robust.rankers import BM25Index, BM25Ranker
from ir_robust.rankers.base import CallableRanker, Ranker, Vocabulary, as_ranker, candidates, rerank, scores_of

DOCS = {
    "1": "The wing in a slipstream: lift of the wing, drag of the wing.",
    "2": "Heat transfer in a laminar boundary layer.",
    "3": "A boundary layer on a wing.",
    "4": "",
}
QUERIES = {"q": "lift of a wing", "r": "boundary layer boundary heat", "none": "zebra"}


@pytest.mark.quick
@pytest.mark.parametrize("settings", [{}, {"k1": 0.9, "b": 0.4}, {"k1": 0.0}, {"b": 1.0, "stopwords": None}])
def test_scores_of_free_texts_are_those_of_the_index(settings: dict[str, Any]) -> None:
    index = BM25Index(DOCS, **settings)
    for query in QUERIES.values():
        found = BM25Ranker(index).score(query, list(DOCS.values()))
        np.testing.assert_allclose(found, index.scores(query), rtol=1e-6, atol=1e-7)


def test_repetition_saturates_at_the_idf() -> None:
    index = BM25Index(DOCS)
    ranker = BM25Ranker(index)
    scores = [float(ranker.score("lift", ["lift " * n])[0]) for n in (1, 10, 100, 10_000)]
    assert scores == sorted(scores)
    limit = index.idf["lift"] / (1 + index.k1 * index.b / index.mean_length)  # both tf and length grow
    assert scores[-1] == pytest.approx(limit, rel=1e-3)
    flat = BM25Ranker(BM25Index(DOCS, b=0.0))
    assert float(flat.score("lift", ["lift " * 100_000])[0]) == pytest.approx(flat.index.idf["lift"], rel=1e-4)


def test_retrieval_orders_equals_by_falling_number_and_hides_what_is_hidden() -> None:
    data = Collection(DOCS, QUERIES, hidden={"q": frozenset({"1"})})
    steps: list[tuple[str, int, int]] = []
    run = BM25Index(DOCS).retrieve(data, depth=3, on_step=lambda *step: steps.append(step))
    assert list(run["none"]) == ["4", "3", "2"]
    assert list(run["q"]) == ["3", "4", "2"]
    assert steps == [("retrieve", i, 3) for i in (1, 2, 3)]
    assert list(BM25Index(DOCS).retrieve(data, depth=1)["r"]) == ["2"]


def test_wrong_settings_and_empty_corpora() -> None:
    with pytest.raises(ValueError, match="k1=-1"):
        BM25Index(DOCS, k1=-1.0)
    with pytest.raises(ValueError, match=r"b=1\.5"):
        BM25Index(DOCS, b=1.5)
    with pytest.raises(ValueError, match="docs"):
        BM25Index({})
    with pytest.raises(ValueError, match="no word"):
        BM25Index({"1": "", "2": "the"})
    with pytest.raises(ValueError, match="depth"):
        BM25Index(DOCS).retrieve(Collection(DOCS, QUERIES), depth=0)


def test_the_measured_reference_on_lee() -> None:
    data = load_collection("lee")
    index = BM25Index(data.docs)
    run = index.retrieve(data)
    values = np.array(list(per_query(run, data.qrels, ["nDCG@10"])["nDCG@10"].values()))
    assert values.mean() == pytest.approx(0.589, abs=5e-4)
    assert values.var() == pytest.approx(0.050, abs=5e-4)
    again = rerank(BM25Ranker(index), data, run)
    assert per_query(again, data.qrels, ["nDCG@10"])["nDCG@10"] == pytest.approx(dict(zip(run, values, strict=True)))


@pytest.mark.quick
def test_anything_that_scores_is_a_ranker() -> None:
    def lengths(query: str, docs: Sequence[str]) -> list[int]:
        return [len(doc) for doc in docs]

    assert isinstance(as_ranker(lengths), CallableRanker)
    ranker = BM25Ranker(BM25Index(DOCS))
    assert as_ranker(ranker) is ranker
    assert isinstance(ranker, Ranker)
    with pytest.raises(TypeError, match="ranker is int"):
        as_ranker(7)
    tensors = CallableRanker(lambda query, docs: torch.ones(len(docs), dtype=torch.bfloat16, requires_grad=True) * 2)
    assert scores_of(tensors, "", ["a", "b", "c"], batch_size=2).tolist() == [2.0, 2.0, 2.0]
    assert scores_of(as_ranker(lengths), "", []).shape == (0,)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda docs: [1.0], "shape \\(1,\\) for 2 documents"),
        (lambda docs: np.zeros((2, 1)), "shape \\(2, 1\\)"),
        (lambda docs: [0.0, float("nan")], "document 1 is nan.*begins 'b'"),
        (lambda docs: torch.tensor([float("inf"), 0.0]), "document 0 is inf"),
    ],
)
def test_scores_that_make_no_ranking_are_refused(scores: Callable[[Sequence[str]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores_of(CallableRanker(lambda query, docs: scores(docs)), "", ["a", "b"])
    with pytest.raises(ValueError, match="batch_size"):
        scores_of(CallableRanker(lambda query, docs: scores(docs)), "", ["a", "b"], batch_size=0)


def test_candidates_are_checked_and_cut() -> None:
    data = Collection(DOCS, QUERIES, hidden={"q": frozenset({"2"})})
    run = {"q": {"1": 1.0, "2": 3.0, "3": 1.0}}
    assert candidates(run, data) == {"q": ["3", "1"]}
    assert candidates(run, data, 1) == {"q": ["3"]}
    with pytest.raises(ValueError, match="1 queries are not in the collection, 'z' first"):
        candidates({"z": {}}, data)
    with pytest.raises(ValueError, match="query 'q' ranks document '9'"):
        candidates({"q": {"9": 1.0}}, data)
    steps: list[tuple[str, int, int]] = []
    found = rerank(
        lambda query, docs: [len(doc) for doc in docs], data, run, depth=2, on_step=lambda *s: steps.append(s)
    )
    assert found == {"q": {"3": 27.0, "1": 61.0}}
    assert steps == [("rank", 1, 1)]


def test_vocabularies_number_words() -> None:
    known = Vocabulary(["wing", "lift", "wing"])
    assert len(known) == 4
    assert known.ids(["lift", "zebra", "wing"]) == [3, Vocabulary.UNKNOWN, 2]
    assert "wing" in known
    assert "zebra" not in known
