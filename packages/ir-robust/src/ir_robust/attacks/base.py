"""What an attack on a document is, and the budget that this module keeps, not the attack.

An attacker owns one document below the top and edits it so that it climbs; all other documents stay as they are. He is
told what he would see: the scores of the others and how many places he wants to reach. :func:`attack_list` runs an
attack for chosen documents of one query, checks what comes back against the budget, and scores it afresh: no figure is
the attack's own word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Protocol

import numpy as np

from ir_robust.formats import ordered
from ir_robust.rankers.base import Ranker, as_ranker, scores_of
from ir_robust.text import Words
from robust_core.checks import check_count, check_number
from robust_core.errors import BudgetExceededError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["DocumentAttack", "DocumentResult", "Edit", "WordBudget", "attack_list", "rank_among"]


@dataclass(frozen=True)
class Edit:
    """A word at ``position`` of the old text that became ``new``; "" stands for an insertion or a deletion."""

    position: int
    old: str
    new: str


@dataclass(frozen=True)
class WordBudget:
    """How many words may change.

    Attributes:
        share: of the document's words, in [0, 1]; ``floor(share * M)`` may be changed.
        most: in any case no more than this many.
        insertions: words that may be added beside; changed words and added words are counted apart.
    """

    share: float = 0.1
    most: int | None = None
    insertions: int = 0

    def __post_init__(self) -> None:
        check_number("share", self.share, low=0.0, high=1.0)
        if self.most is not None:
            check_count("most", self.most, low=0)
        check_count("insertions", self.insertions, low=0)

    def words(self, length: int) -> int:
        """Return how many of ``length`` words may be changed or deleted."""
        allowed = math.floor(self.share * length * (1 + 1e-12))
        return allowed if self.most is None else min(allowed, self.most)


class DocumentAttack(Protocol):
    """Edits one document."""

    budget: WordBudget

    def __call__(
        self, ranker: Ranker, query: str, doc: str, rivals: np.ndarray, k: int, *, generator: Seed = None
    ) -> tuple[str, int]:
        """Return the edited text and how often the ranker was asked for the score of one text.

        Args:
            ranker: the victim; a white-box attack says so where it is not a :class:`WhiteBoxRanker`.
            query: the query.
            doc: the text.
            rivals: (N - 1,) scores of the other documents, falling.
            k: the attack has won once fewer than ``k`` rivals are at or above the document; it may stop there.
            generator: seed.
        """
        ...


@dataclass(frozen=True)
class DocumentResult:
    """What an attack did to one document.

    Attributes:
        docno: which.
        text: after the attack.
        edits: what changed.
        score: (before, after).
        rank: (before, after), from 1, ties as in trec_eval.
        n_queries: scores asked of the ranker.
    """

    docno: str
    text: str
    edits: tuple[Edit, ...]
    score: tuple[float, float]
    rank: tuple[int, int]
    n_queries: int

    @property
    def boost(self) -> int:
        """Places climbed."""
        return self.rank[0] - self.rank[1]


def rank_among(scores: Mapping[str, float], docno: str, score: float | None = None) -> int:
    """Return the rank, from 1, that ``docno`` has, or would have with another score."""
    return ordered(scores if score is None else {**scores, docno: score}).index(docno) + 1


def edits_between(before: str, after: str) -> tuple[Edit, ...]:
    """Return how the words of one text became those of another."""
    old, new = Words.of(before).words, Words.of(after).words
    found: list[Edit] = []
    if len(old) == len(new):
        return tuple(Edit(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    for tag, i, i_end, j, j_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for step in range(max(i_end - i, j_end - j)):
            a = old[i + step] if i + step < i_end else ""
            b = new[j + step] if j + step < j_end else ""
            found.append(Edit(min(i + step, i_end), a, b))
    return tuple(found)


def check_budget(before: str, after: str, budget: WordBudget) -> tuple[Edit, ...]:
    """Return the edits of an attack.

    Raises:
        BudgetExceededError: more than the budget allows.
    """
    edits = edits_between(before, after)
    changed, added = sum(1 for e in edits if e.old), sum(1 for e in edits if not e.old)
    allowed = budget.words(len(Words.of(before)))
    if changed > allowed or added > budget.insertions:
        raise BudgetExceededError(
            f"the attack changed {changed} words of {allowed} allowed and added {added} of {budget.insertions}"
        )
    return edits


def attack_list(
    attack: DocumentAttack,
    ranker: Any,
    query: str,
    docs: Mapping[str, str],
    targets: Sequence[str],
    *,
    k: int = 10,
    scores: Mapping[str, float] | None = None,
    generator: Seed = None,
) -> list[DocumentResult]:
    """Attack documents of one list, each alone against the untouched others.

    Args:
        attack: what is done.
        ranker: the victim.
        query: the query.
        docs: number -> text, of the whole list.
        targets: the documents that are edited, usually such as stand below ``k``.
        k: the place that is wanted.
        scores: of the list by this ranker, if they are known.
        generator: seed; a document's stream depends on the seed, the query and its number alone.

    Raises:
        BudgetExceededError: an attack overspent.
    """
    check_count("k", k)
    victim, seed = as_ranker(ranker), resolve_seed(generator)
    if scores is None:
        scores = dict(zip(docs, scores_of(victim, query, list(docs.values())).tolist(), strict=True))
    found = []
    for docno in targets:
        rivals = np.sort([score for other, score in scores.items() if other != docno])[::-1]
        text, n_queries = attack(victim, query, docs[docno], rivals, k, generator=derive(seed, query, docno))
        edits = check_budget(docs[docno], text, attack.budget)
        after = float(scores_of(victim, query, [text])[0]) if text != docs[docno] else scores[docno]
        rank = (rank_among(scores, docno), rank_among(scores, docno, after))
        found.append(DocumentResult(docno, text, edits, (scores[docno], after), rank, n_queries))
    return found
