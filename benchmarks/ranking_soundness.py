"""Attack certified rankings: nobody may enter a certified top K.

    python benchmarks/ranking_soundness.py [--tables 3000] [--json FILE] [--first-seed S]

Each random table has a random graph of synonyms, a random cap, and in one case of three sets of random unequal sizes.
Scores are known exactly: means of numbers of words (closed form), or a random table of zeros and ones over all noisy
documents (every variant is scored). Lists are certified for several K by both rules; every outsider is then attacked by
exhaustive search over all documents within the budget, by greedy swaps and by a random one, and re-scored by the exact
smoother. Counted are certified (q, K), how many of them were broken, and how many of those that were *not* certified an
attack did enter, which shows that the attacks bite. Lists certified from samples (alpha 0.05 joint) are counted apart:
their false certificates must stay below alpha. Exit code 1 on any break.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ir_robust.certdr import PerturbationTable, SmoothedScores, SynonymGraph, certify_top_k
from robust_core.claim import versions

MOVABLE = tuple(f"w{i}" for i in range(7))
WORDS = (*MOVABLE, *(f"fixed{i}" for i in range(4)))
KS = (1, 2, 3)
Document = tuple[str, ...]


def random_table(draw: np.random.Generator) -> PerturbationTable:
    density = draw.choice([0.1, 0.3, 0.6, 0.9])
    pairs = [pair for pair in itertools.combinations(MOVABLE, 2) if draw.random() < density]
    graph, supports = SynonymGraph.from_pairs(pairs), {}
    if draw.random() < 1 / 3:  # unequal sizes, as no component gives them
        for word in graph.neighbours:
            others = [o for o in graph.component(word) if o != word]
            size = len(others) - int(draw.integers(0, min(len(others), 3)))
            supports[word] = [word, *draw.permutation(others)[:size].tolist()]
    return PerturbationTable(graph, int(draw.integers(2, 8)), supports=supports)


class Additive:
    """Mean of numbers, steep, so that gaps are wide."""

    def __init__(self, draw: np.random.Generator) -> None:
        fixed = draw.integers(0, 2, len(WORDS) - len(MOVABLE))
        self.numbers = dict(zip(WORDS, [*draw.random(len(MOVABLE)) ** 4, *fixed.tolist()], strict=True))

    def exact(self, table: PerturbationTable, document: Document) -> float:
        return float(np.mean([np.mean([self.numbers[w] for w in table.support(word)]) for word in document]))

    def samples(self, table: PerturbationTable, document: Document, n: int, draw: np.random.Generator) -> np.ndarray:
        columns = [np.array([self.numbers[w] for w in table.support(word)]) for word in document]
        return np.mean([draw.choice(column, n) for column in columns], 0)


class Arbitrary:
    """Any number in {0, 1} for any document: nothing smooth to lean on."""

    def __init__(self, draw: np.random.Generator) -> None:
        chance = draw.choice([0.02, 0.5, 0.98], (len(WORDS),) * 2)[..., None]  # lists are told apart by two words
        self.table = draw.random((len(WORDS),) * 3) < chance

    def _indices(self, table: PerturbationTable, document: Document) -> list[list[int]]:
        return [[WORDS.index(w) for w in table.support(word)] for word in document]

    def exact(self, table: PerturbationTable, document: Document) -> float:
        return float(self.table[np.ix_(*self._indices(table, document))].mean())

    def samples(self, table: PerturbationTable, document: Document, n: int, draw: np.random.Generator) -> np.ndarray:
        rows = [draw.choice(column, n) for column in self._indices(table, document)]
        return self.table[tuple(rows)].astype(np.float64)


def variants(table: PerturbationTable, document: Document, budget: int) -> list[Document]:
    choices = itertools.product(*((word, *table.substitutes(word)) for word in document))
    return [v for v in choices if sum(a != b for a, b in zip(v, document, strict=True)) <= budget]


def choice(documents: list[Document], draw: np.random.Generator) -> Document:
    return documents[int(draw.integers(len(documents)))]


def greedy(scorer: Any, table: PerturbationTable, document: Document, budget: int) -> float:
    at = document
    allowed = variants(table, document, budget)  # substitutes are those of the original words, step by step
    for _ in range(budget):
        swaps = [v for v in allowed if sum(a != b for a, b in zip(v, at, strict=True)) <= 1]
        at = max(swaps, key=lambda v: scorer.exact(table, v))
    return scorer.exact(table, at)


def play(seed: int) -> Counter[str]:
    draw = np.random.default_rng(seed)
    table, counts = random_table(draw), Counter[str]()
    scorer = Additive(draw) if draw.random() < 0.5 else Arbitrary(draw)
    docs: list[Document] = [tuple(draw.choice(WORDS, 3).tolist()) for _ in range(6)]
    budget = int(draw.integers(0, 4))
    devs = np.array([table.deviation(doc, budget) for doc in docs])
    exact = np.array([scorer.exact(table, doc) for doc in docs])
    reach = {
        "exhaustive": [max(scorer.exact(table, v) for v in variants(table, doc, budget)) for doc in docs],
        "greedy": [greedy(scorer, table, doc, budget) for doc in docs],
        "random": [scorer.exact(table, choice(variants(table, doc, budget), draw)) for doc in docs],
    }
    counts["moves"] += sum(len(variants(table, doc, budget)) for doc in docs)
    counts["deviation exceeded"] += int((np.array(reach["exhaustive"]) - exact > devs + 1e-12).sum())
    for rule in ("per_document", "paper"):
        found = certify_top_k(SmoothedScores.closed_form(exact), devs, KS, bound="exact", rule=rule)
        for certificate in found.values():
            bar = exact[list(certificate.top)].min()
            outside = [i for i in range(6) if i not in certificate.top]
            counts[f"{rule}/{'certified' if certificate.certified else 'open'}"] += 1
            counts[f"{rule}/certified with deviation"] += certificate.certified and certificate.max_deviation > 0
            for name, best in reach.items():
                enters = bool(max(best[i] for i in outside) >= bar)
                counts[f"{rule}/{name} {'broken' if certificate.certified else 'enters open'}"] += enters
    samples = [scorer.samples(table, doc, 500, draw) for doc in docs]
    mean, var = np.array([s.mean() for s in samples]), np.array([s.var(ddof=1) for s in samples])
    estimated = SmoothedScores(mean, var, np.full(6, 500), np.zeros(6, dtype=bool), 3000, tuple(samples))
    false = False
    for certificate in certify_top_k(estimated, devs, KS).values():
        outside = [i for i in range(6) if i not in certificate.top]
        bar = exact[list(certificate.top)].min()
        counts["sampled/certified"] += certificate.certified
        false |= certificate.certified and bool(max(reach["exhaustive"][i] for i in outside) >= bar)
    counts["sampled/lists"] += 1
    counts["sampled/lists with a false certificate"] += false
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=3000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts, started = Counter[str](), time.perf_counter()
    for seed in range(options.first_seed, options.first_seed + options.tables):
        counts.update(play(seed))
    broken = sum(value for key, value in counts.items() if key.endswith(" broken")) + counts["deviation exceeded"]
    false = counts["sampled/lists with a false certificate"] > 0.05 * counts["sampled/lists"]
    document = {
        "benchmark": "ranking_soundness",
        "tables": options.tables,
        "first_seed": options.first_seed,
        "counts": dict(sorted(counts.items())),
        "broken": broken,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
    }
    text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")
    return int(broken > 0 or false)


if __name__ == "__main__":
    sys.exit(main())
