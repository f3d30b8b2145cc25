"""Sets, pay-offs, adaptive play, discovery by PPO in miniature, the paper's recipes in two small updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rl_robust.adversarial import StateAdversarialRegulariser, train_policy
from rl_robust.adversarial.ppo import blank_policy
from rl_robust.attacks import RandomNoise
from rl_robust.attacks.learned import train_adversary
from rl_robust.bandits import Exp3IX
from rl_robust.claims import non_dominated_policies
from rl_robust.nondominated import AdaptivePolicy, PayoffMatrix, PolicySet, adapt, flip, replay
from rl_robust.nondominated.discovery import discover_policies
from rl_robust.nondominated.recipes import RECIPES
from rl_robust.nondominated.tabular import random_game
from rl_robust.observation import StepBudget
from rl_robust.policy import NetworkPolicy
from rl_robust.rollout import collect
from rl_robust.task import Normaliser, Task
from robust_core.errors import UntrustedFileError
from robust_core.threats import Linf

TINY = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}


def ball(eps: float) -> StepBudget:
    return StepBudget(Linf(eps, domain=None))


def balancer(gain: float) -> NetworkPolicy:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(gain * torch.tensor([[-0.05, -0.2, -1.0, -1.0], [0.05, 0.2, 1.0, 1.0]]))
        layer.bias.zero_()
    return NetworkPolicy(layer, spaces.Discrete(2))


CARTPOLE = Task("CartPole-v1", max_steps=40)


def pair() -> PolicySet:
    return PolicySet([balancer(1.0), balancer(-1.0)], CARTPOLE, names=["good", "bad"])


@pytest.mark.quick
def test_payoff_gap_and_pruning() -> None:
    policies = pair()
    done: list[int] = []
    found = policies.payoff({"none": None, "noise": RandomNoise(ball(0.2))}, 6, on_step=lambda k, _: done.append(k))
    assert found.returns.shape == (2, 2, 6)
    assert done == [1, 2, 3, 4]
    assert found.best == {"none": 0, "noise": 0}
    estimate = found.estimate(1, "none")
    assert estimate.interval is not None
    assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
    assert found.gap([0])[0] == 0
    assert found.gap([1])[0] > 10
    assert policies.prune(found).names == ("good",)
    assert found.as_json()["attackers"] == ["none", "noise"]
    direct = collect(policies[0], CARTPOLE, 6).returns
    assert np.array_equal(found.returns[0, 0], direct)


def test_sets_are_saved_and_checked_on_the_way_back(tmp_path: Path) -> None:
    policies = pair()
    policies.save(tmp_path, about={"eps": 0.1})
    again = PolicySet.load(tmp_path, CARTPOLE, lambda: balancer(0.0))
    obs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for k in range(2):
        assert torch.equal(again[k].act(obs)[0], policies[k].act(obs)[0])
    assert again.names == ("good", "bad")
    other = Task("CartPole-v1", normaliser=Normaliser(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match="normaliser"):
        PolicySet.load(tmp_path, other, lambda: balancer(0.0))
    with pytest.raises(ValueError, match="does not fit"):
        PolicySet.load(tmp_path, CARTPOLE, lambda: NetworkPolicy(nn.Linear(3, 2), spaces.Discrete(2)))
    (tmp_path / "policies.json").write_text("{}")
    with pytest.raises(UntrustedFileError):
        PolicySet.load(tmp_path, CARTPOLE, lambda: balancer(0.0))


def test_bad_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PolicySet([], CARTPOLE)
    with pytest.raises(ValueError, match="acts in"):
        PolicySet([NetworkPolicy(nn.Linear(4, 3), spaces.Discrete(3))], CARTPOLE)
    with pytest.raises(ValueError, match="attackers"):
        pair().payoff({})
    with pytest.raises(ValueError, match="returns"):
        PayoffMatrix(np.zeros((2, 1, 3)), ("a", "b"))
    with pytest.raises(ValueError, match="arms"):
        AdaptivePolicy(pair(), Exp3IX(3, reward_range=(0.0, 1.0)))


def test_adaptive_play_online_is_the_replay_and_arms_are_fixed_within_an_episode() -> None:
    task = Task("CartPole-v1", max_steps=15)
    policies = PolicySet([balancer(1.0), balancer(-1.0)], task)
    bandit = Exp3IX(2, 12, reward_range=(0.0, 15.0), generator=5)
    online = adapt(policies, bandit, 12, attack=lambda t, p: RandomNoise(ball(0.1)) if t % 2 else None, generator=9)
    table = np.stack([
        np.concatenate([
            collect(policy, task, 1, attack=RandomNoise(ball(0.1)) if t % 2 else None, generator=9, first=t).returns
            for t in range(12)
        ])
        for policy in policies.policies
    ])  # fmt: skip
    known = replay(Exp3IX(2, 12, reward_range=(0.0, 15.0), generator=5), table)
    assert online.arms.tolist() == known.arms.tolist()
    assert online.returns == pytest.approx(known.returns)
    adaptive = AdaptivePolicy(policies, Exp3IX(2, 10, reward_range=(0.0, 15.0), generator=1))
    with pytest.raises(RuntimeError, match="reset"):
        adaptive(np.zeros(4))
    env = gym.make("CartPole-v1")
    arm = adaptive.reset()
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        action = adaptive(obs)
        assert action == int(policies[arm].act(torch.as_tensor(obs)[None])[0])
        assert adaptive.arm == arm
        obs, *_ = env.step(action)
    adaptive.finish(5.0)
    assert adaptive.bandit.rounds == 1
    assert adaptive.regret_bound(10, gap=0.5) == pytest.approx(5 + adaptive.bandit.regret_bound(10))


def test_discovery_runs_stops_and_goes_on_where_it_was(tmp_path: Path) -> None:
    task = Task("InvertedPendulum-v5", max_steps=20)
    before = torch.get_rng_state()
    term = StateAdversarialRegulariser(ball(0.1).threat, 0.1, ramp=0.5)
    first, task = train_policy(task, term, n_steps=64, n_envs=2, settings=TINY)
    assert task.normaliser is not None
    asked: dict[str, Any] = {
        "budget": ball(0.1), "n_updates": 2, "n_episodes": 2, "n_envs": 2, "kappa": 0.1, "victim_settings": TINY,
        "attacker_settings": TINY, "generator": 3,
    }  # fmt: skip
    seen: list[str] = []
    found = discover_policies(
        task, first, n_policies=2, delta=-1e9, checkpoint=tmp_path, on_step=lambda name, *_: seen.append(name), **asked
    )
    assert torch.equal(before, torch.get_rng_state())
    assert found.policies.names == ("initial", "discovered 1")
    assert seen == ["discovered 1"] * 2
    assert list(found.attackers) == ["against discovered 1"]
    again = discover_policies(task, first, n_policies=2, delta=-1e9, **asked)
    assert again.values == found.values
    went_on = discover_policies(task, first, n_policies=2, delta=-1e9, checkpoint=tmp_path, **asked)
    assert went_on.values == ()
    obs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(went_on.policies[1].act(obs)[0], found.policies[1].act(obs)[0])
    assert torch.equal(PolicySet.load(tmp_path, task, lambda: blank_policy(task)).policies[0].act(obs)[0],
                       first.act(obs)[0])  # fmt: skip
    seen.clear()
    stopped, again = (
        discover_policies(
            task, first, n_policies=3, delta=1e9, attacker="sa-rl", checkpoint=tmp_path / "stopped",
            on_step=lambda name, *_: seen.append(name), **asked,
        )
        for _ in range(2)
    )  # fmt: skip
    assert stopped.stopped
    assert again.stopped
    assert len(stopped.policies) == len(again.policies) == 1
    assert seen == ["discovered 1"] * 2, "what found nothing is not tried again"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_papers_recipes_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates on the true environment and settings, with fewer steps each."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it stands
    recipe = RECIPES[name]
    short = replace(recipe.task, max_steps=20)
    small = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
    term = StateAdversarialRegulariser(ball(recipe.eps).threat, recipe.kappa, ramp=0.5)
    first, task = train_policy(short, term, n_steps=16, n_envs=1, settings={**recipe.victim, **small})
    found = discover_policies(
        task, first, budget=ball(recipe.eps), n_policies=2, delta=-1e9, n_updates=2, n_episodes=1, n_envs=1,
        kappa=recipe.kappa, victim_settings={**recipe.victim, **small},
        attacker_settings={**recipe.attacker, **small},
    )  # fmt: skip
    assert len(found.policies) == 2
    assert np.isfinite(found.values[0])
    attack = train_adversary(task, found.policies[1], ball(recipe.eps), n_steps=16, n_envs=2, settings=small)
    assert np.isfinite(collect(found.policies[1], task, 1, attack=attack).mean)


def test_the_flip_attacker_waits_until_the_bandit_has_settled() -> None:
    attack = RandomNoise(ball(0.1))
    choose = flip(attack, committed=0.7)
    assert choose(0, np.array([0.6, 0.4])) is None
    assert choose(1, np.array([0.7, 0.3])) is attack
    assert choose(2, np.array([0.5, 0.5])) is attack, "it goes on"
    assert choose(0, np.array([0.5, 0.5])) is None, "a new run"
    with pytest.raises(ValueError, match="committed"):
        flip(attack, committed=1.5)


def test_the_full_claim_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true environment, policies and attackers; few steps of each."""
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES["hopper"]
    small = replace(
        recipe, task=replace(recipe.task, max_steps=5), n_updates=1, ramp=1,
        victim={**recipe.victim, **TINY}, attacker={**recipe.attacker, **TINY},
    )  # fmt: skip
    monkeypatch.setattr(non_dominated_policies, "RECIPES", {"hopper": small})
    monkeypatch.setattr(non_dominated_policies, "UPDATE", 16)
    monkeypatch.setattr(non_dominated_policies, "PLAYED", 2)
    monkeypatch.setattr(non_dominated_policies, "GAMES", 1)
    found = non_dominated_policies.run(0, "full")
    assert set(found.measured) == set(found.baseline) == {"worst", "natural_control"}
    assert all(gate.passed for gate in found.gates)


def test_the_quick_claim_measures_what_it_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pendulum = non_dominated_policies.PENDULUM
    small = replace(pendulum, task=replace(pendulum.task, max_steps=5), n_updates=1, ramp=1, victim=TINY, attacker=TINY)
    monkeypatch.setattr(non_dominated_policies, "PENDULUM", small)
    monkeypatch.setattr(non_dominated_policies, "UPDATE", 16)
    monkeypatch.setattr(non_dominated_policies, "PLAYED", 2)
    monkeypatch.setattr(non_dominated_policies, "GAMES", 1)
    monkeypatch.setattr(non_dominated_policies, "ROUNDS", 200)
    monkeypatch.setattr(non_dominated_policies.tabular, "random_game", lambda seed: random_game(seed, n_states=3))
    found = non_dominated_policies.run(1, "quick")
    assert all(gate.passed for gate in found.gates)
    figures = {s.figure for s in non_dominated_policies.STATEMENTS if "quick" in s.scales}
    assert figures == set(found.measured) == set(found.baseline)
