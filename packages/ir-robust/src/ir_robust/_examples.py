"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case

__all__ = ["certdr"]


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
