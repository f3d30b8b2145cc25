"""CertDR's cost: certification beside its bare draws and scores, early decisions, words by number beside texts.

    python benchmarks/certdr.py [--quick] [--json FILE]

A list of 100 documents of 120 words, two thirds of them with five synonyms, and a bag of embeddings. *Bare* is a loop
over the same texts that splits each once, draws the same words from the same streams, gathers, scores, squashes and
takes means by the same fast calls, and no more: nothing is checked, kept, bounded or decided. All figures are least
times of alternated rounds on one thread, as ratios in one run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ir_robust.certdr import PerturbationTable, SmoothedRanker, Squash, SynonymGraph, certify_list
from ir_robust.rankers import BagRanker, random_vectors
from ir_robust.text import Words
from robust_core.claim import versions
from robust_core.random import SampleStreams, derive

KS = (1, 5, 10)
QUERY = "c0w0 c1w1 c2w2"


def setting(n_docs: int) -> tuple[BagRanker, PerturbationTable, list[str], Squash]:
    draw = np.random.default_rng(0)
    moving = [[f"c{c}w{i}" for i in range(5)] for c in range(300)]
    fixed = [f"f{i}" for i in range(800)]
    graph = SynonymGraph.from_pairs([(a, b) for group in moving for a in group for b in group if a < b])
    ranker = BagRanker(random_vectors([*(w for group in moving for w in group), *fixed], 128, generator=0)).eval()
    docs = []
    for _ in range(n_docs):
        groups = draw.choice(300, 80, p=draw.dirichlet(np.full(300, 0.05)))
        words = [moving[g][draw.integers(5)] for g in groups] + draw.choice(fixed, 40).tolist()
        docs.append(" ".join(draw.permutation(words)))
    squash = Squash.of(ranker.score(QUERY, docs).detach().numpy())
    return ranker, PerturbationTable(graph), docs, squash


def bare(ranker: BagRanker, table: PerturbationTable, docs: list[str], squash: Squash, n: int) -> Callable[[], Any]:
    """Return a loop that does no more than it must."""
    numbers = {word: ranker.vocabulary.ids(table.support(word)) for word in table.graph.neighbours}

    def loop() -> list[float]:
        means = []
        with torch.no_grad():
            for doc in docs:
                words = Words.of(doc).words
                places = [i for i, word in enumerate(words) if word in numbers]
                free, base = torch.tensor(places), torch.tensor(ranker.vocabulary.ids(words))
                sets = torch.tensor([numbers[words[i]] for i in places]).flatten()
                streams = SampleStreams(derive(0, "certdr", QUERY, doc), torch.arange(n), "words")
                picks = streams.integers(torch.full((len(free),), 5), (len(free),))
                drawn = sets.index_select(0, (picks + 5 * torch.arange(len(free))).flatten()).view(n, -1)
                noisy = base.repeat(n, 1).scatter_(1, free.expand(n, -1), drawn)
                means.append(float(squash(ranker.score_words(QUERY, noisy).double()).mean()))
        return means

    return loop


def least(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times = {name: float("inf") for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - started)
    return times


def early(n_docs: int, n: int, seeds: int) -> dict[str, Any]:
    """Return samples with and without early decisions, and how many verdicts differ."""
    ranker, table, docs, squash = setting(n_docs)
    same = total = held = spent = 0
    for seed in range(seeds):
        smoothed = SmoothedRanker(ranker, table, n, squash=squash, generator=seed)
        query = f"c{3 * seed}w0 c{3 * seed + 1}w1 f{seed}"
        fast, scores = certify_list(smoothed, query, docs, KS)
        full, _ = certify_list(smoothed, query, docs, KS, early=False)
        spent += int(scores.n.sum())
        same += sum(fast[k].certified == full[k].certified for k in KS)
        held += sum(full[k].certified for k in KS)
        total += len(KS)
    return {"n_samples": n, "verdicts": total, "certified": held, "equal": same, "saving": n * n_docs * seeds / spent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_docs, n, rounds = (20, 200, 2) if options.quick else (100, 1000, 7)
    ranker, table, docs, squash = setting(n_docs)
    smoothed = SmoothedRanker(ranker, table, n, squash=squash)
    by_text = SmoothedRanker(ranker.score, table, n, squash=squash)  # a plain callable: texts, split again
    loop = bare(ranker, table, docs, squash, n)
    with torch.no_grad():
        assert np.allclose(loop(), smoothed(QUERY, docs).mean, atol=2e-6), "the bare loop draws other words"
    times = least(
        {
            "bare": loop,
            "certified": lambda: certify_list(smoothed, QUERY, docs, KS, early=False),
            "sampled": lambda: smoothed(QUERY, docs),
            "early": lambda: certify_list(smoothed, QUERY, docs, KS),
        },
        rounds,
    )
    few = docs[:5]
    words = least({"number": lambda: smoothed(QUERY, few), "text": lambda: by_text(QUERY, few)}, 2)
    document = {
        "benchmark": "certdr",
        "n_documents": n_docs,
        "n_samples": n,
        "seconds": {name: round(value, 4) for name, value in {**times, **words}.items()},
        "certified_over_bare": round(times["certified"] / times["bare"], 3),
        "early_over_bare": round(times["early"] / times["bare"], 3),
        "text_over_number": round(words["text"] / words["number"], 1),
        "early": [
            early(n_docs, size, 2 if options.quick else 8 if size == n else 3)
            for size in ((n,) if options.quick else (n, 10 * n))
        ],
        "versions": versions(),
    }
    text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
