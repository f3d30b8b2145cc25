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
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ir_robust.formats import ordered
from ir_robust.rankers.base import Ranker, as_ranker, scores_of
from ir_robust.text import Words
from robust_core.checks import check_count, check_number
from robust_core.errors import BudgetExceededError
from robust_core.random import Seed, derive, resolve_seed

__all__ = [
    "DocumentAttack",
    "DocumentResult",
    "Edit",
    "WordBudget",
    "align",
    "attack_list",
    "check_budget",
    "edits_between",
    "rank_among",
]


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

    @property
    def budget(self) -> WordBudget:
        """How many words it may change or add."""
        ...

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
    """Return the fewest edits that make the words of one text those of another."""
    return align(Words.of(before).words, Words.of(after).words)[0]


def align(
    old: Sequence[str], new: Sequence[str], substitution: int = 1, deletion: int = 1
) -> tuple[tuple[Edit, ...], list[tuple[int, int]]]:
    """Return the cheapest edits, where an insertion costs 1, and the (old, new) positions opposite each other.

    The recursion of Wagner and Fischer (1974), a row at a time, without the common head and tail.
    """
    head = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    rest = min(len(old), len(new)) - head
    tail = next((i for i in range(rest) if old[-1 - i] != new[-1 - i]), rest)
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    numbers = {word: i for i, word in enumerate({*a, *b})}
    ids, steps = np.array([numbers[word] for word in b], dtype=np.int64), np.arange(len(b) + 1)
    cost = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int64)
    cost[0] = steps
    for i, word in enumerate(a, 1):
        row = cost[i - 1] + deletion
        row[1:] = np.minimum(row[1:], cost[i - 1, :-1] + substitution * (ids != numbers[word]))
        cost[i] = np.minimum.accumulate(row - steps) + steps  # insertions from the left
    edits, opposite, i, j = [], [(len(old) - 1 - k, len(new) - 1 - k) for k in range(tail)], len(a), len(b)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + substitution * (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            opposite.append((head + i, head + j))
            if a[i] != b[j]:
                edits.append(Edit(head + i, a[i], b[j]))
        elif j and cost[i, j] == cost[i, j - 1] + 1:
            j -= 1
            edits.append(Edit(head + i, "", b[j]))
        else:
            i -= 1
            edits.append(Edit(head + i, a[i], ""))
    return tuple(edits[::-1]), [(k, k) for k in range(head)] + opposite[::-1]


def check_budget(before: str, after: str, budget: WordBudget) -> tuple[Edit, ...]:
    """Return the edits of an attack.

    Edits are read in the attacker's favour: as substitutions if that can be, else as the fewest edits, else as the
    fewest changed words. Signs and capitals are no free channel: they stay as they are, but for those beside a word
    that was added or deleted.

    Raises:
        BudgetExceededError: more than the budget allows.
    """
    old, new = Words.of(before), Words.of(after)
    allowed = budget.words(len(old))
    dear = len(old) + len(new) + 1
    trouble = ""
    for substitution, deletion in ((1, dear), (1, 1), (dear, dear)):
        edits, opposite = align(old.words, new.words, substitution, deletion)
        changed, added = sum(1 for e in edits if e.old), sum(1 for e in edits if not e.old)
        if changed <= allowed and added <= budget.insertions:
            rest, moved = _other_changes(old, new, opposite), added + sum(1 for e in edits if not e.new)
            # which of two equal words was added or deleted is anybody's guess: signs may have moved with the other one
            if not rest or (len(rest) <= moved and max(rest.values()) <= SIGNS):
                return edits
            trouble = trouble or next(iter(rest))
    told = f"the attack changed {changed} words of {allowed} allowed and added {added} of {budget.insertions}"
    raise BudgetExceededError(trouble or told)


SIGNS = 4
"""So many signs may stand in each gap beside an added word: a sentence comes with its own."""


def _other_changes(old: Words, new: Words, opposite: list[tuple[int, int]]) -> dict[str, int]:
    """Return what changed beside words, and how many signs are in it."""
    found: dict[str, int] = {}
    before, after = old.words, new.words
    for i, j in opposite:
        if before[i] == after[j] and old.surfaces[i] != new.surfaces[j]:
            found[f"the attack wrote {old.surfaces[i]!r}, word {i}, as {new.surfaces[j]!r}: words may change"] = 0
    ends = [(-1, -1), *opposite, (len(old), len(new))]
    for (i, j), (i_next, j_next) in pairwise(ends):
        gaps = new.gaps[j + 1 : j_next + 1]
        if (i_next - i, j_next - j) == (1, 1):
            if old.gaps[i + 1] != gaps[0]:
                what = f"changed {old.gaps[i + 1]!r} after word {i} to {gaps[0]!r}"
                found[f"the attack {what}: words may change"] = max(len(old.gaps[i + 1].strip()), len(gaps[0].strip()))
            continue
        known, most = {gap.strip() for gap in old.gaps[i + 1 : i_next + 1]}, SIGNS if len(gaps) > 1 else 0
        for gap in gaps:
            if gap.strip() not in known and len(gap.strip()) > most:
                found[f"the attack brought in {gap!r} between words: words may change"] = SIGNS + 1
    return found


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
        ValueError: targets that are not in the list, or scores of other documents.
        BudgetExceededError: an attack overspent.
    """
    check_count("k", k)
    victim, seed = as_ranker(ranker), resolve_seed(generator)
    strange = next((docno for docno in targets if docno not in docs), None)
    if strange is not None:
        raise ValueError(f"targets: {strange!r} is not among the {len(docs)} documents of the list")
    if scores is not None and scores.keys() != docs.keys():
        raise ValueError(f"scores: of {len(scores)} documents, {len(docs.keys() & scores.keys())} of the {len(docs)}")
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
