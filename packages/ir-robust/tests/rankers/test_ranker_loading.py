"""Rankers from words, the user's own modules, and data frames of PyTerrier."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ir_robust.collection import Collection
from ir_robust.rankers import BagRanker, BM25Ranker, random_vectors, save_ranker, scores_of
from ir_robust.rankers.cross import CrossEncoderRanker
from ir_robust.rankers.encoders import BiEncoderRanker
from ir_robust.rankers.loading import as_pyterrier, load_ranker, score_frame
from robust_core.errors import DataMissingError, MissingExtraError, ResourceError, UntrustedFileError

DATA = Collection({"1": "wing flow", "2": "heat shock"}, {"q": "wing"})
OWN = """
class Lengths:
    def __init__(self):
        self.seen = 0
    def score(self, query, docs):
        return [float(len(d)) for d in docs]

ready = Lengths()

def plain(query, docs):
    return [float(d.count(query)) for d in docs]

def factory():
    return plain

def broken():
    raise RuntimeError("no\\nweights")

def nothing():
    return 3

number = 4
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rankers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rankers", raising=False)


@pytest.mark.quick
@pytest.mark.usefixtures("own")
def test_the_users_own() -> None:
    docs = ["a wing", "wing wing wing"]
    assert scores_of(load_ranker("own_rankers:Lengths"), "wing", docs).tolist() == [6, 14]
    assert scores_of(load_ranker("own_rankers:ready"), "wing", docs).tolist() == [6, 14]
    assert scores_of(load_ranker("own_rankers:plain"), "wing", docs).tolist() == [1, 3]
    assert scores_of(load_ranker("own_rankers:factory"), "wing", docs).tolist() == [1, 3]
    with pytest.raises(ValueError, match="RuntimeError: no weights"):
        load_ranker("own_rankers:broken")
    with pytest.raises(ValueError, match="gave int"):
        load_ranker("own_rankers:nothing")
    with pytest.raises(TypeError, match="int"):
        load_ranker("own_rankers:number")
    with pytest.raises(ValueError, match="has no 'absent'"):
        load_ranker("own_rankers:absent")
    with pytest.raises(ResourceError, match="no module"):
        load_ranker("absent_rankers:factory")


@pytest.mark.quick
def test_bm25_saved_and_unknown_words(tmp_path: Path) -> None:
    assert isinstance(load_ranker("bm25", data=DATA), BM25Ranker)
    with pytest.raises(ValueError, match="needs the collection"):
        load_ranker("bm25")
    model = BagRanker(random_vectors(["wing", "flow"], 4), dim=2)
    save_ranker(tmp_path / "bag", model)
    found = load_ranker(f"saved:{tmp_path / 'bag'}")
    assert isinstance(found, BagRanker)
    assert not found.training
    for words in ("bm26", "cross:", "weights.bin", "model.pt2", "hub:name/x"):
        with pytest.raises(ValueError, match="give bm25, minilm, saved:FOLDER"):
            load_ranker(words)
    for kind in ("saved", "cross", "bi", "sbert", "colbert"):
        with pytest.raises(DataMissingError):
            load_ranker(f"{kind}:{tmp_path / 'absent'}")


def test_folders_of_hugging_face(encoder: Path, classifier: Callable[[int], Path], tmp_path: Path) -> None:
    assert isinstance(load_ranker(f"cross:{classifier(1)}"), CrossEncoderRanker)
    assert isinstance(load_ranker(f"bi:{encoder}"), BiEncoderRanker)
    for file in encoder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    for kind in ("cross", "bi", "colbert"):
        with pytest.raises(UntrustedFileError, match="pickled"):
            load_ranker(f"{kind}:{tmp_path}")


def frame() -> Any:
    import pandas

    rows = [("2", "heat", "a", "heat"), ("1", "wing", "b", "the wing"), ("2", "heat", "c", "heat heat"),
            ("1", "wing", "d", "flow"), ("1", "wing", "e", "flow")]  # fmt: skip
    return pandas.DataFrame(rows, columns=["qid", "query", "docno", "text"], index=[9, 7, 5, 3, 1])


def count(query: str, docs: list[str]) -> list[float]:
    return [float(doc.split().count(query)) for doc in docs]


def test_frames_are_scored_query_by_query() -> None:
    found = score_frame(count, frame())
    assert found["qid"].tolist() == ["2", "2", "1", "1", "1"]
    assert found["docno"].tolist() == ["c", "a", "b", "e", "d"]  # ties fall by number, as in trec_eval
    assert found["score"].tolist() == [2, 1, 1, 0, 0]
    assert found["rank"].tolist() == [0, 1, 0, 1, 2]
    with pytest.raises(ValueError, match="lacks the columns text"):
        score_frame(count, frame().drop(columns="text"))
    with pytest.raises(ValueError, match="twice"):
        score_frame(count, frame().assign(docno="a"))
    assert not len(score_frame(count, frame().iloc[:0]))


def test_a_transformer_of_pyterrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyterrier", None)
    with pytest.raises(MissingExtraError, match="pip install pyterrier"):
        as_pyterrier(count)
    stand_in = types.SimpleNamespace(
        apply=types.SimpleNamespace(generic=lambda function: function), model=types.SimpleNamespace(FIRST_RANK=1)
    )
    monkeypatch.setitem(sys.modules, "pyterrier", stand_in)
    assert as_pyterrier(count)(frame())["rank"].tolist() == [1, 2, 1, 2, 3]
