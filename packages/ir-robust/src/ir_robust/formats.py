"""Files of the field: TREC runs, judgements, topics and documents, BEIR's lines of JSON; plain or gzip.

Every reader goes through a file once, takes UTF-8 only, and refuses what breaks the format with file and line: a number
measured on half a file would look as good as any.

====================  =========================================================================
run                   ``qid Q0 docno rank score tag``; ranks from 1, scores falling with them
judgements (qrels)    ``qid 0 docno grade``, or BEIR's table with a header
topics                ``qid TAB text``; ``<top><num>…<title>…</top>``; BEIR's ``queries.jsonl``
documents             ``docno TAB text``; ``<DOC><DOCNO>…</DOCNO>…</DOC>``; BEIR's ``corpus.jsonl``
====================  =========================================================================
"""

from __future__ import annotations

import gzip
import html
import json
import math
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from robust_core.errors import MalformedFileError, ResourceError
from robust_core.io import write_atomic

__all__ = [
    "Qrels",
    "Run",
    "ordered",
    "read_documents",
    "read_qrels",
    "read_run",
    "read_topics",
    "write_qrels",
    "write_run",
]

PathLike = str | os.PathLike[str]
Run = dict[str, dict[str, float]]
"""Query -> document -> score."""
Qrels = dict[str, dict[str, int]]
"""Query -> document -> grade; 0 or less is not relevant."""

LINE_LIMIT = 64 << 20
"""No line may be longer, in bytes: a small archive could unpack to one that fills the memory."""
_TAG = re.compile(r"<[^<>]*>")


def ordered(scores: Mapping[str, float]) -> list[str]:
    """Return documents from best to worst; equal scores go by falling document number, as in trec_eval."""
    return sorted(sorted(scores, reverse=True), key=lambda docno: -scores[docno])


