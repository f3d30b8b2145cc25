"""Documents, queries and judgements that belong together, from the user's files or from a named collection.

    data = load_collection("beir:scifact")                  # BEIR's folder
    data = read_collection("docs.tsv", "topics.tsv", "qrels.txt")
    data = load_collection("lee")                           # inside gensim: pip install 'ir-robust[claims]'

Named: ``lee`` (50 news texts, graded by people against each other), ``cranfield`` (1,400 abstracts, 225 queries) and
``vaswani`` (11,429 abstracts, 93 queries) below ``root`` or ``$ROBUST_DATA``; ``irds:ID`` asks ir_datasets, the one
source here that downloads, and only if the user names it. Nothing else is ever downloaded.

Two facts of these files decide figures. Cranfield's topics carry numbers with gaps while its judgements count topics by
position: read by number, BM25's nDCG@10 is 0.015 and not 0.352. In the Lee corpus a document is its own best answer, so
it is left out of its own candidates.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ir_robust.formats import Qrels, read_documents, read_qrels, read_topics
from robust_core.data.files import sha256_of
from robust_core.errors import DataMissingError, MalformedFileError, MissingExtraError, optional_import

__all__ = ["NAMED", "Collection", "lee_background", "load_collection", "read_collection"]

PathLike = str | os.PathLike[str]
LEE_GRADES = (0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Collection:
    """What is searched, what is asked, and what is right.

    Attributes:
        docs: number -> text.
        queries: number -> text.
        qrels: query -> document -> grade; may be empty where nothing is measured.
        name: for reports.
        sha256: of the files it was read from, or empty.
        hidden: query -> documents that may not be found for it.

    Raises:
        ValueError: no documents or queries, or judgements of queries that are not there.
    """

    docs: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels = field(default_factory=dict)
    name: str = "collection"
    sha256: str = ""
    hidden: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("docs", "queries"):
            if not len(getattr(self, name)):
                raise ValueError(f"{name}: a collection needs at least one")
        unknown = [qid for qid in self.qrels if qid not in self.queries]
        if unknown:
            raise ValueError(
                f"qrels: {len(unknown)} of {len(self.qrels)} judged queries are not among the {len(self.queries)} "
                f"queries, {unknown[0]!r} first: do both files number queries alike?"
            )

    def judged(self) -> list[str]:
        """Return the queries that have at least one relevant document: the others say nothing of a ranker."""
        return [qid for qid in self.queries if any(grade > 0 for grade in self.qrels.get(qid, {}).values())]

    def check_judged_documents(self) -> None:
        """Refuse judgements of documents that are not there, for the figures of a re-ranker would be capped.

        Raises:
            ValueError: there are such.
        """
        missing = {docno for grades in self.qrels.values() for docno in grades if docno not in self.docs}
        if missing:
            raise ValueError(
                f"qrels: {len(missing)} judged documents are not among the {len(self.docs)} documents, "
                f"{min(missing)!r} first"
            )


def read_collection(
    documents: PathLike,
    topics: PathLike,
    qrels: PathLike | None = None,
    *,
    fields: tuple[str, ...] = ("text",),
    empty: str = "refuse",
    name: str | None = None,
) -> Collection:
    """Return a collection from the user's files; see :mod:`ir_robust.formats` for their forms.

    Args:
        documents: a file of documents.
        topics: a file of queries.
        qrels: a file of judgements, if there is one.
        fields: as of :func:`ir_robust.formats.read_documents`.
        empty: likewise.
        name: for reports; the documents' file if None.

    Raises:
        ResourceError: a file that is not there.
        MalformedFileError: a line that breaks its format.
        ValueError: judgements of queries that are not among the topics.
    """
    files = [Path(p) for p in (documents, topics, qrels) if p is not None]
    docs = read_documents(documents, fields=fields, empty=empty)
    judgements = {} if qrels is None else read_qrels(qrels)
    return Collection(docs, read_topics(topics), judgements, name or files[0].stem, _sha256(files))


def _sha256(files: list[Path]) -> str:
    return "+".join(sha256_of(file)[:16] for file in files)


def load_collection(words: str, root: PathLike | None = None, *, split: str = "test") -> Collection:
    """Return a collection by name: ``lee``, ``cranfield``, ``vaswani``, ``beir:FOLDER`` or ``irds:ID``.

    Args:
        words: the name.
        root: folder with ``cranfield/`` and ``vaswani/``; ``$ROBUST_DATA`` if None.
        split: of BEIR's judgements.

    Raises:
        ValueError: no such name.
        DataMissingError: it is not there; the message says how to get it.
        MissingExtraError: the package that carries it is not installed.
    """
    kind, _, rest = words.partition(":")
    if kind == "beir" and rest:
        return _beir(Path(rest), split)
    if kind == "irds" and rest:
        return _ir_datasets(rest)
    if words == "lee":
        return _lee()
    if words not in NAMED:
        raise ValueError(f"collection {words!r}: choose one of {', '.join(NAMED)}, or beir:FOLDER, or irds:ID")
    place = root if root is not None else os.environ.get("ROBUST_DATA")
    folder = None if place is None else Path(place).expanduser() / words
    if folder is None or not folder.is_dir():
        looked = "ROBUST_DATA is not set" if folder is None else f"{folder} is no folder"
        raise DataMissingError(f"{words}: {looked}. Get {_SOURCES[words]}, and set ROBUST_DATA to the folder above it")
    return _cranfield(folder) if words == "cranfield" else _vaswani(folder)


_SOURCES = {
    "cranfield": "cran.all.1400.xml, cran.qry.xml and cranqrel.trec.txt of github.com/oussbenk/cranfield-trec-dataset "
    "into cranfield/",
    "vaswani": "doc-text.trec, query-text.trec and qrels of github.com/terrier-org/pyterrier, "
    "tests/fixtures/vaswani_npl, into vaswani/",
}
NAMED = ("lee", *_SOURCES)


def _need(files: list[Path]) -> list[Path]:
    for file in files:
        if not file.is_file():
            raise DataMissingError(f"{file} is missing")
    return files


def _cranfield(folder: Path) -> Collection:
    names = ("cran.all.1400.xml", "cran.qry.xml", "cranqrel.trec.txt")
    files = _need([folder / name for name in names])
    docs = read_documents(files[0], empty="keep")  # 471 and 995 hold no text; judgements name them all the same
    by_position = {str(i): text for i, text in enumerate(read_topics(files[1]).values(), 1)}
    qrels = read_qrels(files[2])
    if len(by_position) != 225 or set(qrels) != set(by_position):
        raise MalformedFileError(f"{files[1]}: {len(by_position)} topics; 225 are needed, to count them by position")
    return Collection(docs, by_position, qrels, "cranfield", _sha256(files))


def _vaswani(folder: Path) -> Collection:
    files = _need([folder / name for name in ("doc-text.trec", "query-text.trec", "qrels")])
    queries = {qid: text.lower() for qid, text in read_topics(files[1]).items()}  # they shout; documents do not
    return Collection(read_documents(files[0]), queries, read_qrels(files[2]), "vaswani", _sha256(files))


def _beir(folder: Path, split: str) -> Collection:
    if not folder.is_dir():
        raise DataMissingError(f"beir:{folder}: no such folder; corpus.jsonl, queries.jsonl and qrels/ are needed")
    files = _need([folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"])
    found = read_collection(*files, empty="keep", name=folder.name)
    queries = {qid: text for qid, text in found.queries.items() if qid in found.qrels}  # of this split
    hidden = {qid: frozenset([qid]) for qid in queries if qid in found.docs}  # as BEIR's own evaluation
    return Collection(found.docs, queries, found.qrels, found.name, found.sha256, hidden)


def _ir_datasets(name: str) -> Collection:
    library = optional_import("ir_datasets", extra="datasets", package="ir-robust")
    try:
        data = library.load(name)
    except KeyError:
        raise DataMissingError(f"irds:{name}: ir_datasets knows no such data set") from None
    docs = {doc.doc_id: doc.default_text() for doc in data.docs_iter()}
    queries = {query.query_id: query.default_text() for query in data.queries_iter()}
    qrels: Qrels = {}
    for row in data.qrels_iter() if data.has_qrels() else ():
        qrels.setdefault(row.query_id, {})[row.doc_id] = int(row.relevance)
    return Collection(docs, queries, {k: v for k, v in qrels.items() if k in queries}, f"irds:{name}")


def _lee_folder() -> Path:
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the Lee corpus comes inside 'gensim': pip install 'ir-robust[claims]'")
    return Path(spec.submodule_search_locations[0]) / "test" / "test_data"


def _lee() -> Collection:
    folder = _lee_folder()
    files = _need([folder / "lee.cor", folder / "similarities0-1.txt"])
    texts = [" ".join(line.split()) for line in files[0].read_text(errors="replace").splitlines() if line.strip()]
    upper = np.triu(np.loadtxt(files[1]))
    similarity = upper + np.triu(upper, 1).T
    if len(texts) != 50 or similarity.shape != (50, 50):
        raise MalformedFileError(f"{files[0]}: {len(texts)} texts and a matrix {similarity.shape}; 50 are needed")
    docs = {str(i): text for i, text in enumerate(texts, 1)}
    grades = np.digitize(similarity, LEE_GRADES)
    qrels = {
        str(i + 1): {str(j + 1): int(grades[i, j]) for j in range(50) if i != j and grades[i, j] > 0}
        for i in range(50)
    }  # fmt: skip
    hidden = {docno: frozenset([docno]) for docno in docs}
    return Collection(docs, dict(docs), qrels, "lee", _sha256(files), hidden)


def lee_background() -> list[str]:
    """Return the 300 further news texts that come with the Lee corpus, to train on.

    Raises:
        MissingExtraError: gensim is not installed.
    """
    (file,) = _need([_lee_folder() / "lee_background.cor"])
    return [" ".join(line.split()) for line in file.read_text(errors="replace").splitlines() if line.strip()]
