"""Early decisions: the verdicts of all samples from a fraction of them, and never a false one more often than alpha."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ir_robust.certdr import PerturbationTable, SmoothedRanker, Squash, SynonymGraph, certify_list, certify_run
from ir_robust.certdr.early import looks_of
from ir_robust.collection import Collection
from ir_robust.rankers.base import Vocabulary
from ir_robust.text import Words
from robust_core.errors import CheckpointError

LETTERS = [a + b for a in "abcdefgh" for b in "stuvwxyz"]
GRAPH = SynonymGraph.from_pairs([(a + b, a + c) for a in "abcdefgh" for b in "stuvwxyz" for c in "stuvwxyz" if b < c])
"""Eight components of eight words."""
TABLE = PerturbationTable(GRAPH)
QUERIES = [f"q{i}" for i in range(8)]


class Scorer:
    """A different additive score for each query."""

    vocabulary = Vocabulary(LETTERS)

    def numbers(self, query: str) -> Tensor:
        draw = torch.Generator().manual_seed(sum(map(ord, query)))
        component, word = torch.rand(8, 1, generator=draw), torch.rand(8, 8, generator=draw)
        return torch.cat([torch.zeros(2), (0.8 * component + 0.2 * word).flatten()]).double()

    def score(self, query: str, docs: Sequence[str]) -> Tensor:
        rows = [torch.tensor([self.vocabulary.ids(Words.of(doc).words)]) for doc in docs]
        return torch.cat([self.score_words(query, row) for row in rows])

    def score_words(self, query: str, words: Tensor) -> Tensor:
        return self.numbers(query)[words].mean(1)


def collection(n_docs: int = 25, length: int = 12) -> Collection:
    draw = np.random.default_rng(0)
    docs = {}
    for i in range(n_docs):
        liked = draw.dirichlet(np.full(8, 0.5))  # documents differ by their components, or noise would level them
        chosen = draw.choice(8, length, p=liked)
        docs[f"d{i:02d}"] = " ".join("abcdefgh"[c] + "stuvwxyz"[draw.integers(8)] for c in chosen)
    return Collection(docs, {query: query for query in QUERIES})


DATA = collection()
RUN = {query: dict.fromkeys(DATA.docs, 0.0) for query in QUERIES}


def truth(query: str, doc: str) -> float:
    numbers = Scorer().numbers(query)
    means = [numbers[Scorer.vocabulary.ids(TABLE.support(w))].mean() for w in Words.of(doc).words]
    return float(torch.stack(means).mean())


@pytest.mark.quick
def test_verdicts_are_those_of_all_samples_from_far_fewer() -> None:
    smoothed, ks, docs = SmoothedRanker(Scorer(), TABLE, 4000, squash=None), (1, 3, 5, 10), list(DATA.docs.values())
    same = total = spent = held = 0
    for query in QUERIES:
        fast, scores = certify_list(smoothed, query, docs, ks)
        full, whole = certify_list(smoothed, query, docs, ks, early=False)
        assert int(whole.n.sum()) == 4000 * len(docs)
        spent += int(scores.n.sum())
        for k in ks:
            same += fast[k].certified == full[k].certified
            total += 1
            held += full[k].certified
            assert fast[k].n_samples == int(scores.n.sum())
    assert same >= total - 1
    assert 5 < held < total
    assert spent <= 4000 * len(docs) * len(QUERIES) / 5


def test_early_certificates_are_true() -> None:
    """At a large alpha, over many seeds: wherever a certificate stands, the closed-form scores agree."""
    docs, false, runs = list(DATA.docs.values()), 0, 0
    exact = {query: np.array([truth(query, doc) for doc in docs]) for query in QUERIES}
    for seed in range(4):
        smoothed = SmoothedRanker(Scorer(), TABLE, 1000, squash=None, generator=seed)
        for query in QUERIES:
            found, _ = certify_list(smoothed, query, docs, (1, 3, 5, 10), alpha=0.5)
            runs += 1
            false += any(
                c.certified and exact[query][list(c.top)].min() <= np.delete(exact[query], list(c.top)).max()
                for c in found.values()
            )
    assert false <= 0.1 * runs


def test_looks_double_up_to_all_samples() -> None:
    assert looks_of(1000) == [64, 128, 256, 512, 1000]
    assert looks_of(50) == [50]
    assert looks_of(64) == [64]


def test_hopeless_lists_are_given_up_at_the_first_look() -> None:
    loose = PerturbationTable(GRAPH, cap=1)  # no smoothing, any word may be swapped
    found, scores = certify_list(SmoothedRanker(Scorer(), loose, squash=None), "q0", list(DATA.docs.values()), 1)
    assert not found[1].certified
    assert found[1].max_deviation == 1.0
    narrow = PerturbationTable(GRAPH, cap=4)
    found, scores = certify_list(SmoothedRanker(Scorer(), narrow, squash=None), "q0", list(DATA.docs.values()), (1, 5))
    assert scores.n.max() == 64
    assert certify_list(SmoothedRanker(Scorer(), narrow, squash=None), "q0", list(DATA.docs.values()), 1, budget=0)[0]


@pytest.mark.parametrize("rule", ["per_document", "paper"])
@pytest.mark.parametrize("how", [{"selection": "split"}, {"early": False}, {}])
def test_every_way_certifies_a_wide_gap(rule: str, how: dict) -> None:
    best = max(QUERIES, key=lambda q: np.diff(sorted(truth(q, d) for d in DATA.docs.values()))[-3])
    found, _ = certify_list(
        SmoothedRanker(Scorer(), TABLE, 30_000, squash=None), best, list(DATA.docs.values()), [3], rule=rule, **how
    )
    assert found[3].certified
    with pytest.raises(ValueError, match="selection='none'"):
        certify_list(SmoothedRanker(Scorer(), TABLE, squash=None), best, ["as"], 1, selection="none")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="docs: an empty list"):
        certify_list(SmoothedRanker(Scorer(), TABLE, squash=None), "q0", [], 1)


def test_exact_scores_go_through_every_variant() -> None:
    found, scores = certify_list(
        SmoothedRanker(Scorer(), TABLE, 10, squash=None), "q1", ["as bs", "cs ds", "es"], [1, 3], bound="exact"
    )
    assert scores.exact.all()
    assert scores.n.tolist() == [64, 64, 8]
    assert found[1].alpha == 0.0
    assert found[1].certified
    assert scores.mean[0] == pytest.approx(truth("q1", "as bs"), abs=2e-6)


def test_a_run_is_certified_resumed_and_reported(tmp_path: Path) -> None:
    file, seen = tmp_path / "rows.jsonl", []
    settings = {"n_samples": 500, "squash": None, "generator": 3, "budget": 0.2}
    whole = certify_run(Scorer(), TABLE, DATA, RUN, (1, 5), on_step=lambda *a: seen.append(a), **settings)
    assert seen[-1] == ("certify", 8, 8)
    assert whole["figures"]["CRQ@5"]["n"] == 8
    shares = [row["certificates"]["5"]["certified"] for row in whole["queries"]]
    assert whole["figures"]["CRQ@5"]["value"] == np.mean(shares)
    assert whole["threat"]["largest_component"] == 8
    assert whole["threat"]["budget"] == 0.2
    assert set(whole["run"]["q0"]) == set(DATA.docs)
    json.dumps(whole, allow_nan=False)
    part = {query: RUN[query] for query in QUERIES}
    certify_run(Scorer(), TABLE, DATA, part, (1, 5), resume=file, **settings)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # as a crash would leave it
    again = certify_run(Scorer(), TABLE, DATA, RUN, (1, 5), resume=file, batch_size=17, **settings)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    with pytest.raises(CheckpointError, match="other settings"):
        certify_run(Scorer(), TABLE, DATA, RUN, (1,), resume=file, **settings)


def test_runs_that_cannot_be_certified_are_refused() -> None:
    with pytest.raises(ValueError, match="run of 0 queries"):
        certify_run(Scorer(), TABLE, DATA, {})
    with pytest.raises(ValueError, match="squash='none'"):
        certify_run(Scorer(), TABLE, DATA, RUN, squash="none")
    with pytest.raises(ValueError, match="does not have"):
        certify_run(Scorer(), TABLE, DATA, {"q0": {"nowhere": 1.0}})
    fitted = certify_run(Scorer(), TABLE, DATA, {"q0": RUN["q0"]}, (1,), n_samples=64)
    assert set(fitted["settings"]["squash"]) == {"centre", "temperature"}
    assert Squash(**fitted["settings"]["squash"]).temperature > 0
