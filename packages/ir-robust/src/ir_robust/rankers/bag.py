"""Bag of embeddings: the smallest ranker that learns, and the fastest to ask.

A text is the mean of its words' frozen vectors, projected by a trained matrix P: ``e(t) = P mean_i v(t_i)``; the score
is ``s <e(q), e(d)>`` with a trained scale s. Order and company of words do not matter, so for a fixed query each word
has a number of its own, ``u(w) = s <e(q), P v(w)>``, and a document's score is the mean of its words' numbers:
:meth:`BagRanker.score_words` gathers and averages, and never touches a vector. That also makes the ranker additive, for
which smoothed scores and worst substitutions have closed forms: the yardstick of certificates and attacks.

Source: the neural bag of words with a bilinear match, folklore; ours are its use and its defaults (64 dimensions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.rankers.word_model import EmbeddedWordModel
from robust_core.checks import check_count
from robust_core.random import Seed, resolve_seed

__all__ = ["BagRanker"]


def _mean(vectors: Tensor, words: Tensor) -> Tensor:
    """(B, D) mean over (B, M, D) where there is a word; 0 for an empty text."""
    there = (words != Vocabulary.PAD).to(vectors.dtype)[..., None]
    return (vectors * there).sum(1) / there.sum(1).clamp_min(1)


class BagRanker(EmbeddedWordModel):
    """Mean of word vectors, projected, by a scaled dot product.

    Args:
        vectors: of the vocabulary.
        dim: rows of the projection.
        train_vectors: as of :class:`WordModel`.
        generator: seed of the projection.
    """

    kind: ClassVar[str] = "bag"

    def __init__(
        self, vectors: WordVectors, *, dim: int = 64, train_vectors: bool = False, generator: Seed = None
    ) -> None:
        super().__init__(vectors, train_vectors=train_vectors)
        check_count("dim", dim)
        draw = torch.Generator().manual_seed(resolve_seed(generator))
        # P'P is near the identity at first: the untrained score is the plain inner product of the means
        self.project = nn.Parameter(torch.randn(dim, vectors.dim, generator=draw) / dim**0.5)
        self.scale = nn.Parameter(torch.tensor(10.0))

    @property
    def config(self) -> Mapping[str, Any]:
        """The constructor's arguments."""
        return {**super().config, "dim": len(self.project)}

    def relate(self, query: Tensor, words: Tensor, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores."""
        asked, found = _mean(query_vectors, query) @ self.project.T, _mean(word_vectors, words) @ self.project.T
        return self.scale * (asked * found).sum(1)

    def forward(self, query: Tensor, words: Tensor) -> Tensor:
        """Return (B,) scores; the same as of :meth:`relate`, without the (B, M, D) vectors in between."""
        asked, found = (
            F.embedding_bag(part, self.vectors, mode="mean", padding_idx=Vocabulary.PAD) @ self.project.T
            for part in (query, words)
        )
        return self.scale * (asked * found).sum(1)

    def word_scores(self, query: str) -> Tensor:
        """Return (V,) float64: u(w) of each word for a query; 0 for the end of a text."""
        return self.kept(query, self._word_scores)

    def _word_scores(self, asked: Tensor) -> Tensor:
        mean = _mean(self.vectors[asked][None], asked[None])[0]
        return (self.scale * (self.vectors @ (self.project.T @ (self.project @ mean)))).double()

    def score_words(self, query: str, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, M) documents: one gather and a mean, in float64, so that no grouping shows."""
        numbers = self.word_scores(query)
        words = words.to(numbers.device)
        length = (words != Vocabulary.PAD).sum(1).clamp_min(1)
        return (numbers[words].sum(1) / length).to(self.vectors.dtype)
