"""Attacks that write other words: synonyms in place of words, or a few words in front of a text.

    attack = WordSubstitution(graph, WordBudget(share=0.1))                      # greedy, by asking for scores
    attack = WordSubstitution(graph, WordBudget(share=0.1), search=NearestPGD(n_rounds=3), surrogate=mine)   # PRADA
    attack_list(attack, ranker, query, docs, targets, k=10)

The search itself is :mod:`robust_core.attacks.tokens`: exhaustive, random, greedy in any order, beam, greedy coordinate
gradient, or steps of PGD on the vectors of the most important words followed by the nearest synonym. The last one is
the word substitution ranking attack, PRADA (Wu et al., TOIS 2023, arXiv 2204.01321; its steps are reconstructed):
importance is the norm of the gradient at a word, gradients are those of a surrogate that imitates the victim, and a
replacement stays only if the victim's score says so. What the victim is asked are scores.

Gradients with respect to *words* of rankers that read pieces of words: a word's vector is the mean of its pieces';
moving it moves all of its pieces alike. For rankers that read words this is exact, else it guides only: what is kept
has been scored as text.

:class:`Trigger` puts words in front instead (after the triggers of Wallace et al. 2019, arXiv 1908.07125), from a list
of candidates such as the query's own words and frequent ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ir_robust.attacks.base import WordBudget
from ir_robust.rankers.base import Ranker, TokenBatch, WhiteBoxRanker, WordRanker, scores_of
from ir_robust.text import Words, is_word
from robust_core.attacks.tokens import Greedy, TokenProblem, TokenSearch, TokenSpace
from robust_core.random import Seed

__all__ = ["Substitutes", "Trigger", "WordSubstitution"]

FILLER = "the"
"""Stands in the places of a trigger before it is found."""


class Substitutes(Protocol):
    """What may be written for a word: a :class:`~ir_robust.synonyms.SynonymGraph` or a table."""

    def substitutes(self, word: str) -> Sequence[str]:
        """Return the words that may stand for ``word``, itself among them or not."""
        ...


@dataclass(frozen=True)
class WordSubstitution:
    """Replaces words by synonyms so that the document climbs.

    Attributes:
        table: which word may stand for which.
        budget: how many may change.
        search: how they are found.
        surrogate: whose gradients are taken, for searches that need them; the victim's own if None.
    """

    table: Substitutes
    budget: WordBudget = field(default_factory=WordBudget)
    search: TokenSearch = field(default_factory=Greedy)
    surrogate: Any = field(default=None, repr=False)

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the edited text and the number of scores asked for."""
        words = Words.of(doc)
        most = self.budget.words(len(words))
        choices = [[w for w in self.table.substitutes(word) if is_word(w) and w != word] for word in words.words]
        if not most or not any(choices) or len(rivals) < k:
            return doc, 0
        return _search(self, ranker, query, words, choices, most, float(rivals[k - 1]), generator)


