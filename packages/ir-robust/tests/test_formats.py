"""Files of the field: what is well formed comes back whole, what is not is refused with file and line."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_robust.formats import (
    ordered,
    read_documents,
    read_qrels,
    read_run,
    read_topics,
    write_qrels,
    write_run,
)
from robust_core.errors import MalformedFileError, ResourceError

Reader = Callable[[Path], Any]
names = st.from_regex(r"[A-Za-z0-9_.-]{1,6}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def wrote(folder: Path, content: str | bytes, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.dictionaries(names, st.dictionaries(names, numbers, min_size=1, max_size=5), min_size=1, max_size=3))
def test_a_run_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, run: dict[str, dict[str, float]]
) -> None:
    path = write_run(tmp_path_factory.mktemp("run") / "run.trec", run)
    found = read_run(path)
    assert found == run
    assert [list(found[qid]) for qid in run] == [ordered(scores) for scores in run.values()]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.dictionaries(names, st.dictionaries(names, st.integers(-2, 9), min_size=1, max_size=5), min_size=1, max_size=3)
)
def test_judgements_come_back(tmp_path_factory: pytest.TempPathFactory, qrels: dict[str, dict[str, int]]) -> None:
    path = write_qrels(tmp_path_factory.mktemp("qrels") / "qrels.txt", qrels)
    assert read_qrels(path) == qrels


def test_equal_scores_go_by_falling_number() -> None:
    assert ordered({"a": 1.0, "b": 2.0, "c": 1.0, "B": 1.0}) == ["b", "c", "a", "B"]


def test_runs_in_any_order_of_lines(tmp_path: Path) -> None:
    run = read_run(wrote(tmp_path, "2 Q0 b 2 1.5 t\r\n1 Q0 a 1 2e0 t\n\n2 Q0 a 1 3 t\n1 Q0 b 1 1 t"))
    assert run == {"2": {"b": 1.5, "a": 3.0}, "1": {"a": 2.0, "b": 1.0}}


def test_compressed_files_and_byte_order_marks(tmp_path: Path) -> None:
    content = "\ufeff1 Q0 a 1 2 t\n".encode()
    assert read_run(wrote(tmp_path, gzip.compress(content), "run.gz")) == read_run(wrote(tmp_path, content))
    assert read_run(tmp_path / "run.gz") == {"1": {"a": 2.0}}


def test_judgements_of_beir(tmp_path: Path) -> None:
    assert read_qrels(wrote(tmp_path, "query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n")) == {"1": {"a": 2, "b": 0}}


def test_topics_in_all_forms(tmp_path: Path) -> None:
    old = (
        "<top>\n<num> Number: 301\n<title> Topic: Crime across\n borders\n\n<desc> Description:\nWho does it?\n</top>\n"
        "<top>\n<num> Number: 302\n<dom> Domain: x\n<title> Polio\n<narr> Narrative:\n</top>\n"
    )
    assert read_topics(wrote(tmp_path, old)) == {"301": "Crime across borders", "302": "Polio"}
    new = "<?xml version='1.0'?>\n<xml><top><num>7</num><title>A &lt; B &amp; C</title></top></xml>"
    assert read_topics(wrote(tmp_path, new)) == {"7": "A < B & C"}
    assert read_topics(wrote(tmp_path, "7\tlift  of\ta wing\n\n8\tdrag\n")) == {"7": "lift of a wing", "8": "drag"}
    assert read_topics(wrote(tmp_path, '\n{"_id": "7", "text": "lift", "metadata": {}}\n')) == {"7": "lift"}


def test_documents_in_all_forms(tmp_path: Path) -> None:
    tagged = (
        "<DOC><DOCNO> A-1 </DOCNO><HEAD>of a</HEAD> plain\n<p>text</p></DOC><DOC>\n<DOCNO>A-2</DOCNO>\n<TITLE>wing\n"
        "</TITLE><TEXT>in a\n<p>\nstream</TEXT><TEXT>again</TEXT>\n</DOC>"
    )
    path = wrote(tmp_path, tagged)
    assert read_documents(path) == {"A-1": "of a plain text", "A-2": "in a stream again"}
    assert read_documents(path, fields=("title", "text"))["A-2"] == "wing in a stream again"
    line = '{"_id": "1", "title": "wing", "text": "in a stream", "url": "u"}'
    assert read_documents(wrote(tmp_path, line)) == {"1": "wing in a stream"}
    assert read_documents(wrote(tmp_path, line), fields=("url", "text")) == {"1": "u in a stream"}
    assert read_documents(wrote(tmp_path, "1\twing\n2\t\n"), empty="keep") == {"1": "wing", "2": ""}
    assert read_documents(wrote(tmp_path, "1\twing\n2\t\n"), empty="drop") == {"1": "wing"}


RUN, QRELS, TOPICS, DOCS = read_run, read_qrels, read_topics, read_documents
MALFORMED = {
    "five columns": (RUN, "1 Q0 a 1 2 t\n1 Q0 b 2 1\n", "2: 5 columns"),
    "seven columns": (RUN, "1 Q0 a 1 2 t x\n", "1: 7 columns"),
    "rank in words": (RUN, "1 Q0 a first 2 t\n", "1: rank 'first' is no whole number"),
    "huge rank": (RUN, f"1 Q0 a {'9' * 400} 2 t\n", "1: rank '9+' is no whole"),
    "score nan": (RUN, "1 Q0 a 1 2 t\n\n1 Q0 b 2 nan t\n", "3: score 'nan' is no finite number"),
    "score in words": (RUN, "1 Q0 a 1 good t\n", "1: score 'good'"),
    "score with underscore": (RUN, "1 Q0 a 1 1_0 t\n", "1: score '1_0'"),
    "document twice": (RUN, "1 Q0 a 1 2 t\n2 Q0 a 1 2 t\n1 Q0 a 2 1 t\n", "3: query '1': document 'a' stands"),
    "rising scores": (RUN, "1 Q0 a 1 1 t\n1 Q0 b 2 2 t\n", "2: query '1' has rank 2 with score 2 below rank 1 with 1"),
    "rising scores, mixed lines": (RUN, "1 Q0 a 1 5 t\n1 Q0 c 3 3 t\n1 Q0 b 2 6 t\n", "3: query '1' has rank 2"),
    "empty run": (RUN, "\n\n", "holds no line"),
    "wrong encoding": (RUN, b"1 Q0 a 1 2 t\n1 Q0 caf\xe9 2 1 t\n", "2: byte 0xe9 at column 9 is no UTF-8"),
    "three columns": (QRELS, "1 a 1\n", "1: 3 columns"),
    "four under a header": (QRELS, "query-id\tcorpus-id\tscore\n1 0 a 1\n", "2: 4 columns"),
    "grade in fractions": (QRELS, "1 0 a 0.5\n", "1: grade '0.5' is no whole number"),
    "pair twice": (QRELS, "1 0 a 1\n1 0 a 0\n", "2: query '1': document 'a' stands here a second"),
    "empty qrels": (QRELS, "", "holds no judgement"),
    "topic without a tab": (TOPICS, "1\tlift\n2 drag\n", "2: no tab"),
    "topic without number": (TOPICS, "1\tlift\n\tdrag\n", "2: topic without a number"),
    "topic without text": (TOPICS, "1\tlift\n2\t \n", "2: topic '2' has no text"),
    "topic twice": (TOPICS, "1\tlift\n1\tdrag\n", "2: topic '1' stands here a second"),
    "topic without num": (TOPICS, "<top>\n<title>lift</title>\n</top>\n", "1: no <num>"),
    "topic without title": (TOPICS, "<top><num>1</num></top>\n", "1: topic '1' has no text"),
    "topic not closed": (TOPICS, "<top><num>1<title>a\n<top><num>2<title>b\n</top>", "2: <top> inside the <top> of"),
    "last topic not closed": (TOPICS, "<x>\n<top><num>1<title>lift\n", "2: <top> has no </top>"),
    "no topic": (TOPICS, "<xml></xml>\n", "holds no topic"),
    "document not opened": (DOCS, "<DOC><DOCNO>1</DOCNO>a</DOC>\n<DOCNO>2</DOCNO>b</DOC>\n", "2: </doc> without <doc>"),
    "document without docno": (DOCS, "<doc>\n<text>a</text>\n</doc>\n", "1: no <docno>"),
    "docno empty": (DOCS, "<doc><docno> </docno>a</doc>\n", "1: document without a number"),
    "document empty": (DOCS, "1\ta\n2\t\n", "2: document '2' has no text; empty='keep'"),
    "number with a blank": (DOCS, "1\ta\n2 b\tc\n", "2: document '2 b': a number with a blank"),
    "bad json": (DOCS, '{"_id": "1", "text": "a"}\n{"_id": "2", "text": \n', "2: no JSON"),
    "json of numbers": (DOCS, '{"_id": 1, "text": "a"}\n', '1: an object with "_id" and "text"'),
    "json without text": (DOCS, '{"_id": "1"}\n', '1: an object with "_id" and "text"'),
    "json of lists": (DOCS, '{"_id": "1", "text": ["a"]}\n', "1: title and text must be texts"),
    "deep json": (DOCS, '{"_id": "1", "text": ' + "[" * 100_000 + "\n", "1: no JSON"),
    "no document": (DOCS, "\n", "holds no document"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    read, content, message = MALFORMED[case]
    path = wrote(tmp_path, content)
    with pytest.raises(MalformedFileError, match=message) as found:
        read(path)
    assert str(found.value).startswith(f"{path}:")
    if path.suffix != ".gz":
        packed = wrote(tmp_path, gzip.compress(path.read_bytes()), "file.gz")
        with pytest.raises(MalformedFileError, match=message):
            read(packed)


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d Q0 a 1 2 t\n" % i for i in range(20_000)))
    for content in (whole[: len(whole) // 2], b"1 Q0 a 1 2 t\n"):
        with pytest.raises(MalformedFileError, match=r"run.gz:\d+: no complete gzip"):
            read_run(wrote(tmp_path, content, "run.gz"))
    with pytest.raises(MalformedFileError, match=r"run.gz:\d+: "):
        read_run(wrote(tmp_path, whole[:4000] + b"xxxx" + whole[4004:], "run.gz"))


def test_absent_files_and_wrong_arguments(tmp_path: Path) -> None:
    for read in (read_run, read_qrels, read_topics, read_documents):
        with pytest.raises(ResourceError, match="absent: no such file"):
            read(tmp_path / "absent")
    with pytest.raises(ValueError, match="empty='maybe'"):
        read_documents(tmp_path / "absent", empty="maybe")
    with pytest.raises(ValueError, match="tag='two words'"):
        write_run(tmp_path / "run", {"1": {"a": 1.0}}, tag="two words")
    with pytest.raises(ValueError, match="document 'a b'"):
        write_run(tmp_path / "run", {"1": {"a b": 1.0}})
    with pytest.raises(ValueError, match="score nan"):
        write_run(tmp_path / "run", {"1": {"a": float("nan")}})
