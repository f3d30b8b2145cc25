"""Prototype networks on the command line: harden, certify, explain, on what the other verbs wrote."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_core.cli.main import main
from robust_core.data import load
from robust_core.evaluation import Certified, NotCertified
from robust_core.io import read_json
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf
from vision_robust.cli.certify import certified_parts
from vision_robust.cli.setting import Setting
from vision_robust.explain.rbf_prototype_network import CBC, CBCCertifier
from vision_robust.models import load_model
from vision_robust.recipes import find
from vision_robust.recipes.base import Proof
from vision_robust.recipes.rbf_prototype_network import CertifySettings


def robust(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*words, "--json"])
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    return json.loads(out)


def test_verbs_work_on_what_the_others_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = ("--method", "rbf-prototype-network", "--data", "digits", "--device", "cpu")
    own = ("--set", "n_components=15", "--set", "distance=tangent", "--set", "subspace_dim=3")
    made = robust(capsys, "vision", "harden", *shared, "--out", "net", "--norm", "l2", "--eps", "0.4", "--epochs", "3",
                  "--n", "120", *own)  # fmt: skip
    assert made["details"]["kappa"] == 0.4
    assert made["figures"]["certified/acr"]["value"] > 0
    model = load_model(made["model"])
    assert isinstance(model, CBC)
    assert model.components.distance == "tangent"
    proved = robust(capsys, "vision", "certify", *shared, "--model", "saved:net", "--n", "40", "--set", "bound=closed")
    assert proved["figures"]["certified/acr"]["value"] > 0
    told = robust(capsys, "vision", "explain", *shared, "--model", "saved:net", "--n", "5", "--out", "why",
                  "--set", "plots=1")  # fmt: skip
    assert 0 <= told["figures"]["share of the evidence by absence"]["value"] <= 1
    with (tmp_path / "why" / "explanations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        parts = [float(value) for name, value in row.items() if name.startswith(("present_", "absent_"))]
        assert len(parts) == 30
        assert abs(sum(parts) - float(row["score"])) < 1e-5
    pictures = sorted(path.name for path in (tmp_path / "why").glob("*.png"))
    assert pictures == [f"explained-{rows[0]['index']}.png", "prototypes.png", "reasoning.png"]
    assert read_json(tmp_path / "why" / "result.json")["figures"] == told["figures"]


def test_radius_asked_for_encloses_the_threat() -> None:
    from vision_robust.recipes.rbf_prototype_network import enclosing_radius

    assert enclosing_radius(Linf(0.05), 64) == pytest.approx(0.4)
    assert enclosing_radius(L2(0.3), 64) == enclosing_radius(L1(0.3), 64) == 0.3


def test_certifier_of_the_recipe_knows_its_model() -> None:
    certifier: Any = find("rbf-prototype-network").certifier
    proof = Proof(L2(0.1))
    with pytest.raises(TypeError, match="not a prototype network"):
        certifier(digits_cnn(), proof, CertifySettings())
    model = CBC(10, (1, 8, 8), 6).initialise(*digits(), generator=0).eval()
    chosen = certifier(model, proof, CertifySettings(domain=False))
    setting = Setting(model, load("digits", "test").subset(range(2)), "net", 0, torch.device("cpu"), 64)
    parts = {part.name: part for part in certified_parts("all", setting, Proof(L2(0.1), n_samples=10))}
    assert isinstance(parts["rbf-prototype-network"], Certified)
    assert isinstance(parts["crown-l2"], NotCertified)  # bounds of layers know no distances
    x = digits()[0][:6]
    assert torch.equal(chosen.certify(x).radius, CBCCertifier(model).certify(x).radius)


def test_settings_and_configs_are_checked(tmp_path: Path) -> None:
    recipe: Any = find("rbf-prototype-network")
    with pytest.raises(ValueError, match="kappa=-1"):
        recipe.settings(kappa=-1.0)
    with pytest.raises(ValueError, match="needs n_classes"):
        recipe.restore({"n_classes": 3}, tmp_path)
