"""Bi-encoders and late interaction against slow readings of their formulas."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ir_robust.collection import load_collection
from ir_robust.measures import per_query
from ir_robust.rankers import WhiteBoxRanker, load_ranker, rerank
from ir_robust.rankers.encoders import (
    BiEncoderRanker,
    ColBERTRanker,
    load_bi,
    load_colbert,
    load_sentence_transformer,
    pool,
)
from ir_robust.rankers.huggingface import HuggingFaceRanker, load_encoder
from ir_robust.rankers.saved import load_saved, save_ranker
from ir_robust.text import Words
from robust_core.errors import DataMissingError
from robust_core.io import save_tensors

QUERY = "Wing in heat"
DOCS = [
    "It's a hydro-dynamic wing, of the body.",
    "",
    "Heat flows in a boundary layer" * 20,
    "wings",
    "drag lift. The plate",
]


def hidden(ranker: HuggingFaceRanker, ids: list[int], attended: int | None = None) -> Tensor:
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    mask[:, attended:] = 0 if attended is not None else 1
    with torch.no_grad():
        return ranker.model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]


def ids_of(ranker: HuggingFaceRanker, text: str, length: int = 64) -> list[int]:
    return ranker.tokenizer(text, truncation=True, max_length=length)["input_ids"]


@pytest.mark.quick
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_bi_encoder_is_the_inner_product_of_pooled_states(encoder: Path, pooling: str) -> None:
    ranker = load_bi(encoder, pooling=pooling, query_prefix="the: ", doc_prefix="a it ", batch_size=2)

    def embed(text: str) -> Tensor:
        states = hidden(ranker, ids_of(ranker, text))
        found = states.mean(0) if pooling == "mean" else states[0]
        return found / found.norm()

    wanted = torch.stack([embed(f"the: {QUERY}") @ embed(f"a it {doc}") for doc in DOCS])
    for _ in range(2):  # the second time they are remembered
        torch.testing.assert_close(ranker.score(QUERY, DOCS), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ranker(**ranker.inputs([QUERY] * 5, DOCS)), wanted, rtol=1e-4, atol=1e-5)
        for parameter in ranker.model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(ranker.score(QUERY, DOCS), wanted, atol=1e-3)


def slow_colbert(ranker: ColBERTRanker, query: str, doc: str) -> float:
    vocabulary = ranker.tokenizer.get_vocab()
    asked = ids_of(ranker, query, ranker.query_length - 1)
    asked = [asked[0], vocabulary["[unused0]"], *asked[1:]]
    n, asked = len(asked), asked + [vocabulary["[MASK]"]] * (ranker.query_length - len(asked))
    found = ids_of(ranker, doc, 63)
    found = [found[0], vocabulary["[unused1]"], *found[1:]]
    q = F.normalize(hidden(ranker, asked, n) @ ranker.projection.detach().T, dim=1)
    d = F.normalize(hidden(ranker, found) @ ranker.projection.detach().T, dim=1)
    signs = {vocabulary[s] for s in "-.,'"}
    return sum(max(float(u @ v) for v, i in zip(d, found, strict=True) if i not in signs) for u in q)


@pytest.mark.quick
def test_late_interaction_is_the_sum_of_best_matches(encoder: Path) -> None:
    ranker = ColBERTRanker(*load_encoder(encoder), dim=8, query_length=9, generator=2, batch_size=3)
    wanted = torch.tensor([slow_colbert(ranker, QUERY, doc) for doc in DOCS])
    torch.testing.assert_close(ranker.score(QUERY, DOCS), wanted, rtol=1e-4, atol=1e-4)
    long = "wing heat flow " * 10
    assert ranker.score(long, DOCS[:1]).item() == pytest.approx(slow_colbert(ranker, long, DOCS[0]), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ranker(**ranker.inputs([QUERY] * 5, DOCS)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bi", "colbert"])
def test_white_box_forms(encoder: Path, kind: str) -> None:
    model = load_encoder(encoder)
    ranker = BiEncoderRanker(*model, doc_prefix="the ") if kind == "bi" else ColBERTRanker(*model, dim=8)
    assert isinstance(ranker, WhiteBoxRanker)
    batch = ranker.tokens(QUERY, DOCS)
    pieces = ranker.tokenizer.convert_ids_to_tokens(batch.ids[0].tolist())
    spelled: dict[int, str] = {}
    for piece, word in zip(pieces, batch.word[0].tolist(), strict=True):
        if word >= 0:
            spelled[word] = spelled.get(word, "") + piece.removeprefix("##")
    assert tuple(spelled[i] for i in sorted(spelled)) == Words.of(DOCS[0]).words
    assert (batch.word[batch.inputs["query"]] == -1).all()
    embeddings = ranker.token_embeddings[batch.ids].detach().clone().requires_grad_()
    scores = ranker.score_embedded(batch, embeddings)
    torch.testing.assert_close(scores, ranker.score(QUERY, DOCS), rtol=1e-4, atol=1e-4)
    scores.sum().backward()
    assert embeddings.grad is not None
    assert (embeddings.grad[batch.word >= 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind", ["bi", "colbert"])
def test_folders_come_back(encoder: Path, tmp_path: Path, kind: str) -> None:
    model = load_encoder(encoder)
    ranker = (
        BiEncoderRanker(*model, pooling="cls", normalise=False, max_length=20, query_prefix="the ")
        if kind == "bi"
        else ColBERTRanker(*model, dim=8, query_length=12, skip_signs=False)
    )
    save_ranker(tmp_path, ranker)
    found = load_saved(tmp_path)
    assert isinstance(found, HuggingFaceRanker)
    assert found.config == ranker.config
    assert torch.equal(found.score(QUERY, DOCS), ranker.score(QUERY, DOCS))


def test_a_projection_may_stand_beside_or_be_missing(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"linear\.weight"):
        load_colbert(encoder)
    place = tmp_path / "colbert"
    shutil.copytree(encoder, place)
    save_tensors(place / "projection.safetensors", {"linear.weight": torch.eye(32)[:5]})
    assert load_colbert(place).projection.shape == (5, 32)


def test_settings_of_sentence_transformers_are_read(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "st"
    shutil.copytree(encoder, place)
    (place / "1_Pooling").mkdir()
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    file = place / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    ranker = load_bi(place)
    assert (ranker.pooling, ranker.max_length) == ("cls", 24)
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="load_sentence_transformer"):
        load_bi(place)


def test_a_sentence_transformer_scores_as_its_library_does(encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    network = Transformer(str(encoder), max_seq_length=30)
    parts = [network, Pooling(32, pooling_mode="max"), Dense(32, 6, activation_function=torch.nn.Tanh())]
    theirs = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "the: ", "document": ""})
    theirs.save(str(tmp_path / "st"))
    ours = load_sentence_transformer(tmp_path / "st")
    assert ours.max_length == 30
    q, d = theirs.encode([f"the: {QUERY}"], normalize_embeddings=True), theirs.encode(DOCS, normalize_embeddings=True)
    torch.testing.assert_close(ours.score(QUERY, DOCS), torch.from_numpy(d @ q[0]), rtol=1e-4, atol=1e-5)
    batch = ours.tokens(QUERY, DOCS)
    found = ours.score_embedded(batch, ours.token_embeddings[batch.ids])
    torch.testing.assert_close(found, ours.score(QUERY, DOCS), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="head of its own"):
        save_ranker(tmp_path / "saved", ours)
    with pytest.raises(DataMissingError, match=r"modules\.json"):
        load_sentence_transformer(tmp_path)


def test_pooling_of_padded_texts() -> None:
    states = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert torch.equal(pool(states, mask, "mean"), states[:, :2].mean(1))
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])


def test_nothing_is_remembered_where_that_is_asked(encoder: Path) -> None:
    ranker = load_bi(encoder, remember=0)
    ranker.score(QUERY, DOCS)
    assert not ranker._known
    with pytest.raises(ValueError, match="remember=-1"):
        load_bi(encoder, remember=-1)


def test_bad_settings(encoder: Path) -> None:
    tokenizer, model = load_encoder(encoder)
    with pytest.raises(ValueError, match="pooling='max'"):
        BiEncoderRanker(tokenizer, model, pooling="max")
    with pytest.raises(ValueError, match="query_length=3"):
        ColBERTRanker(tokenizer, model, query_length=3)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask token"):
        ColBERTRanker(tokenizer, model)


def test_minilm_ranks_the_lee_corpus_as_measured() -> None:
    data, ranker = load_collection("lee"), load_ranker("minilm")
    run = {qid: dict.fromkeys((d for d in data.docs if d != qid), 0.0) for qid in data.queries}
    values = list(per_query(rerank(ranker, data, run), data.qrels, ["nDCG@10"])["nDCG@10"].values())
    assert statistics.fmean(values) == pytest.approx(0.741, abs=0.002)
    assert statistics.pvariance(values) == pytest.approx(0.0178, abs=0.001)
