"""Learning to rank on features: RankSVM and LambdaMART, the baselines between BM25 and networks.

    ranker = LambdaMART(BM25Index(data.docs)).fit(data, run)

Each (query, document) becomes the numbers of :data:`FEATURES`; all but ``cosine`` come from the index's statistics, so
edited texts that no index holds are scored like any other. ``embed`` adds the cosine of two texts.

* :class:`RankSVM` (Joachims 2002): a linear model on differences of features within a query, hinge loss, by
  scikit-learn's ``LinearSVC`` without intercept. Features are scaled to unit variance over the training documents.
* :class:`LambdaMART` (Burges 2010): boosted trees on lambda gradients of nDCG, by LightGBM (extra ``ltr``), whose
  defaults are kept but for smaller trees, as collections are small.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.rankers.base import candidates
from ir_robust.rankers.bm25 import BM25Index, BM25Ranker
from ir_robust.rankers.training import Pairs
from robust_core.checks import check_count, check_number
from robust_core.errors import optional_import
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["FEATURES", "FeatureRanker", "LambdaMART", "RankSVM", "features_of"]

FEATURES = (
    "bm25",
    "sum_tf",
    "sum_log_tf",
    "sum_tf_idf",
    "max_tf_idf",
    "sum_idf_matched",
    "share_matched",
    "share_idf_matched",
    "log_length",
    "query_length",
    "likelihood",
)
"""Names of the columns of :func:`features_of`, before ``cosine``."""

MU = 1500.0
Embed = Callable[[Sequence[str]], Any]
"""Texts -> (N, D) embeddings."""


def features_of(index: BM25Index, query: str, docs: Sequence[str], *, embed: Embed | None = None) -> np.ndarray:
    """Return (N, F) float64 features of documents for a query.

    ``likelihood`` is that of the query under a Dirichlet-smoothed model of the document (mu = 1500), in logarithms by
    word; a word's collection probability is estimated from its document frequency, which is what the index holds.

    Args:
        index: statistics; query words that it lacks are left out.
        query: the query.
        docs: N texts.
        embed: adds a last column, the cosine of the embeddings.
    """
    terms = Counter(word for word in index.tokens([query])[0] if word in index.idf)
    n_terms, found = sum(terms.values()), np.zeros((len(docs), len(FEATURES)))
    found[:, 0] = BM25Ranker(index).score(query, docs)
    idf = np.array([index.idf[term] for term in terms])
    weight = np.array(list(terms.values()), dtype=np.float64)
    # idf = ln(1 + (N - df + 1/2) / (df + 1/2)), read backwards
    frequency = ((index.n_docs + 1) / np.exp(idf) - 0.5) / (index.n_docs * index.mean_length)
    for row, words in zip(found, index.tokens(docs), strict=True):
        counts, length = Counter(words), len(words)
        row[8], row[9] = math.log1p(length), n_terms
        if not n_terms:
            continue
        tf = np.array([counts.get(term, 0) for term in terms], dtype=np.float64)
        there = tf > 0
        row[1:5] = weight @ tf, weight @ np.log1p(tf), weight @ (tf * idf), (tf * idf).max()
        row[5], row[6] = weight @ (idf * there), weight @ there / n_terms
        row[7] = row[5] / (weight @ idf)
        row[10] = weight @ np.log((tf + MU * frequency) / (length + MU)) / n_terms
    return found if embed is None else np.column_stack([found, _cosines(embed, query, docs)])


def _cosines(embed: Embed, query: str, docs: Sequence[str]) -> np.ndarray:
    if not len(docs):
        return np.zeros(0)
    rows = np.asarray(embed([query, *docs]), dtype=np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows[1:] @ rows[0]


class FeatureRanker:
    """Base: features of an index, and a model that turns them into scores once it is fitted.

    Args:
        index: statistics of a corpus.
        embed: as of :func:`features_of`.
    """

    def __init__(self, index: BM25Index, *, embed: Embed | None = None) -> None:
        self.index, self.embed = index, embed
        self.model: Any = None

    def features(self, query: str, docs: Sequence[str]) -> np.ndarray:
        """Return (N, F) features."""
        return features_of(self.index, query, docs, embed=self.embed)

    def on(self, index: BM25Index) -> Self:
        """Return this fitted ranker with the statistics of another corpus."""
        other = copy.copy(self)
        other.index = index
        return other

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} states no _predict()")

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        """Return (N,) scores.

        Raises:
            ValueError: it was never fitted.
        """
        if self.model is None:
            raise ValueError(f"{type(self).__name__} was not fitted; call fit(...) first")
        return self._predict(self.features(query, docs)) if len(docs) else np.zeros(0)


class RankSVM(FeatureRanker):
    """A linear ranker by support vectors of pairs.

    Args:
        index: statistics of a corpus.
        C: weight of each pair's hinge loss against the squared norm; beyond 0.1, thousands of pairs take long.
        embed: as of :func:`features_of`.
    """

    def __init__(self, index: BM25Index, *, C: float = 0.01, embed: Embed | None = None) -> None:
        super().__init__(index, embed=embed)
        self.C = check_number("C", C, low=0.0, open_low=True)
        self.scale = np.ones(0)

    def fit(self, data: Collection, pairs: Pairs, *, generator: Seed = None) -> RankSVM:
        """Fit to pairs of :func:`~ir_robust.rankers.training_pairs`; return itself."""
        from sklearn.svm import LinearSVC

        asked: dict[str, dict[str, int]] = {}
        for qid, up, down in pairs.triples:
            for docno in (up, down):
                asked.setdefault(qid, {}).setdefault(docno, len(asked[qid]))
        tables = {qid: self.features(data.queries[qid], [data.docs[d] for d in rows]) for qid, rows in asked.items()}
        deviation = np.concatenate(list(tables.values())).std(0)
        self.scale = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0.0)
        better, worse = (
            np.stack([tables[triple[0]][asked[triple[0]][triple[side]]] for triple in pairs.triples]) for side in (1, 2)
        )
        gaps = (better - worse) * self.scale
        sign = np.where(np.arange(len(gaps)) % 2 == 0, 1.0, -1.0)  # both classes, as the library wants them
        seed = derive(resolve_seed(generator), "ranksvm") & 0x7FFFFFFF
        self.model = LinearSVC(loss="hinge", C=self.C, fit_intercept=False, random_state=seed, max_iter=20_000)
        if len(gaps) == 1:
            gaps, sign = np.concatenate([gaps, -gaps]), np.array([1.0, -1.0])
            self.model.fit(gaps, sign)
        else:
            self.model.fit(gaps * sign[:, None], sign)
        return self

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return rows @ (self.model.coef_[0] * self.scale)


class LambdaMART(FeatureRanker):
    """Boosted trees on nDCG's lambda gradients.

    Args:
        index: statistics of a corpus.
        n_trees: rounds of boosting.
        learning_rate: of each.
        n_leaves: of a tree.
        least: documents in a leaf.
        embed: as of :func:`features_of`.
    """

    def __init__(
        self,
        index: BM25Index,
        *,
        n_trees: int = 100,
        learning_rate: float = 0.1,
        n_leaves: int = 7,
        least: int = 20,
        embed: Embed | None = None,
    ) -> None:
        super().__init__(index, embed=embed)
        check_number("learning_rate", learning_rate, low=0.0, open_low=True)
        self.settings = {
            "n_estimators": check_count("n_trees", n_trees),
            "num_leaves": check_count("n_leaves", n_leaves, low=2),
            "min_child_samples": check_count("least", least),
            "learning_rate": learning_rate,
        }

    def fit(
        self, data: Collection, run: Run, *, queries: Iterable[str] | None = None, depth: int = 100,
        generator: Seed = None,
    ) -> LambdaMART:  # fmt: skip
        """Fit to the lists of a first stage and the grades in them (0 where nobody judged); return itself.

        Args:
            data: the collection.
            run: a first stage.
            queries: to train on; all judged ones if None. Lists without any relevant document teach nothing.
            depth: of the lists.
            generator: seed.

        Raises:
            MissingExtraError: LightGBM is not installed.
            ValueError: no list holds a relevant document.
        """
        library = optional_import("lightgbm", extra="ltr", package="ir-robust")
        wanted = set(data.judged() if queries is None else queries)
        lists = candidates({qid: run[qid] for qid in run if qid in wanted}, data, depth)
        rows, grades, sizes = [], [], []
        for qid, docnos in lists.items():
            known = [max(data.qrels.get(qid, {}).get(docno, 0), 0) for docno in docnos]
            if not any(known):
                continue
            rows.append(self.features(data.queries[qid], [data.docs[docno] for docno in docnos]))
            grades += known
            sizes.append(len(docnos))
        if not rows:
            raise ValueError("no list holds a relevant document to learn from")
        seed = derive(resolve_seed(generator), "lambdamart") & 0x7FFFFFFF
        self.model = library.LGBMRanker(
            objective="lambdarank", random_state=seed, deterministic=True, force_row_wise=True, n_jobs=1, verbose=-1,
            label_gain=list(range(max(grades) + 1)), **self.settings,
        )  # fmt: skip
        self.model.fit(np.concatenate(rows), np.array(grades), group=sizes)
        return self

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.booster_.predict(rows, num_threads=1), dtype=np.float64)
