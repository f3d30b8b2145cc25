"""The plain alternative that every smoothed certificate has to beat: one word stands for its whole component.

Each word is replaced by its component's representative before the ranker sees it. No substitution inside components
changes anything, so the score of an attacked document is *equal*, whatever the sizes of the components, with one
deterministic score instead of a thousand samples, and no failure probability: nearly every query is certified. What is
paid is the quality of the ranking, for the ranker no longer sees which of the synonyms was written. Shares of certified
queries mean nothing without that loss beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir_robust.certdr.certificate import TopKCertificate, order_of
from ir_robust.rankers.base import Ranker, as_ranker, scores_of
from ir_robust.tables import PerturbationTable
from ir_robust.text import Words
from robust_core.checks import check_count, check_number

__all__ = ["RepresentativeRanker"]


class RepresentativeRanker:
    """A ranker that reads representatives instead of words.

    Args:
        ranker: any ranker.
        table: whose components count, and within which attacks stay.
        batch_size: documents in one call.
    """

    def __init__(self, ranker: Any, table: PerturbationTable, *, batch_size: int = 256) -> None:
        self.ranker: Ranker = as_ranker(ranker)
        self.table, self.batch_size = table, check_count("batch_size", batch_size)

    def text(self, doc: str) -> str:
        """Return what the ranker reads; words without synonyms stay to the letter."""
        words = Words.of(doc)
        return words.lowered([self.table.representative(w) if w in self.table.graph else None for w in words.words])

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        """Return (N,) scores on the ranker's own scale."""
        return scores_of(self.ranker, query, [self.text(doc) for doc in docs], batch_size=self.batch_size)

    def certify(
        self,
        query: str,
        docs: Sequence[str],
        ks: int | Sequence[int],
        *,
        names: Sequence[str] | None = None,
        tolerance: float = 1e-6,
    ) -> dict[int, TopKCertificate]:
        """Return K -> certificate: certified where no outsider ties with the K-th, which no attack can change.

        Args:
            query: the query.
            docs: the texts of the list.
            ks: which K.
            names: document numbers, for the order of equals.
            tolerance: share of the largest score by which rankers may disagree with themselves between calls.
        """
        check_number("tolerance", tolerance, low=0.0)
        scores = self.score(query, docs)
        order, slack = order_of(scores, names), tolerance * float(np.abs(scores).max(initial=0.0))
        found = {}
        for k in [ks] if isinstance(ks, int) else ks:
            check_count("k", k)
            inside, outside = scores[order[:k]], scores[order[k:]]
            margin = float(inside.min() - outside.max() - slack) if len(outside) else float("inf")
            found[k] = TopKCertificate(k, tuple(order[:k].tolist()), margin > 0.0, margin, 0.0, 0.0, 0.0, len(docs))
        return found
