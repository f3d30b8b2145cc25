"""What a reader would notice of an edited text, by counts of the collection alone: cheap, and no model to trust.

* ``changed``: edits for each word of the old text;
* ``cosine``: of the tf-idf vectors of both texts (1 is the same bag of words);
* ``perplexity``: of the new text over that of the old one, under a bigram model of the collection, interpolated with
  unigrams and a uniform rest. Above 1, the text reads less like the collection than it did.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ir_robust.text import Words

__all__ = ["Readers"]

AT_MOST = 20_000
"""Documents that the model is counted on, the first ones."""
BIGRAM, UNIGRAM = 0.6, 0.35
"""Weights of the interpolation; the rest is uniform over words."""


class Readers:
    """Counts of a collection.

    Args:
        docs: its texts.
        at_most: how many of them are counted.
    """

    def __init__(self, docs: Iterable[str], *, at_most: int = AT_MOST) -> None:
        self.n_docs = 0
        self.frequency, self.words, self.pairs = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
        for doc in docs:
            if self.n_docs == at_most:
                break
            words = Words.of(doc).words
            self.n_docs += 1
            self.frequency.update(set(words))
            self.words.update(words)
            self.pairs.update(pairwise(words))
        self.total = self.words.total()

    def look(self, before: str, after: str, n_edits: int) -> dict[str, float]:
        """Return ``changed``, ``cosine`` and ``perplexity`` of an edited text."""
        old, new = Words.of(before).words, Words.of(after).words
        return {
            "changed": n_edits / max(len(old), 1),
            "cosine": self.cosine(old, new),
            "perplexity": math.exp(self.surprise(new) - self.surprise(old)),
        }

    def cosine(self, a: Sequence[str], b: Sequence[str]) -> float:
        """Return the cosine of two texts' tf-idf vectors; 0 where one of them is empty."""
        first, second = (
            {word: n * (1 + math.log((1 + self.n_docs) / (1 + self.frequency[word]))) for word, n in counts.items()}
            for counts in (Counter(a), Counter(b))
        )
        lengths = math.sqrt(sum(v * v for v in first.values()) * sum(v * v for v in second.values()))
        return sum(v * second.get(word, 0.0) for word, v in first.items()) / lengths if lengths else 0.0

    def surprise(self, words: Sequence[str]) -> float:
        """Return the mean negative logarithm of the probability of each word after the one before it."""
        if not words:
            return 0.0
        rest = (1 - BIGRAM - UNIGRAM) / (len(self.words) + 1)
        total, before = 0.0, None
        for word in words:
            alone = self.words[word] / max(self.total, 1)
            known = self.words[before] if before is not None else 0
            pair = self.pairs[before, word] / known if before is not None and known else alone
            total -= math.log(BIGRAM * pair + UNIGRAM * alone + rest)
            before = word
        return total / len(words)
