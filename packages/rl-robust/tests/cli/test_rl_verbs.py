"""``robust rl``: a zip trained elsewhere is attacked, certified and reported; wrong words end in one line."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from rl_robust.cli import setting
from rl_robust.policy import CallablePolicy, NetworkPolicy
from rl_robust.task import Task
from robust_core.cli.main import main
from robust_core.random import reseeded


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["rl", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policies") / "ppo.zip"
    with reseeded(0):
        PPO("MlpPolicy", gym.make("CartPole-v1"), seed=0, policy_kwargs={"net_arch": [16]}, device="cpu").save(path)
    return path


def test_attack_and_certify_write_reports(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = ["--policy", f"sb3:{trained}", "--env", "CartPole-v1", "--max-steps", "50", "--json"]
    out = tmp_path / "attacked"
    assert run("attack", *setting, "--attacks", "random,mad", "--eps", "0.1", "-n", "10", "--out", str(out)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "robust.policy/1"
    assert document["figures"]["worst/tried"]["value"] == 2
    assert (out / "report.html").read_text().count("<svg") == 2
    words = ["--sigma", "0.2", "--lower", "0", "-n", "300", "--attacks", "pgd", "--attacked-episodes", "10"]
    assert run("certify", *setting, *words, "--eps", "0.1", "--eps", "0.2", "--out", str(tmp_path / "c")) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["certified/return@0"]["value"] > figures["certified/return@0.2"]["value"] > 0
    assert "Certified return" in (tmp_path / "c" / "report.html").read_text()


def test_names_of_attacks_become_attacks_that_share_one_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("CartPole-v1", max_steps=20)
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    monkeypatch.setattr(setting, "fit_sarsa", partial(setting.fit_sarsa, n_steps=100, epochs=1))
    found: Any = setting.attacks_of(
        "mad,sarsa,sarsa+mad", policy, task, eps=[0.1, 0.2], norm="linf", per="step", duration=9
    )
    assert list(found) == ["mad@0.1", "sarsa@0.1", "sarsa+mad@0.1", "mad@0.2", "sarsa@0.2", "sarsa+mad@0.2"]
    assert found["sarsa@0.1"].critic is found["sarsa+mad@0.2"].critic
    assert found["sarsa+mad@0.2"].mixing_weight == 0.5
    blind = CallablePolicy(lambda obs: (obs[:, 2] > 0).astype(int), spaces.Discrete(2))
    with pytest.raises(TypeError, match="needs no gradients"):
        setting.attacks_of("sarsa", blind, task, eps=[0.1], norm="linf", per="step", duration=9)


def test_check_tells_what_is_wrong_and_how_to_put_it_right(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setting = ["--policy", f"sb3:{trained}", "--env", "CartPole-v1"]
    assert run("check", *setting, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["ok"]
    assert document["shown"] == [4]
    assert run("check", *setting, "--bound", "0.01") == 0
    assert "VecNormalize" in capfd.readouterr().err
    assert run("check", "--policy", "torch.nn:Identity", "--env", "CartPole-v1") == 1
    assert "2) are needed" in capfd.readouterr().err


def test_a_hardened_policy_can_be_checked_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--env", "CartPole-v1", "--steps", "64", "--eps", "0.1", "--inner", "interval", "--device", "cpu"]
    assert run("harden", *words, "--out", str(tmp_path), "--json") == 0
    zipped = json.loads(capfd.readouterr().out)["policy"]
    assert run("check", "--policy", f"sb3:{zipped}", "--env", "CartPole-v1") == 0
    assert "nothing found" in capfd.readouterr().err
    assert run("harden", *words, "--out", str(tmp_path), "--method", "magic") == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["attack", "--policy", "nothing", "--env", "CartPole-v1"], 2, "sb3:FILE"),
        (["attack", "--policy", "sb3:absent.zip", "--env", "CartPole-v1"], 3, "no such file"),
        (["attack", "--policy", "absent_module:net", "--env", "CartPole-v1"], 3, "no module"),
        (["attack", "--policy", "POLICY", "--env", "NoSuch-v0"], 3, "NoSuch"),
        (["attack", "--policy", "POLICY", "--env", "Pendulum-v1"], 2, "does not fit"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--attacks", "magic"], 2, "--attacks"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--attacks", "pgd"], 2, "--per episode"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--eps", "much"], 2, "fraction"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--per", "year"], 2, "--per"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--norm", "l7"], 2, "norm"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--env-set", "x"], 2, "--env-set"),
        (["certify", "--policy", "POLICY", "--env", "CartPole-v1", "--sigma", "0", "--lower", "0"], 2, "--sigma"),
        (["certify", "--policy", "POLICY", "--env", "CartPole-v1", "--sigma", "1", "--lower", "0", "--alpha", "1"], 2,
         "--alpha"),
    ],
)  # fmt: skip
def test_wrong_words_end_in_one_line(
    trained: Path, words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(*(f"sb3:{trained}" if word == "POLICY" else word for word in words))
    out, err = capfd.readouterr()
    assert found == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
