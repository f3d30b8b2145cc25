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
from ir_robust.rankers.cross import CrossEncoderRanker, load_cross, new_cross_encoder
from ir_robust.rankers.drmm import DRMM
from ir_robust.rankers.duet import Duet
from ir_robust.rankers.encoders import (
    BiEncoderRanker,
    ColBERTRanker,
    load_bi,
    load_colbert,
    load_sentence_transformer,
)
from ir_robust.rankers.knrm import KNRM
from ir_robust.rankers.loading import as_pyterrier, load_ranker
from ir_robust.rankers.ltr import LambdaMART, RankSVM
from ir_robust.rankers.saved import load_saved, save_ranker
from ir_robust.rankers.training import fit_ranker, training_pairs
from ir_robust.rankers.vectors import WordVectors, idf_of, piece_vectors, random_vectors, read_vectors, vocabulary_of

__all__ = [
    "DRMM",
    "KNRM",
    "BM25Index",
    "BM25Ranker",
    "BagRanker",
    "BiEncoderRanker",
    "CallableRanker",
    "ColBERTRanker",
    "CrossEncoderRanker",
    "Duet",
    "LambdaMART",
    "RankSVM",
    "Ranker",
    "TokenBatch",
    "Vocabulary",
    "WhiteBoxRanker",
    "WordRanker",
    "WordVectors",
    "as_pyterrier",
    "as_ranker",
    "fit_ranker",
    "idf_of",
    "load_bi",
    "load_colbert",
    "load_cross",
    "load_ranker",
    "load_saved",
    "load_sentence_transformer",
    "new_cross_encoder",
    "piece_vectors",
    "random_vectors",
    "read_vectors",
    "rerank",
    "save_ranker",
    "scores_of",
    "training_pairs",
    "vocabulary_of",
]
