"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case

__all__ = ["certdr", "ranking_robustness"]


def certdr() -> Case:
    """Return the certified share of three queries over twelve small documents, for a bag of embeddings."""
    import torch

    from ir_robust.certdr import PerturbationTable, SynonymGraph, certify_run
    from ir_robust.collection import Collection
    from ir_robust.rankers import BagRanker, random_vectors, vocabulary_of

    sets = [["wing", "airfoil", "vane"], ["lift", "buoyancy"], ["heat", "warmth", "hotness"], ["flow", "stream"]]
    pairs = [(a, b) for members in sets for a in members for b in members if a < b]
    topics = [" ".join(members[i % len(members)] for i in range(9)) for members in sets]
    docs = {f"d{i:02d}": f"{topics[i % 4]} of {topics[(i + 1) % 4][: 4 + 3 * i]}" for i in range(12)}
    data = Collection(docs, {"q1": "wing lift", "q2": "heat flow", "q3": "lift of a stream"})
    ranker = BagRanker(random_vectors(vocabulary_of([*docs.values(), *data.queries.values()]), 16, generator=1))
    table = PerturbationTable(SynonymGraph.from_pairs(pairs))
    run = {qid: dict.fromkeys(docs, 0.0) for qid in data.queries}

    def measure() -> dict[str, float]:
        report = certify_run(ranker, table, data, run, (1, 3, 6), n_samples=400)
        return {name: figure["value"] for name, figure in report["figures"].items()}

    return Case(measure, ranker, torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))


def ranking_robustness() -> Case:
    """Return what four of the tasks say of BM25 and of a bag of embeddings trained by folds, on made documents."""
    import torch

    from ir_robust.attacks import WordBudget
    from ir_robust.attacks.spam import TermSpamming
    from ir_robust.collection import Collection
    from ir_robust.formats import Run
    from ir_robust.perturb import Shuffle, Typos
    from ir_robust.rankers import (
        BagRanker,
        BM25Index,
        BM25Ranker,
        fit_ranker,
        random_vectors,
        training_pairs,
        vocabulary_of,
    )
    from ir_robust.ranking_robustness import (
        DocumentAttackTask,
        PerCorpus,
        QueryAttackTask,
        RobustnessBenchmark,
        Trained,
        UnseenQueryTypeTask,
        VarianceTask,
        length_types,
    )

    subjects = ["wing lift chord sweep", "heat flux plate temperature", "shock cone nozzle", "panel flutter modes"]
    terms = [subject.split() for subject in subjects]
    docs, queries, qrels = {}, {}, {}
    for s, words in enumerate(terms):
        for d in range(4):
            docs[f"d{s}{d}"] = " ".join([*words[d % 2 : d % 2 + 2], *terms[(s + d) % 4][:2], "study of results"])
        for q in range(3):
            queries[f"q{s}{q}"] = " ".join(words[: 1 + q])
            qrels[f"q{s}{q}"] = {f"d{s}{d}": 1 for d in range(2)}
    data = Collection(docs, queries, qrels, "made")
    vectors = random_vectors(vocabulary_of([*docs.values(), *queries.values()]), 16, generator=1)

    def fit(train: Collection, run: Run, seed: int) -> BagRanker:
        ranker = BagRanker(vectors, dim=8, generator=seed)
        pairs = training_pairs(train, run, ranks=(1, 16), n_negatives=2, generator=seed)
        fit_ranker(ranker, train, pairs, epochs=1, generator=seed)
        return ranker

    tasks = [
        VarianceTask(),
        UnseenQueryTypeTask(length_types(queries), least=3),
        QueryAttackTask((Typos(1), Shuffle())),
        DocumentAttackTask(TermSpamming(WordBudget(share=0.0, insertions=2)), ranks=(4, 10), k=3),
    ]
    rankers = {"bm25": PerCorpus(lambda docs: BM25Ranker(BM25Index(docs))), "bag": Trained(fit)}

    def measure() -> dict[str, float]:
        benchmark = RobustnessBenchmark(tasks, ["nDCG@3"], depth=16, folds=2, n_boot=50)
        report = benchmark.run(rankers, data)
        return {f"{task['name']}/{m}": report.headline(task["name"], m).value for task in report.tasks for m in rankers}

    return Case(measure, torch.nn.Identity(), torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))
