"""``robust rl imitate``: clones with a certified constant, kept in folders that ``robust rl attack`` reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_robust.lipschitz import (
    GraphLipschitzPolicy,
    LinearLipschitzPolicy,
    LipschitzPolicy,
    load_policy,
    save_policy,
)
from robust_core.cli.main import main
from robust_core.errors import UntrustedFileError
from robust_core.evaluation.arrays import save_arrays


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["rl", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A linear expert for Pendulum-v1 (three numbers in, one torque out)."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    save_arrays(tmp_path / "pairs.npz", {"obs": x, "acts": x @ np.array([[0.0], [-1.5], [-0.5]])})
    return tmp_path / "pairs.npz"


def test_a_bound_gives_a_policy_that_can_be_attacked_and_a_curve_goes_on_where_it_stopped(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clone"
    words = ["--demonstrations", str(pairs), "--env", "Pendulum-v1", "--max-steps", "20", "--solver", "linear"]
    more = ["-n", "4", "--zeta", "0.3", "--json"]
    assert run("imitate", *words, *more, "--lipschitz", "0.75", "--out", str(out)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "robust.imitation/1"
    (row,) = document["rows"]
    assert row["certified"] == pytest.approx(0.75, abs=1e-6)
    assert row["certified"] <= 0.75
    assert set(row["attacked"]) == {"random", "bang-bang", "mad"}
    assert document["slope"] > 1.2
    (folder,) = document["policies"]
    assert "above every constant" in (out / "report.html").read_text()
    policy = f"lipschitz:{folder}"
    attack = ["--policy", policy, "--env", "Pendulum-v1", "--max-steps", "20", "-n", "3", "--json"]
    assert run("attack", *attack, "--attacks", "random", "--eps", "0.1") == 0
    assert json.loads(capsys.readouterr().out)["model"] == policy
    curve = tmp_path / "curve"
    assert run("imitate", *words, *more, "--tradeoff", "--out", str(curve)) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["policies"]) == 8
    kept = {file: file.stat().st_mtime_ns for file in curve.glob("*/policy.safetensors")}
    assert run("imitate", *words, *more, "--tradeoff", "--out", str(curve)) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
    assert kept == {file: file.stat().st_mtime_ns for file in curve.glob("*/policy.safetensors")}


def test_a_network_is_fitted_in_a_folder_that_holds_nothing_else_in_the_end(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--demonstrations", str(pairs), "--env", "Pendulum-v1", "--max-steps", "5", "-n", "2", "--json"]
    more = ["--steps", "20", "--width", "8", "--lipschitz", "0.4", "--out", str(tmp_path / "net")]
    assert run("imitate", *words, *more) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["worst"] < 0  # no --zeta: the return in peace
    folder = tmp_path / "net" / "lipschitz-0.4"
    assert {file.name for file in folder.iterdir()} == {"policy.json", "policy.safetensors", "tradeoff.json"}
    assert load_policy(folder).lipschitz_bound() <= 0.4
    assert "add --zeta" in (tmp_path / "net" / "report.html").read_text()


def test_an_expert_is_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experts.py").write_text(
        "import torch\n\n\ndef pendulum():\n    net = torch.nn.Linear(3, 1)\n"
        "    torch.nn.init.constant_(net.weight, -0.5)\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--expert", "experts:pendulum", "--env", "Pendulum-v1", "--max-steps", "20", "--watched", "3", "-n", "2"]
    assert run("imitate", *words, "--lipschitz", "0.5", "--solver", "graph", "--out", "graph", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n"] == 60
    assert isinstance(load_policy(document["policies"][0]), GraphLipschitzPolicy)


@pytest.mark.quick
def test_folders_keep_policies_and_their_certificate(tmp_path: Path) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    policies = (
        LipschitzPolicy(3, 2, lipschitz=1.5, hidden=(8, 4), generator=1),
        LinearLipschitzPolicy(torch.diag(torch.tensor([1.0, 0.5, 0.2]))[:2], lipschitz=1.0),
        GraphLipschitzPolicy(x, 0.3 * x[:, :2], lipschitz=0.4),
    )
    for policy in policies:
        folder = save_policy(tmp_path / type(policy).__name__, policy, about={"task": "none"})
        again = load_policy(folder, shown=(3,), actions=policy.action_space)
        obs = x.float()
        assert torch.equal(again.outputs(obs), policy.outputs(obs))
        assert again.lipschitz_bound() == policy.lipschitz_bound()
        assert "Infinity" not in (folder / "policy.json").read_text()
        with pytest.raises(ValueError, match="sees 3 numbers"):
            load_policy(folder, shown=(4,))
    words = tmp_path / "LinearLipschitzPolicy" / "policy.json"
    words.write_text(words.read_text().replace('"lipschitz": 1.0', '"lipschitz": 0.9'))
    with pytest.raises(UntrustedFileError, match="norm 1"):
        load_policy(words.parent)
    weights = tmp_path / "LipschitzPolicy" / "policy.safetensors"
    weights.write_bytes((tmp_path / "GraphLipschitzPolicy" / "policy.safetensors").read_bytes())
    with pytest.raises(UntrustedFileError, match="is not the file"):
        load_policy(weights.parent)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--lipschitz", "1"], 2, "--demonstrations FILE.npz or --expert"),
        (["--demonstrations", "absent.npz", "--lipschitz", "1"], 3, "no such file"),
        (["--demonstrations", "PAIRS"], 2, "--lipschitz BOUND or --tradeoff"),
        (["--demonstrations", "PAIRS", "--lipschitz", "-1"], 2, "above 0"),
        (["--demonstrations", "PAIRS", "--lipschitz", "1", "--solver", "magic"], 2, "--solver"),
        (["--demonstrations", "PAIRS", "--lipschitz", "1", "--zeta", "nan"], 2, "--zeta"),
        (["--demonstrations", "PAIRS", "--lipschitz", "1", "--width", "7"], 2, "even"),
        (["--demonstrations", "WRONG", "--lipschitz", "1"], 2, "x and u or obs and acts"),
        (["--expert", "absent_module:net", "--lipschitz", "1"], 3, "no module"),
    ],
)
def test_wrong_words_end_in_one_line(
    pairs: Path, tmp_path: Path, words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.npz"
    save_arrays(wrong, {"a": np.zeros(3)})
    known = {"PAIRS": str(pairs), "WRONG": str(wrong)}
    found = run("imitate", "--env", "Pendulum-v1", "--out", str(tmp_path / "o"), *(known.get(w, w) for w in words))
    out, err = capfd.readouterr()
    assert found == code, err
    assert message in " ".join(err.split())
    assert out == ""
