"""Rankers behind one protocol, ``score(query, docs) -> scores``."""

from ir_robust.rankers.base import CallableRanker, Ranker, WhiteBoxRanker, WordRanker, as_ranker, rerank, scores_of
from ir_robust.rankers.bm25 import BM25Index, BM25Ranker

__all__ = [
    "BM25Index",
    "BM25Ranker",
    "CallableRanker",
    "Ranker",
    "WhiteBoxRanker",
    "WordRanker",
    "as_ranker",
    "rerank",
    "scores_of",
]
