"""Which word may stand for which: graphs of synonyms from lists, vectors or WordNet, and what they amount to.

    graph = SynonymGraph.from_json("counterfitted_neighbors.json", words=vocabulary_of(data.docs.values()))
    print(graph.report())            # look at the largest component before anything is certified
    graph = graph.clustered(100)     # one component that holds most words makes every certificate void

An edge says that an attacker may write one word for the other. What decides over certificates (:mod:`ir_robust.certdr`)
are the connected components, and lists of neighbours that look harmless hang together: on the vocabulary of Cranfield,
all edges of the counter-fitted list or of WordNet's synsets put most words into one component, and nothing can be
certified. So lists are read with *mutual* edges by default (both words name each other; ``edges="either"``
symmetrises), and :meth:`SynonymGraph.clustered` cuts a graph into cliques by complete linkage: a smaller threat, and
one that is stated.

Words are single words in lower case (:func:`ir_robust.text.is_word`); others are left out. Vectors are treated as in
the code of CertDR (Wu et al., CIKM 2022): scaled to length 1, mean and the 8 leading principal directions removed ("all
but the top", Mu and Viswanath 2018), *dot products* above the threshold are edges.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ir_robust.rankers.vectors import WordVectors
from ir_robust.text import is_word
from ir_robust.wordnet import wordnet_neighbours
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import MalformedFileError, ResourceError
from robust_core.io import read_json

__all__ = ["GraphReport", "SynonymGraph", "all_but_the_top"]

PathLike = str | os.PathLike[str]
EDGES = ("mutual", "either")
MAX_CLUSTERED = 12_000
"""Words of one component that complete linkage takes: it needs all their distances at once."""


@dataclass(frozen=True)
class GraphReport:
    """What a graph amounts to.

    Attributes:
        words: how many words have a synonym.
        edges: pairs of them.
        sizes: of the connected components, falling.
    """

    words: int
    edges: int
    sizes: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Words in the largest component."""
        return self.sizes[0] if self.sizes else 0

    def __str__(self) -> str:
        """Return two lines for people."""
        share = self.largest / self.words if self.words else 0.0
        sizes = ", ".join(map(str, self.sizes[:5])) or "none"
        return (
            f"{self.words} words with synonyms, {self.edges} pairs, {len(self.sizes)} components\n"
            f"largest components: {sizes} ({share:.0%} of the words in the first)"
        )


