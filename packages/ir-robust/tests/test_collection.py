"""Collections: Cranfield counts its topics by position, a text is no answer to itself, what is absent is said."""

import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from ir_robust.collection import Collection, lee_background, load_collection, read_collection
from robust_core.errors import DataMissingError, MalformedFileError, MissingExtraError


def cranfield(root: Path, topics: int = 225) -> Path:
    """Write the form of the real files: numbers with gaps, judgements by position, texts with titles of their own."""
    folder = root / "cranfield"
    folder.mkdir()
    docs = [f"<doc>\n<docno>{i}</docno>\n<title>title {i}</title>\n<text>body {i}\n</text>\n</doc>\n" for i in (1, 2)]
    docs.append("<doc>\n<docno>471</docno>\n<title></title>\n<text>\n</text>\n</doc>\n")
    (folder / "cran.all.1400.xml").write_text("".join(docs))
    tops = [f"<top>\n<num> {3 * i + 1}</num>\n<title>\nquery at {i}\n</title>\n</top>\n" for i in range(1, topics + 1)]
    (folder / "cran.qry.xml").write_text(f"<?xml version='1.0'?>\n<xml>\n{''.join(tops)}</xml>\n")
    rows = [f"{i} 0 {1 + i % 2} 1\n" for i in range(1, 226)] + ["225 0 471 -1\n"]
    (folder / "cranqrel.trec.txt").write_text("".join(rows))
    return root


def test_cranfield_counts_topics_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_DATA", str(cranfield(tmp_path)))
    data = load_collection("cranfield")
    assert data.docs == {"1": "body 1", "2": "body 2", "471": ""}
    assert (len(data.queries), data.queries["4"]) == (225, "query at 4")  # the file calls the first one 4
    assert data.qrels["4"] == {"1": 1}
    assert len(data.judged()) == 225
    data.check_judged_documents()


def test_half_of_cranfield_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="224 topics; 225 are needed"):
        load_collection("cranfield", cranfield(tmp_path, topics=224))
    (tmp_path / "cranfield" / "cran.qry.xml").unlink()
    with pytest.raises(DataMissingError, match=r"cran.qry.xml is missing"):
        load_collection("cranfield", tmp_path)


def test_vaswani_does_not_shout(tmp_path: Path) -> None:
    folder = tmp_path / "vaswani"
    folder.mkdir()
    (folder / "doc-text.trec").write_text("<DOC>\n<DOCNO>1</DOCNO>\ncompact memories\n\n</DOC>\n")
    (folder / "query-text.trec").write_text("<top>\n<num>1</num><title>\nCOMPACT MEMORIES\n</title>\n</top>\n")
    (folder / "qrels").write_text("1 0 1 1\n")
    data = load_collection("vaswani", tmp_path)
    assert (data.docs, data.queries) == ({"1": "compact memories"}, {"1": "compact memories"})


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    docs = ['{"_id": "q1", "title": "", "text": "asks"}', '{"_id": "d", "title": "wing", "text": "in a stream"}']
    (folder / "corpus.jsonl").write_text("\n".join([*docs, '{"_id": "e", "title": "", "text": ""}', ""]))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "asks"}\n{"_id": "train", "text": "other"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td\t1\n")
    return folder


@pytest.mark.quick
def test_a_folder_of_beir(tmp_path: Path) -> None:
    data = load_collection(f"beir:{beir(tmp_path / 'mine')}")
    assert data.docs["d"] == "wing in a stream"
    assert data.queries == {"q1": "asks"}  # of this split
    assert data.hidden == {"q1": frozenset({"q1"})}
    assert (data.name, len(data.sha256.split("+"))) == ("mine", 3)
    with pytest.raises(DataMissingError, match=r"dev.tsv is missing"):
        load_collection(f"beir:{tmp_path / 'mine'}", split="dev")
    with pytest.raises(DataMissingError, match="no such folder"):
        load_collection("beir:absent")


def test_ir_datasets_are_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = namedtuple("judged", "query_id doc_id relevance")
    text = lambda **ids: SimpleNamespace(**ids, default_text=lambda: f"text of {next(iter(ids.values()))}")  # noqa: E731
    data = SimpleNamespace(
        docs_iter=lambda: [text(doc_id="d1"), text(doc_id="d2")],
        queries_iter=lambda: [text(query_id="q1")],
        qrels_iter=lambda: [judged("q1", "d1", 2), judged("gone", "d2", 1)],
        has_qrels=lambda: True,
    )

    def load(name: str) -> SimpleNamespace:
        return {"mine": data}[name]

    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=load))
    found = load_collection("irds:mine")
    assert found.docs == {"d1": "text of d1", "d2": "text of d2"}
    assert found.qrels == {"q1": {"d1": 2}}
    with pytest.raises(DataMissingError, match="no such data set"):
        load_collection("irds:yours")
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(MissingExtraError, match=r"ir-robust\[datasets\]"):
        load_collection("irds:mine")


def test_lee_has_fifty_texts_that_are_no_answers_to_themselves() -> None:
    data = load_collection("lee")
    assert len(data.docs) == len(data.queries) == len(data.judged()) == 50
    assert data.hidden["7"] == {"7"}
    pairs = {(q, d, g) for q, grades in data.qrels.items() for d, g in grades.items()}
    assert {g for _, _, g in pairs} == {1, 2, 3}
    assert all((d, q, g) in pairs and d != q for q, d, g in pairs)
    background = lee_background()
    assert len(background) == 300
    assert not set(background) & set(data.docs.values())


def test_files_of_the_user(tmp_path: Path) -> None:
    docs, topics, qrels = (tmp_path / name for name in ("docs.tsv", "topics.tsv", "qrels.txt"))
    docs.write_text("a\twing\nb\t\n")
    topics.write_text("1\tlift\n2\tdrag\n")
    qrels.write_text("1 0 a 1\n2 0 a 0\n2 0 c 0\n")
    with pytest.raises(MalformedFileError, match=r"docs.tsv:2: document 'b' has no text"):
        read_collection(docs, topics, qrels)
    data = read_collection(docs, topics, qrels, empty="keep")
    assert (data.name, data.judged()) == ("docs", ["1"])
    with pytest.raises(ValueError, match="1 judged documents are not among the 2 documents, 'c' first"):
        data.check_judged_documents()
    assert read_collection(docs, topics, empty="drop").qrels == {}
    qrels.write_text("1 0 a 1\n3 0 a 1\n")
    with pytest.raises(ValueError, match="1 of 2 judged queries are not among the 2 queries, '3' first"):
        read_collection(docs, topics, qrels, empty="drop")


def test_names_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="collection 'trec': choose one of lee, cranfield, vaswani, or beir:FOLDER"):
        load_collection("trec")
    monkeypatch.delenv("ROBUST_DATA", raising=False)
    with pytest.raises(DataMissingError, match="ROBUST_DATA is not set"):
        load_collection("vaswani")
    with pytest.raises(DataMissingError, match="is no folder"):
        load_collection("vaswani", tmp_path)
    with pytest.raises(ValueError, match="docs: a collection needs at least one"):
        Collection({}, {"1": "a"})
