"""The verbs on a model that only answers queries: attacked, hardened within a budget, saved, and certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robust_core.cli.main import main
from robust_core.settings import parse_settings
from vision_robust.models import load_model
from vision_robust.models.black_box import BlackBox
from vision_robust.recipes.zo_ae_ds import RECIPE, Settings

MODULE = """
import torch
from robust_core.testing.tiny import digits_cnn

network = digits_cnn()


def ask(x):
    with torch.no_grad():
        return network(torch.from_numpy(x)).softmax(1).numpy()


def net():
    return digits_cnn()
"""
SMALL = ["depth=3", "width=8", "latent=6", "autoencoder_epochs=2", "n_samples=40"]


def _robust(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, Any]:
    with pytest.raises(SystemExit) as end:
        main(["vision", *words, "--json"])
    found = capsys.readouterr()
    return end.value.code, json.loads(found.out) if found.out else found.err


def test_a_black_box_is_attacked_hardened_and_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sealed_nets.py").write_text(MODULE)
    box = ["--model", "callable:sealed_nets:ask"]
    code, attacked = _robust(capsys, "attack", *box, "--n", "3", "--eps", "0.4")
    assert code == 0
    assert attacked["figures"]["adversarial/attack_success"]["value"] > 0
    assert not [flag for flag in attacked["flags"] if "gradient" in flag]

    train = ["harden", "--method", "zo-ae-ds", *box, "--n", "60", "--epochs", "2", "--sigma", "0.3", "--out", "out"]
    train += [word for setting in SMALL for word in ("--set", setting)]
    code, error = _robust(capsys, *train, "--set", "max_queries=700")
    assert code != 0
    assert "raise max_queries" in error
    code, hardened = _robust(capsys, *train, "--set", "max_queries=5000")  # goes on from the checkpoint
    assert code == 0
    assert hardened["details"]["training_queries"] == 60 * (1 + 2 * 12)
    assert "certified/acr" in hardened["figures"]

    code, proved = _robust(
        capsys, "certify", "--model", "saved:out", "--n", "8", "--n-samples", "100", "--sigma", "0.3"
    )
    assert code == 0
    assert proved["figures"]["certified/acr"]["n"] == 8
    code, error = _robust(capsys, "attack", "--model", "callable:sealed_nets:missing", "--n", "4")
    assert code == 2
    assert "has no" in error
    code, error = _robust(capsys, "certify", "--model", "onnx:nowhere.onnx", "--n", "4")
    assert code == 3


def test_open_models_are_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open_nets.py").write_text(MODULE)
    for name, own in (("a", ["estimator=gradients", "latent=0"]), ("b", ["estimator=random", "n_directions=3"])):
        settings = [s for s in SMALL if s.partition("=")[0] not in {o.partition("=")[0] for o in own}] + own
        words = [word for setting in settings for word in ("--set", setting)]
        train = ["harden", "--method", "zo-ae-ds", "--model", "open_nets:net", "--n", "40", "--epochs", "1"]
        code, hardened = _robust(capsys, *train, "--out", name, *words)
        assert code == 0, hardened
        model = load_model(f"saved:{name}")
        assert isinstance(model.get_submodule("classifier"), BlackBox) == (name == "b")
        assert hardened["model"] == f"saved:{name}"


def test_settings_are_checked() -> None:
    assert parse_settings(Settings, ["latent=none"]).latent is None
    assert parse_settings(Settings, ["latent=0"]).latent == 0
    for word in ("estimator=magic", "n_samples=-1", "latent=-1", "autoencoder_epochs=0"):
        with pytest.raises((ValueError, TypeError)):
            parse_settings(Settings, [word])
    assert RECIPE.restore is not None
    with pytest.raises(ValueError, match="needs"):
        RECIPE.restore({"model": "onnx:../x.onnx"}, Path("."))
    config = {"model": "onnx:../../x.onnx", "boxed": False, "n_classes": 10}
    config |= {"shape": [1, 8, 8], "latent": 6, "depth": 3, "width": 8}
    with pytest.raises(Exception, match=r"\.\."):
        RECIPE.restore(config, Path("."))
