"""Features by hand, and both baselines where they must succeed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.rankers import BM25Index, training_pairs
from ir_robust.rankers.ltr import FEATURES, LambdaMART, RankSVM, features_of
from ir_robust.rankers.training import Pairs

DOCS = {"a": "wing wing flow", "b": "heat shock layer", "c": "wing heat drag lift plate", "d": "flow"}
INDEX = BM25Index(DOCS)


def column(table: np.ndarray, name: str) -> list[float]:
    return table[:, FEATURES.index(name)].tolist()


@pytest.mark.quick
def test_features_by_hand() -> None:
    found = features_of(INDEX, "wing wing heat absent", list(DOCS.values()))
    wing = heat = math.log(1 + (4 - 2 + 0.5) / 2.5)
    assert column(found, "sum_tf") == [4, 1, 3, 0]
    assert column(found, "sum_log_tf") == pytest.approx([2 * math.log(3), math.log(2), 3 * math.log(2), 0])
    assert column(found, "sum_tf_idf") == pytest.approx([4 * wing, heat, 2 * wing + heat, 0])
    assert column(found, "max_tf_idf") == pytest.approx([2 * wing, heat, wing, 0])
    assert column(found, "sum_idf_matched") == pytest.approx([2 * wing, heat, 2 * wing + heat, 0])
    assert column(found, "share_matched") == pytest.approx([2 / 3, 1 / 3, 1, 0])
    assert column(found, "share_idf_matched") == pytest.approx([2 / 3, 1 / 3, 1, 0])
    assert column(found, "log_length") == pytest.approx([math.log(4), math.log(4), math.log(6), math.log(2)])
    assert column(found, "query_length") == [3] * 4
    p = 2 / (4 * INDEX.mean_length)
    wanted = (2 * math.log((2 + 1500 * p) / 1503) + math.log(1500 * p / 1503)) / 3
    assert column(found, "likelihood")[0] == pytest.approx(wanted)


def test_unknown_queries_and_empty_documents_have_finite_features() -> None:
    for query in ("absent", "", "wing"):
        assert np.isfinite(features_of(INDEX, query, ["", "wing", "zzz"])).all()
    assert features_of(INDEX, "wing", []).shape == (0, len(FEATURES))


def test_a_cosine_joins_the_features() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[float(text.count("wing")), 1.0, 0.0] for text in texts]

    found = features_of(INDEX, "wing", ["wing", "heat"], embed=embed)
    assert found.shape == (2, len(FEATURES) + 1)
    assert found[:, -1].tolist() == pytest.approx([1, 1 / math.sqrt(2)])


def collection() -> tuple[Collection, Run]:
    """Relevant documents hold the query's word and are short; BM25's order is not asked."""
    words = "wing body flow heat shock layer boundary mach drag lift".split()
    filler = "alpha beta gamma delta epsilon zeta eta theta".split()
    docs, queries, qrels = {}, {}, {}
    for i, word in enumerate(words):
        queries[str(i)] = word
        for j in range(12):
            docs[f"{i}-{j}"] = " ".join([word] * (1 + j % 3) + (filler * 4)[: 3 + 2 * j])
        qrels[str(i)] = {f"{i}-{j}": 1 for j in range(4)}
    data = Collection(docs, queries, qrels)
    return data, {q: {d: float(n % 7) for n, d in enumerate(docs) if d.startswith(f"{q}-")} for q in queries}


DATA, RUN = collection()


def test_rank_svm_separates_what_a_line_separates() -> None:
    pairs = training_pairs(DATA, RUN, ranks=(1, 12))
    ranker = RankSVM(BM25Index(DATA.docs), C=10.0).fit(DATA, pairs, generator=0)
    same = RankSVM(BM25Index(DATA.docs), C=10.0).fit(DATA, pairs, generator=0)
    for qid in DATA.queries:
        docnos = list(RUN[qid])
        scores = dict(zip(docnos, ranker.score(DATA.queries[qid], [DATA.docs[d] for d in docnos]), strict=True))
        assert min(scores[d] for d in DATA.qrels[qid]) > max(scores[d] for d in docnos if d not in DATA.qrels[qid])
    assert np.array_equal(ranker.model.coef_, same.model.coef_)


def test_rank_svm_is_its_hinge_problem() -> None:
    """One pair: w = alpha g with alpha = min(C, 1 / |g|^2) for both signs of the pair together."""
    ranker = RankSVM(INDEX, C=1e4)
    ranker.fit(Collection(DOCS, {"q": "wing"}), Pairs((("q", "a", "b"),)))
    table = ranker.features("wing", [DOCS["a"], DOCS["b"]]) * ranker.scale
    gap = table[0] - table[1]
    assert ranker.model.coef_[0] == pytest.approx(gap / (gap @ gap), rel=1e-3)


def test_lambdamart_learns_and_repeats_itself() -> None:
    made = [LambdaMART(BM25Index(DATA.docs), n_trees=30, least=3).fit(DATA, RUN, generator=0) for _ in range(2)]
    good = 0
    for qid in DATA.queries:
        docnos = list(RUN[qid])
        texts = [DATA.docs[d] for d in docnos]
        scores = made[0].score(DATA.queries[qid], texts)
        assert np.array_equal(scores, made[1].score(DATA.queries[qid], texts))
        top = {docnos[i] for i in np.argsort(-scores, kind="stable")[:4]}
        good += len(top & set(DATA.qrels[qid]))
    assert good == 40


def test_another_corpus_takes_its_own_statistics() -> None:
    ranker = RankSVM(INDEX, C=1.0).fit(Collection(DOCS, {"q": "wing"}), Pairs((("q", "a", "b"),)))
    other = ranker.on(BM25Index(DATA.docs))
    assert not np.array_equal(other.features("wing", ["wing flow"]), ranker.features("wing", ["wing flow"]))
    assert isinstance(other, RankSVM)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="was not fitted"):
        RankSVM(INDEX).score("wing", ["wing"])
    with pytest.raises(ValueError, match="C=0"):
        RankSVM(INDEX, C=0)
    with pytest.raises(ValueError, match="n_leaves=1"):
        LambdaMART(INDEX, n_leaves=1)
    with pytest.raises(ValueError, match="no list holds"):
        LambdaMART(INDEX).fit(Collection(DOCS, {"q": "wing"}, {"q": {"a": 1}}), {"q": {"b": 1.0}})
