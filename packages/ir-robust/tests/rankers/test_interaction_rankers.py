"""K-NRM, DRMM and Duet against slow references that follow the formulas letter by letter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_robust.rankers import DRMM, KNRM, Duet, Vocabulary, WhiteBoxRanker, WordRanker, random_vectors
from ir_robust.rankers import knrm as knrm_module
from ir_robust.rankers.drmm import bins_of
from ir_robust.rankers.saved import load_saved, save_ranker
from ir_robust.rankers.word_model import WordModel
from ir_robust.text import Words

WORDS = "wing body flow heat shock layer boundary mach drag lift the of in plate".split()
VECTORS = random_vectors(WORDS, 6, generator=3)
IDF = torch.cat([torch.zeros(2), torch.linspace(0.1, 3.0, len(WORDS))])
QUERIES = ["drag of the wing", "wing wing xyzzy", "xyzzy", ""]
DOCS = ["The wing of the body.", "", "Heat-flow in a boundary layer", "wing", "xyzzy wing xyzzy", "flow " * 15]
MAKERS: dict[str, Callable[[], WordModel]] = {
    "knrm": lambda: KNRM(VECTORS, generator=1),
    "drmm": lambda: DRMM(VECTORS, IDF, generator=1),
    "duet": lambda: Duet(VECTORS, hidden=3, n_query=3, n_doc=7, window=3, generator=1),
}


def known(model: WordModel, text: str) -> list[int]:
    return [i for i in model.vocabulary.ids(Words.of(text).words) if i > 1]


def cosine(a: int, b: int) -> float:
    u, v = VECTORS.table[a].double(), VECTORS.table[b].double()
    return float(u @ v / (u.norm() * v.norm()))


def slow_knrm(model: KNRM, query: str, doc: str) -> float:
    total = model.bias.item()
    for k in range(11):
        mu, sigma = (1.0, 1e-3) if k == 0 else (0.9 - 0.2 * (k - 1), 0.1)
        phi = 0.0
        for i in known(model, query):
            soft = 0.0
            for j in known(model, doc):
                c = 1.0 if i == j else cosine(i, j)
                soft += math.exp(-((c - mu) ** 2) / (2 * sigma**2))
            phi += math.log(max(soft, 1e-10)) * 0.01
        total += model.weight[k].item() * phi
    return math.tanh(total)


def slow_drmm(model: DRMM, query: str, doc: str) -> float:
    terms = known(model, query)
    if not terms:
        return 0.0
    gates = [math.exp(model.gate.item() * float(IDF[i])) for i in terms]
    total = 0.0
    for i, gate in zip(terms, gates, strict=True):
        counts = [0] * 30
        for j in known(model, doc):
            counts[29 if i == j else min(int((cosine(i, j) + 1) / 2 * 29), 28)] += 1
        z = model.network(torch.tensor([math.log(1 + n) for n in counts])).item()
        total += gate / sum(gates) * z
    return total


def slow_duet(model: Duet, query: str, doc: str) -> float:
    q = (model.vocabulary.ids(Words.of(query).words) + [0] * 3)[:3]
    d = (model.vocabulary.ids(Words.of(doc).words) + [0] * 7)[:7]
    match = torch.tensor([[float(i == j and i > 1) for j in d] for i in q])
    flat = torch.stack([torch.tanh(model.positions.weight @ row + model.positions.bias) for row in match]).flatten()
    for layer in model.local_score:
        flat = flat if isinstance(layer, nn.Flatten) else layer(flat)

    def windows(side: nn.Conv1d, ids: list[int]) -> Tensor:
        rows = [torch.zeros(6), *VECTORS.table[ids], torch.zeros(6)]
        bias = side.bias
        assert bias is not None
        steps = range(1, len(rows) - 1)
        return torch.tanh(
            torch.stack([sum(side.weight[:, :, k] @ rows[t - 1 + k] for k in range(3)) + bias for t in steps])
        )

    asked = torch.tanh(model.query_hidden(windows(model.query_side, q).max(0).values))
    found = windows(model.doc_side, d)
    hidden, bias = model.doc_hidden.weight[:, :, 0], model.doc_hidden.bias
    assert bias is not None
    parts = [torch.tanh(hidden @ found[s : s + 3].max(0).values + bias) * asked for s in (0, 3)]
    other = torch.stack(parts, 1).flatten()
    for layer in model.distributed_score:
        other = other if isinstance(layer, nn.Flatten) else layer(other)
    return (flat + other).item()


SLOW: dict[str, Callable[..., float]] = {"knrm": slow_knrm, "drmm": slow_drmm, "duet": slow_duet}


@pytest.mark.quick
@pytest.mark.parametrize("kind", MAKERS)
def test_every_form_agrees_with_the_slow_reference(kind: str) -> None:
    model = MAKERS[kind]()
    assert isinstance(model, WordRanker)
    with torch.no_grad():
        for query in QUERIES:
            wanted = torch.tensor([SLOW[kind](model, query, doc) for doc in DOCS])
            words, asked = model.numbers(DOCS), model.numbers([query]).expand(len(DOCS), -1)
            for found in (model.score(query, DOCS), model.score_words(query, words), model(asked, words)):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.lists(st.integers(1, len(WORDS) + 1), max_size=9), min_size=1, max_size=5), st.integers(0, 4))
def test_a_document_scores_alike_in_any_company_and_padding(kind: str, rows: list[list[int]], more: int) -> None:
    model = MAKERS[kind]()
    width = max(map(len, rows)) + more + 1
    words = torch.tensor([row + [Vocabulary.PAD] * (width - len(row)) for row in rows])
    with torch.no_grad():
        together = model.score_words("wing flow of", words)
        alone = [model.score_words("wing flow of", torch.tensor([row or [Vocabulary.PAD]])) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["knrm", "duet"])
def test_white_box_form(kind: str) -> None:
    model = MAKERS[kind]()
    assert isinstance(model, WhiteBoxRanker)
    tokens = model.tokens("drag of the wing", DOCS)
    embeddings = model.token_embeddings[tokens.ids].detach().clone().requires_grad_()
    scores = model.score_embedded(tokens, embeddings)
    torch.testing.assert_close(scores, model.score("drag of the wing", DOCS), rtol=1e-4, atol=1e-5)
    scores.sum().backward()
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert embeddings.grad[0, 4:].abs().sum() > 0


def test_a_histogram_offers_no_gradient() -> None:
    assert not isinstance(MAKERS["drmm"](), WhiteBoxRanker)
    with pytest.raises(ValueError, match="train_vectors=True"):
        DRMM(VECTORS, train_vectors=True)


def test_bins_at_their_borders() -> None:
    cosines = torch.tensor([-1.0, -1.0 + 2 / 29 + 1e-6, 0.0, 0.999999, 1.0, 1.0, 1.0000001])
    same = torch.tensor([False, False, False, False, False, True, False])
    assert bins_of(cosines, same).tolist() == [0, 1, 14, 28, 28, 29, 28]


def test_order_of_words_matters_to_duet_alone() -> None:
    there, back = "heat flow wing body", "body wing flow heat"
    with torch.no_grad():
        for kind, make in MAKERS.items():
            a, b = make().score("wing flow", [there, back]).tolist()
            assert (abs(a - b) < 1e-6) == (kind != "duet")


def test_long_queries_make_their_tables_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, query = MAKERS["knrm"](), " ".join(WORDS)
    with torch.no_grad():
        whole = model.score(query, DOCS)
        monkeypatch.setattr(knrm_module, "ROOM", 11 * 40)
        torch.testing.assert_close(model.score(query, DOCS), whole)


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_learn_and_come_back_from_their_folder(kind: str, tmp_path: Path) -> None:
    model = MAKERS[kind]()
    words, asked = model.numbers(DOCS), model.numbers(["wing of the flow"]).expand(len(DOCS), -1)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(20):
        scores = model(asked, words)
        loss = torch.relu(1 - scores[3] + scores[2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    save_ranker(tmp_path, model)
    found = load_saved(tmp_path)
    assert type(found) is type(model)
    with torch.no_grad():
        assert torch.equal(found(asked, words), model(asked, words))


def test_dropout_never_acts_outside_training() -> None:
    model = MAKERS["duet"]()
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model.score("wing", DOCS), model.score("wing", DOCS))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="n_doc=5"):
        Duet(VECTORS, n_doc=5, window=6)
    with pytest.raises(ValueError, match="dropout=1"):
        Duet(VECTORS, dropout=1.0)
    with pytest.raises(ValueError, match="idf: shape"):
        DRMM(VECTORS, IDF[:-1])
