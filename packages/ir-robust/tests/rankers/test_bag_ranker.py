"""The bag of embeddings against its formula, and its fast form against its plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.rankers import BagRanker, Vocabulary, WhiteBoxRanker, WordRanker, random_vectors, scores_of
from ir_robust.text import Words
from robust_core.models import fingerprint

WORDS = "wing body flow heat shock layer boundary mach drag lift the of in plate".split()
DOCS = ["The wing of the body.", "", "Heat-flow in a boundary layer", "wing", "xyzzy wing xyzzy"]


def ranker() -> BagRanker:
    return BagRanker(random_vectors(WORDS, 12, generator=3), dim=8, generator=1)


def slow(model: BagRanker, query: str, doc: str) -> float:
    def embed(text: str) -> torch.Tensor:
        rows = [model.vectors[i] for i in model.vocabulary.ids(Words.of(text).words)]
        mean = torch.stack(rows).mean(0) if rows else torch.zeros(12)
        return model.project @ mean

    return (model.scale * (embed(query) @ embed(doc))).item()


@pytest.mark.quick
def test_scores_follow_the_formula_in_every_form() -> None:
    model, query = ranker(), "drag of the wing"
    wanted = torch.tensor([slow(model, query, doc) for doc in DOCS])
    words, asked = model.numbers(DOCS), model.numbers([query]).expand(len(DOCS), -1)
    tokens = model.tokens(query, DOCS)
    for found in (
        model.score(query, DOCS),
        model.score_words(query, words),
        model(asked, words),
        model.score_embedded(tokens, model.token_embeddings[tokens.ids]),
        torch.from_numpy(scores_of(model, query, DOCS)).float(),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(model, WordRanker)
    assert isinstance(model, WhiteBoxRanker)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.lists(st.integers(1, len(WORDS) + 1), max_size=9), min_size=1, max_size=6), st.integers(0, 4))
def test_a_document_scores_alike_in_any_company_and_padding(rows: list[list[int]], more: int) -> None:
    model = ranker()
    width = max(map(len, rows)) + more + 1
    words = torch.tensor([row + [Vocabulary.PAD] * (width - len(row)) for row in rows])
    with torch.no_grad():
        together = model.score_words("wing flow", words)
        alone = [model.score_words("wing flow", torch.tensor([row or [Vocabulary.PAD]])) for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_kept_word_scores_are_forgotten_when_a_weight_changes() -> None:
    model = ranker()
    with torch.no_grad():
        before, kept = model.word_scores("wing"), model.word_scores("wing")
        assert kept is before
        assert model.word_scores("flow") is not before
        model.scale.mul_(2)
        torch.testing.assert_close(model.word_scores("wing"), before * 2)
        model.double()
        assert model.score("wing", ["wing body"]).dtype == torch.float64


def test_gradients_reach_the_trained_weights_and_the_embeddings_but_not_the_frozen_vectors() -> None:
    model = ranker()
    model.score("wing flow", DOCS[:1]).sum().backward()
    assert model.project.grad is not None
    assert model.project.grad.abs().sum() > 0
    assert model.vectors.grad is None
    tokens = model.tokens("wing flow", DOCS[:3])
    embeddings = model.token_embeddings[tokens.ids].clone().requires_grad_()
    model.score_embedded(tokens, embeddings).sum().backward()
    assert embeddings.grad is not None
    moved = embeddings.grad.abs().sum(-1) > 0
    written = tokens.ids != Vocabulary.PAD
    assert torch.equal(moved[[0, 2]], written[[0, 2]])
    assert not moved[1].any()  # an empty document has a score of 0 wherever the query lies
    assert tokens.word[:2].tolist() == [[-1, -1, 0, 1, 2, 3, 4, -1], [-1] * 8]


def test_a_fingerprint_tells_vocabularies_apart_and_ignores_what_is_kept() -> None:
    model = ranker()
    before = fingerprint(model)
    with torch.no_grad():
        model.score("wing", DOCS)
    assert fingerprint(model) == before
    other = BagRanker(random_vectors([*WORDS[:-1], "plane"], 12, generator=3), dim=8, generator=1)
    assert fingerprint(other) != before


def test_making_one_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    ranker()
    assert torch.equal(before, torch.get_rng_state())


def test_no_documents_and_a_wrong_size() -> None:
    assert ranker().score("wing", []).shape == (0,)
    with pytest.raises(ValueError, match="dim=0"):
        BagRanker(random_vectors(WORDS, 12), dim=0)
