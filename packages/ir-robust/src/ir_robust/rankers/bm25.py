"""BM25: the first stage by bm25s, and the same numbers for texts that no index holds.

An attacked document is not in the index, so re-ranking needs the score of a free text under the statistics of a fixed
corpus: ``sum_t idf(t) tf / (tf + k1 (1 - b + b |d| / avgdl))`` with ``idf = ln(1 + (N - df + 0.5) / (df + 0.5))``
(Lucene's form, bm25s's default; the textbook's factor ``k1 + 1`` changes no ranking). Splitting into words is bm25s's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bm25s
import numpy as np

from ir_robust.collection import Collection
from ir_robust.formats import Run
from robust_core.checks import check_count, check_number

__all__ = ["BM25Index", "BM25Ranker"]


class BM25Index:
    """A corpus with its index and statistics.

    Args:
        docs: number -> text.
        k1: how fast repeated words saturate.
        b: how far long documents are discounted, in [0, 1].
        stopwords: a language that bm25s knows, a list, or None.
        stemmer: as bm25s takes it, e.g. ``Stemmer.Stemmer("english")`` of PyStemmer.
    """

    def __init__(
        self,
        docs: Mapping[str, str],
        *,
        k1: float = 1.2,
        b: float = 0.75,
        stopwords: str | list[str] | None = "en",
        stemmer: Any = None,
    ) -> None:
        self.k1 = check_number("k1", k1, low=0.0)
        self.b = check_number("b", b, low=0.0, high=1.0)
        self.stopwords, self.stemmer = stopwords, stemmer
        self.docnos = list(docs)
        if not self.docnos:
            raise ValueError("docs: an index needs at least one document")
        tokens = self.tokens(list(docs.values()))
        if not any(tokens):
            raise ValueError(f"docs: no word in {len(tokens)} documents but those of stopwords={self.stopwords!r}")
        self.n_docs = len(tokens)
        self.mean_length = sum(map(len, tokens)) / self.n_docs
        counts = Counter(word for document in tokens for word in set(document))
        self.idf = {word: math.log1p((self.n_docs - df + 0.5) / (df + 0.5)) for word, df in counts.items()}
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(tokens, show_progress=False)

    def tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the words of texts as the index counts them."""
        found: Any = bm25s.tokenize(
            list(texts), stopwords=self.stopwords or [], stemmer=self.stemmer, return_ids=False, show_progress=False
        )
        return found

    def scores(self, query: str) -> np.ndarray:
        """Return (N,) scores of the whole corpus, in the order of ``docnos``."""
        words = [word for word in self.tokens([query])[0] if word in self.idf]
        return self._index.get_scores(words).astype(np.float64) if words else np.zeros(self.n_docs)

    def retrieve(
        self, data: Collection, *, depth: int = 100, on_step: Callable[[str, int, int], None] | None = None
    ) -> Run:
        """Return the best ``depth`` documents of every query of a collection, ties by falling number."""
        check_count("depth", depth)
        falling = np.argsort(np.array(self.docnos))[::-1]  # trec_eval's order of equals
        run: Run = {}
        for done, (qid, query) in enumerate(data.queries.items(), 1):
            scores, hidden = self.scores(query), data.hidden.get(qid, frozenset())
            best = falling[np.argsort(-scores[falling], kind="stable")[: depth + len(hidden)]]
            found = [(self.docnos[i], float(scores[i])) for i in best if self.docnos[i] not in hidden]
            run[qid] = dict(found[:depth])
            if on_step is not None:
                on_step("retrieve", done, len(data.queries))
        return run


class BM25Ranker:
    """Scores any text under the statistics of an index."""

    def __init__(self, index: BM25Index) -> None:
        self.index = index

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        """Return (N,) scores."""
        index = self.index
        terms = Counter(word for word in index.tokens([query])[0] if word in index.idf)
        found = np.zeros(len(docs))
        for i, words in enumerate(index.tokens(docs)):
            counts, length = Counter(words), len(words)
            slack = index.k1 * (1 - index.b + index.b * length / index.mean_length)
            for term, weight in terms.items():
                if tf := counts.get(term, 0):
                    found[i] += weight * index.idf[term] * tf / (tf + slack)
        return found