@dataclass(frozen=True)
class Trigger:
    """Writes words in front of the document so that it climbs.

    Attributes:
        words: the candidates, or a function of the query that returns them.
        budget: ``insertions`` is how many words go in.
        search: how they are found.
        surrogate: as for :class:`WordSubstitution`.
    """

    words: Sequence[str] | Callable[[str], Sequence[str]]
    budget: WordBudget = field(default_factory=lambda: WordBudget(share=0.0, insertions=3))
    search: TokenSearch = field(default_factory=Greedy)
    surrogate: Any = field(default=None, repr=False)

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the text with its trigger, or as it was if none helps, and the number of scores asked for."""
        n = self.budget.insertions
        listed = self.words(query) if callable(self.words) else self.words
        candidates = [word for word in dict.fromkeys(listed) if is_word(word) and word != FILLER]
        if not n or not candidates or len(rivals) < k:
            return doc, 0
        old = Words.of(doc)
        words = Words((*[FILLER] * n, *old.surfaces), ("", *[" "] * n, *old.gaps[1:]))
        if old.gaps[0]:  # a quotation mark in front of the text stays with it
            words = Words(words.surfaces, (*words.gaps[:n], f" {old.gaps[0]}", *words.gaps[n + 1 :]))
        choices = [candidates] * n + [[] for _ in old.surfaces]
        text, n_queries = _search(self, ranker, query, words, choices, n, float(rivals[k - 1]), generator)
        before, after = scores_of(ranker, query, [doc, text])
        return (text if after > before else doc), n_queries + 1


def _search(
    attack: WordSubstitution | Trigger,
    ranker: Ranker,
    query: str,
    words: Words,
    choices: Sequence[Sequence[str]],
    most: int,
    bar: float,
    generator: Seed,
) -> tuple[str, int]:
    """Find the words that score highest; a score above ``bar`` is enough."""
    known = list(dict.fromkeys([*words.words, *(word for row in choices for word in row)]))
    number = {word: i for i, word in enumerate(known)}
    ids = torch.tensor([[number[word] for word in words.words]])
    space = TokenSpace.lists(ids, [[[number[word] for word in row] for row in choices]], budget=most)
    written = _Written(ranker, query, words, known, ids[0])
    source = ranker if attack.surrogate is None else attack.surrogate
    problem = TokenProblem(
        space,
        loss=written.loss,
        goal=float(np.nextafter(-bar, -np.inf)),
        models=[m for m in {id(m): m for m in (ranker, source)}.values() if isinstance(m, nn.Module)],
        **({} if not isinstance(source, WhiteBoxRanker) else _gradients(source, query, words, known, ids[0])),
    )
    found = attack.search.run(problem, generator=generator)
    return written.text(found.ids[0]), int(found.n_queries[0])


@dataclass(frozen=True)
class _Written:
    """Texts by the numbers of their words, and the victim's scores of them."""

    ranker: Ranker
    query: str
    words: Words
    known: Sequence[str]
    start: Tensor

    def text(self, ids: Tensor) -> str:
        changed = (ids.cpu() != self.start).nonzero()[:, 0].tolist()
        return self.words.replaced({i: self.known[int(ids[i])] for i in changed}).text

    def loss(self, ids: Tensor, text: Tensor) -> Tensor:
        del text
        if isinstance(self.ranker, WordRanker):
            numbers = torch.tensor(self.ranker.vocabulary.ids(self.known))[ids.cpu()]
            return -self.ranker.score_words(self.query, numbers).to("cpu", torch.float64)
        return -torch.from_numpy(scores_of(self.ranker, self.query, [self.text(row) for row in ids]))


def _gradients(
    source: WhiteBoxRanker, query: str, words: Words, known: Sequence[str], start: Tensor
) -> Mapping[str, Any]:
    """Return the differentiable part of the problem: a vector for each known word, and the loss of such vectors."""
    table = source.token_embeddings.detach()
    listed = source.tokens(query, list(known))
    own = (listed.word == 0).to(table)[..., None]
    vectors = (table[listed.ids] * own).sum(1) / own.sum(1).clamp(min=1)
    batch = source.tokens(query, [words.text])
    base, word = table[batch.ids[0]], batch.word[0]
    place, of_word = word.clamp(min=0), (word >= 0)[:, None].to(table)
    written = vectors[start.to(table.device)]

    def loss(embeddings: Tensor, text: Tensor) -> Tensor:
        del text
        n = len(embeddings)
        moved = base + (embeddings.to(table) - written)[:, place] * of_word
        inputs = {name: value.expand(n, *value.shape[1:]) for name, value in batch.inputs.items()}
        rows = TokenBatch(batch.ids.expand(n, -1), batch.word.expand(n, -1), inputs)
        return -source.score_embedded(rows, moved).to(embeddings.device)

    return {"embedded": loss, "embedding": vectors.to("cpu")}
