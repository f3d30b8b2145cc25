"""Rankers behind one protocol, ``score(query, docs) -> scores``."""

from ir_robust.rankers.bag import BagRanker
from ir_robust.rankers.base import (
    CallableRanker,
    Ranker,
    TokenBatch,
    Vocabulary,
    WhiteBoxRanker,
    WordRanker,
    as_ranker,
    rerank,
    scores_of,
)
from ir_robust.rankers.bm25 import BM25Index, BM25Ranker
from ir_robust.rankers.vectors import WordVectors, idf_of, piece_vectors, random_vectors, read_vectors, vocabulary_of

__all__ = [
    "BM25Index",
    "BM25Ranker",
    "BagRanker",
    "CallableRanker",
    "Ranker",
    "TokenBatch",
    "Vocabulary",
    "WhiteBoxRanker",
    "WordRanker",
    "WordVectors",
    "as_ranker",
    "idf_of",
    "piece_vectors",
    "random_vectors",
    "read_vectors",
    "rerank",
    "scores_of",
    "vocabulary_of",
]
