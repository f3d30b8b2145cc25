"""Rankers on thousands of variants of one document: scoring word numbers beside scoring texts and the bare network.

    python benchmarks/rankers.py [--quick] [--json FILE]

Certification and attacks ask for one document in thousands of wordings. For each small ranker (a vocabulary of 8,000
words, vectors of 384 numbers, a query of 10 words) variants of a document of 150 words are scored

- ``score_words``: by word numbers, as smoothers and attacks ask;
- ``score``: by text, which splits each variant into words again;
- ``forward``: by the plain forward pass of the network on the same numbers, the form in which it trains;
- ``gather`` (the bag alone): the least there is, one gather and a mean of ready numbers in float32, without the
  float64 sums that keep a score from depending on its company.

A draw of the numbers (uniform words) is timed too. Alternated, least times of processor time on one thread;
``ratio_x`` is the time of ``score_words`` over that of ``x``: below 1 it is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ir_robust.rankers import DRMM, KNRM, BagRanker, Duet, random_vectors
from ir_robust.rankers.word_model import WordModel
from robust_core.claim import versions

WORDS, DIM, LENGTH, QUERY = 8_000, 384, 150, 10


def models() -> dict[str, WordModel]:
    vectors = random_vectors([f"w{i}" for i in range(WORDS)], DIM, generator=0)
    idf = torch.rand(WORDS + 2, generator=torch.Generator().manual_seed(1))
    return {
        "bag": BagRanker(vectors), "knrm": KNRM(vectors), "drmm": DRMM(vectors, idf), "duet": Duet(vectors)
    }  # fmt: skip


def least(parts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least over alternated rounds."""
    found = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds + 1):  # the first warms up: it is kept only if it is the least
        for name, part in parts.items():
            start = time.process_time()
            part()
            found[name] = min(found[name], time.process_time() - start)
    return found


def row(name: str, model: WordModel, n: int, rounds: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(2, WORDS + 2, (n, LENGTH), generator=draw)
    query = " ".join(f"w{int(i)}" for i in torch.randint(0, WORDS, (QUERY,), generator=draw))
    few = min(n, 200)  # by text and by plain forward, so that memory and patience last
    texts = [" ".join(model.vocabulary.words[i] for i in ids) for ids in words[:few].tolist()]
    asked = model.numbers([query]).expand(few, -1)
    parts: dict[str, Callable[[], Any]] = {
        "score_words": lambda: model.score_words(query, words),
        "score": lambda: model.score(query, texts),
        "forward": lambda: model(asked, words[:few]),
        "draw": lambda: torch.randint(2, WORDS + 2, (n, LENGTH), generator=draw),
    }
    if isinstance(model, BagRanker):
        ready: Tensor = model.word_scores(query).float()
        parts["gather"] = lambda: ready[words].mean(1)
    seconds = least(parts, rounds)
    each = {key: value / (few if key in ("score", "forward") else n) for key, value in seconds.items()}
    ratios = {f"ratio_{key}": each["score_words"] / each[key] for key in each if key != "score_words"}
    rate = {f"{key}_per_second": round(1 / value) for key, value in each.items()}
    return {"ranker": name, "n": n, **rate, **{key: round(value, 4) for key, value in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, rounds = (200, 2) if options.quick else (4_000, 7)
    rows = []
    with torch.no_grad():
        for name, model in models().items():
            rows.append(row(name, model, n if name != "duet" else min(n, 1_000), rounds))
            print(json.dumps(rows[-1]))
    if options.json is not None:
        about = {"rows": rows, "threads": 1, "machine": platform.machine(), "versions": versions()}
        options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
