"""``robust optim train``: own model and data, reports, resuming with the same bits; wrong words end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from optim_robust.byzantine import AGGREGATORS as RULES
from optim_robust.byzantine import ATTACKS as FORGERIES
from optim_robust.cli import train as words
from optim_robust.collab import experiment
from optim_robust.collab.experiment import run_simulated
from optim_robust.collab.recipe import MIXINGS, Recipe, guarantee
from optim_robust.collab.recipe import PRE as BEFORE
from robust_core.cli.main import main
from robust_core.errors import CheckpointError
from robust_core.io import load_tensors, load_weights


def run(*more: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["optim", "train", *more])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


SMALL = ["--peers", "9", "--faulty", "2", "--steps", "12", "--batch-size", "8", "--beta", "0.5"]
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.mark.quick
def test_the_words_are_those_of_the_library() -> None:
    assert set(words.AGGREGATORS) == set(MIXINGS) == {*RULES, "scc"}
    assert set(words.ATTACKS) == {"none", *FORGERIES}
    assert set(words.PRE) == set(BEFORE)
    assert words.REFERENCE == experiment.REFERENCE


def test_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*SMALL, "--attack", "sign-flip", "--beside", "mean,no-attack", "--json", "--out", str(out)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "result.json").read_text())
    assert document["schema"] == "robust.train/1"
    assert document["figures"]["nna/accuracy"]["value"] > document["figures"]["mean/accuracy"]["value"]
    assert [round_ for round_, _ in document["details"]["curves"]["nna"]["accuracy"]] == [10, 12]
    assert "beyond the proved regime" in document["flags"][0]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "2 of 9 peers faulty" in page
    assert load_tensors(out / "peers.safetensors")["theta"].shape[0] == 7
    assert set(load_weights(out / "model.safetensors")) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_ones_own_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_for_train.py").write_text(MODEL)
    x = np.random.default_rng(0).random((300, 4), dtype=np.float32)
    np.savez("own.npz", x=x, y=(3 * x[:, 0]).astype(np.int64))
    own = ["--model", "mine_for_train:build", "--data", "own.npz", "--aggregator", "trimmed-mean", "--pre", "nnm"]
    assert run(*own, *SMALL, "--topology", "server", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "mine_for_train:build"
    assert document["n"] == 60
    assert "kappa" in document["details"]["guarantee"]


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    recipe = Recipe(honest=7, f=2, batch_size=8, beta=0.5, wait="n-f")
    whole = run_simulated(recipe, recipe.team(), "alie", steps=9, test_every=3, every=3)
    run_simulated(recipe, recipe.team(), "alie", steps=6, test_every=3, every=3, folder=tmp_path)
    resumed = run_simulated(recipe, recipe.team(), "alie", steps=9, test_every=3, every=3, folder=tmp_path)
    assert torch.equal(whole.theta, resumed.theta)
    assert whole.loss == resumed.loss
    assert whole.accuracy == resumed.accuracy
    with pytest.raises(CheckpointError, match="another run"):
        run_simulated(recipe, recipe.team(), "sign-flip", steps=9, test_every=3, every=3, folder=tmp_path)


def test_what_is_proved_is_said() -> None:
    assert "inside the proved regime" in guarantee(Recipe(honest=17, f=2))
    assert "beyond the proved regime" in guarantee(Recipe(honest=16, f=2))
    assert "beyond" in guarantee(Recipe(honest=17, f=2, wait="n-f"))
    assert "kappa = " in guarantee(Recipe(aggregator="krum"))
    assert "no constant is proved" in guarantee(Recipe(aggregator="mean"))
    assert "no bound is known" in guarantee(Recipe(aggregator="scc"))


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        (["--aggregator", "average"], 2, "--aggregator"),
        (["--attack", "rumour"], 2, "--attack"),
        (["--beside", "nna,foo"], 2, "--beside"),
        (["--pre", "shuffle"], 2, "--pre"),
        (["--wait", "n"], 2, "--wait"),
        (["--topology", "ring"], 2, "--topology"),
        (["--faulty", "9", "--peers", "9"], 2, "honest peers are needed"),
        (["--faulty", "5", "--peers", "10"], 2, "f=5"),
        (["--lr", "-1"], 2, "--lr"),
        (["--lr", "nan"], 2, "--lr"),
        (["--kill", "1"], 2, "--processes"),
        (["--processes", "--resume", "x"], 2, "--resume"),
        (["--aggregator", "nna", "--topology", "server"], 2, "server"),
        (["--model", "no_such_module_here:build"], 3, "no_such_module_here"),
        (["--data", "no_such_data"], 3, "no_such_data"),
        (["--out", __file__], 3, "--out"),
    ],
)
def test_wrong_words_end_in_one_line(bad: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*bad) == code
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
