"""What the small rankers share: words by number, frozen word vectors, texts in and scores out.

A model states one function, ``relate``: the score of (query, document) pairs from the numbers and the vectors of their
words. From it follow ``forward`` on padded numbers (training), ``score_words`` (thousands of variants of one document),
``score`` (texts), and, where scores move with the vectors, the form of
:class:`ir_robust.rankers.WhiteBoxRanker`, with a word for a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ir_robust.rankers.base import TokenBatch, Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.text import Words

__all__ = ["EmbeddedWordModel", "FeatureModel", "WordModel", "padded"]


CACHED = 1 << 22
"""Numbers of word vectors that go through a model together."""


def padded(rows: Sequence[Sequence[int]], *, least: int = 1) -> Tensor:
    """Return (B, M) int64 of rows of numbers, filled up at the end with :attr:`Vocabulary.PAD`; M >= ``least``."""
    found = torch.full((len(rows), max([least, *map(len, rows)])), Vocabulary.PAD, dtype=torch.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return found


class WordModel(nn.Module):
    """Base of rankers that see words.

    Args:
        vectors: (V, D) vectors of the vocabulary.
        train_vectors: train them as well, which a small collection does not support.
    """

    kind: ClassVar[str] = ""
    vectors: nn.Parameter

    def __init__(self, vectors: WordVectors, *, train_vectors: bool = False) -> None:
        super().__init__()
        self.vocabulary = vectors.vocabulary
        self.vectors = nn.Parameter(vectors.table.clone(), requires_grad=train_vectors)
        self._words = hashlib.sha256("\n".join(self.vocabulary.words).encode()).hexdigest()  # a fingerprint counts it
        self._kept: dict[Any, Tensor] = {}
        self.eval()

    @property
    def config(self) -> Mapping[str, Any]:
        """What the constructor needs beside the vectors, as plain JSON values."""
        return {"train_vectors": self.vectors.requires_grad}

    def relate(self, query: Tensor, words: Tensor, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores.

        Args:
            query: (B, Q) int64 words of the queries, 0 behind their end.
            words: (B, M) int64 words of the documents.
            query_vectors: (B, Q, D).
            word_vectors: (B, M, D).
        """
        raise TypeError(f"{type(self).__name__} states no relate()")

    def forward(self, query: Tensor, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, Q) queries and (B, M) documents."""
        return self.relate(query, words, self.vectors[query], self.vectors[words])

    def numbers(self, texts: Iterable[str]) -> Tensor:
        """Return (B, M) words of texts, on the model's device."""
        return padded([self.prepare(text) for text in texts]).to(self.vectors.device)

    def kept(self, query: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what ``make`` gives for the (Q,) words of a query; the last query's is kept while no weight changes.

        Nothing is kept where gradients are recorded.
        """
        asked = self.numbers([query])[0]
        if torch.is_grad_enabled():
            return make(asked)
        tensors = (*self.parameters(), *self.buffers())
        key = (query, *((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors))
        if key not in self._kept:
            self._kept = {key: make(asked)}
        return self._kept[key]

    def prepare(self, text: str) -> list[int]:
        """Return the numbers of a text's words: what training works out once for each text."""
        return self.vocabulary.ids(Words.of(text).words)

    def inputs(self, queries: Sequence[list[int]], docs: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return the arguments of :meth:`forward` for pairs of prepared texts."""
        device = self.vectors.device
        return {"query": padded(queries).to(device), "words": padded(docs).to(device)}

    def score_words(self, query: str, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, M) documents."""
        asked = self.numbers([query])
        # vectors that outgrow the caches are slow
        rows = max(1, CACHED // max(1, words.shape[1] * self.vectors.shape[1]))
        parts = words.to(asked.device).split(rows)
        return torch.cat([self(asked.expand(len(part), -1), part) for part in parts])

    def score(self, query: str, docs: Sequence[str]) -> Tensor:
        """Return (N,) scores."""
        if not len(docs):
            return self.vectors.new_zeros(0)
        return self.score_words(query, self.numbers(docs))


class FeatureModel(WordModel):
    """A word model that reads features of query and document: while the vectors stay, training needs nothing else."""

    def features(self, query: str, words: Tensor) -> Tensor:
        """Return (B, ...) features of (B, M) documents."""
        raise TypeError(f"{type(self).__name__} states no features()")

    def read(self, features: Tensor) -> Tensor:
        """Return (B,) scores of (B, ...) features."""
        raise TypeError(f"{type(self).__name__} states no read()")

    def forward(
        self, query: Tensor | None = None, words: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Return (B,) scores of words, or of (B, ...) features in their place."""
        if features is not None:
            return self.read(features)
        if query is None or words is None:
            raise ValueError("query and words, or features, are needed")
        return super().forward(query, words)

    def score_words(self, query: str, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, M) documents."""
        return self.read(self.features(query, words))


class EmbeddedWordModel(WordModel):
    """A word model whose score moves with the vectors of its words: white-box attacks may ask for the gradient."""

    @property
    def token_embeddings(self) -> Tensor:
        """(V, D) vectors."""
        return self.vectors

    def tokens(self, query: str, docs: Sequence[str]) -> TokenBatch:
        """Return query and documents side by side, a word a token."""
        asked, words = self.numbers([query]).expand(len(docs), -1), self.numbers(docs)
        place = torch.arange(words.shape[1], device=words.device).expand_as(words)
        place = torch.where(words == Vocabulary.PAD, -1, place)
        ids, of_query = torch.cat([asked, words], 1), torch.arange(asked.shape[1] + words.shape[1]) < asked.shape[1]
        return TokenBatch(
            ids=ids,
            word=torch.cat([torch.full_like(asked, -1), place], 1),
            inputs={"query": of_query.to(ids.device).expand_as(ids)},
        )

    def score_embedded(self, batch: TokenBatch, embeddings: Tensor) -> Tensor:
        """Return (B,) scores with (B, T, D) vectors in place of the batch's; exact matches stay those of its words."""
        n = int(batch.inputs["query"][0].sum()) if len(batch.ids) else 0
        return self.relate(batch.ids[:, :n], batch.ids[:, n:], embeddings[:, :n], embeddings[:, n:])
