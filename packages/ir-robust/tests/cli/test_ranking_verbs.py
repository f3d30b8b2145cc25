"""``robust ranking``: a user's files from end to end; what is malformed ends in one line that names file and line."""

import json
from pathlib import Path

import numpy as np
import pytest

from ir_robust import certdr
from ir_robust.cli import words
from ir_robust.formats import read_run, write_run
from ir_robust.rankers import loading
from ir_robust.rankers.saved import WORD_MODELS
from robust_core.attacks.tokens import SEARCHES
from robust_core.cli.main import main

WORDS = "wing lift drag flow heat layer shock jet wake spin".split()
SYNONYMS = {"wing": ["jet"], "jet": ["wing"], "heat": ["spin"], "spin": ["heat"]}
RANKER = '''
def overlap(query, docs):
    """Scores by the share of a document's words that the query has."""
    asked = set(query.lower().split())
    found = []
    for doc in docs:
        words = doc.lower().rstrip(".").split()
        found.append(sum(word in asked for word in words) / len(words))
    return found


class Made:
    def score(self, query, docs):
        return overlap(query, docs)


def make():
    return Made()
'''


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["ranking", *map(str, words)])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw = np.random.default_rng(0)
    docs = [f"d{i}\t{' '.join(draw.choice(WORDS, 12)).capitalize()}.\n" for i in range(24)]
    (tmp_path / "docs.tsv").write_text("".join(docs))
    (tmp_path / "topics.tsv").write_text("".join(f"q{i}\t{' '.join(WORDS[i : i + 2])}\n" for i in range(6)))
    (tmp_path / "qrels.txt").write_text("".join(f"q{i} 0 d{3 * i + j} {1 + j}\n" for i in range(6) for j in range(3)))
    (tmp_path / "synonyms.json").write_text(json.dumps(SYNONYMS))
    (tmp_path / "users_ranker_of_words.py").write_text(RANKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CORPUS = ("--corpus", "docs.tsv", "--topics", "topics.tsv")
MINE = ("--ranker", "users_ranker_of_words:overlap")


def test_a_run_is_reranked_attacked_certified_and_measured(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("retrieve", *CORPUS, "--out", "bm25.trec", "--json") == 0
    assert json.loads(capsys.readouterr().out)["queries"] == 6
    assert run("rerank", *CORPUS, *MINE, "--run", "bm25.trec", "--out", "mine.trec", "--depth", "20", "--json") == 0
    capsys.readouterr()
    assert all(len(scores) == 20 for scores in read_run("mine.trec").values())

    lists = ("--run", "bm25.trec", "--qrels", "qrels.txt")
    assert (
        run("evaluate", "--run", "bm25.trec", "--run", "mine.trec", "--qrels", "qrels.txt", "--out", "e", "--json") == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "robust.ranking-evaluation/1"
    assert {"bm25/nDCG@10", "mine/nDCG@10_gain"} <= set(document["figures"])
    assert run("evaluate", *CORPUS, *MINE, *lists, "--measures", "nDCG@10", "--depth", "20", "--json") == 0
    again = json.loads(capsys.readouterr().out)["figures"]
    assert again["reranked/nDCG@10"] == document["figures"]["mine/nDCG@10"]

    words = (*CORPUS, *MINE, *lists, "--json")
    assert run("attack", *words, "--attacks", "spam,sentences,deletion", "-k", "3", "--targets", "4", "--out", "a") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["spam/entry"]["value"] > 0.5
    assert document["threat"]["deletion"] == {"kind": "Deletion", "share": 0.1, "most": None, "insertions": 0}
    edits = [json.loads(line) for line in (files / "a" / "edits.jsonl").read_text().splitlines()]
    assert len(edits) == 3 * 6 * 4
    assert {"before", "text", "edits", "rank"} <= set(edits[0])
    assert set(read_run("a/runs/spam.trec")) == set(read_run("bm25.trec"))
    assert "<ins>" in (files / "a" / "report.html").read_text()

    words = (*words, "--synonyms", "json:synonyms.json", "-k", "1", "-k", "5", "-n", "100", "--resume", "done.jsonl")
    assert run("certify", *words, "--out", "c") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["figures"]) > {"CRQ@1", "CRQ@5", "smoothed/nDCG@10_gain"}
    assert document["details"]["table"]["largest"] == 2
    assert run("certify", *words) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == document["figures"]
    assert "The attacker that is assumed" in (files / "c" / "report.html").read_text()


def test_reranking_goes_on_where_it_stopped(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rerank", *CORPUS, "--ranker", "users_ranker_of_words:make", "--depth", "9", "--resume", "done.jsonl")
    assert run(*words, "--out", "whole.trec") == 0
    lines = (files / "done.jsonl").read_text().splitlines(keepends=True)
    (files / "done.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert run(*words, "--out", "again.trec") == 0
    assert (files / "again.trec").read_text() == (files / "whole.trec").read_text()
    assert run(*words[:-3], "8", "--resume", "done.jsonl", "--out", "other.trec") == 2
    assert "other settings" in capsys.readouterr().err


def test_a_ranker_is_trained_and_attacked_by_synonyms(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*CORPUS, "--qrels", "qrels.txt", "--synonyms", "json:synonyms.json", "--json")
    train = ("train", *words, "--model", "bag", "--epochs", "1", "--batch-size", "8")
    assert run(*train, "--out", "bag", "--resume", "points") == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["ranker"], about["queries"], about["noise"]) == ("saved:bag", 6, "json:synonyms.json")
    attack = ("attack", *words, "--ranker", "saved:bag", "-k", "3", "--targets", "2", "--share", "0.25")
    assert run(*attack, "--attacks", "greedy,pgd,trigger,exhaustive", "--insertions", "2", "--out", "a") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["threat"]["pgd"]["kind"] == "WordSubstitution by NearestPGD"
    entry = {name: document["figures"][f"{name}/entry"]["value"] for name in document["threat"]}
    assert entry["exhaustive"] >= max(entry["greedy"], entry["pgd"])
    for row in map(json.loads, (files / "a" / "edits.jsonl").read_text().splitlines()):
        if row["attack"] != "trigger":
            assert all(edit["new"] in SYNONYMS[edit["old"]] for edit in row["edits"])
    blind = ("attack", *words[:-1], "--ranker", "bm25", "-k", "3", "--attacks", "pgd")
    assert run(*blind) == 2
    assert "give a --surrogate" in " ".join(capsys.readouterr().err.split())
    assert run(*blind, "--surrogate", "saved:bag", "--targets", "1") == 0


def test_rankers_are_compared_on_the_tasks(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        *CORPUS,
        "--qrels",
        "qrels.txt",
        "--ranker",
        "bm25",
        "--ranker",
        "users_ranker_of_words:overlap",
        "-k",
        "3",
    )
    synonyms = ("--attacks", "spam,greedy", "--synonyms", "json:synonyms.json")
    assert run("benchmark", *words, *synonyms, "--tasks", "variance,query,document", "--out", "b", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len({name.partition("/")[0] for name in document["figures"]}) == 3
    assert (files / "b" / "report.html").is_file()
    assert run("benchmark", *words, "--tasks", "corpus") == 2
    assert run("benchmark", *words, "--typos", "few") == 2
    assert "--typos 'few'" in capsys.readouterr().err


def test_named_collections_bring_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--corpus", "lee", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    figure = document["figures"]["bm25/nDCG@10"]
    assert (round(figure["value"], 3), figure["n"]) == (0.589, 50)


def test_both_sides_of_a_comparison_hold_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("retrieve", "--corpus", "lee", "--out", "bm25.trec") == 0
    first = read_run("bm25.trec")
    write_run("own.trec", {qid: {qid: 1e6, **scores} for qid, scores in first.items()})  # each text finds itself first
    words = ("evaluate", "--corpus", "lee", "--run", "own.trec", "--ranker", "bm25", "--depth", "20", "--json")
    capsys.readouterr()
    assert run(*words, "--measures", "AP@100,nDCG@10") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert abs(figures["reranked/AP@100_gain"]["value"]) < 1e-9
    assert round(figures["own/nDCG@10"]["value"], 3) == 0.589


BROKEN = {
    "bm25.trec": ("1 Q0 d1 1\n", "bm25.trec:1: 4 columns"),
    "qrels.txt": ("q0 0 d1 1\nq0 0 d1 2\n", "qrels.txt:2: query 'q0': document 'd1' stands here a second time"),
    "docs.tsv": ("d1\twing\n\tlift\n", "docs.tsv:2: document without a number"),
    "topics.tsv": (b"q1\tcaf\xe9\n", "topics.tsv:1: byte 0xe9"),
}
OTHER = {
    "an empty document": ("docs.tsv", "d1\twing\nd2\t \n", "docs.tsv:2: document 'd2' has no text"),
    "a document twice": ("docs.tsv", "d1\twing\nd1\tlift\n", "docs.tsv:2: document 'd1' stands here a second"),
    "rising scores": ("bm25.trec", "q1 Q0 d1 1 1 t\nq1 Q0 d2 2 2 t\n", "bm25.trec:2: query 'q1' has rank 2"),
    "a run over another corpus": ("bm25.trec", "q1 Q0 x9 1 1 t\n", "ranks document 'x9', which"),
    "a run over other topics": ("bm25.trec", "z1 Q0 d1 1 1 t\n", "1 queries are not in the collection, 'z1' first"),
    "judgements of other topics": ("qrels.txt", "z1 0 d1 1\n", "'z1' first: do both files number queries alike?"),
    **{name: (name, *rest) for name, rest in BROKEN.items()},
}  # fmt: skip


@pytest.mark.parametrize("verb", ["evaluate", "attack", "certify"])
@pytest.mark.parametrize("case", OTHER)
def test_malformed_files_are_refused_with_the_line(
    files: Path, case: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "bm25.trec").write_text("q1 Q0 d1 1 2 t\nq1 Q0 d2 2 1 t\n")
    name, content, message = OTHER[case]
    (files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [*CORPUS, "--ranker", "bm25", "--run", "bm25.trec", "--qrels", "qrels.txt"]
    words += ["--synonyms", "json:synonyms.json"] if verb == "certify" else []
    assert run(verb, *words) == 2
    out, err = capsys.readouterr()
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_every_ranker_and_bound_can_be_named() -> None:
    assert tuple(loading.FOLDERS) == words.FOLDERS
    assert (*words.BOUNDS, "exact") == certdr.BOUNDS  # of sampled scores none is exact
    assert certdr.RULES == words.RULES
    assert tuple(WORD_MODELS) == words.MODELS
    assert set(words.SUBSTITUTIONS) < set(SEARCHES)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        (["retrieve", "--corpus", "absent.tsv", "--out", "r"], 3, "no such file, nor one of lee"),
        (["retrieve", "--corpus", "docs.tsv", "--out", "r"], 2, "needs --topics"),
        (["retrieve", "--corpus", "beir:absent", "--out", "r"], 3, "no such folder absent"),
        (["retrieve", "--corpus", "lee", "--topics", "topics.tsv", "--out", "r"], 2, "brings its own queries"),
        (["retrieve", *CORPUS, "--out", "."], 3, "--out .: a file"),
        (["retrieve", *CORPUS, "--out", "r", "--empty", "maybe"], 2, "--empty='maybe'"),
        (["rerank", *CORPUS, "--ranker", "magic", "--out", "r"], 2, "--ranker 'magic': bm25, minilm, saved:FOLDER"),
        (["rerank", *CORPUS, "--ranker", "sbert:absent", "--out", "r"], 3, "no such folder absent"),
        (["rerank", *CORPUS, "--ranker", "absent_module:net", "--out", "r"], 3, "no module 'absent_module'"),
        (["rerank", *CORPUS, "--ranker", "bm25", "--run", "absent.trec", "--out", "r"], 3, "--run absent.trec: no"),
        (["evaluate", "--run", "docs.tsv"], 2, "--run and --qrels are needed"),
        (["evaluate", "--ranker", "bm25", "--qrels", "qrels.txt"], 2, "--ranker needs --corpus"),
        (["evaluate", *CORPUS, "--ranker", "bm25"], 2, "no judgements; --qrels is needed"),
        (["evaluate", *CORPUS, "--qrels", "qrels.txt", "--measures", "best"], 2, "ir-measures knows none"),
        (["attack", *CORPUS, "--ranker", "bm25", "--attacks", "magic"], 2, "--attacks='magic'"),
        (["attack", *CORPUS, "--ranker", "bm25", "--attacks", "sentences"], 2, "--qrels is needed"),
        (["attack", *CORPUS, "--ranker", "bm25", "--attacks", "greedy"], 2, "--attacks greedy: --synonyms is needed"),
        (["attack", *CORPUS, "--ranker", "bm25", "-k", "24"], 2, "no document below rank 24"),
        (["attack", *CORPUS, "--ranker", "bm25", "--out", "docs.tsv"], 3, "a folder that can be written"),
        (["train", *CORPUS, "--model", "magic", "--out", "m"], 2, "--ranker 'magic'"),
        (["train", *CORPUS, "--model", "bm25", "--out", "m"], 2, "--model 'bm25': choose one of bag"),
        (["train", *CORPUS, "--model", "bag", "--out", "m"], 2, "no judgements to learn from"),
        (["train", *CORPUS, "--model", "bag", "--out", "m", "--vectors", "absent"], 3, "--vectors absent"),
        (["certify", *CORPUS, "--ranker", "bm25", "--synonyms", "words"], 2, "json:FILE, wordnet:FOLDER"),
        (["certify", *CORPUS, "--ranker", "bm25", "--synonyms", "json:no.json"], 3, "no such file"),
        (["certify", *CORPUS, "--ranker", "bm25", "--synonyms", "json:docs.tsv"], 2, "docs.tsv is not valid JSON"),
        (["certify", *CORPUS, "--ranker", "bm25", "--synonyms", "json:synonyms.json", "--alpha", "1"], 2, "--alpha 1"),
    ],
)  # fmt: skip
def test_wrong_words_end_in_one_line(
    files: Path, said: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(*said)
    out, err = capsys.readouterr()
    assert found == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_the_words_are_checked_before_anything_heavy_is_imported(files: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom robust_core.cli.main import main\n"
        "try:\n    main(['ranking', 'attack', '-c', 'docs.tsv', '--topics', 'topics.tsv', '-r', 'magic'])\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=files)
    assert found.stdout.strip() == "[]"
