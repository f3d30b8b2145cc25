"""DRMM: for each word of the query, a histogram of how close the document's words are; a small network reads it.

Buys: a ranker that looks at strengths of matches and not at meanings, and weighs query words by their rarity.

Paper: Guo, Fan, Ai and Croft, "A Deep Relevance Matching Model for Ad-hoc Retrieval" (CIKM 2016, arXiv 1711.08611), the
variant with log-counts and term gating by IDF, its best:

* section 4.1 → :func:`bins_of`: 29 equal bins over cosines in [-1, 1), and one for the same word;
* ``LCH`` → :meth:`DRMM.read`: ``z_i = MLP(ln(1 + counts_i))``, 30 → 5 → 1 with tanh;
* eq. 3 → :meth:`DRMM.read`: ``s = sum_i g_i z_i``, ``g = softmax(w idf)`` over the words of the query.

The paper takes ln(count) without saying what becomes of empty bins; ln(1 + count) is ours. Words that the vocabulary
lacks are left out on either side. A histogram does not move with its vectors: gradients reach the network's weights but
no embedding, so attacks by gradients have nothing to hold (this is no defence: words can still be tried).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.knrm import unit
from ir_robust.rankers.vectors import WordVectors
from ir_robust.rankers.word_model import FeatureModel
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["DRMM", "bins_of"]

N_BINS = 30
ROOM = 1 << 22


def bins_of(cosines: Tensor, same: Tensor) -> Tensor:
    """Return the bins, 0 .. 29, of cosines; ``same`` says where both words are one."""
    place = ((cosines + 1) / 2 * (N_BINS - 1)).long().clamp(0, N_BINS - 2)
    return torch.where(same, N_BINS - 1, place)


class DRMM(FeatureModel):
    """Histograms of matches.

    Args:
        vectors: of the vocabulary.
        idf: (V,) of :func:`ir_robust.rankers.idf_of`; all query words weigh alike if None.
        hidden: width of the small network.
        train_vectors: must be False: nothing would train them.
        generator: seed of the initial weights.
    """

    kind: ClassVar[str] = "drmm"
    idf: Tensor

    def __init__(
        self,
        vectors: WordVectors,
        idf: Tensor | None = None,
        *,
        hidden: int = 5,
        train_vectors: bool = False,
        generator: Seed = None,
    ) -> None:
        if train_vectors:
            raise ValueError("train_vectors=True: a histogram has no gradient with respect to its vectors")
        super().__init__(vectors)
        weights = torch.zeros(len(vectors.vocabulary)) if idf is None else idf.detach().clone().float()
        if weights.shape != (len(vectors.vocabulary),):
            raise ValueError(f"idf: shape {tuple(weights.shape)} for {len(vectors.vocabulary)} words")
        self.register_buffer("idf", weights)
        with reseeded(resolve_seed(generator)):
            self.network = nn.Sequential(nn.Linear(N_BINS, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Tanh())
        self.gate = nn.Parameter(torch.ones(()))
        self.eval()

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments."""
        first = self.network[0]
        return {"hidden": first.out_features}

    def relate(self, query: Tensor, words: Tensor, query_vectors: Tensor, word_vectors: Tensor) -> Tensor:
        """Return (B,) scores in [-1, 1]."""
        cosines = unit(query_vectors) @ unit(word_vectors).transpose(1, 2)
        bins = bins_of(cosines, query[:, :, None] == words[:, None, :])
        return self.read(self._with_gates(self._counts(bins, words), query))

    def _counts(self, bins: Tensor, words: Tensor) -> Tensor:
        """(B, Q, 30) counts of (B, Q, M) bins over the known ones among (B, M) words."""
        there = (words > Vocabulary.UNKNOWN)[:, None].expand_as(bins).to(self.gate.dtype)
        return there.new_zeros(*bins.shape[:2], N_BINS).scatter_add_(2, bins, there)

    def _with_gates(self, counts: Tensor, query: Tensor) -> Tensor:
        """(B, Q, 32): counts, rarity, and whether the query word is known."""
        known = (query > Vocabulary.UNKNOWN).to(counts.dtype)
        rest = torch.stack([self.idf[query].to(counts.dtype), known], 2)
        return torch.cat([counts, rest.expand(len(counts), -1, -1)], 2)

    def read(self, features: Tensor) -> Tensor:
        """Return (B,) scores in [-1, 1] of (B, Q, 32) histograms with rarities; 0 where no query word is known."""
        counts, idf, known = features[..., :N_BINS], features[..., N_BINS], features[..., N_BINS + 1] > 0
        found = self.network(counts.log1p())[..., 0]
        logits = (self.gate * idf).masked_fill(~known, -torch.inf)
        logits = logits.masked_fill(~known.any(1, keepdim=True), 0.0)  # softmax of nothing would be NaN
        return (torch.softmax(logits, 1) * found * known).sum(1)

    def _bins(self, asked: Tensor) -> Tensor:
        """(V, Q): the bin of each word of the vocabulary for (Q,) query words."""
        directions = unit(self.vectors)
        numbers = torch.arange(len(directions), device=asked.device)
        return bins_of(directions @ directions[asked].T, numbers[:, None] == asked)

    def features(self, query: str, words: Tensor) -> Tensor:
        """Return (B, Q, 32) features of (B, M) documents: all that training needs of them."""
        asked, bins = self.numbers([query]), self.kept(query, self._bins)
        words = words.to(asked.device)
        found = [
            self._counts(bins[part].transpose(1, 2), part)
            for part in words.split(max(1, ROOM // max(1, words.shape[1] * asked.shape[1])))
        ]
        return self._with_gates(torch.cat(found), asked)
