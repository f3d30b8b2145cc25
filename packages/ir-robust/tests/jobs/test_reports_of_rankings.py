"""Reports of rankings: figures are those of slow references, pages come from files, work goes on where it stopped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ir_robust.attacks.base import WordBudget
from ir_robust.attacks.readers import Readers
from ir_robust.attacks.run import attack_run, targets_of
from ir_robust.attacks.spam import Deletion, TermSpamming
from ir_robust.certdr import PerturbationTable, SynonymGraph
from ir_robust.certdr.report import certify_report
from ir_robust.collection import Collection
from ir_robust.evaluation import evaluate_runs
from ir_robust.finished import Finished
from ir_robust.formats import Run, ordered
from ir_robust.pages.common import diff
from ir_robust.rankers import BM25Index, BM25Ranker
from ir_robust.report import RankingReport
from robust_core.errors import CheckpointError, UntrustedFileError

WORDS = "wing lift drag flow heat layer shock jet wake spin".split()


@pytest.fixture(scope="module")
def data() -> Collection:
    draw = np.random.default_rng(0)
    docs = {f"d{i}": " ".join(draw.choice(WORDS, 12)).capitalize() + "." for i in range(24)}
    queries = {f"q{i}": " ".join(WORDS[i : i + 2]) for i in range(8)}
    qrels = {q: {f"d{(3 * i + j) % 24}": 1 + j % 2 for j in range(3)} for i, q in enumerate(queries)}
    return Collection(docs, queries, {**qrels, "q7": {"d0": 0}}, "toy")


@pytest.fixture(scope="module")
def index(data: Collection) -> BM25Index:
    return BM25Index(data.docs)


def shuffled(run: Run) -> Run:
    return {q: {d: float(len(d) * 7 % 5 + i) for i, d in enumerate(sorted(scores))} for q, scores in run.items()}


@pytest.mark.quick
def test_figures_of_runs_are_paired_by_query(data: Collection, index: BM25Index, tmp_path: Path) -> None:
    first = index.retrieve(data)
    runs = {"bm25": first, "other": shuffled(first)}
    report = evaluate_runs(runs, data.qrels, ["nDCG@5", "RR@10"], data="toy & co")
    mine, theirs = report.arrays["other/nDCG@5"], report.arrays["bm25/nDCG@5"]
    assert len(mine) == report.document["n"] == 7  # q7 has nothing relevant
    assert report["other/nDCG@5_gain"].value == pytest.approx(mine.mean() - theirs.mean())
    low, high = report["other/nDCG@5_gain"].interval or (0, 0)
    assert low <= report["other/nDCG@5_gain"].value <= high
    assert report["bm25/nDCG@5_variance"].value == pytest.approx(theirs.var())
    assert report.document["details"]["tests"]["other/nDCG@5"]["worse"] == (mine < theirs).sum()
    assert any("1 of 8 queries have no relevant document" in flag for flag in report.document["flags"])
    same = evaluate_runs({"a": first, "b": first}, data.qrels, ["RR@10"])
    assert same["b/RR@10_gain"].interval == (0.0, 0.0)
    assert same.document["details"]["tests"]["b/RR@10"]["p"] == 1
    report.save(tmp_path)
    again = RankingReport.load(tmp_path)
    assert again.document == report.document
    assert again.html() == (tmp_path / "report.html").read_text()
    assert "toy &amp; co" in again.html()


def test_what_no_interval_says_is_flagged() -> None:
    qrels = {str(q): {f"a{i}": int(i == 0) for i in range(10)} for q in range(5)}
    known = {q: {f"a{i}": float(-i) for i in range(10)} for q in qrels}
    strange = {q: {f"b{i}": 0.0 for i in range(10)} for q in qrels}
    flags = " ".join(evaluate_runs({"known": known, "strange": strange}, qrels).document["flags"])
    assert "strange: 0 % of its first 10 documents were ever judged, against 100 % of known's" in flags
    assert "strange: 100 % of neighbours" in flags
    assert "known: " not in flags
    short = {q: {"a0": 1.0} for q in qrels}
    assert "fewer than 10" in evaluate_runs({"short": short}, qrels).document["flags"][0]


def test_targets_stand_below_k_and_are_not_relevant() -> None:
    scores = {f"d{i}": float(-i) for i in range(20)}
    grades = {"d7": 2, "d8": 0, "d9": 1}
    every = targets_of(scores, grades, k=5, at_most=None, seed=0, qid="q")
    assert every == [f"d{i}" for i in range(5, 20) if i not in (7, 9)]
    some = targets_of(scores, grades, k=5, at_most=4, seed=0, qid="q")
    assert some == targets_of(dict(reversed(scores.items())), grades, k=5, at_most=4, seed=0, qid="q")
    assert len({tuple(targets_of(scores, grades, k=5, at_most=4, seed=s, qid="q")) for s in range(9)}) > 5
    assert [d for d in every if d in some] == some


def test_an_attacked_run_is_counted_query_by_query(data: Collection, index: BM25Index, tmp_path: Path) -> None:
    attacks = {"spam": TermSpamming(WordBudget(0.0, insertions=4)), "deletion": Deletion(WordBudget(0.3))}
    ranker, run = BM25Ranker(index), index.retrieve(data)
    report = attack_run(ranker, data, run, attacks, k=3, targets=4, measures=["nDCG@5"], name="bm25")
    rows = [row for row in report.edits if row["attack"] == "spam"]
    assert all(row["rank"][0] > 3 and data.qrels[row["qid"]].get(row["docno"], 0) == 0 for row in rows)
    by_query = [[r["rank"][1] <= 3 for r in rows if r["qid"] == q] for q in data.queries]
    assert report["spam/entry"].value == pytest.approx(np.mean([np.mean(entries) for entries in by_query]))
    assert report["spam/entered"].value == np.mean([any(entries) for entries in by_query])
    assert report["spam/entry"].value > report["deletion/entry"].value
    assert report["any/entry"].value >= report["spam/entry"].value
    assert report["spam/changed"].value == pytest.approx(4 / 12)
    attacked = report.runs["spam"]
    for row in rows:
        fresh = float(ranker.score(data.queries[row["qid"]], [row["text"]])[0])
        assert attacked[row["qid"]][row["docno"]] == pytest.approx(fresh)
        assert row["rank"][0] == ordered(report.runs["clean"][row["qid"]]).index(row["docno"]) + 1
    lost = report["spam/nDCG@5_drop_rate"].value
    assert lost == pytest.approx(report["spam/nDCG@5"].value / report["clean/nDCG@5"].value - 1)
    report.save(tmp_path)
    again = RankingReport.load(tmp_path)
    assert again.edits == report.edits
    assert again.html() == (tmp_path / "report.html").read_text()
    assert "<ins>" in again.html()
    assert "add 4 words" in again.html()


def test_an_attack_goes_on_where_it_stopped(data: Collection, index: BM25Index, tmp_path: Path) -> None:
    run, path = index.retrieve(data), tmp_path / "finished.jsonl"
    asked: list[str] = []

    def ranker(query: str, docs: Sequence[str]) -> Any:
        asked.append(query)
        return BM25Ranker(index).score(query, docs)

    attacks = {"spam": TermSpamming(WordBudget(0.0, insertions=2))}
    options: dict[str, Any] = {"k": 3, "targets": 2, "resume": path}
    whole = attack_run(ranker, data, run, attacks, **options)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '["q4", {"sco')  # a crash
    asked.clear()
    again = attack_run(ranker, data, run, attacks, **options)
    assert set(asked) == set(list(data.queries.values())[4:])
    assert again.edits == whole.edits
    assert again.document["figures"] == whole.document["figures"]
    with pytest.raises(CheckpointError, match="other settings"):
        attack_run(ranker, data, run, attacks, **{**options, "k": 2})
    assert attack_run(ranker, data, run, attacks, k=3, targets=2).document["figures"] == whole.document["figures"]


def test_attacks_without_documents_or_names_are_refused(data: Collection, index: BM25Index) -> None:
    run = index.retrieve(data)
    with pytest.raises(ValueError, match="no document below rank 30"):
        attack_run(BM25Ranker(index), data, run, {"spam": TermSpamming()}, k=30)
    with pytest.raises(ValueError, match="attacks: at least one"):
        attack_run(BM25Ranker(index), data, run, {})
    idle = attack_run(BM25Ranker(index), data, run, {"none": Deletion(WordBudget(0.0))}, k=3, targets=2)
    assert "none: changed no document at all" in idle.document["flags"][-1]
    assert idle["none/boost"].value == 0


def test_a_certified_run_states_its_attacker_and_its_price(data: Collection, index: BM25Index, tmp_path: Path) -> None:
    table = PerturbationTable(SynonymGraph.from_pairs([("wing", "jet"), ("heat", "spin"), ("lift", "wake")]))
    report = certify_report(
        BM25Ranker(index), table, data, index.retrieve(data), (1, 3, 24), budget=0.25, n_samples=50,
        measures=["nDCG@5"], source="by hand",
    )  # fmt: skip
    details = report.document["details"]
    assert details["table"]["largest"] == 2
    assert details["table"]["deviation"] == 0
    assert report["CRQ@1"].value == report.arrays["certified@1"].mean()
    assert report["CRQ@24"].value == 1
    assert "8 of 8 queries are certified for some K because nobody stands below it" in report.document["flags"][0]
    gain = report.arrays["smoothed/nDCG@5"].mean() - report.arrays["plain/nDCG@5"].mean()
    assert report["smoothed/nDCG@5_gain"].value == pytest.approx(gain)
    assert set(report.runs) == {"plain", "smoothed"}
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert RankingReport.load(tmp_path).html() == page
    assert "25 % of the words" in page
    assert "by hand" in page


def test_finished_work_is_told_from_other_work_and_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "finished.jsonl"
    done: list[str] = []
    steps: list[tuple[int, int]] = []

    def work(qid: str) -> tuple[str, int]:
        done.append(qid)
        return qid, 1

    assert Finished(path, {"a": 1}).work("xy", work) == {"x": ["x", 1], "y": ["y", 1]}
    assert Finished(path, {"a": 1}).work("xyz", work, lambda *s: steps.append(s)) == {q: [q, 1] for q in "xyz"}
    assert (done, steps) == (["x", "y", "z"], [(1, 3), (2, 3), (3, 3)])
    with pytest.raises(CheckpointError, match="other settings"):
        Finished(path, {"a": 2})
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(CheckpointError, match=r"finished.jsonl:5: is damaged"):
        Finished(path, {"a": 1})
    assert Finished(None, {}).work("x", work) == {"x": ["x", 1]}


def test_what_a_reader_notices() -> None:
    readers = Readers(["the wing of the jet", "the heat of the wing", "a wing and a jet"])
    same = readers.look("the wing of the jet", "the wing of the jet", 0)
    assert same == {"changed": 0.0, "cosine": pytest.approx(1.0), "perplexity": 1.0}
    odd = readers.look("the wing of the jet", "the zebra of the jet", 1)
    assert (odd["changed"], odd["cosine"] < 1, odd["perplexity"] > 1.5) == (0.2, True, True)
    assert readers.look("a wing", "", 2)["cosine"] == 0
    mass = sum(np.exp(-readers.surprise(["the", word]) * 2 + readers.surprise(["the"])) for word in readers.words)
    assert 0.9 < mass < 1  # after "the", known words share all but the part kept for unknown ones


def test_diffs_show_what_was_there_and_what_stands_there() -> None:
    found = diff("title", "The big wing, in a stream.", "The large wing, in a fast stream.")
    assert list(found.pieces) == [
        ("same", "The "), ("old", "big"), ("same", " "), ("new", "large"), ("same", " wing, in a "), ("new", "fast"),
        ("same", " stream."),
    ]  # fmt: skip
    gone = diff("", "one two three", "one three").pieces
    assert ("old", "two") in gone
    assert "".join(text for kind, text in gone if kind != "old").split() == ["one", "three"]
    long = diff("", " ".join(f"w{i}" for i in range(99)), " ".join(f"w{i}" if i != 50 else "x" for i in range(99)))
    assert sum(len(text.split()) for _, text in long.pieces) < 30


def test_other_files_are_no_reports(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema": "robust.policy/1"}))
    with pytest.raises(UntrustedFileError, match=r"no report of a schema among robust.ranking-evaluation/1"):
        RankingReport.load(tmp_path)
    with pytest.raises(ValueError, match="'a/b' is to name a file"):
        evaluate_runs({"a/b": {"1": {"a": 1.0}}}, {"1": {"a": 1}})
    with pytest.raises(ValueError, match="measures: at least one"):
        evaluate_runs({"a": {"1": {"a": 1.0}}}, {"1": {"a": 1}}, [])
