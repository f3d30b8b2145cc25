"""``robust rl``: a zip trained elsewhere is attacked, certified and reported; wrong words end in one line."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from rl_robust.attacks import suite
from rl_robust.attacks.suite import Suite
from rl_robust.cli import setting
from rl_robust.cli.words import ATTACKS
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
    words = ["--sigma", "0.2", "--lower", "0", "-n", "300", "--attacks", "mad", "--attacked-episodes", "10"]
    assert run("certify", *setting, *words, "--eps", "0.1", "--eps", "0.2", "--out", str(tmp_path / "c")) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["certified/return@0"]["value"] > figures["certified/return@0.2"]["value"] > 0
    assert "Certified return" in (tmp_path / "c" / "report.html").read_text()


def test_names_of_attacks_become_attacks_that_share_one_critic() -> None:
    task = Task("CartPole-v1", max_steps=20)
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    names, asked = ("mad", "sarsa", "sarsa+mad"), {"eps": [0.1, 0.2], "norm": "linf", "per": "step"}
    found: Any = setting.attacks_of(names, Suite(policy, task, duration=9, sarsa_steps=100), **asked)
    assert list(found) == ["mad@0.1", "sarsa@0.1", "sarsa+mad@0.1", "mad@0.2", "sarsa@0.2", "sarsa+mad@0.2"]
    assert found["sarsa@0.1"].critic is found["sarsa+mad@0.2"].critic
    assert found["sarsa+mad@0.2"].mixing_weight == 0.5
    blind = CallablePolicy(lambda obs: (obs[:, 2] > 0).astype(int), spaces.Discrete(2))
    with pytest.raises(TypeError, match="needs no gradients"):
        setting.attacks_of(("sarsa",), Suite(blind, task), **asked)
    assert ATTACKS == suite.ATTACKS
    assert set(suite.usual_attacks(policy)) == set(ATTACKS) - {"pgd", "offset"}
    assert suite.usual_attacks(blind) == ("random", "sa-rl")


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


QUICK = ["--device", "cpu", "--seed", "1"]
SMALL = ["--env", "CartPole-v1", "--max-steps", "30", "--steps", "64", "--n-envs", "2", *QUICK,
         "--set", "rollout=16", "--set", "batch_size=16"]  # fmt: skip


def test_a_hardened_policy_can_be_checked_and_evaluated_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["harden", "--method", "sa-ppo", *SMALL, "--eps", "0.1", "--set", "inner=interval"]
    out = tmp_path / "sa"
    assert run(*words, "--out", str(out), "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["policy"] == f"saved:{out}"
    assert run("check", "--policy", f"saved:{out}") == 0
    assert "nothing found" in capfd.readouterr().err
    with_zip = ["--policy", f"sb3:{out / 'policy.zip'}", "--env", "CartPole-v1", "--max-steps", "30"]
    found = []
    for which in (with_zip, ["--policy", f"saved:{out}"]):
        assert run("attack", *which, "--attacks", "mad", "--eps", "0.1", "-n", "5", "--json", *QUICK) == 0
        found.append(json.loads(capfd.readouterr().out)["figures"])
    assert found[0] == found[1], "the zip and the folder are one policy"
    assert run("attack", "--policy", f"saved:{out}", "--frames", "2") == 2
    assert "leave it out" in capfd.readouterr().err


def test_a_smoothed_policy_brings_its_noise_and_its_certificate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["harden", "--method", "smoothed", *SMALL, "--set", "sigma=0.2"]
    out = tmp_path / "smoothed"
    assert run(*words, "--out", str(out), "--json") == 0
    capfd.readouterr()
    saved, keep = ["--policy", f"saved:{out}", "--json", *QUICK], ["--resume", str(tmp_path / "kept")]
    asked = ["--attacks", "random,sa-rl,pa-ad", "--attack-steps", "64", "-n", "5", "--certificate-episodes", "100"]
    assert run("evaluate", *saved, *keep, *asked, "--out", str(tmp_path / "report")) == 0
    document = json.loads(capfd.readouterr().out)
    figures = document["figures"]
    assert document["details"]["sigma"] == 0.2
    assert figures["worst/tried"]["value"] == 3, "the ball of every step is one threat"
    assert figures["worst of an episode/tried"]["value"] == 9, "the length of an episode another"
    assert figures["certified/return@0"]["value"] > figures["certified/return@0.4"]["value"]
    attackers = sorted((tmp_path / "kept" / "attackers").iterdir())
    assert len(attackers) == 2
    stamps = [file.stat().st_mtime_ns for file in attackers]
    assert run("evaluate", *saved, *keep, *asked) == 0
    assert json.loads(capfd.readouterr().out)["figures"] == figures
    assert [file.stat().st_mtime_ns for file in attackers] == stamps, "attackers are kept"
    assert run("certify", *saved, "-n", "100") == 0
    assert json.loads(capfd.readouterr().out)["figures"]["certified/return@0.05"]["value"] > 0


def test_a_set_asks_which_of_its_policies(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["harden", "--method", "non-dominated", *SMALL, "--set", "n_policies=2", "--set", "delta=-1000"]
    assert run(*words, "--out", str(tmp_path)) == 0
    assert run("attack", "--policy", f"saved:{tmp_path}") == 2
    assert "@0" in capfd.readouterr().err
    assert run("attack", "--policy", f"saved:{tmp_path}@1", "-n", "3", "--attacks", "random", *QUICK) == 0
    assert run("attack", "--policy", f"saved:{tmp_path}@9", "-n", "3") == 2
    assert run("settings", "non-dominated") == 0
    out, err = capfd.readouterr()
    assert "n_policies" in out
    assert "hopper" in err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["harden", "--env", "CartPole-v1", "--out", "OUT", "--method", "magic"], 2, "--method"),
        (["harden", "--env", "CartPole-v1", "--out", "OUT", "--set", "kapa=1"], 2, "kappa"),
        (["harden", "--env", "CartPole-v1", "--out", "OUT", "--recipe", "pong"], 2, "is for smoothed"),
        (["harden", "--out", "OUT"], 2, "--env is needed"),
        (["harden", "--env", "CartPole-v1", "--out", "OUT", "--recipe", "hopper"], 2, "leave --env"),
        (["settings", "magic"], 2, "METHOD"),
        (["attack", "--policy", "saved:absent", "--env", "CartPole-v1"], 3, "no such file"),
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
        (["certify", "--policy", "POLICY", "--env", "CartPole-v1"], 2, "--sigma"),
        (["attack", "--policy", "POLICY"], 2, "--env is needed"),
        (["attack", "--policy", "POLICY", "--env", "CartPole-v1", "--attacks", "sa-rl", "--per", "episode"], 2, "ball"),
        (["certify", "--policy", "POLICY", "--env", "CartPole-v1", "--sigma", "1", "--lower", "0", "--alpha", "1"], 2,
         "--alpha"),
    ],
)  # fmt: skip
def test_wrong_words_end_in_one_line(
    trained: Path, words: list[str], code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {"POLICY": f"sb3:{trained}", "OUT": str(tmp_path / "out")}
    found = run(*(known.get(word, word) for word in words))
    out, err = capfd.readouterr()
    assert found == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
