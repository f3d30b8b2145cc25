"""Words of ``robust ranking`` as objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ir_robust.attacks.base import DocumentAttack, WordBudget
from ir_robust.attacks.spam import Deletion, SentenceInjection, TermSpamming, relevant_sentences
from ir_robust.attacks.words import Trigger, WordSubstitution
from ir_robust.cli.words import NAMED, listed
from ir_robust.collection import Collection, load_collection, read_collection
from ir_robust.finished import Finished
from ir_robust.formats import Run, read_qrels, read_run
from ir_robust.rankers import BM25Index, vocabulary_of
from ir_robust.rankers.base import WhiteBoxRanker, as_ranker, candidates, scores_of
from ir_robust.ranking_robustness.models import digest
from ir_robust.synonyms import SynonymGraph
from ir_robust.text import Words
from robust_core.attacks.tokens import SEARCHES

__all__ = ["attacks_of", "collection_of", "graph_of", "ranker_of", "reranked", "run_of", "runs_of", "same_documents"]

FREQUENT = 100
"""Words of the collection that a trigger may be made of, beside the query's."""
OnStep = Callable[[str, int, int], None]


def collection_of(
    corpus: str, topics: Path | None, qrels: Path | None, *, fields: str = "text", empty: str = "refuse"
) -> Collection:
    """Return the collection that ``--corpus``, ``--topics`` and ``--qrels`` mean; judgements given apart go first."""
    if corpus in NAMED or (":" in corpus and not Path(corpus).is_file()):
        data = load_collection(corpus)
        return data if qrels is None else dataclasses.replace(data, qrels=read_qrels(qrels))
    if topics is None:
        raise ValueError(f"--corpus {corpus}: a file of documents needs --topics")
    return read_collection(corpus, topics, qrels, fields=tuple(listed("--fields", fields)), empty=empty)


def run_of(file: Path | None, data: Collection, depth: int, on_step: OnStep | None = None) -> Run:
    """Return the user's run, or that of BM25 where there is none."""
    if file is not None:
        return read_run(file)
    return BM25Index(data.docs).retrieve(data, depth=depth, on_step=on_step)


def runs_of(files: Sequence[Path]) -> dict[str, Run]:
    """Return name of the file -> run.

    Raises:
        ValueError: two files of one name.
    """
    found: dict[str, Run] = {}
    for file in files:
        name = file.name.removesuffix(".gz").rpartition(".")[0] or file.name
        if name in found:
            raise ValueError(f"--run {file}: another run is called {name!r}; rename one of the files")
        found[name] = read_run(file)
    return found


def same_documents(run: Run, data: Collection, depth: int | None) -> Run:
    """Return a run without what is hidden from its queries, cut to a depth: what a re-ranker of it is shown."""
    return {qid: {docno: run[qid][docno] for docno in docnos} for qid, docnos in candidates(run, data, depth).items()}


def ranker_of(words: str, data: Collection, device: torch.device) -> Any:
    """Return the ranker that ``--ranker`` names; see :mod:`ir_robust.rankers.loading`."""
    from ir_robust.rankers.loading import load_ranker  # transformers are imported for it

    return load_ranker(words, data=data, device=device)


def reranked(
    ranker: Any,
    data: Collection,
    run: Run,
    *,
    depth: int,
    batch_size: int,
    resume: Path | None,
    on_step: OnStep | None,
) -> Run:
    """Return a run with new scores, as :func:`ir_robust.rankers.rerank`, from where an interrupted one stopped."""
    judge, lists = as_ranker(ranker), candidates(run, data, depth)
    about = {"rerank": digest(ranker), "lists": digest(lists), "data": data.sha256 or digest([data.docs, data.queries])}

    def work(qid: str) -> dict[str, float]:
        scores = scores_of(judge, data.queries[qid], [data.docs[d] for d in lists[qid]], batch_size=batch_size)
        return dict(zip(lists[qid], scores.tolist(), strict=True))

    def report(done: int, total: int) -> None:
        if on_step is not None:
            on_step("rank", done, total)

    return Finished(resume, about).work(lists, work, report)


def graph_of(
    words: str, data: Collection, *, edges: str, threshold: float, cap: int | None, senses: int = 1
) -> SynonymGraph:
    """Return the graph that ``--synonyms`` names, on the words of the collection.

    Args:
        words: ``json:FILE``, ``wordnet:FOLDER`` or ``vectors:FILE``.
        data: only its words are kept.
        edges: ``"mutual"`` or ``"either"``.
        threshold: of the similarity of vectors.
        cap: larger components are cut into cliques of at most this many words; None leaves them whole.
        senses: of WordNet, the most frequent first.
    """
    kind, _, name = words.partition(":")
    place, known = Path(name).expanduser(), vocabulary_of(data.docs.values())
    if kind == "json":
        graph = SynonymGraph.from_json(place, edges=edges, words=known)
    elif kind == "wordnet":
        graph = SynonymGraph.from_wordnet(place, edges=edges, words=known, senses=senses)
    else:
        from ir_robust.rankers import read_vectors

        graph = SynonymGraph.from_vectors(read_vectors(place), threshold, words=known)
    return graph if cap is None else graph.clustered(cap)


def attacks_of(
    names: str,
    data: Collection,
    *,
    share: float,
    most: int | None,
    insertions: int,
    graph: SynonymGraph | None = None,
    victim: Any = None,
    surrogate: Any = None,
    max_queries: int | None = None,
) -> dict[str, DocumentAttack]:
    """Return name -> attack.

    Args:
        names: with commas.
        data: the collection.
        share: of a document's words that may change.
        most: of them, in any case.
        insertions: words that may be added.
        graph: what may be written for what, for attacks that substitute.
        victim: the ranker under attack.
        surrogate: whose gradients are taken; the victim's if None.
        max_queries: scores that a search may ask for, for each document.

    Raises:
        ValueError: an attack that needs what was not given.
    """
    words, room = WordBudget(share, most), WordBudget(0.0, insertions=insertions)
    found: dict[str, DocumentAttack] = {}
    for name in listed("--attacks", names):
        if name == "spam":
            found[name] = TermSpamming(room, place="best")
        elif name == "deletion":
            found[name] = Deletion(words)
        elif name == "sentences":
            if not data.qrels:
                raise ValueError("--attacks sentences: takes sentences of relevant documents; --qrels is needed")
            found[name] = SentenceInjection(relevant_sentences(data), room)
        elif name == "trigger":
            frequent = tuple(vocabulary_of(data.docs.values())[:FREQUENT])
            found[name] = Trigger(_TriggerWords(frequent), room, SEARCHES["greedy"](max_queries=max_queries))
        elif graph is None:
            raise ValueError(f"--attacks {name}: --synonyms is needed, what may be written for what")
        else:
            if name in ("pgd", "gcg") and not isinstance(surrogate or victim, WhiteBoxRanker):
                raise ValueError(
                    f"--attacks {name}: the ranker shows no gradients; give a --surrogate that does, or take greedy"
                )
            search = SEARCHES[name](max_queries=max_queries)
            found[name] = WordSubstitution(graph, words, search, surrogate)
    return found


@dataclass(frozen=True)
class _TriggerWords:
    """Candidates of a trigger: the query's words, and frequent ones of the collection."""

    frequent: tuple[str, ...]

    def __call__(self, query: str) -> list[str]:
        return [*Words.of(query).words, *self.frequent]