def lines(path: PathLike) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its end) of each line of a plain or gzip file.

    Raises:
        ResourceError: there is no such file.
        MalformedFileError: a line that is no UTF-8 or too long, a broken archive.
    """
    file = Path(path)
    if not file.is_file():
        raise ResourceError(f"{file}: no such file")
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            while raw := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(raw) > LINE_LIMIT:
                    raise MalformedFileError(f"{file}:{number}: a line of more than {LINE_LIMIT >> 20} MiB")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        what = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1} is no UTF-8"
        raise MalformedFileError(f"{file}:{number}: {what}; convert it: iconv -f latin1 -t utf-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MalformedFileError(f"{file}:{number + 1}: no complete gzip file ({error})") from None


def _put(found: dict, key: str, value: object, where: str, what: str) -> None:
    if not key:
        raise MalformedFileError(f"{where}: {what} without a number")
    if len(key.split()) != 1:
        raise MalformedFileError(f"{where}: {what} {key!r}: a number with a blank cannot stand in the columns of a run")
    if key in found:
        raise MalformedFileError(f"{where}: {what} {key!r} stands here a second time")
    found[key] = value


def read_run(path: PathLike) -> Run:
    """Return the scores of a TREC run.

    Raises:
        ResourceError: there is no such file.
        MalformedFileError: a line of other than six columns, a rank or score that is no number, a document twice under
            one query, scores that rise while ranks fall, or no line at all.
    """
    run: Run = {}
    places: dict[str, tuple[array[int], array[int]]] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        where, columns = f"{path}:{number}", line.split()
        if len(columns) != 6:
            raise MalformedFileError(f"{where}: {len(columns)} columns; 'qid Q0 docno rank score tag' is needed")
        qid, _, docno, rank_text, score_text, _ = columns
        rank, score = int(_number(rank_text, int, where, "rank")), _number(score_text, float, where, "score")
        ranks, numbers = places.setdefault(qid, (array("q"), array("q")))
        ranks.append(rank)
        numbers.append(number)
        _put(run.setdefault(qid, {}), docno, score, where, f"query {qid!r}: document")
    if not run:
        raise MalformedFileError(f"{path}: holds no line; 'qid Q0 docno rank score tag' is needed")
    for qid, (ranks, numbers) in places.items():
        _check_fall(path, qid, np.array(ranks), np.array(list(run[qid].values())), numbers)
    return run


def _check_fall(path: PathLike, qid: str, ranks: np.ndarray, scores: np.ndarray, numbers: array[int]) -> None:
    """Refuse scores that rise from one rank to the next; equal ranks say nothing."""
    order = np.lexsort((-scores, ranks))
    rises = np.flatnonzero(np.diff(scores[order]) > 0)
    if len(rises):
        a, b = order[rises[0]], order[rises[0] + 1]
        raise MalformedFileError(
            f"{path}:{numbers[int(max(a, b))]}: query {qid!r} has rank {ranks[b]} with score {scores[b]:g} below rank "
            f"{ranks[a]} with {scores[a]:g}; evaluation goes by scores, so they must fall with the ranks"
        )


def write_run(path: PathLike, run: Mapping[str, Mapping[str, float]], tag: str = "robust") -> Path:
    """Write a TREC run, ordered as :func:`ordered` does; scores are written so that they read back the same."""
    if len(tag.split()) != 1:
        raise ValueError(f"tag={tag!r}: one word is needed")
    for qid, scores in run.items():
        for docno, score in scores.items():
            if not math.isfinite(score) or len(qid.split()) != 1 or len(docno.split()) != 1:
                raise ValueError(
                    f"run: query {qid!r}, document {docno!r}, score {score}: numbers without blanks and a finite score "
                    "are needed"
                )
    rows = [
        f"{qid} Q0 {docno} {rank} {float(scores[docno])!r} {tag}\n"
        for qid, scores in run.items()
        for rank, docno in enumerate(ordered(scores), 1)
    ]
    write_atomic(Path(path), "".join(rows))
    return Path(path)


def read_qrels(path: PathLike) -> Qrels:
    """Return judgements in TREC's four columns, or in BEIR's three with a header.

    Raises:
        ResourceError: there is no such file.
        MalformedFileError: a line of other columns, a grade that is no whole number, a pair twice, or no line at all.
    """
    qrels: Qrels = {}
    form = "qid 0 docno grade"
    for number, line in lines(path):
        where, columns = f"{path}:{number}", line.split()
        if number == 1 and columns[:1] == ["query-id"]:
            form = "query-id corpus-id score"
            continue
        if not columns:
            continue
        if len(columns) != len(form.split()):
            raise MalformedFileError(f"{where}: {len(columns)} columns; '{form}' is needed")
        qid, docno, grade = columns[0], columns[-2], columns[-1]
        value = int(_number(grade, int, where, "grade"))
        _put(qrels.setdefault(qid, {}), docno, value, where, f"query {qid!r}: document")
    if not qrels:
        raise MalformedFileError(f"{path}: holds no judgement; 'qid 0 docno grade' is needed")
    return qrels


def write_qrels(path: PathLike, qrels: Mapping[str, Mapping[str, int]]) -> Path:
    """Write judgements in TREC's four columns."""
    rows = [f"{qid} 0 {docno} {grade}\n" for qid, grades in qrels.items() for docno, grade in grades.items()]
    write_atomic(Path(path), "".join(rows))
    return Path(path)


def _number(text: str, kind: Callable[[str], float], where: str, what: str) -> float:
    try:
        value = math.nan if "_" in text else kind(text)
    except ValueError:
        value = math.nan
    if not abs(value) < (1 << 53 if kind is int else math.inf):
        raise MalformedFileError(f"{where}: {what} {text!r} is no {'whole' if kind is int else 'finite'} number")
    return value


def read_topics(path: PathLike) -> dict[str, str]:
    """Return query -> text of topics in any of the three forms, told apart by their first sign.

    Raises:
        ResourceError: there is no such file.
        MalformedFileError: a topic without number or text, one that stands twice, or none at all.
    """
    return _read_texts(path, "topic", "top", "num", ("title",))


def read_documents(path: PathLike, *, fields: tuple[str, ...] = ("text",), empty: str = "refuse") -> dict[str, str]:
    """Return document number -> text of documents in any of the three forms, told apart by their first sign.

    Args:
        path: a file.
        fields: tags or keys whose contents make up the text, in this order, joined by a blank; a tagged document that
            has none of them is taken whole, and JSON's ``title`` goes before its ``text``.
        empty: what becomes of a document without text: ``"refuse"``, ``"keep"`` or ``"drop"``.

    Raises:
        ResourceError: there is no such file.
        MalformedFileError: a document without a number, one that stands twice, an empty one, or none at all.
    """
    if empty not in ("refuse", "keep", "drop"):
        raise ValueError(f"empty={empty!r}: choose one of 'refuse', 'keep', 'drop'")
    found = _read_texts(path, "document", "doc", "docno", fields, allow_empty=empty != "refuse")
    return {k: v for k, v in found.items() if v} if empty == "drop" else found


