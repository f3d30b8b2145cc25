"""What a ranker is: anything with ``score(query, docs) -> (N,) numbers``, higher is better, on any scale.

A plain callable of the same form is one too. Two richer forms let the suite work faster or look inside:

* :class:`WordRanker` reads words by number, so that thousands of variants of a document are scored without writing and
  splitting their texts again;
* :class:`WhiteBoxRanker` shows its tokens and takes their embeddings, for attacks by gradients.

A score may depend on its query and its document alone: not on the company of a call. :func:`scores_of` is the one way
in which the suite asks for scores; it batches, and refuses what no ranking can be made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ir_robust.collection import Collection
from ir_robust.formats import Run, ordered
from robust_core.checks import check_count

__all__ = [
    "CallableRanker",
    "Ranker",
    "TokenBatch",
    "Vocabulary",
    "WhiteBoxRanker",
    "WordRanker",
    "as_ranker",
    "candidates",
    "rerank",
    "scores_of",
]


@runtime_checkable
class Ranker(Protocol):
    """Scores documents for a query."""

    def score(self, query: str, docs: Sequence[str]) -> Any:
        """Return (N,) scores, an array or a tensor, one for each document."""
        ...


@dataclass(frozen=True)
class CallableRanker:
    """A function ``(query, docs) -> scores`` as a ranker."""

    function: Callable[[str, Sequence[str]], Any]

    def score(self, query: str, docs: Sequence[str]) -> Any:
        """Return what the function says."""
        return self.function(query, docs)


class Vocabulary:
    """Words by number; 0 is the place holder behind the end of a text, 1 every unknown word."""

    PAD, UNKNOWN = 0, 1

    def __init__(self, words: Sequence[str]) -> None:
        self.words = ("", "\N{REPLACEMENT CHARACTER}", *dict.fromkeys(words))
        self._ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        """Return whether a word is known."""
        return word in self._ids

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the numbers of words in lower case."""
        return [self._ids.get(word, self.UNKNOWN) for word in words]


@runtime_checkable
class WordRanker(Ranker, Protocol):
    """A ranker that sees a document as the numbers of its words (of :class:`ir_robust.text.Words`) and nothing else."""

    vocabulary: Vocabulary

    def score_words(self, query: str, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, M) int64 words, padded with :attr:`Vocabulary.PAD` at the end; differentiable."""
        ...


@dataclass(frozen=True)
class TokenBatch:
    """Documents of one query as the network sees them.

    Attributes:
        ids: (B, T) int64.
        word: (B, T) int64: which word of the document (its place in :class:`ir_robust.text.Words`) a token belongs to;
            -1 for the query, signs, marks and padding.
        inputs: everything else that the network wants, such as ``attention_mask``, each (B, T).
    """

    ids: Tensor
    word: Tensor
    inputs: Mapping[str, Tensor]


@runtime_checkable
class WhiteBoxRanker(Ranker, Protocol):
    """A ranker whose gradient with respect to token embeddings can be asked for."""

    def tokens(self, query: str, docs: Sequence[str]) -> TokenBatch:
        """Return the documents in tokens."""
        ...

    @property
    def token_embeddings(self) -> Tensor:
        """(V, D): what :meth:`score_embedded` expects for each token."""
        ...

    def score_embedded(self, batch: TokenBatch, embeddings: Tensor) -> Tensor:
        """Return (B,) scores, differentiable, with (B, T, D) embeddings in place of the batch's tokens."""
        ...


def as_ranker(ranker: Any) -> Ranker:
    """Return ``ranker`` as a :class:`Ranker`.

    Raises:
        TypeError: it has no ``score`` and cannot be called.
    """
    if isinstance(ranker, Ranker):
        return ranker
    if callable(ranker):
        return CallableRanker(ranker)
    raise TypeError(f"ranker is {type(ranker).__name__}; score(query, docs) or a callable of this form is needed")


def scores_of(ranker: Ranker, query: str, docs: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
    """Return (N,) float64 scores of documents.

    Args:
        ranker: whose.
        query: the query.
        docs: N texts.
        batch_size: documents in a call.

    Raises:
        ValueError: the ranker gives another number of scores, or NaN or infinity.
    """
    check_count("batch_size", batch_size)
    parts = []
    for start in range(0, len(docs), batch_size):
        block = docs[start : start + batch_size]
        with torch.no_grad():
            found = ranker.score(query, block)
        values = found.detach().to("cpu", torch.float64).numpy() if isinstance(found, Tensor) else np.asarray(found)
        values = values.astype(np.float64)
        if values.shape != (len(block),):
            raise ValueError(f"ranker: scores of shape {values.shape} for {len(block)} documents; one each is needed")
        if not np.isfinite(values).all():
            where = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"ranker: the score of document {start + where} is {values[where]}; an empty text, or one that is too "
                f"long? It begins {block[where][:40]!r}"
            )
        parts.append(values)
    return np.concatenate(parts) if parts else np.empty(0)


def candidates(run: Run, data: Collection, depth: int | None = None) -> dict[str, list[str]]:
    """Return query -> its documents in order, the first ``depth`` of them that are not hidden from it.

    Raises:
        ValueError: queries or documents that the collection does not have.
    """
    strange = [qid for qid in run if qid not in data.queries]
    if strange:
        raise ValueError(f"run: {len(strange)} queries are not in the collection, {strange[0]!r} first")
    lists = {}
    for qid, scores in run.items():
        hidden = data.hidden.get(qid, frozenset())
        lists[qid] = [docno for docno in ordered(scores) if docno not in hidden][:depth]
        unknown = next((docno for docno in lists[qid] if docno not in data.docs), None)
        if unknown is not None:
            raise ValueError(f"run: query {qid!r} ranks document {unknown!r}, which the collection does not have")
    return lists


def rerank(
    ranker: Any,
    data: Collection,
    run: Run,
    *,
    depth: int | None = 100,
    batch_size: int = 256,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Return the candidates of a first stage with new scores.

    Args:
        ranker: anything that :func:`as_ranker` takes.
        data: where queries and documents are found.
        run: the first stage.
        depth: how many documents of each query; None takes all.
        batch_size: documents in a call.
        on_step: called with ("rank", queries done, queries in all).
    """
    judge, lists = as_ranker(ranker), candidates(run, data, depth)
    found: Run = {}
    for done, (qid, docnos) in enumerate(lists.items(), 1):
        scores = scores_of(judge, data.queries[qid], [data.docs[d] for d in docnos], batch_size=batch_size)
        found[qid] = dict(zip(docnos, scores.tolist(), strict=True))
        if on_step is not None:
            on_step("rank", done, len(lists))
    return found
