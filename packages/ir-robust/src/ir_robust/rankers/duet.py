"""Duet: one network reads where the query's words stand in the document, another compares their vectors; scores add.

Buys: a ranker with both kinds of evidence, exact and distributed, and one that sees positions.

Paper: Mitra, Diaz and Craswell, "Learning to Match using Local and Distributed Representations of Text for Web Search"
(WWW 2017, arXiv 1610.08136):

* section 3.1 → :meth:`Duet.local`: the binary matrix of exact matches (query word, position); filters as long as the
  document, tanh, two hidden layers, dropout, a score;
* section 3.2 → :meth:`Duet.distributed`: convolutions over three words on both sides; the query is pooled whole, the
  document in windows; their products, a hidden layer, dropout, a score;
* ``f(q, d) = local + distributed``.

Departures: word vectors stand in the place of counts of letter n-graphs, as in the authors' later Duet
(arXiv 1903.07666); sizes are for small collections (32 filters, 20 and 200 words, windows of 20; the paper has 300
filters, 10 and 1,000 words, windows of 100). What is behind ``n_query`` and ``n_doc`` words is not read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.rankers.word_model import EmbeddedWordModel
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["Duet", "matches"]


def matches(query: Tensor, words: Tensor) -> Tensor:
    """Return (B, Q, M) float32: 1 where a known query word is the document's word."""
    return ((query[:, :, None] == words[:, None, :]) & (query > Vocabulary.UNKNOWN)[:, :, None]).float()


def _fitted(values: Tensor, length: int) -> Tensor:
    """Cut or fill up (with zeros) the second dimension."""
    values = values[:, :length]
    missing = length - values.shape[1]
    return F.pad(values, (0, 0) * (values.ndim - 2) + (0, missing))


class Duet(EmbeddedWordModel):
    """Local and distributed matching.

    Args:
        vectors: of the vocabulary.
        hidden: filters and widths of hidden layers.
        n_query: words of a query that are read.
        n_doc: words of a document that are read.
        window: positions of a document that are pooled together.
        dropout: in training.
        train_vectors: as of :class:`WordModel`.
        generator: seed of the initial weights.
    """

    kind: ClassVar[str] = "duet"

    def __init__(
        self,
        vectors: WordVectors,
        *,
        hidden: int = 32,
        n_query: int = 20,
        n_doc: int = 200,
        window: int = 20,
        dropout: float = 0.2,
        train_vectors: bool = False,
        generator: Seed = None,
    ) -> None:
        super().__init__(vectors, train_vectors=train_vectors)
        for name, value in (("hidden", hidden), ("n_query", n_query), ("window", window)):
            check_count(name, value)
        check_count("n_doc", n_doc, low=window)
        check_number("dropout", dropout, low=0.0, high=1.0, open_high=True)
        self._sizes = {"hidden": hidden, "n_query": n_query, "n_doc": n_doc, "window": window, "dropout": dropout}
        with reseeded(resolve_seed(generator)):
            self.positions = nn.Linear(n_doc, hidden)
            self.local_score = nn.Sequential(
                nn.Flatten(),
                *(nn.Linear(n_query * hidden, hidden), nn.Tanh()),
                *(nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout)),
                nn.Linear(hidden, 1),
            )
            self.query_side = nn.Conv1d(vectors.dim, hidden, 3, padding=1)
            self.query_hidden = nn.Linear(hidden, hidden)
            self.doc_side = nn.Conv1d(vectors.dim, hidden, 3, padding=1)
            self.doc_hidden = nn.Conv1d(hidden, hidden, 1)
            self.distributed_score = nn.Sequential(
                nn.Flatten(),
                *(nn.Linear(hidden * (n_doc // window), hidden), nn.Tanh(), nn.Dropout(dropout)),
                nn.Linear(hidden, 1),
            )
        self.eval()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config, **self._sizes}

    def local(self, query: Tensor, words: Tensor) -> Tensor:
        """Return (B,) scores of (B, n_query) and (B, n_doc) words by their exact matches."""
        found = matches(query, words).to(self.positions.weight.dtype)
        return self.local_score(torch.tanh(self.positions(found)))[:, 0]

    def distributed(self, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores of (B, n_query, D) and (B, n_doc, D) vectors."""
        asked = torch.tanh(self.query_side(query_vectors.transpose(1, 2))).amax(2)
        asked = torch.tanh(self.query_hidden(asked))
        found = torch.tanh(self.doc_side(word_vectors.transpose(1, 2)))
        found = torch.tanh(self.doc_hidden(F.max_pool1d(found, self._sizes["window"])))
        return self.distributed_score(found * asked[:, :, None])[:, 0]

    def relate(self, query: Tensor, words: Tensor, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores; exact matches are those of the numbers, whatever the vectors are."""
        n_query, n_doc = self._sizes["n_query"], self._sizes["n_doc"]
        local = self.local(_fitted(query, n_query), _fitted(words, n_doc))
        return local + self.distributed(_fitted(query_vectors, n_query), _fitted(word_vectors, n_doc))
