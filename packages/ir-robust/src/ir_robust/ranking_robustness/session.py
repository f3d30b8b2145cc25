"""One run of the benchmark: lists, folds and measurements that tasks share, each kept on disk if asked.

A measurement is (what is ranked, by whom, after which training); it is stored in blocks of queries whose file carries a
hash of all that its numbers depend on, so an interrupted run goes on where it stopped and never picks up the numbers of
another model. A recipe is trained only where a block that needs it is missing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ir_robust.collection import Collection
from ir_robust.formats import Run
from ir_robust.measures import per_query
from ir_robust.rankers.base import Ranker, candidates, scores_of
from ir_robust.ranking_robustness.metrics import Resamples
from ir_robust.ranking_robustness.models import Contestant, Split, assign_folds, digest
from robust_core.errors import UntrustedFileError
from robust_core.io import read_json, sweep, write_json
from robust_core.random import derive

__all__ = ["Corpus", "Kept", "Ranked", "Session"]

logger = logging.getLogger(__name__)
OnStep = Callable[[str, int, int], None]
BLOCK = 50
"""Queries in a stored block."""
Rows = dict[str, np.ndarray]
"""Measure -> (R, Q) values: R trainings (or draws), Q queries in the order of their names."""


@dataclass(frozen=True)
class Corpus:
    """A collection with its first stage.

    Attributes:
        data: the collection.
        lists: query -> candidates in the order of the first stage, of the queries in ``qids``.
        qids: the queries that have something relevant, by name.
        sha256: of the documents.
        lists_sha256: of the lists.
        dropped: queries without anything relevant.
    """

    data: Collection
    lists: Mapping[str, list[str]]
    qids: tuple[str, ...]
    sha256: str
    lists_sha256: str
    dropped: int


@dataclass(frozen=True)
class Ranked:
    """What one model made of one set of lists.

    Attributes:
        rows: values.
        scores: a list for each row: query -> (N,) scores in the order of the lists.
        lists: query -> documents.
    """

    rows: Rows
    scores: list[dict[str, np.ndarray]]
    lists: Mapping[str, list[str]]

    def run(self, row: int, qid: str) -> dict[str, float]:
        """Return document -> score."""
        return dict(zip(self.lists[qid], self.scores[row][qid].tolist(), strict=True))


@dataclass(frozen=True)
class Kept:
    """A ranking that can be written as a TREC run."""

    condition: str
    model: str
    part: str
    lists: Mapping[str, list[str]]
    scores: Mapping[str, np.ndarray]

    def run(self) -> Run:
        """Return query -> document -> score."""
        return {qid: dict(zip(self.lists[qid], s.tolist(), strict=True)) for qid, s in self.scores.items()}


@dataclass
class Session:
    """What all tasks of one run share; see the arguments of :class:`.RobustnessBenchmark`."""

    data: Collection
    measures: tuple[str, ...]
    candidates: str
    depth: int | None
    first_stage: Callable[[Mapping[str, str]], Any]
    folds: int
    seed: int
    resamples: Resamples
    given_run: Run | None = None
    train: tuple[Collection, Run | None] | None = None
    resume: Path | None = None
    on_step: OnStep | None = None
    prefix: str = ""
    kept: list[Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stages: dict[str, Any] = {}
        self._clean: dict[str, Ranked] = {}
        self._splits: dict[str, Split] = {}
        if self.resume is not None:
            self.resume.mkdir(parents=True, exist_ok=True)
            sweep(self.resume)
        self.source = self.corpus(self.data, self.given_run)
        if self.train is None:
            self.learn = self.source
        else:
            self.learn = self.corpus(*self.train)

    # -- lists --------------------------------------------------------------------------------------------------

    def corpus(self, data: Collection, run: Run | None = None) -> Corpus:
        """Return a collection with its first stage and without the queries that have nothing relevant.

        Raises:
            ValueError: no judged query, judged documents that are not there, judged queries without candidates.
        """
        data.check_judged_documents()
        qids = tuple(sorted(data.judged()))
        if not qids:
            raise ValueError(f"{data.name}: no query has a relevant document; without judgements nothing is measured")
        sha256 = _hash_texts(data.docs)
        if run is None:
            lists = self._retrieve(data, sha256, {qid: data.queries[qid] for qid in qids})
        else:
            lists = candidates(run, data, self.depth)
        missing = [qid for qid in qids if not lists.get(qid)]
        if missing:
            raise ValueError(
                f"run: {len(missing)} of {len(qids)} judged queries have no candidates, {missing[0]!r} first; leave "
                "their judgements out, or rank them"
            )
        lists = {qid: lists[qid] for qid in qids}
        return Corpus(data, lists, qids, sha256, digest(lists), len(data.queries) - len(qids))

    def _retrieve(self, data: Collection, sha256: str, queries: Mapping[str, str]) -> dict[str, list[str]]:
        if sha256 not in self._stages:
            self._stages[sha256] = self.first_stage(data.docs)
        asked = Collection(data.docs, queries, name=data.name, hidden=data.hidden)
        depth = len(data.docs) if self.depth is None else self.depth
        return candidates(self._stages[sha256].retrieve(asked, depth=depth), asked, self.depth)

    def lists_for(self, queries: Mapping[str, str]) -> Mapping[str, list[str]]:
        """Return the candidates of rewritten queries: those of the clean ones, or the first stage asked again."""
        if self.candidates == "fixed":
            return self.source.lists
        found = self._retrieve(self.data, self.source.sha256, queries)
        return {qid: found[qid] or self.source.lists[qid] for qid in queries}

    def elsewhere(self, data: Collection, run: Run | None) -> Session:
        """Return a session whose source is another collection, with the same settings and stores."""
        return replace(self, data=data, given_run=run, train=None, prefix=f"{data.name} ", kept=self.kept)

    # -- training -----------------------------------------------------------------------------------------------

    def split(self, name: str = "all", keep: Callable[[str], bool] | None = None) -> Split:
        """Return how recipes are trained: on the training collection, or on the other folds of the queries.

        Args:
            name: of the split.
            keep: of queries that may be learned from; all if None. Those of the source that it leaves out are tested
                by :meth:`each` only.
        """
        if name not in self._splits:
            allowed = [qid for qid in self.learn.qids if keep is None or keep(qid)]
            if self.train is not None:
                split = Split(name, {"train": tuple(allowed)}, dict.fromkeys(self.source.qids, "train"))
            else:
                fold = assign_folds(allowed, min(self.folds, len(allowed)), self.seed)
                parts = [f"fold{i}" for i in range(max(fold.values()) + 1)]
                training = {p: tuple(q for q in allowed if f"fold{fold[q]}" != p) for p in parts}
                split = Split(name, training, {qid: f"fold{fold[qid]}" for qid in allowed})
            self._splits[name] = split
        return self._splits[name]

    def _fit(self, who: Contestant, split: Split, part: str, number: int) -> Any:
        learn, qids = self.learn, split.training[part]
        chosen = Collection(
            learn.data.docs,
            {qid: learn.data.queries[qid] for qid in qids},
            {qid: learn.data.qrels[qid] for qid in qids},
            learn.data.name,
            learn.data.sha256,
            learn.data.hidden,
        )
        run = {qid: {d: float(-i) for i, d in enumerate(learn.lists[qid], 1)} for qid in qids}
        logger.info("training %s on %s/%s, number %d", who.name, split.name, part, number)
        if self.on_step is not None:
            self.on_step(f"train {who.name}: {split.name}/{part}", number, who.n_trainings)
        return who.model.fit(chosen, run, self.fit_seed(split.name, part, number))

    def fit_seed(self, split: str, part: str, number: int) -> int:
        """Return the seed of one training, below 2**31 as every library takes it."""
        return derive(self.seed, "fit", split, part, number) % (2**31 - 1)

    def ranker(self, who: Contestant, corpus: Corpus, split: Split, part: str | None, number: int) -> Ranker:
        """Return the ranker of one training for a corpus."""
        fitted = None if part is None else lambda: self._fit(who, split, part, number)
        key = (split.name, part, number, self.learn.sha256, self.learn.lists_sha256)
        home = corpus.sha256 == self.learn.sha256
        return who.ranker(corpus.data.docs, corpus.sha256, fitted, key=key, home=home)

    def identity(self, who: Contestant, split: Split, part: str | None, number: int) -> list[Any]:
        """Return what tells this ranker from others."""
        if part is None:
            return [who.sha256]
        seed, learn = self.fit_seed(split.name, part, number), self.learn
        return [who.sha256, split.training[part], seed, learn.sha256, learn.lists_sha256]

    # -- measuring ----------------------------------------------------------------------------------------------

    def clean(self, who: Contestant) -> Ranked:
        """Return the untouched queries, each ranked by a training that has not seen it; measured once."""
        if who.name not in self._clean:
            label, lists = f"{self.prefix}clean", self.source.lists
            self._clean[who.name] = self.cross(who, label, self.data.queries, lists, self.split())
        return self._clean[who.name]

    def cross(
        self, who: Contestant, label: str, queries: Mapping[str, str], lists: Mapping[str, list[str]], split: Split
    ) -> Ranked:
        """Return rows of trainings; each query is ranked by the part of the split that has not seen it."""
        qids = [qid for qid in self.source.qids if qid in split.part_of]
        rows = []
        for number in range(who.n_trainings):
            scores: dict[str, np.ndarray] = {}
            for part in who.parts(split):
                own = [qid for qid in qids if part is None or split.part_of[qid] == part]
                scores |= self._rank(who, label, self.source, queries, lists, own, split, part, number)
            rows.append({qid: scores[qid] for qid in qids})
            self._keep(label, who, str(number), lists, rows[-1])
        return Ranked(self._measured(self.source.data, lists, rows), rows, lists)

    def each(self, who: Contestant, label: str, corpus: Corpus, qids: Sequence[str], split: Split) -> Ranked:
        """Return rows of (training, part): queries that no part has seen are ranked by every part."""
        rows = []
        for number in range(who.n_trainings):
            for part in who.parts(split):
                queries, lists = corpus.data.queries, corpus.lists
                rows.append(self._rank(who, label, corpus, queries, lists, qids, split, part, number))
                self._keep(label, who, f"{number}-{part or 'all'}", lists, rows[-1])
        return Ranked(self._measured(corpus.data, corpus.lists, rows), rows, corpus.lists)

    def _measured(self, data: Collection, lists: Mapping[str, list[str]], rows: list[dict[str, np.ndarray]]) -> Rows:
        found: dict[str, list[list[float]]] = {name: [] for name in self.measures}
        for scores in rows:
            run = {qid: dict(zip(lists[qid], s.tolist(), strict=True)) for qid, s in scores.items()}
            for name, values in self.measure(data, run).items():
                found[name].append(values)
        return {name: np.array(values) for name, values in found.items()}

    def measure(self, data: Collection, run: Run) -> dict[str, list[float]]:
        """Return measure -> values of the queries of a run, in its order."""
        found = per_query(run, {qid: data.qrels[qid] for qid in run}, self.measures)
        return {name: [values[qid] for qid in run] for name, values in found.items()}

    def _keep(
        self, label: str, who: Contestant, part: str, lists: Mapping[str, list[str]], scores: Mapping[str, np.ndarray]
    ) -> None:
        self.kept.append(Kept(label, who.name, part, lists, scores))

    def _rank(
        self, who: Contestant, label: str, corpus: Corpus, queries: Mapping[str, str],
        lists: Mapping[str, list[str]], qids: Sequence[str], split: Split, part: str | None, number: int,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        docs = corpus.data.docs

        def rank(qid: str) -> list[float]:
            ranker = self.ranker(who, corpus, split, part, number)
            return scores_of(ranker, queries[qid], [docs[d] for d in lists[qid]]).tolist()

        about = [corpus.sha256, {qid: (queries[qid], lists[qid]) for qid in qids}]
        identity = [*self.identity(who, split, part, number), *about]
        found = self.stored(f"{label} {who.name} {part or ''} {number}", identity, qids, rank)
        return {qid: np.array(values, dtype=np.float64) for qid, values in found.items()}

    def stored(self, key: str, identity: Any, qids: Sequence[str], work: Callable[[str], Any]) -> dict[str, Any]:
        """Return query -> ``work(query)``, read from blocks on disk where they are there.

        Args:
            key: names the measurement, for people.
            identity: all that the results depend on.
            qids: the queries.
            work: gives plain JSON.
        """
        whole = digest([identity, key, list(qids)]) if self.resume is not None else ""
        found: dict[str, Any] = {}
        for start in range(0, len(qids), BLOCK):
            block = qids[start : start + BLOCK]
            path = None
            if self.resume is not None:
                name = "".join(c if c.isalnum() else "-" for c in key)[:60]
                path = self.resume / f"{name}-{whole[:16]}-{start // BLOCK:04d}.json"
            rows = _read(path, whole, block)
            if rows is None:
                rows = {}
                for qid in block:
                    rows[qid] = work(qid)
                    self._report(key, len(found) + len(rows), len(qids))
                if path is not None:
                    write_json(path, {"identity": whole, "rows": rows}, indent=None)
            found |= rows
        return found

    def _report(self, key: str, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(" ".join(key.split()), done, total)


def _read(path: Path | None, identity: str, block: Sequence[str]) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    try:
        document = read_json(path)
    except UntrustedFileError as error:
        logger.warning("%s is damaged (%s); its queries are measured again", path, error)
        return None
    rows = document.get("rows") if isinstance(document, dict) and document.get("identity") == identity else None
    if not isinstance(rows, dict) or list(rows) != list(block):
        logger.warning("%s is of another run; its queries are measured again", path)
        return None
    return rows


def _hash_texts(docs: Mapping[str, str]) -> str:
    found = hashlib.sha256()
    for docno in sorted(docs):
        found.update(f"{len(docno)} {docno} {len(docs[docno])} ".encode())
        found.update(docs[docno].encode())
    return found.hexdigest()
