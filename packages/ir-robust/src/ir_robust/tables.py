"""What noise each word gets, and how far an attack can move it: the tables behind CertDR's certificates.

For a word w, S_w is what an attacker may write in its place and P_w the set from which the smoother draws: two
different things. P_w is the whole connected component of w where that holds at most ``cap`` words, else the ``cap``
members most similar to w. An attack that leaves its component would void every certificate, so such a table is refused.

    ov(w, w') = |P_w & P_w'| / max(|P_w|, |P_w'|),   q_w = min over w' in S_w of ov(w, w')
    o_d = 1 - product of the R smallest q_w of the document     (R: how many words may change)

*Why o_d bounds the change of a smoothed score.* The expectations of a function into [0, 1] under two distributions
differ by at most their total variation. Noise is drawn word by word, uniformly, so ``1 - TV = sum_z min(prod p_i,
prod p'_i) >= prod_i sum min(p_i, p'_i)``, and a factor is ``|P & P'| min(1/|P|, 1/|P'|) = ov``; unchanged words give
factors 1. The *larger* size stands in the denominator: with that of w alone, as in the paper's code, the bound is false
for tables of unequal sizes (there it is harmless: sizes in one component are equal).

Words below the cap have q_w = 1: no substitution inside their component changes the smoothed score at all. A
certificate is therefore nearly all or nothing in the table; :meth:`PerturbationTable.report` says which, before
anything is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ir_robust.attacks.base import WordBudget
from ir_robust.synonyms import SynonymGraph
from ir_robust.text import Words, is_word
from robust_core.checks import check_count, check_number

__all__ = ["PerturbationTable", "Similarity", "TableReport", "budget_words", "deviation"]

Similarity = Callable[[str, Sequence[str]], Sequence[float] | np.ndarray]
"""(word, others) -> how similar each of the others is to it; higher is nearer."""


@dataclass(frozen=True)
class TableReport:
    """What a table promises before anything is drawn.

    Attributes:
        words: with more than themselves to draw from.
        largest: words in the largest component.
        cap: of the table.
        loose: words with q_w below 1, by which certificates weaken.
        replaceable: share of the words of the documents that are drawn anew.
        deviation: mean o_d of the documents.
        free: share of documents with o_d = 0.
    """

    words: int
    largest: int
    cap: int
    loose: int
    replaceable: float
    deviation: float
    free: float

    def __str__(self) -> str:
        """Return two lines for people."""
        return (
            f"{self.words} words, largest component {self.largest}, cap {self.cap}: {self.loose} words lose overlap\n"
            f"{self.replaceable:.0%} of the words of documents are drawn; mean deviation {self.deviation:.4f}, "
            f"0 for {self.free:.0%} of the documents"
        )


class PerturbationTable:
    """Sets of words to draw from, and their overlaps.

    Args:
        graph: whose components bound everything.
        cap: largest set to draw from, at least 1.
        similarity: chooses the members of larger components; None takes the fewest steps in the graph, then the order
            of the alphabet.
        attack: word -> what an attacker may write for it; None takes the neighbours in the graph. Every pair must lie
            in one component.
        supports: word -> other sets to draw from than the above, of any sizes; bounds stay true.

    Raises:
        ValueError: ``cap`` below 1, an attack that leaves its component, or a set that is empty or holds no words.
    """

    def __init__(
        self,
        graph: SynonymGraph,
        cap: int = 100,
        *,
        similarity: Similarity | None = None,
        attack: Mapping[str, Iterable[str]] | None = None,
        supports: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self.graph, self.cap, self._similarity = graph, check_count("cap", cap), similarity
        self.attack = dict(graph.neighbours) if attack is None else self._checked(attack)
        self._given = _sets({} if supports is None else supports)
        self._supports: dict[str, tuple[str, ...]] = dict(self._given)
        self._least: dict[str, float] = {}

    def _checked(self, attack: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
        found = {}
        for word, others in attack.items():
            members = frozenset(self.graph.component(word))
            found[word] = tuple(sorted({other for other in others if other != word}))
            strange = next((other for other in found[word] if other not in members), None)
            if strange is not None:
                raise ValueError(
                    f"attack: {word!r} may become {strange!r}, which is in another component of the graph, so no "
                    "certificate would hold; add the pair to the graph"
                )
        return found

    def __contains__(self, word: str) -> bool:
        """Return whether a word has synonyms or a set of its own; smoothed documents write it in lower case."""
        return word in self.graph or word in self._given

    def substitutes(self, word: str) -> tuple[str, ...]:
        """Return what an attacker may write for ``word``, itself left out."""
        return self.attack.get(word, ())

    def support(self, word: str) -> tuple[str, ...]:
        """Return P_w in order: what the smoother draws for ``word``, itself among them."""
        known = self._supports.get(word)
        if known is None:
            component = self.graph.component(word)
            known = component if len(component) <= self.cap else tuple(sorted(self._nearest(word, component)))
            self._supports[word] = known
        return known

    def _nearest(self, word: str, component: Sequence[str]) -> list[str]:
        others = [other for other in component if other != word]
        if self._similarity is None:
            steps = self.graph.distances(word)
            ranking = sorted(others, key=lambda other: (steps[other], other))
        else:
            values = np.asarray(self._similarity(word, others), dtype=np.float64)
            if values.shape != (len(others),) or np.isnan(values).any():
                raise ValueError(f"similarity: one number for each of {len(others)} words is needed for {word!r}")
            ranking = [others[i] for i in np.argsort(-values, kind="stable")]
        return [word, *ranking[: self.cap - 1]]

    def overlap(self, word: str, other: str) -> float:
        """Return ov(w, w') in [0, 1], symmetric, 1 for a word with itself."""
        a, b = self.support(word), self.support(other)
        return 1.0 if a is b or a == b else len(frozenset(a) & frozenset(b)) / max(len(a), len(b))

    def least_overlap(self, word: str) -> float:
        """Return q_w: the least overlap with what an attacker may write; 1 where he can write nothing else."""
        known = self._least.get(word)
        if known is None:
            known = min((self.overlap(word, other) for other in self.substitutes(word)), default=1.0)
            self._least[word] = known
        return known

    def representative(self, word: str) -> str:
        """Return the one word that stands for the whole component of ``word``: the best connected, then the first."""
        component = self.graph.component(word)
        return self._representatives.get(component[0], component[0])

    @cached_property
    def _representatives(self) -> dict[str, str]:
        degree = {word: len(others) for word, others in self.graph.neighbours.items()}
        return {c[0]: min(c, key=lambda word: (-degree[word], word)) for c in self.graph.components}

    @cached_property
    def sha256(self) -> str:
        """Hash of what a certificate depends on: sets to draw from, and what the attacker may write."""
        digest = hashlib.sha256(f"cap {self.cap}\n".encode())
        for word in sorted({*self.graph.neighbours, *self.attack, *self._given}):
            row = f"{word}\t{' '.join(self.support(word))}\t{' '.join(self.substitutes(word))}\n"
            digest.update(row.encode())
        return digest.hexdigest()

    def deviation(self, words: Sequence[str], budget: WordBudget | float | int | None = None) -> float:
        """Return o_d of a document: see :func:`deviation`."""
        return deviation(words, self, budget)

    def report(self, docs: Iterable[str], budget: WordBudget | float | int | None = None) -> TableReport:
        """Return what the table means for documents (texts) under a budget."""
        split = [Words.of(text).words for text in docs]
        total = max(sum(map(len, split)), 1)
        drawn = sum(len(self.support(word)) > 1 for words in split for word in words)
        found = [deviation(words, self, budget) for words in split] or [0.0]
        loose = sum(self.least_overlap(word) < 1.0 for word in self.graph.neighbours)
        sizes = self.graph.report()
        free = float(np.mean([value == 0.0 for value in found]))
        return TableReport(sizes.words, sizes.largest, self.cap, loose, drawn / total, float(np.mean(found)), free)


def _sets(supports: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    found = {word: tuple(sorted(set(members))) for word, members in supports.items()}
    for word, members in found.items():
        if not is_word(word) or not members or not all(map(is_word, members)):
            raise ValueError(f"supports[{word!r}]={members!r}: at least one word, all in lower case, is needed")
    return found


def budget_words(length: int, budget: WordBudget | float | int | None) -> int:
    """Return R, how many of ``length`` words may change.

    Args:
        length: words of the document.
        budget: a share in [0, 1] (a float), a number of words (an int), a :class:`WordBudget`, or None for all.

    Raises:
        ValueError: out of range, or a budget that allows insertions, of which certificates know nothing.
    """
    if budget is None:
        return length
    if isinstance(budget, WordBudget):
        if budget.insertions:
            raise ValueError(f"budget allows {budget.insertions} insertions; only replaced words are certified")
        return budget.words(length)
    if isinstance(budget, int) and not isinstance(budget, bool):
        return min(check_count("budget", budget, low=0), length)
    return WordBudget(check_number("budget", budget, low=0.0, high=1.0)).words(length)


def deviation(words: Sequence[str], table: PerturbationTable, budget: WordBudget | float | int | None = None) -> float:
    """Return o_d: by how much the smoothed score of a document can change, rounded up; exactly 0 where it cannot.

    Args:
        words: of the *original* document, in lower case.
        table: sets and overlaps.
        budget: as of :func:`budget_words`.
    """
    changed = budget_words(len(words), budget)
    smallest = sorted(q for q in map(table.least_overlap, words) if q < 1.0)[:changed]
    if not smallest:
        return 0.0
    product = math.prod(smallest)
    # every factor and every product may be off by half a unit in the last place, and the difference too
    return min(1.0, float(np.nextafter(1.0 - product * (1.0 - 2.0**-52 * (changed + 1)), 2.0)))
