"""Who takes part: a ready ranker, one that is built for each corpus, or a recipe that is trained for each test.

A ready ranker is anything that :func:`ir_robust.rankers.as_ranker` takes. The other two say what they may learn from:

* :class:`PerCorpus`: from documents alone (statistics of words, an index), as BM25 does;
* :class:`Trained`: from judged queries; the benchmark trains it afresh without the queries that test it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.rankers.base import Ranker, as_ranker
from robust_core.evaluation.run import describe
from robust_core.models import fingerprint
from robust_core.random import derive

__all__ = ["Contestant", "PerCorpus", "Split", "Trained", "assign_folds", "contestants", "digest"]


@dataclass(frozen=True)
class PerCorpus:
    """A ranker that takes statistics from the documents that it ranks, and from nothing else.

    Attributes:
        build: documents -> ranker, e.g. ``lambda docs: BM25Ranker(BM25Index(docs))``.
        about: for the report, such as stemming and stop words; it also names the recipe where work is resumed.
    """

    build: Callable[[Mapping[str, str]], Any]
    about: str = ""


@dataclass(frozen=True)
class Trained:
    """A recipe that learns from judged queries.

    Attributes:
        fit: (training collection, its first stage, seed) -> ranker. The collection holds all documents but only the
            queries and judgements that may be learned from, so that nothing leaks through a choice of settings either.
        adapt: (ranker, documents of another corpus) -> ranker, for what may be taken from a corpus without
            judgements, such as document frequencies; None ranks the other corpus with the ranker as it is.
        about: as of :class:`PerCorpus`.
    """

    fit: Callable[[Collection, Run, int], Any]
    adapt: Callable[[Any, Mapping[str, str]], Any] | None = None
    about: str = ""


def digest(value: Any) -> str:
    """Return a SHA-256 of texts, numbers, settings and networks."""
    return hashlib.sha256(repr(describe(value)).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Which training leaves which queries for a test.

    Attributes:
        name: of the split.
        training: part -> queries that its ranker learns from.
        part_of: tested query -> the part whose ranker has not seen it.
    """

    name: str
    training: Mapping[str, tuple[str, ...]]
    part_of: Mapping[str, str] = field(default_factory=dict)


def assign_folds(qids: Sequence[str], folds: int, seed: int) -> dict[str, int]:
    """Return query -> fold; folds differ in size by one at most, and do not depend on the order of ``qids``."""
    if folds < 2 or folds > len(qids):
        raise ValueError(f"folds={folds}: between 2 and the {len(qids)} queries are needed")
    order = sorted(qids, key=lambda qid: (derive(seed, "fold", qid), qid))
    return {qid: place % folds for place, qid in enumerate(order)}


@dataclass
class Contestant:
    """One of the compared models.

    Attributes:
        name: in tables.
        model: what the user gave.
        n_trainings: trainings from different seeds; 1 for what is not trained.
        sha256: of its weights or settings; a recipe is known by its function's name and its ``about``.
        about: for the report.
    """

    name: str
    model: Any
    n_trainings: int
    sha256: str
    about: str
    _made: dict[tuple[Any, ...], Ranker] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether it learns from judgements."""
        return isinstance(self.model, Trained)

    def parts(self, split: Split) -> list[str | None]:
        """Return the parts of a split that give rankers of their own."""
        return list(split.training) if self.trained else [None]

    def ranker(
        self,
        docs: Mapping[str, str],
        sha256: str,
        fitted: Callable[[], Any] | None,
        *,
        key: tuple[Any, ...],
        home: bool,
    ) -> Ranker:
        """Return the ranker for a corpus; made once.

        Args:
            docs: of the corpus.
            sha256: of those documents.
            fitted: trains the recipe.
            key: names the training.
            home: whether it was trained on this corpus.
        """
        if isinstance(self.model, PerCorpus):
            return self._once((sha256,), lambda: self.model.build(docs))
        if not isinstance(self.model, Trained):
            return self._once((), lambda: self.model)
        ranker = self._once(key, fitted)
        adapt = self.model.adapt
        return ranker if adapt is None or home else self._once((*key, sha256), lambda: adapt(ranker, docs))

    def forget(self, split: str) -> None:
        """Let go of the rankers of a split."""
        self._made = {key: ranker for key, ranker in self._made.items() if not key or key[0] != split}

    def _once(self, key: tuple[Any, ...], make: Any) -> Ranker:
        if key not in self._made:
            self._made[key] = as_ranker(make())
        return self._made[key]


def contestants(rankers: Mapping[str, Any], n_trainings: int) -> list[Contestant]:
    """Return the models of a comparison, in the order given.

    Raises:
        TypeError: something that is neither a ranker nor a recipe.
    """
    if not rankers:
        raise ValueError("rankers: at least one is needed")
    found = []
    for name, model in rankers.items():
        if isinstance(model, PerCorpus | Trained):
            recipe = model.fit if isinstance(model, Trained) else model.build
            identity = (describe(recipe), model.about)
            about, count = model.about, n_trainings if isinstance(model, Trained) else 1
        else:
            judge, count = as_ranker(model), 1
            identity = fingerprint(judge) if hasattr(judge, "state_dict") else describe(judge)  # pyright: ignore
            about = str(getattr(model, "about", "") or type(model).__name__)
        found.append(Contestant(name, model, count, digest(identity), about))
    return found
