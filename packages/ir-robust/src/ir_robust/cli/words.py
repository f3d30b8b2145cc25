"""The words of ``robust ranking``, checked before torch is imported: a typing error is told at once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from robust_core.errors import ResourceError
from robust_core.words import check_module, check_word, parse_spec

__all__ = [
    "ATTACKS",
    "BM25",
    "BOUNDS",
    "EMPTY",
    "FOLDERS",
    "MODELS",
    "NAMED",
    "READY",
    "RULES",
    "SUBSTITUTIONS",
    "SYNONYMS",
    "TASKS",
    "check",
    "check_vectors",
    "listed",
    "split_ranker",
]

NAMED = ("lee", "cranfield", "vaswani")
EMPTY = ("refuse", "keep", "drop")
BM25 = "bm25"
READY = (BM25, "minilm")
FOLDERS = ("saved", "cross", "bi", "sbert", "colbert")
"""Rankers that lie in a folder."""
SYNONYMS = ("json", "wordnet", "vectors")
MODELS = ("bag", "drmm", "duet", "knrm")
BOUNDS = ("betting", "bernstein", "chernoff", "hoeffding")
RULES = ("per_document", "paper")
TASKS = ("variance", "type", "corpus", "query", "document")
SUBSTITUTIONS = ("greedy", "beam", "pgd", "gcg", "random", "exhaustive")
"""Searches for synonyms, of :data:`robust_core.attacks.tokens.SEARCHES`."""
ATTACKS = ("spam", "sentences", "deletion", "trigger", *SUBSTITUTIONS)


def split_ranker(words: str) -> tuple[str, str]:
    """Return (kind, name) of ``bm25``, ``minilm``, ``sbert:FOLDER`` or ``package.module:name``.

    Raises:
        ValueError: words of no known form.
    """
    if words in READY:
        return words, ""
    kind, colon, name = words.partition(":")
    if colon and name and kind in FOLDERS:
        return kind, name
    try:
        found = parse_spec(words)
    except ValueError:
        found = ("", "")
    if found[0] != "factory":
        known = ", ".join(f"{kind}:FOLDER" for kind in FOLDERS)
        raise ValueError(f"--ranker {words!r}: {', '.join(READY)}, {known} or package.module:name is needed")
    return found


def listed(option: str, text: str, allowed: Sequence[str] | None = None) -> list[str]:
    """Return the words of a comma-separated list, each once.

    Raises:
        ValueError: no word, or one that is not allowed.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError(f"{option} {text!r}: at least one name is needed")
    for word in words if allowed is not None else ():
        check_word(option, word, allowed or ())
    return words


def check(
    *,
    corpus: str | None = None,
    topics: Path | None = None,
    empty: str = "refuse",
    ranker: str | None = None,
    files: Mapping[str, Path | None] | None = None,
    folder: Path | None = None,
    writes: Path | None = None,
    resume: Path | None = None,
    synonyms: str | None = None,
    attacks: str | None = None,
    shares: Mapping[str, float] | None = None,
) -> None:
    """Refuse what can be refused by looking at the words and the disk.

    Args:
        corpus: words of a collection.
        topics: its queries, where it is a file.
        empty: what becomes of empty documents.
        ranker: words of a ranker.
        files: option -> file that must be there, where one is given.
        folder: to write to.
        writes: a file to write.
        resume: a file of finished queries.
        synonyms: words of a graph.
        attacks: names, with commas.
        shares: option -> number that must lie strictly between 0 and 1.

    Raises:
        ValueError: a word of no known form.
        ResourceError: a file that is not there, or a place that cannot be written.
    """
    if corpus is not None:
        _check_corpus(corpus, topics)
    check_word("--empty", empty, EMPTY)
    if ranker is not None:
        kind, name = split_ranker(ranker)
        if kind in FOLDERS and not Path(name).expanduser().is_dir():
            raise ResourceError(f"--ranker {ranker}: no such folder {name}")
        if kind == "factory":
            check_module(name)
    for option, file in {"--topics": topics, **(files or {})}.items():
        if file is not None and not file.is_file():
            raise ResourceError(f"{option} {file}: no such file")
    _check_synonyms(synonyms)
    named = [] if attacks is None else listed("--attacks", attacks, ATTACKS)
    writes_synonyms = [name for name in named if name in SUBSTITUTIONS]
    if writes_synonyms and synonyms is None:
        raise ValueError(f"--attacks {writes_synonyms[0]}: --synonyms is needed, what may be written for what")
    for option, value in (shares or {}).items():
        if not (math.isfinite(value) and 0 < value < 1):
            raise ValueError(f"{option} {value}: a number between 0 and 1 is needed")
    _check_places(folder, writes, resume)


def check_vectors(vectors: str | None) -> None:
    """Refuse ``--vectors`` that are neither a file nor a folder.

    Raises:
        ResourceError: there is nothing of that name.
    """
    if vectors is not None and not Path(vectors).expanduser().exists():
        raise ResourceError(f"--vectors {vectors}: no such file or folder")


def _check_corpus(corpus: str, topics: Path | None) -> None:
    kind, colon, name = corpus.partition(":")
    if corpus in NAMED or (colon and name and kind in ("beir", "irds")):
        if topics is not None:
            raise ValueError(f"--topics {topics}: {corpus} brings its own queries")
        if kind == "beir" and not Path(name).is_dir():
            raise ResourceError(f"--corpus {corpus}: no such folder {name}")
        return
    if not Path(corpus).is_file():
        raise ResourceError(f"--corpus {corpus}: no such file, nor one of {', '.join(NAMED)}, beir:FOLDER, irds:ID")
    if topics is None:
        raise ValueError(f"--corpus {corpus}: a file of documents needs --topics, the file of their queries")


def _check_synonyms(synonyms: str | None) -> None:
    if synonyms is None:
        return
    kind, colon, name = synonyms.partition(":")
    if not colon or kind not in SYNONYMS:
        raise ValueError(f"--synonyms {synonyms!r}: json:FILE, wordnet:FOLDER or vectors:FILE is needed")
    place = Path(name).expanduser()
    if not (place.is_dir() if kind == "wordnet" else place.is_file()):
        raise ResourceError(f"--synonyms {synonyms}: no such {'folder' if kind == 'wordnet' else 'file'}")


def _check_places(folder: Path | None, writes: Path | None, resume: Path | None) -> None:
    if folder is not None and (folder.is_file() or not os.access(_nearest(folder), os.W_OK)):
        raise ResourceError(f"--out {folder}: a folder that can be written is needed")
    for option, file in {"--out": writes, "--resume": resume}.items():
        if file is not None and (file.is_dir() or not os.access(_nearest(file.parent), os.W_OK)):
            raise ResourceError(f"{option} {file}: a file in a folder that can be written is needed")


def _nearest(folder: Path) -> Path:
    here = folder.absolute()
    while not here.exists():
        here = here.parent
    return here