@dataclass(frozen=True)
class SynonymGraph:
    """An undirected graph of words.

    Attributes:
        neighbours: word -> the other words that may stand for it, in order; words without any are not in it.
        strength: (smaller word, larger word) -> similarity, where it is known.
    """

    neighbours: Mapping[str, tuple[str, ...]]
    strength: Mapping[tuple[str, str], float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for word, others in self.neighbours.items():
            if not is_word(word):
                raise ValueError(f"neighbours: {word!r} is not one word in lower case")
            if not others or word in others:
                raise ValueError(f"neighbours[{word!r}]={others!r}: at least one other word is needed, and not itself")
            strange = next((o for o in others if word not in self.neighbours.get(o, ())), None)
            if strange is not None:
                raise ValueError(f"neighbours: {word!r} names {strange!r} but not the other way round")

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[str, str] | tuple[str, str, float]], *, words: Iterable[str] | None = None
    ) -> SynonymGraph:
        """Return the graph of pairs, each an edge; a third entry is its strength.

        Args:
            pairs: two words each, in any case.
            words: only these are kept; None keeps all.
        """
        keep = None if words is None else frozenset(words)
        found: dict[str, set[str]] = {}
        strength: dict[tuple[str, str], float] = {}
        for a, b, *rest in pairs:
            first, second = sorted((a.lower(), b.lower()))
            known = keep is None or (first in keep and second in keep)
            if first == second or not known or not (is_word(first) and is_word(second)):
                continue
            found.setdefault(first, set()).add(second)
            found.setdefault(second, set()).add(first)
            if rest:
                strength[first, second] = check_number("strength", float(rest[0]))
        return cls({word: tuple(sorted(found[word])) for word in sorted(found)}, strength)

    @classmethod
    def from_neighbours(
        cls, lists: Mapping[str, Iterable[str]], *, edges: str = "mutual", words: Iterable[str] | None = None
    ) -> SynonymGraph:
        """Return the graph of directed lists.

        Args:
            lists: word -> its neighbours.
            edges: ``"mutual"`` keeps pairs that name each other, ``"either"`` all.
            words: only these are kept; None keeps all.
        """
        check_choice("edges", edges, EDGES)
        arcs = {(word.lower(), other.lower()) for word, others in lists.items() for other in others}
        return cls.from_pairs((arc for arc in arcs if edges == "either" or arc[::-1] in arcs), words=words)

    @classmethod
    def from_json(cls, path: PathLike, *, edges: str = "mutual", words: Iterable[str] | None = None) -> SynonymGraph:
        """Return the graph of a file ``{word: [neighbours]}``; see :meth:`from_neighbours`.

        Raises:
            ResourceError: there is no such file.
            UntrustedFileError: it is no JSON.
            MalformedFileError: it holds something else.
        """
        if not Path(path).is_file():
            raise ResourceError(f"{path}: no such file")
        found = read_json(path, max_bytes=1 << 30)
        rows: Any = found.items() if isinstance(found, dict) else [(None, None)]
        for word, others in rows:
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                raise MalformedFileError(f"{path}: {word!r} has no list of words; {{word: [neighbours]}} is needed")
        return cls.from_neighbours(found, edges=edges, words=words)

    @classmethod
    def from_vectors(
        cls,
        vectors: WordVectors,
        threshold: float = 0.9,
        *,
        n_remove_pc: int = 8,
        measure: str = "dot",
        words: Iterable[str] | None = None,
    ) -> SynonymGraph:
        """Return the graph of all pairs of vectors above a threshold.

        Args:
            vectors: of words, e.g. from :func:`ir_robust.rankers.vectors.read_vectors`.
            threshold: of the similarity.
            n_remove_pc: leading principal directions that are removed; they are those of *all* vectors.
            measure: ``"dot"``, as in the paper's code, or ``"cosine"`` after the removal.
            words: only these are kept; None keeps all.
        """
        check_number("threshold", threshold)
        check_choice("measure", measure, ("dot", "cosine"))
        names = vectors.vocabulary.words[2:]  # behind the two place holders
        flat = all_but_the_top(vectors.table[2:].detach().cpu().numpy(), n_remove_pc)
        if measure == "cosine":
            flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
        keep = None if words is None else frozenset(words)
        rows = [i for i, name in enumerate(names) if is_word(name) and (keep is None or name in keep)]
        flat, names = flat[rows], [names[i] for i in rows]
        pairs: list[tuple[str, str, float]] = []
        for start in range(0, len(names), 1024):
            similar = flat[start : start + 1024] @ flat.T
            for i, j in np.argwhere(similar > threshold):
                if start + i < j:
                    pairs.append((names[start + i], names[j], float(similar[i, j])))
        return cls.from_pairs(pairs)

    @classmethod
    def from_wordnet(
        cls, folder: PathLike, *, senses: int | None = 1, edges: str = "mutual", words: Iterable[str] | None = None
    ) -> SynonymGraph:
        """Return the graph of WordNet's synsets, from its ``index.*`` and ``data.*`` files.

        Args:
            folder: e.g. ``/usr/share/wordnet`` (Debian's ``wordnet-base``).
            senses: synsets of each word and part of speech, the most frequent first; None takes all. All of them put
                most of the language into one component.
            edges: as of :meth:`from_neighbours`.
            words: only these are kept; None keeps all.

        Raises:
            DataMissingError: the files are not there.
            MalformedFileError: a line that is no WordNet's.
        """
        return cls.from_neighbours(wordnet_neighbours(folder, senses=senses), edges=edges, words=words)

    def __contains__(self, word: str) -> bool:
        """Return whether a word has a synonym."""
        return word in self.neighbours

    def substitutes(self, word: str) -> tuple[str, ...]:
        """Return the words that may stand for ``word``, itself left out."""
        return self.neighbours.get(word, ())

    @cached_property
    def components(self) -> tuple[tuple[str, ...], ...]:
        """The connected components of two words or more, the largest first, each in order."""
        seen: set[str] = set()
        found = []
        for start in self.neighbours:
            if start not in seen:
                members = set(self.distances(start))
                seen |= members
                found.append(tuple(sorted(members)))
        return tuple(sorted(found, key=lambda c: (-len(c), c)))

    @cached_property
    def _component_of(self) -> dict[str, tuple[str, ...]]:
        return {word: component for component in self.components for word in component}

    def component(self, word: str) -> tuple[str, ...]:
        """Return the component of a word; itself alone where it has no synonym."""
        return self._component_of.get(word, (word,))

    def distances(self, word: str) -> dict[str, int]:
        """Return every word of the component of ``word`` -> steps from it, the nearest first."""
        found, queue = {word: 0}, deque([word])
        while queue:
            at = queue.popleft()
            for other in self.substitutes(at):
                if other not in found:
                    found[other] = found[at] + 1
                    queue.append(other)
        return found

    def edges(self) -> list[tuple[str, str]]:
        """Return every edge once, the smaller word first."""
        return [(a, b) for a, others in self.neighbours.items() for b in others if a < b]

    def restricted(self, words: Iterable[str]) -> SynonymGraph:
        """Return the graph of some words."""
        keep = frozenset(words)
        return self._of(edge for edge in self.edges() if edge[0] in keep and edge[1] in keep)

    def where(self, similarity: Callable[[str, str], float], threshold: float) -> SynonymGraph:
        """Return the graph of the edges whose similarity exceeds a threshold, such as a cosine of other vectors."""
        return self._of(edge for edge in self.edges() if similarity(*edge) > threshold)

    def __and__(self, other: SynonymGraph) -> SynonymGraph:
        """Return the edges that both graphs have."""
        return self._of(edge for edge in self.edges() if edge[1] in other.substitutes(edge[0]))

    def clustered(self, cap: int) -> SynonymGraph:
        """Return the edges inside clusters of at most ``cap`` words that all name each other.

        Clusters come from complete linkage, the strongest edges first; where strengths are not known, edges whose ends
        share most neighbours come first. Every component of the result is a clique of this graph.

        Raises:
            ValueError: a component is too large for complete linkage.
        """
        check_count("cap", cap)
        kept: list[tuple[str, str]] = []
        for component in self.components:
            if len(component) > MAX_CLUSTERED:
                raise ValueError(
                    f"a component has {len(component)} words; complete linkage takes {MAX_CLUSTERED}. Restrict the "
                    "graph to the words of your corpus first: restricted(vocabulary_of(docs))"
                )
            for cluster in self._cliques(component, cap):
                kept += [(a, b) for i, a in enumerate(cluster) for b in cluster[i + 1 :]]
        return self._of(kept)

    def _cliques(self, component: Sequence[str], cap: int) -> list[list[str]]:
        from scipy.cluster.hierarchy import linkage, to_tree
        from scipy.spatial.distance import squareform

        distance = self._distance_matrix(component)
        root: Any = to_tree(linkage(squareform(distance, checks=False), "complete"))
        found, open_ = [], [root]
        while open_:
            node = open_.pop()
            if node.count <= cap and node.dist < 2.0:  # at 2 and above some pair has no edge
                found.append([component[i] for i in sorted(node.pre_order())])
            else:
                open_ += [node.left, node.right]
        return found

    def _distance_matrix(self, component: Sequence[str]) -> np.ndarray:
        """Return (n, n): below 1 for edges, 2 for all other pairs, 0 on the diagonal."""
        number = {word: i for i, word in enumerate(component)}
        arcs = [(number[a], number[b]) for a in component for b in self.neighbours[a]]
        near = np.eye(len(component), dtype=np.float32)
        near[tuple(np.array(arcs).T)] = 1.0
        if self.strength:
            weights = np.zeros_like(near, dtype=np.float64)
            for i, j in arcs:
                weights[i, j] = self.strength.get((component[min(i, j)], component[max(i, j)]), 0.0)
            distance = (weights.max() - weights) / (1.0 + np.ptp(weights))
        else:
            common, degree = near @ near, near.sum(1)
            distance = (1.0 - common / (degree[:, None] + degree[None, :] - common)).astype(np.float64)
        distance = np.where(near > 0, np.minimum(distance, 1.0), 2.0)
        np.fill_diagonal(distance, 0.0)
        return distance

    def _of(self, edges: Iterable[tuple[str, str]]) -> SynonymGraph:
        known = self.strength
        return SynonymGraph.from_pairs((a, b, known[a, b]) if (a, b) in known else (a, b) for a, b in edges)

    def report(self) -> GraphReport:
        """Return sizes of the graph and its components."""
        return GraphReport(len(self.neighbours), len(self.edges()), tuple(len(c) for c in self.components))


def all_but_the_top(vectors: np.ndarray, n_remove_pc: int = 8) -> np.ndarray:
    """Return (V, D) vectors of length 1, without their mean and their leading principal directions (not scaled again).

    Args:
        vectors: (V, D).
        n_remove_pc: directions to remove, below D.
    """
    found = np.asarray(vectors, dtype=np.float64)
    if found.ndim != 2 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"vectors of shape {found.shape}: finite (V, D) numbers are needed")
    if not 0 <= n_remove_pc < found.shape[1]:
        raise ValueError(f"n_remove_pc={n_remove_pc}: 0 .. {found.shape[1] - 1} are possible")
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    found = found - found.mean(0)
    _, directions = np.linalg.eigh(found.T @ found)  # rising
    top = directions[:, found.shape[1] - n_remove_pc :]
    return found - found @ top @ top.T
