"""Attacks that need no knowledge of language: words of the query repeated, somebody else's sentence, words left out.

    attack_list(TermSpamming(WordBudget(share=0, insertions=10)), ranker, query, docs, targets)

The old tricks of web spam, and the yardstick for cleverer ones: what changes words unseen should beat what anybody can
do. BM25 bounds term spamming: however often a word is repeated, it adds at most ``idf (k1 + 1)`` (``idf`` in the form
without that factor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
import torch

from ir_robust.attacks.base import WordBudget
from ir_robust.collection import Collection
from ir_robust.perturb.document import PLACES, delete_words, insert_sentence, sentences_of, spam_terms
from ir_robust.rankers.base import Ranker, scores_of
from ir_robust.text import Words
from robust_core.checks import check_choice, check_count
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = ["Deletion", "SentenceInjection", "TermSpamming", "relevant_sentences"]

BEST = "best"


def _best(ranker: Ranker, query: str, texts: Sequence[str]) -> tuple[str, int]:
    """Return the text with the highest score, the first among equals, and how many were scored."""
    scores = scores_of(ranker, query, texts)
    return texts[int(np.argmax(scores))], len(texts)


@dataclass(frozen=True)
class TermSpamming:
    """Repeats the words of the query.

    Attributes:
        budget: ``insertions`` is how many words may go in.
        times: how often the whole query goes in at most; None fills the budget.
        place: ``"head"``, ``"tail"``, ``"random"``, blind; or ``"best"``: whichever of the three, or none, scores best.
        stop_words: words of the query that are not worth repeating.
    """

    budget: WordBudget = field(default_factory=lambda: WordBudget(share=0.0, insertions=10))
    times: int | None = None
    place: str = "head"
    stop_words: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        check_choice("place", self.place, (*PLACES, BEST))
        if self.times is not None:
            check_count("times", self.times, low=0)

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the spammed text."""
        terms = [word for word in Words.of(query).words if word not in self.stop_words]
        most = self.budget.insertions if self.times is None else self.times * len(terms)
        new = list(islice(cycle(terms), min(most, self.budget.insertions)))
        if not new:
            return doc, 0
        seed = resolve_seed(generator)
        if self.place != BEST:
            return spam_terms(doc, new, self.place, generator=seed), 0
        return _best(ranker, query, [doc, *(spam_terms(doc, new, place, generator=seed) for place in PLACES)])


def relevant_sentences(data: Collection, *, at_most: int = 50) -> dict[str, list[str]]:
    """Return text of a query -> sentences of its relevant documents: what :class:`SentenceInjection` puts in."""
    check_count("at_most", at_most)
    found: dict[str, list[str]] = {}
    for qid in data.judged():
        good = sorted(docno for docno, grade in data.qrels[qid].items() if grade > 0 and docno in data.docs)
        sentences = [sentence for docno in good for sentence in sentences_of(data.docs[docno])]
        found[data.queries[qid]] = list(dict.fromkeys(sentences))[:at_most]
    return found


@dataclass(frozen=True)
class SentenceInjection:
    """Puts in a sentence that is about the query, such as one of a relevant document.

    Attributes:
        sentences: text of a query -> sentences (:func:`relevant_sentences`), or a function of the query.
        budget: ``insertions`` is the length of the longest sentence that may go in.
        place: where.
        tries: sentences that are scored, drawn from those that are short enough; 1 is blind.
    """

    sentences: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]] = field(repr=False)
    budget: WordBudget = field(default_factory=lambda: WordBudget(share=0.0, insertions=30))
    place: str = "head"
    tries: int = 10

    def __post_init__(self) -> None:
        check_choice("place", self.place, PLACES)
        check_count("tries", self.tries)

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the text with the sentence that scores best, or as it is where none is short enough or helps."""
        known = self.sentences.get(query, ()) if isinstance(self.sentences, Mapping) else self.sentences(query)
        short = [s for s in known if 0 < len(Words.of(s)) <= self.budget.insertions]
        if not short:
            return doc, 0
        seed = resolve_seed(generator)
        order = torch.randperm(len(short), generator=stream(seed, 0, "sentences"))[: self.tries].tolist()
        texts = [insert_sentence(doc, short[i], self.place, generator=derive(seed, i)) for i in order]
        return (texts[0], 0) if self.tries == 1 else _best(ranker, query, [doc, *texts])


@dataclass(frozen=True)
class Deletion:
    """Leaves out the words whose absence helps most.

    Words are weighed once, each alone; of all shortened texts in that order the best is kept. Words of the query stay.

    Attributes:
        budget: how many words may go.
    """

    budget: WordBudget = field(default_factory=lambda: WordBudget(share=0.1))

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the shortened text."""
        words, kept = Words.of(doc), frozenset(Words.of(query).words)
        able = [i for i, word in enumerate(words.words) if word not in kept]
        most = min(self.budget.words(len(words)), len(able), len(words) - 1)
        if most <= 0:
            return doc, 0
        scores = scores_of(ranker, query, [doc, *(delete_words(doc, [i]) for i in able)])
        order = [able[i] for i in np.argsort(-scores[1:], kind="stable")[:most]]
        shorter = [delete_words(doc, order[:n]) for n in range(1, len(order) + 1)]
        text, n_scored = _best(ranker, query, [doc, *shorter])
        return text, len(able) + 1 + n_scored
