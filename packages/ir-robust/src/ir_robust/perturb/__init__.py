"""What happens to queries and documents: mistypings, other wordings, spam; each a small function of text and seed."""

from ir_robust.perturb.document import delete_words, insert_sentence, sentences_of, spam_terms
from ir_robust.perturb.query import (
    Compose,
    DropWords,
    Paraphrase,
    QueryPerturbation,
    RemoveStopWords,
    Rewrite,
    Shuffle,
    Synonyms,
    Typos,
    operator,
    sampled,
    typos_of,
    worst_of,
)

__all__ = [
    "Compose",
    "DropWords",
    "Paraphrase",
    "QueryPerturbation",
    "RemoveStopWords",
    "Rewrite",
    "Shuffle",
    "Synonyms",
    "Typos",
    "delete_words",
    "insert_sentence",
    "operator",
    "sampled",
    "sentences_of",
    "spam_terms",
    "typos_of",
    "worst_of",
]
