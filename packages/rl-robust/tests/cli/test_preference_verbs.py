"""``robust rl prefer · revise · steps`` on folders of small language models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_robust.preference import PreferenceData, Templates, TokenRow
from rl_robust.preference.folders import LanguageModel, load_language_model, save_language_model
from rl_robust.preference.judging import implicit_accuracy, log_ratios, win_rate
from robust_core.cli.main import main
from robust_core.errors import ResourceError

ASK = ["--writer", "{prompt}=", "--reviser", "{prompt}~{completion}="]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["rl", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rl_robust.preference.characters import character_tokenizer, small_gpt2

    tokenizer = character_tokenizer("0123456789=~", max_length=32)
    model = small_gpt2(tokenizer, width=16, n_layers=1, n_positions=32)
    return save_language_model(tmp_path_factory.mktemp("gpt2"), LanguageModel(model, tokenizer, None))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def triples(tmp_path: Path) -> str:
    rows = [{"prompt": str(i % 5), "chosen": "77", "rejected": str(10 + i)} for i in range(24)]
    return lines(tmp_path / "triples.jsonl", rows)


def test_folders_keep_model_tokenizer_and_templates(gpt2: Path, tmp_path: Path) -> None:
    found = load_language_model(gpt2)
    assert found.templates is None
    folder = save_language_model(tmp_path / "again", found._replace(templates=Templates("{prompt}!")))
    again = load_language_model(folder)
    assert again.templates == Templates("{prompt}!")
    assert again.tokenizer("12=~").input_ids == found.tokenizer("12=~").input_ids
    x = torch.tensor([[3, 4, 5]])
    assert torch.equal(again.model(x).logits, found.model(x).logits)
    assert not list(folder.glob("*.bin"))
    with pytest.raises(ResourceError, match=r"config\.json"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("method", ["srpo", "dpo", "ipo"])
def test_a_model_learns_what_is_preferred_and_revises(
    method: str, gpt2: Path, triples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "judges.py").write_text(
        "def sevens(prompt, a, b):\n    return 0.5 + (a.count('7') - b.count('7')) / 40\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    words = ["--model", str(gpt2), "--data", triples, "--held-out", triples, "--method", method, "--out", str(out)]
    words += ["--lr", "3e-3", "--epochs", "6", "--batch-size", "8", "--max-new-tokens", "4", "--device", "cpu"]
    words += [*ASK, "--json"]
    judge = ["--judge", "judges:sevens"] if method == "srpo" else []
    assert run("prefer", *words, *judge) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["held-out/writer_accuracy"]["value"] > 0.9
    assert "held-out/reviser_accuracy" in document["figures"]  # of DPO and IPO too: a control
    if method == "srpo":
        assert document["figures"]["win_rate/against_before"]["value"] > 0.5
        again = (out / "model" / "model.safetensors").read_bytes()
        assert run("prefer", *words, *judge) == 0  # finished: it goes on from the last checkpoint, and changes nothing
        capsys.readouterr()
        assert (out / "model" / "model.safetensors").read_bytes() == again
    (tmp_path / "prompts.txt").write_text("1\n\n2\n")
    words = ["--model", str(out / "model"), "--prompts", "prompts.txt", "--revisions", "2", "--max-new-tokens", "4"]
    assert run("revise", *words, "--out", str(tmp_path / "said.jsonl"), "--device", "cpu", "--json") == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [(row["prompt"], len(row["stages"])) for row in answers] == [("1", 3), ("2", 3)]
    assert [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()] == answers


def test_steps_that_lose_the_answer_are_unlearned_and_nothing_is_drawn_twice(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checks.py").write_text("def without_nine(text, answer):\n    return '9' not in text\n")
    monkeypatch.chdir(tmp_path)
    problems = lines(tmp_path / "problems.jsonl", [{"prompt": f"{i}=", "answer": "any"} for i in range(4)])
    words = ["--model", str(gpt2), "--problems", problems, "--verifier", "checks:without_nine", "--splitter", "token"]
    words += ["--out", "o", "--k", "1", "--rollouts", "8", "--max-new-tokens", "6", "--lr", "3e-3", "--epochs", "8"]
    words += ["--beta", "0.3", "--device", "cpu", "--json"]
    assert run("steps", *words) == 0
    document = json.loads(capsys.readouterr().out)
    figures = document["figures"]
    assert figures["problems/accuracy_after"]["value"] > figures["problems/accuracy_before"]["value"]
    pits = document["details"]["diagnosis"]["pits"]
    assert pits
    assert all("9" in pit["text"] for pit in pits)
    assert "problems of training" in document["flags"][0]
    from rl_robust.preference.per_step_text import TransformersSampler

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(TransformersSampler, "__call__", refuse)
    assert run("steps", *words) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == figures
    assert run("steps", *words, "--temperature", "0.5") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.quick
def test_chosen_answers_that_became_less_likely_are_flagged() -> None:
    from rl_robust.cli.preference import _leaks

    assert _leaks({"train/chosen_log_ratio": {"value": 0.1}, "train/writer_accuracy": {"value": -1}}) == []
    (flag,) = _leaks({"train/chosen_log_ratio": {"value": -0.1}, "held-out/chosen_log_ratio": {"value": -3.0}})
    assert "(train, held-out)" in flag


@pytest.mark.quick
def test_accuracies_count_ties_as_halves_and_judges_see_both_orders() -> None:
    ratios = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 0.0]]).double()
    found = implicit_accuracy(ratios, torch.tensor([1.0, 0.0, 1.0, 0.5]))
    assert found["writer"].value == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["writer"].n == 3
    six = torch.tensor([[1.0, 0.0, 0.0, 1.0, 3.0, 1.0]]).double()
    assert implicit_accuracy(six, torch.ones(1))["reviser"].value == 0.5
    first = win_rate(["p", "p"], ["a", "b"], ["x", "y"], lambda prompt, a, b: 1.0)  # a judge that likes the first
    assert first.value == 0.5
    assert win_rate(["p"], ["long"], ["s"], lambda prompt, a, b: float(len(a) > len(b))).value == 1.0
    with pytest.raises(ValueError, match="probabilities"):
        win_rate(["p"], ["a"], ["b"], lambda prompt, a, b: 7.0)
    with pytest.raises(ValueError, match="a half everywhere"):
        implicit_accuracy(ratios, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="with_reference"):
        log_ratios(torch.nn.Identity(), PreferenceData([(TokenRow((1,), (2,)),)], [1.0]))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["prefer", "--model", "absent", "--data", "TRIPLES", "--out", "o"], 3, "config.json"),
        (["prefer", "--model", "GPT2", "--data", "absent", "--out", "o"], 3, "no such file"),
        (["prefer", "--model", "GPT2", "--data", "TRIPLES", "--out", "o", "--method", "magic"], 2, "--method"),
        (["prefer", "--model", "GPT2", "--data", "TRIPLES", "--out", "o", "--beta", "0"], 2, "--beta"),
        (["prefer", "--model", "GPT2", "--data", "TRIPLES", "--out", "o", "--judge", "json:loads"], 2, "--held-out"),
        (["prefer", "--model", "GPT2", "--data", "TRIPLES", "--out", "o", "--writer", "no mark"], 2, "{prompt}"),
        (["prefer", "--model", "GPT2", "--data", "EMPTY", "--out", "o"], 2, "empty"),
        (["revise", "--model", "GPT2", "--prompts", "absent"], 3, "no such file"),
        (["revise", "--model", "GPT2", "--prompts", "EMPTY"], 2, "empty"),
        (["steps", "--model", "GPT2", "--problems", "TRIPLES", "--out", "o", "--verifier", "magic"], 2, "--verifier"),
        (["steps", "--model", "GPT2", "--problems", "TRIPLES", "--out", "o", "--verifier", "absent:f"], 3, "no module"),
        (["steps", "--model", "GPT2", "--problems", "TRIPLES", "--out", "o", "--verifier", "exact_number"], 2, "lacks"),
        (["steps", "--model", "GPT2", "--problems", "TRIPLES", "--out", "o", "--verifier", "exact_number", "--k", "99"],
         2, "--rollouts"),
    ],
)  # fmt: skip
def test_wrong_words_end_in_one_line(
    gpt2: Path, triples: str, tmp_path: Path, words: list[str], code: int, message: str,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    known = {"GPT2": str(gpt2), "TRIPLES": triples, "EMPTY": lines(tmp_path / "empty.jsonl", [])}
    found = run(*(known.get(word, word) for word in words))
    out, err = capfd.readouterr()
    assert found == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
