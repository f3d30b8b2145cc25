"""Attacks meet defences on three environments, with tiny networks, from training to certificate."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_robust.adversarial import StateAdversarialRegulariser, train_policy
from rl_robust.attacks.episode import offsets
from rl_robust.attacks.suite import ATTACKS, Suite
from rl_robust.nondominated.discovery import discover_policies
from rl_robust.observation import EpisodeBudget, StepBudget
from rl_robust.rollout import collect
from rl_robust.smoothing import certify_return
from rl_robust.task import Task
from robust_core.threats import Linf

TINY: dict[str, Any] = {
    "n_steps": 32, "batch_size": 64, "n_epochs": 2, "policy_kwargs": {"net_arch": [16, 16]},
}  # fmt: skip
EPS = 0.1
STEP = tuple(name for name in ATTACKS if name not in ("pgd", "offset"))
FEW = ("mad", "sa-rl")
CASES = {"CartPole-v1": 0.0, "InvertedPendulum-v5": 0.0, "Hopper-v5": -100.0}


@pytest.mark.parametrize("env", CASES)
def test_attacks_meet_defences(env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it stands
    started = time.process_time()
    budget = StepBudget(Linf(EPS, domain=None))
    train: dict[str, Any] = {"n_steps": 64, "n_envs": 2, "settings": TINY}
    natural, task = train_policy(Task(env, max_steps=12), **train)
    hardened, _ = train_policy(task, StateAdversarialRegulariser(budget.threat, 0.3, ramp=0.5), **train)
    found = discover_policies(
        task, natural, budget=budget, n_policies=2, delta=-1e9, n_updates=1, n_episodes=2, n_envs=2,
        victim_settings=TINY, attacker_settings=TINY,
    ).policies  # fmt: skip
    for victim, names in ((natural, STEP), (hardened, FEW), (found[1], FEW)):
        before = [p.clone() for p in victim.parameters()]
        suite = Suite(victim, task, attack_steps=64, attack_settings={**TINY, "n_steps": 8}, sarsa_steps=64)
        clean = collect(victim, task, 3)
        for name, attack in suite.build(names, budget).items():
            sample = collect(victim, task, 3, attack=attack)
            assert 0 < sample.spent.max() <= EPS, name
            assert np.isfinite(sample.returns).all(), name
            np.testing.assert_array_equal(sample.returns, collect(victim, task, 3, attack=attack, n_envs=2).returns)
        np.testing.assert_array_equal(clean.returns, collect(victim, task, 3).returns)
        assert all(torch.equal(a, b) for a, b in zip(before, victim.parameters(), strict=True))
    assert time.process_time() - started < 60


@pytest.mark.parametrize("env", CASES)
def test_certificates_meet_attacks_with_a_budget_for_the_episode(
    env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, task = train_policy(Task(env, max_steps=10), n_steps=64, n_envs=2, settings=TINY)
    sigma, eps, lower = 0.2, 0.1, CASES[env]
    certificate = certify_return(collect(policy, task, 200, sigma=sigma).returns, sigma=sigma, eps=[eps], lower=lower)
    budget = EpisodeBudget(eps)
    size = int(np.prod(task.make().observation_space.shape or ()))
    names = ("mad", "pgd") if env == "CartPole-v1" else ("mad",)
    attacks: dict[str, Any] = {**Suite(policy, task, sigma=sigma, duration=10).build(names, budget)}
    attacks["offset"] = offsets(budget, size, (10,))["offset+1x10"]
    for name, attack in attacks.items():
        sample = collect(policy, task, 10, attack=attack, sigma=sigma, first=200)
        assert sample.spent.max() <= eps, name
        error = 3 * sample.returns.std() / np.sqrt(len(sample))
        assert sample.mean + error >= certificate.expected_return[0], name
