"""The shape of the claim; it is run by ``robust reproduce ranking-robustness``."""

import torch

from ir_robust.claims import ranking_robustness as claim
from ir_robust.collection import Collection
from ir_robust.rankers import KNRM, random_vectors, rerank, training_pairs, vocabulary_of


def test_statements_name_their_baseline_and_margin():
    assert len(claim.STATEMENTS) == 5
    for statement in claim.STATEMENTS:
        assert statement.metric
        assert statement.reason
    assert {s.margin for s in claim.STATEMENTS if s.unit == "percentage points"} == {5.0, 0.0}


def test_kernels_worked_out_once_train_the_ranker_that_is_measured():
    docs = {"d1": "lift of a wing", "d2": "wing and lift", "d3": "heat in a plate", "d4": "drag of a body"}
    data = Collection(docs, {"q1": "wing lift", "q2": "plate heat"}, {"q1": {"d1": 1, "d2": 1}, "q2": {"d3": 1}})
    run = {qid: {d: float(-i) for i, d in enumerate(docs)} for qid in data.queries}
    ranker = KNRM(random_vectors(vocabulary_of(docs.values()), 16, generator=1), generator=0)
    before = ranker.vectors.clone()
    claim._fit_knrm(ranker, data, training_pairs(data, run, ranks=(1, 4), n_negatives=2), n_steps=200)
    found = rerank(ranker, data, run)
    assert min(found["q1"]["d1"], found["q1"]["d2"]) > max(found["q1"]["d3"], found["q1"]["d4"])
    assert max(found["q2"], key=found["q2"].__getitem__) == "d3"
    assert torch.equal(before, ranker.vectors)
    assert all(p.grad is None for p in ranker.parameters())
