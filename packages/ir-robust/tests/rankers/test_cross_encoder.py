"""Cross-encoders against the bare model, their words against their letters, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ir_robust.collection import Collection
from ir_robust.rankers import WhiteBoxRanker, fit_ranker, scores_of, training_pairs
from ir_robust.rankers.cross import CrossEncoderRanker, load_cross, new_cross_encoder
from ir_robust.rankers.huggingface import load_encoder, word_places
from ir_robust.rankers.saved import load_saved, save_ranker
from ir_robust.text import Words
from robust_core.errors import DataMissingError, UntrustedFileError

Classifier = Callable[[int], Path]
QUERY = "Wing in heat"
DOCS = [
    "It's a hydro-dynamic wing, of the body.",
    "",
    "Heat flows in a boundary layer" * 20,
    "wings",
    "drag lift. The plate",
]


def bare(ranker: CrossEncoderRanker, query: str, doc: str) -> float:
    found = ranker.tokenizer(
        [query], [doc], truncation="only_second", max_length=64, return_token_type_ids=True, return_tensors="pt"
    )
    assert found["token_type_ids"].max() == 1
    with torch.no_grad():
        return float(ranker.model(**found).logits[0, 0])


@pytest.mark.quick
def test_scores_are_those_of_the_bare_model_in_any_batch(classifier: Classifier) -> None:
    ranker = load_cross(classifier(1), max_query=16)
    wanted = torch.tensor([bare(ranker, QUERY, doc) for doc in DOCS])
    for size in (1, 2, 32):
        ranker.batch_size = size
        torch.testing.assert_close(ranker.score(QUERY, DOCS), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(scores_of(ranker, QUERY, DOCS)).float(), wanted, rtol=1e-4, atol=1e-4)
    inputs = ranker.inputs([QUERY], [DOCS[0]])
    inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    assert abs(float(ranker(**inputs)[0].detach()) - float(wanted[0])) > 1e-3  # segments matter, and are given
    assert ranker.score(QUERY, []).shape == (0,)


@pytest.mark.quick
def test_tokens_know_their_words_and_embeddings_give_the_scores(classifier: Classifier) -> None:
    ranker = load_cross(classifier(1), activation="sigmoid")
    assert isinstance(ranker, WhiteBoxRanker)
    batch = ranker.tokens(QUERY, DOCS)
    pieces = [ranker.tokenizer.convert_ids_to_tokens(row) for row in batch.ids.tolist()]
    spelled: dict[int, str] = {}
    for piece, word in zip(pieces[0], batch.word[0].tolist(), strict=True):
        if word >= 0:
            spelled[word] = spelled.get(word, "") + piece.removeprefix("##")
    assert tuple(spelled[i] for i in sorted(spelled)) == Words.of(DOCS[0]).words
    assert (batch.word[:, :5] == -1).all()  # [CLS] wing in heat [SEP]
    assert (batch.word[1] == -1).all()
    embeddings = ranker.token_embeddings[batch.ids].detach().clone().requires_grad_()
    scores = ranker.score_embedded(batch, embeddings)
    torch.testing.assert_close(scores, ranker.score(QUERY, DOCS), rtol=1e-4, atol=1e-5)
    assert ((scores > 0) & (scores < 1)).all()
    scores.sum().backward()
    assert embeddings.grad is not None
    assert (embeddings.grad[batch.word >= 0].abs().sum(-1) > 0).all()


def test_words_of_letters() -> None:
    doc = " ab-cd  e"
    offsets = [(0, 0), (1, 2), (2, 3), (3, 4), (4, 6), (6, 9), (0, 2), (1, 3)]
    of_doc = [True] * 7 + [False]
    assert word_places(doc, offsets, of_doc) == [-1, 0, 0, -1, 1, 2, 0, -1]
    assert word_places("...", [(0, 1)], [True]) == [-1]


def test_a_long_query_leaves_room_for_the_document(classifier: Classifier) -> None:
    ranker = load_cross(classifier(1), max_length=32, max_query=10)
    query = "wing heat " * 40
    found = ranker.inputs([query], [DOCS[2]])
    assert found["input_ids"].shape == (1, 32)
    assert int((found["token_type_ids"] == 0).sum()) == 12
    assert ranker.config["max_length"] == 32


def test_two_labels_score_by_their_difference(classifier: Classifier) -> None:
    ranker = load_cross(classifier(2))
    found = ranker.inputs([QUERY], [DOCS[0]])
    with torch.no_grad():
        logits = ranker.model(**found).logits[0]
    assert ranker.score(QUERY, DOCS[:1]).item() == pytest.approx(float(logits[1] - logits[0]), rel=1e-4)


def test_half_precision_scores_are_near(classifier: Classifier) -> None:
    ranker = load_cross(classifier(1))
    wanted = ranker.score(QUERY, DOCS)
    ranker.bfloat16()
    found = ranker.score(QUERY, DOCS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.2)
    batch = ranker.tokens(QUERY, DOCS)
    assert torch.isfinite(ranker.score_embedded(batch, ranker.token_embeddings[batch.ids].float())).all()


def test_a_folder_comes_back(classifier: Classifier, tmp_path: Path) -> None:
    ranker = load_cross(classifier(1), max_length=40, max_query=7, activation="sigmoid")
    save_ranker(tmp_path / "saved", ranker, {"epochs": 1})
    found = load_saved(tmp_path / "saved")
    assert isinstance(found, CrossEncoderRanker)
    assert found.config == ranker.config
    assert torch.equal(found.score(QUERY, DOCS), ranker.score(QUERY, DOCS))


def test_what_is_refused(classifier: Classifier, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks 2 weights.*classifier\.bias"):
        load_cross(encoder)
    with pytest.raises(ValueError, match="3 labels"):
        load_cross(classifier(3))
    with pytest.raises(ValueError, match="max_length=65"):
        load_cross(classifier(1), max_length=65)
    with pytest.raises(ValueError, match="max_query=60"):
        load_cross(classifier(1), max_query=60)
    with pytest.raises(ValueError, match="activation='softmax'"):
        load_cross(classifier(1), activation="softmax")
    with pytest.raises(DataMissingError, match=r"config\.json"):
        load_cross(tmp_path)
    for file in classifier(1).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataMissingError):
        load_cross(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UntrustedFileError, match="pickled"):
        load_cross(tmp_path)


@pytest.mark.parametrize("hidden", [None, 64])
def test_a_new_one_repeats_itself_and_leaves_generators_and_logs_alone(encoder: Path, hidden: int | None) -> None:
    from transformers.utils import logging as their_logging

    before, level = torch.get_rng_state(), their_logging.get_verbosity()
    one, two, other = (new_cross_encoder(encoder, layers=1, hidden=hidden, generator=g) for g in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert their_logging.get_verbosity() == level
    assert one.model.config.num_hidden_layers == 1
    assert one.token_embeddings.shape[1] == (hidden or 32)
    assert torch.equal(one.score(QUERY, DOCS), two.score(QUERY, DOCS))
    assert not torch.equal(one.score(QUERY, DOCS), other.score(QUERY, DOCS))
    if hidden is None:
        assert torch.equal(one.token_embeddings, load_encoder(encoder)[1].get_input_embeddings().weight)


def test_widths_must_fit_their_heads(encoder: Path) -> None:
    with pytest.raises(ValueError, match="hidden=40"):
        new_cross_encoder(encoder, hidden=40)


def test_training_lowers_the_loss(encoder: Path) -> None:
    docs = {"a": "wing lift", "b": "heat flow", "c": "wing drag", "d": "heat layer"}
    data = Collection(docs, {"1": "wing", "2": "heat"}, {"1": {"a": 1, "c": 1}, "2": {"b": 1, "d": 1}})
    run = {q: {d: float(-i) for i, d in enumerate(docs)} for q in data.queries}
    ranker = new_cross_encoder(encoder, max_length=16)
    pairs = training_pairs(data, run, ranks=(1, 4))
    state = fit_ranker(ranker, data, pairs, epochs=80, lr=3e-3, batch_size=8)
    assert state.step == 80
    for query, up, down in pairs.triples:
        better, worse = ranker.score(data.queries[query], [docs[up], docs[down]]).tolist()
        assert better > worse
    assert not ranker.training
