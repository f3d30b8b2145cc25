"""One table: families, threats, seeds and certificates stand where they should; one command makes it, and goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rl_robust.bandits import Exp3IX
from rl_robust.comparison import Comparison, Settings, compare
from rl_robust.evaluation import BrokenCertificateError, hold_certificate
from rl_robust.hardening.contenders import train_contenders
from rl_robust.nondominated import replay
from rl_robust.observation import StepBudget
from rl_robust.policy import CallablePolicy, NetworkPolicy
from rl_robust.rollout import collect
from rl_robust.saved import Hardened
from rl_robust.task import Task
from robust_core.cli.main import main
from robust_core.random import derive
from robust_core.threats import Linf

CARTPOLE = Task("CartPole-v1", max_steps=40)
BUDGET = StepBudget(Linf(0.2, domain=None))
QUICK = Settings(("random", "mad"), n_episodes=20, certificate_episodes=300, duration=40)
TINY: dict[str, Any] = {"rollout": 16, "batch_size": 16, "n_epochs": 1}


def balancer(gain: float) -> NetworkPolicy:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(gain * torch.tensor([[-0.05, -0.2, -1.0, -1.0], [0.05, 0.2, 1.0, 1.0]]))
        layer.bias.zero_()
    return NetworkPolicy(layer, spaces.Discrete(2))


def alone(gain: float, sigma: float = 0.0) -> Hardened:
    return Hardened((balancer(gain),), ("mine",), CARTPOLE, "given", sigma)


@pytest.mark.quick
def test_the_table_says_which_threat_a_figure_is_of(tmp_path: Path) -> None:
    pair = Hardened((balancer(1.0), balancer(-1.0)), ("good", "bad"), CARTPOLE, "non-dominated", 0.0, (0.0, 40.0))
    found = compare({"plain": [alone(1.0)], "noisy": [alone(1.0, 0.2)], "set": [pair]}, BUDGET, QUICK, generator=3)
    d = found.document
    assert d["columns"] == ["natural", "random", "MAD", "worst", "episode worst", "certified"]
    assert "per step Linf 0.2" in found.header[1]
    assert "per episode L2 0.2" in found.header[4]
    assert "per episode L2 0.2" in found.header[5]
    plain, noisy, members = d["rows"]
    assert plain["cells"]["natural"]["value"] == collect(balancer(1.0), CARTPOLE, 20, generator=3).mean
    for row in d["rows"]:
        cells = {k: cell["value"] for k, cell in row["cells"].items()}
        assert cells["worst"] == min(cells["random"], cells["MAD"])
    assert "certified" not in plain["cells"], "without noise nothing is promised"
    assert 0 < noisy["cells"]["certified"]["value"] <= noisy["cells"]["episode worst"]["value"]
    table = np.stack([collect(p, CARTPOLE, 20, generator=3).returns for p in pair.policies])
    bandit = Exp3IX(2, 20, reward_range=(0.0, 40.0), generator=derive(3, "bandit", "natural"))
    assert members["cells"]["natural"]["value"] == pytest.approx(float(replay(bandit, table).returns.mean()))
    found.save(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(d))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4, "three distributions, one certificate"
    assert "not a stricter or laxer form" in page
    assert found.text().count("\n") == 5
    again = Comparison.load(tmp_path)
    assert again.html() == page
    assert again["noisy/worst"].value == noisy["cells"]["worst"]["value"]
    assert again.arrays.keys() == found.arrays.keys()


def test_several_trainings_give_intervals_over_trainings() -> None:
    found = compare({"mine": [alone(1.0), alone(0.8), alone(-1.0)]}, BUDGET, QUICK)
    cell = found.document["rows"][0]["cells"]["natural"]
    assert cell["n"] == 3
    assert cell["value"] == pytest.approx(np.mean(cell["per_seed"]))
    assert cell["interval"][0] < min(cell["per_seed"])
    assert not found.document["flags"]
    one = compare({"mine": [alone(1.0)]}, BUDGET, QUICK)
    assert one.document["rows"][0]["cells"]["natural"]["n"] == 20
    assert "several seeds" in one.document["flags"][0]


def test_policies_without_gradients_are_measured_by_what_needs_none(tmp_path: Path) -> None:
    blind = CallablePolicy(lambda obs: (obs[:, 2] + obs[:, 3] > 0).astype(int), spaces.Discrete(2))
    made = Hardened((blind,), ("mine",), CARTPOLE, "given")
    found = compare({"blind": [made], "seen": [alone(1.0)]}, BUDGET, QUICK, folder=tmp_path)
    assert set(found.document["rows"][0]["attacks"]) == {"random"}
    assert found.cells(found.document["rows"][0])[2] == "–"
    with pytest.raises(ValueError, match="one environment"):
        compare({}, BUDGET)
    with pytest.raises(ValueError, match="without '/'"):
        compare({"a/b": [made]}, BUDGET)


def test_certificates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="lower"):
        compare({"noisy": [alone(1.0, 0.2)]}, BUDGET, Settings(("random",), n_episodes=5, lower=40.5))
    hold_certificate("mad", np.array([9.0, 11.0]), 10.0)
    with pytest.raises(BrokenCertificateError, match="mad"):
        hold_certificate("mad", np.array([8.9, 9.0, 9.1]), 10.0)


def test_trainings_share_their_statistics_and_are_not_repeated(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "out": tmp_path, "n_steps": 64, "n_envs": 2, "n_seeds": 2, "normalise": True,
        "settings": {name: TINY for name in ("ppo", "smoothed")},
    }  # fmt: skip
    methods = ("smoothed", "ppo")
    told: list[str] = []
    made = train_contenders(methods, CARTPOLE, BUDGET.threat, on_step=lambda what, *_: told.append(what), **asked)
    assert list(made) == list(methods)
    for k in range(2):
        assert len({trained[k].task.identity for trained in made.values()}) == 1, "one radius, one meaning"
    assert made["ppo"][0].task.identity != made["ppo"][1].task.identity
    assert any(what.startswith("smoothed, seed 1") for what in told)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("training.pt")}
    again = train_contenders(methods, CARTPOLE, BUDGET.threat, **asked)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("training.pt")} == stamps
    one, two = (collect(m["smoothed"][1].policies[0], CARTPOLE, 3).returns.tolist() for m in (made, again))
    assert one == two
    with pytest.raises(ValueError, match="magic"):
        train_contenders(("magic",), CARTPOLE, BUDGET.threat, out=tmp_path)


def test_one_command_trains_attacks_certifies_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["rl", "compare", *words])
        return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]

    methods = ("sa-ppo", "smoothed", "non-dominated")
    sizes = [f"{method}.{name}={value}" for method in methods for name, value in TINY.items()]
    words = ["--env", "CartPole-v1", "--max-steps", "20", "--steps", "64", "--n-envs", "2", "--device", "cpu",
             "--attack-steps", "64", "--sarsa-steps", "64", "-n", "3", "--certificate-episodes", "50", "--workers", "1",
             "--methods", ",".join(methods), "--out", str(tmp_path),
             *(word for size in sizes for word in ("--set", size)), "--set", "non-dominated.n_policies=2",
             "--set", "smoothed.sigma=0.3"]  # fmt: skip
    assert run(*words, "--json") == 0
    first = json.loads(capfd.readouterr().out)
    assert first["columns"] == ["natural", "random", "MAD", "RS", "learned", "worst", "episode worst", "certified"]
    assert [row["name"] for row in first["rows"]] == list(methods)
    assert first["threat"]["episode"]["eps"] == 0.3
    assert run(*words, "--json") == 0
    second = json.loads(capfd.readouterr().out)
    assert second["rows"] == first["rows"], "what is finished is taken from the folder"
    saved = f"saved:{tmp_path}/seed-0/smoothed"
    assert run("--policy", f"mine={saved}", "--attacks", "random", "-n", "3", "--out", str(tmp_path / "more")) == 0
    assert "mine" in capfd.readouterr().out
    clash = ["--policy", f"ppo={saved}", "--methods", "ppo"]
    wrong = ((["--set", "kappa=1"], "METHOD.NAME"), (["--policy", "nothing"], "NAME=WORDS"),
             (["--methods", "magic"], "--methods"), (clash, "take another"))  # fmt: skip
    for bad, message in wrong:
        assert run("--env", "CartPole-v1", "--out", str(tmp_path / "bad"), *bad) == 2
        assert message in capfd.readouterr().err
