"""ATLA: sides take turns, runs repeat and go on, and a victim that met attackers withstands a new one."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rl_robust.adversarial import StateAdversarialRegulariser, train_policy
from rl_robust.adversarial.atla import train_atla
from rl_robust.adversarial.game import Game
from rl_robust.attacks.learned import SETTINGS, train_adversary
from rl_robust.observation import StepBudget
from rl_robust.rollout import collect
from rl_robust.sb3 import load_sb3
from rl_robust.task import Task
from robust_core.random import reseeded
from robust_core.threats import Linf

TINY: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}
CARTPOLE = Task("CartPole-v1", max_steps=30)


class Bet(gym.Env):
    """Bet on the sign of what is observed (+1 or -1), or take 0.5: the bet is safe until someone turns the sign."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 4
        return self._next(), {}

    def _next(self) -> np.ndarray:
        self.sign = 1.0 if self.np_random.random() < 0.5 else -1.0
        return np.array([self.sign], np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 0.5 if action == 0 else (1.0 if (action == 1) == (self.sign > 0) else -1.0)
        self.left -= 1
        return self._next(), reward, self.left == 0, False, {}


def ball(eps: float) -> StepBudget:
    return StepBudget(Linf(eps, domain=None))


def flat(policy: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


@pytest.mark.quick
def test_only_the_side_whose_turn_it_is_moves() -> None:
    with reseeded(0):
        game = Game(CARTPOLE, ball(0.1), {**SETTINGS, **TINY}, {**SETTINGS, **TINY}, n_envs=2)
        start = game.weights()
        game.victim_turn(0.0)
        after = game.weights()
        assert not torch.equal(start[0], after[0])
        assert torch.equal(start[1], after[1])
        game.attacker_turn(0.0)
        end = game.weights()
        assert torch.equal(after[0], end[0])
        assert not torch.equal(after[1], end[1])
        game.close()


@pytest.mark.parametrize("kind", ["sa-rl", "pa-ad"])
def test_a_game_repeats_itself_and_goes_on(kind: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "n_steps": 128, "n_envs": 2, "kind": kind, "victim_settings": TINY, "attacker_settings": TINY, "generator": 7,
        "regulariser": StateAdversarialRegulariser(ball(0.1).threat, 0.1, ramp=0.5),
    }  # fmt: skip
    before = torch.get_rng_state()
    one, two = (
        train_atla(CARTPOLE, ball(0.1), **{**asked, "regulariser": StateAdversarialRegulariser(ball(0.1).threat)})
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(flat(one.policy), flat(two.policy))
    told: list[int] = []

    def stop(_: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_atla(CARTPOLE, ball(0.1), checkpoint=tmp_path, on_step=stop, **asked)
    told.append(0)
    zipped = tmp_path / "policy.zip"
    found = train_atla(CARTPOLE, ball(0.1), checkpoint=tmp_path, on_step=stop, file=zipped, **asked)
    assert told == [32, 64, 0, 96, 128]
    again = train_atla(CARTPOLE, ball(0.1), checkpoint=tmp_path, **asked)
    assert torch.equal(flat(found.policy), flat(again.policy))
    env = gym.make("CartPole-v1")
    read = load_sb3(zipped, env.observation_space, env.action_space)
    assert torch.equal(flat(read), flat(found.policy))
    sample = collect(found.policy, CARTPOLE, 2, attack=found.attack)
    assert float(sample.spent.max()) <= 0.1


def test_a_victim_with_a_memory_plays_and_what_cannot_be_is_named() -> None:
    short = {**TINY, "policy_kwargs": {"lstm_hidden_size": 8}}
    found = train_atla(
        CARTPOLE, ball(0.1), n_steps=32, n_envs=2, recurrent=True, victim_settings=short, attacker_settings=TINY
    )
    assert found.policy.recurrent
    assert np.isfinite(collect(found.policy, CARTPOLE, 2, attack=found.attack).mean)
    with pytest.raises(ValueError, match="sa-rl"):
        train_atla(CARTPOLE, ball(0.1), recurrent=True, kind="pa-ad")
    term = StateAdversarialRegulariser(ball(0.1).threat)
    with pytest.raises(ValueError, match="recurrent"):
        train_atla(CARTPOLE, ball(0.1), n_envs=1, recurrent=True, regulariser=term, victim_settings=short)
    with pytest.raises(ValueError, match="attacker_updates"):
        train_atla(CARTPOLE, ball(0.1), attacker_updates=0)


def test_who_grew_up_with_attackers_withstands_a_new_one() -> None:
    task, budget = Task(Bet), ball(1.5)
    settings = {
        "n_steps": 64,
        "batch_size": 128,
        "n_epochs": 5,
        "learning_rate": 3e-3,
        "policy_kwargs": {"net_arch": [16]},
    }
    naive, _ = train_policy(task, n_steps=4_000, n_envs=4, settings=settings, normalise=False)
    grown = train_atla(
        task, budget, n_steps=16_000, n_envs=4, victim_settings=settings, attacker_settings=settings
    ).policy
    worst = []
    for policy in (naive, grown):
        attack = train_adversary(task, policy, budget, kind="sa-rl", n_steps=4_000, n_envs=4, settings=settings)
        worst.append(collect(policy, task, 50, attack=attack).mean)
    assert collect(naive, task, 50).mean == 4.0, "the weakness is planted: in peace the bet is always won"
    assert worst[0] < -3.0
    assert worst[1] > 1.5
