"""K-NRM: kernels count how many words of a document are how close to each word of the query.

Buys: the classic interaction ranker of few parameters: with frozen vectors it learns twelve numbers.

Paper: Xiong, Dai, Callan, Liu and Power, "End-to-End Neural Ad-hoc Ranking with Kernel Pooling" (SIGIR 2017,
arXiv 1706.06613). With c_ij the cosine of query word i and document word j:

* eq. 3, 4 → :func:`kernels`: ``K_k(c) = exp(-(c - mu_k)^2 / (2 sigma_k^2))``, summed over j;
* eq. 2 → :func:`pooled`: ``phi_k = 0.01 sum_i ln(max(sum_j K_k(c_ij), 1e-10))``;
* eq. 1 → :meth:`KNRM.relate`: ``tanh(w phi + b)``.

Defaults of the paper: a kernel for exact matches (mu = 1, sigma = 1e-3) and ten at 0.9, 0.7, ..., -0.9 (sigma = 0.1).
The factor 0.01 is of the authors' code. Words that the vocabulary lacks match nothing. ``train_vectors=True`` trains
the vectors too, as the paper does on millions of clicks.

Because soft counts are sums over the document's words, a query makes a table (word, query word, kernel) once, and
variants of documents are scored by gathering from it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.rankers.word_model import EmbeddedWordModel, FeatureModel
from robust_core.random import Seed, resolve_seed

__all__ = ["KNRM", "kernels", "pooled"]

CENTRES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
WIDTHS = (1e-3, *[0.1] * 10)
ROOM = 1 << 24
"""Numbers in a query's table beyond which it is made a few query words at a time."""


def kernels(cosines: Tensor) -> Tensor:
    """Return (..., 11) values of all kernels at (...) cosines."""
    centres, widths = (torch.tensor(v, dtype=cosines.dtype, device=cosines.device) for v in (CENTRES, WIDTHS))
    return torch.exp(-((cosines[..., None] - centres) ** 2) / (2 * widths**2))


def pooled(soft_counts: Tensor, known: Tensor) -> Tensor:
    """Return (B, 11) features of (B, Q, 11) soft counts; (B, Q) says which query words there are."""
    logs = soft_counts.clamp_min(1e-10).log() * 0.01
    return (logs * known[..., None].to(logs.dtype)).sum(1)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, or 0 where they are 0, in float32 at least: 1e-3 is the finest kernel's width."""
    return F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)


class KNRM(FeatureModel, EmbeddedWordModel):
    """Kernel pooling.

    Args:
        vectors: of the vocabulary.
        train_vectors: as of :class:`WordModel`.
        generator: seed of the initial weights.
    """

    kind: ClassVar[str] = "knrm"

    def __init__(self, vectors: WordVectors, *, train_vectors: bool = False, generator: Seed = None) -> None:
        super().__init__(vectors, train_vectors=train_vectors)
        draw = torch.Generator().manual_seed(resolve_seed(generator))
        bound = len(CENTRES) ** -0.5
        self.weight = nn.Parameter(torch.empty(len(CENTRES)).uniform_(-bound, bound, generator=draw))
        self.bias = nn.Parameter(torch.zeros(()))

    def read(self, features: Tensor) -> Tensor:
        """Return (B,) scores in [-1, 1] of (B, 11) features."""
        return torch.tanh(features.to(self.weight.dtype) @ self.weight + self.bias)

    def relate(self, query: Tensor, words: Tensor, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores in [-1, 1]."""
        cosines = unit(query_vectors) @ unit(word_vectors).transpose(1, 2)
        there = (words > Vocabulary.UNKNOWN)[:, None, :, None]
        return self.read(pooled((kernels(cosines) * there).sum(2), query > Vocabulary.UNKNOWN))

    def _table(self, asked: Tensor) -> Tensor:
        """(V, Q * 11): what each word of the vocabulary adds to the soft counts of (Q,) query words."""
        directions = unit(self.vectors)
        values = kernels(directions @ directions[asked].T).flatten(1)
        there = torch.arange(len(values), device=values.device) > Vocabulary.UNKNOWN
        return values * there[:, None]

    def features(self, query: str, words: Tensor) -> Tensor:
        """Return (B, 11) features of (B, M) documents: all that training needs of them while the vectors stay."""
        asked = self.numbers([query])
        words, width = words.to(asked.device), max(1, ROOM // (len(self.vocabulary) * len(CENTRES)))
        if asked.shape[1] <= width:
            tables = [self.kept(query, self._table)]
        else:
            tables = (self._table(part) for part in asked[0].split(width))
        counts = [F.embedding_bag(words, t, mode="sum", padding_idx=Vocabulary.PAD) for t in tables]
        return pooled(torch.cat(counts, 1).unflatten(1, (-1, len(CENTRES))), asked > Vocabulary.UNKNOWN)