def _read_texts(
    path: PathLike, what: str, block: str, number_tag: str, fields: tuple[str, ...], allow_empty: bool = False
) -> dict[str, str]:
    found: dict[str, str] = {}
    for where, key, text in _texts(path, block, number_tag, fields):
        value = " ".join(text.split())
        _put(found, key, value, where, what)
        if not value and not allow_empty:
            hint = "; empty='keep' or 'drop' allows it" if what == "document" else ""
            raise MalformedFileError(f"{where}: {what} {key!r} has no text{hint}")
    if not found:
        raise MalformedFileError(f"{path}: holds no {what}")
    return found


def _texts(path: PathLike, block: str, number_tag: str, fields: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield (where, number, text); the form is told by the first sign that is no blank."""
    rows = ((number, line) for number, line in lines(path) if line.strip())
    first = next(rows, None)
    if first is None:
        return
    rows, sign = chain([first], rows), first[1].lstrip()[0]
    if sign == "<":
        for number, text in _blocks(path, rows, block):
            yield (f"{path}:{number}", *_from_tags(text, f"{path}:{number}", number_tag, fields))
        return
    for number, line in rows:
        where = f"{path}:{number}"
        if sign == "{":
            yield (where, *_from_json(line, where, fields))
            continue
        key, tab, text = line.partition("\t")
        if not tab:
            raise MalformedFileError(f"{where}: no tab between number and text")
        yield where, key.strip(), text


def _blocks(path: PathLike, rows: Iterator[tuple[int, str]], block: str) -> Iterator[tuple[int, str]]:
    """Yield (line of its begin, text between) of each ``<block>``; what stands outside of them is a wrapper."""
    border = re.compile(rf"<(/?){block}(?:\s[^<>]*)?>", re.IGNORECASE)
    opened, parts = 0, []
    for number, line in rows:
        at = 0
        for tag in border.finditer(line):
            if bool(tag.group(1)) != bool(opened):
                what = f"<{block}> inside the <{block}> of line {opened}" if opened else f"</{block}> without <{block}>"
                raise MalformedFileError(f"{path}:{number}: {what}")
            if opened:
                yield opened, "\n".join([*parts, line[at : tag.start()]])
            opened, parts, at = (0 if opened else number), [], tag.end()
        if opened:
            parts.append(line[at:])
    if opened:
        raise MalformedFileError(f"{path}:{opened}: <{block}> has no </{block}>")


def _from_json(line: str, where: str, fields: tuple[str, ...]) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{where}: no JSON ({error})") from None
    keys = ("title", "text") if fields in (("text",), ("title",)) else fields
    if not isinstance(row, dict) or not isinstance(row.get("_id"), str) or "text" not in row:
        raise MalformedFileError(f'{where}: an object with "_id" and "text" is needed')
    texts = [row.get(key) or "" for key in keys]
    if not all(isinstance(text, str) for text in texts):
        raise MalformedFileError(f"{where}: {' and '.join(keys)} must be texts")
    return row["_id"], " ".join(texts)


def _from_tags(block: str, where: str, number_tag: str, fields: tuple[str, ...]) -> tuple[str, str]:
    """Read one document or topic; old topics open tags without closing them."""
    number = re.search(f"<{number_tag}>([^<]*)", block, re.IGNORECASE)
    if number is None:
        raise MalformedFileError(f"{where}: no <{number_tag}>")
    key = re.sub(r"^\s*Number:", "", number.group(1), flags=re.IGNORECASE).strip()
    texts = []
    for field in fields:
        closed = re.findall(f"<{field}>(.*?)</{field}>", block, re.IGNORECASE | re.DOTALL)
        texts += closed or re.findall(rf"<{field}>(.*?)(?=\n\s*<|\Z)", block, re.IGNORECASE | re.DOTALL)
    rest = block[: number.start()] + block[number.end() :]
    chosen = " ".join(texts) if texts or number_tag == "num" else rest
    chosen = re.sub(r"^\s*Topic:", "", chosen, flags=re.IGNORECASE) if number_tag == "num" else chosen
    return key, html.unescape(_TAG.sub(" ", chosen))
