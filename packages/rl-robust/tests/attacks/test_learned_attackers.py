"""Learned attackers: closed forms, both views of one game, a chain with a known best attack."""

from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from rl_robust.attacks import ConstantOffset, RandomNoise
from rl_robust.attacks.learned import (
    AdversaryEnv,
    LearnedStateAdversary,
    ObservationAttackEnv,
    PolicyAdversaryDirector,
    actor_step,
    train_adversary,
)
from rl_robust.attacks.stage import AdversaryVecEnv, AttackedVecEnv
from rl_robust.attacks.switching import SwitchingAttack
from rl_robust.observation import EpisodeBudget, StepBudget
from rl_robust.policy import NetworkPolicy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.threats import Linf


def ball(eps: float) -> StepBudget:
    return StepBudget(Linf(eps, domain=None))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


class Fixed(nn.Module):
    """An adversary that always does the same."""

    n_draws = 0

    def __init__(self, action: list[float]) -> None:
        super().__init__()
        self.action = torch.tensor(action)
        self.action_space = spaces.Box(-1, 1, (len(action),), np.float32)

    def act(self, obs: Tensor, memory: Any = None, start: Any = None, *, draws: Any = None) -> tuple[Tensor, Any]:
        return self.action.expand(len(obs), -1), None


@pytest.mark.quick
def test_the_actors_step_is_the_closed_form_on_linear_policies() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, obs, u = (torch.randn(s, generator=generator).double() for s in ((3, 6), (40, 6), (40, 3)))
    eta = 0.01 * torch.randn(40, 6, generator=generator).double()
    shown = actor_step(linear(weight), obs, u, budget=ball(0.1), start=obs + eta, straight=False)
    change = eta @ weight.T
    length, unit = change.norm(dim=1, keepdim=True), u / u.norm(dim=1, keepdim=True)
    along = (change * unit).sum(1, keepdim=True)
    gradient = (unit / length - along * change / length**3 + change / length) @ weight
    assert shown - obs == pytest.approx(0.1 * torch.sign(gradient).numpy(), abs=1e-9)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), eps=st.floats(0.01, 0.5))
def test_the_actor_goes_up_and_stays_inside(seed: int, k: int, eps: float) -> None:
    """The released sign would go down: away from the direction, and to a shorter change."""
    generator = torch.Generator().manual_seed(seed)
    weight, obs, u = (torch.randn(s, generator=generator) for s in ((k, 8), (64, 8), (64, k)))
    start = obs + (torch.rand(64, 8, generator=generator) - 0.5) * eps / 5
    budget, policy = ball(eps), linear(weight)
    shown = actor_step(policy, obs, u, budget=budget, start=start)
    assert bool(budget.threat.contains(shown, obs).all())

    def objective(at: Tensor) -> Tensor:
        change = (at - obs) @ weight.T
        return torch.nn.functional.cosine_similarity(change, u, dim=1, eps=1e-12) + change.norm(dim=1)

    with torch.no_grad():
        assert float((objective(shown) - objective(start)).mean()) > 0
        single = actor_step(policy, obs, u, budget=budget, start=start, straight=False)
        direct = budget.threat.project(obs + eps * torch.sign(u @ weight), obs)
        assert bool((objective(shown) >= torch.maximum(objective(single), objective(direct)) - 1e-4).all())
        if k == 1:
            assert bool((((shown - obs) @ weight.T) * u > 0).all()), "the director is heard with one action as well"


def test_sa_rl_shows_the_scaled_action_and_budgets_hold() -> None:
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    task = Task("CartPole-v1", max_steps=20)
    attack = LearnedStateAdversary(ball(0.25), Fixed([1.0, -1.0, 0.5, 0.0]))
    found = collect(policy, task, 3, attack=attack, trace=(0,)).traces[0]
    assert found.seen - found.obs == pytest.approx(np.tile([0.25, -0.25, 0.125, 0.0], (len(found.obs), 1)), abs=1e-6)
    assert float(np.abs(found.seen.astype(np.float64) - found.obs).max()) <= 0.25


@pytest.mark.parametrize("kind", ["sa-rl", "pa-ad"])
@pytest.mark.parametrize("frames", [1, 3])
def test_both_views_and_the_engine_play_the_same_game(kind: Any, frames: int) -> None:
    torch.manual_seed(0)
    task = Task("CartPole-v1", max_steps=30, n_frames=frames, layout="concat")
    policy = NetworkPolicy(nn.Linear(4 * frames, 2), spaces.Discrete(2))
    action = [0.7, -0.2, 1.0, -1.0] if kind == "sa-rl" else [1.0, -1.0]
    attack = (LearnedStateAdversary if kind == "sa-rl" else PolicyAdversaryDirector)(ball(0.2), Fixed(action))
    mine = AdversaryEnv(task, policy, ball(0.2), kind=kind, generator=4)
    yours = ObservationAttackEnv(task, attack, policy, generator=4)
    obs, _ = mine.reset(seed=11)
    shown, _ = yours.reset(seed=11)
    assert yours.observation_space.contains(shown)
    assert mine.observation_space.contains(obs)
    total, done = 0.0, False
    while not done:
        choice = int(policy.act(torch.as_tensor(shown)[None])[0])
        shown, reward, ended, cut, _ = yours.step(choice)
        obs, loss, over, late, info = mine.step(np.array(action, dtype=np.float32))
        assert loss == -reward == -info["reward"]
        assert (ended, cut) == (over, late)
        total, done = total + reward, ended or cut
    assert total > 0
    mine.close()
    yours.close()


def test_batched_views_agree_with_single_ones_and_sides_have_signs() -> None:
    torch.manual_seed(1)
    task = Task("CartPole-v1", max_steps=12)
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    action = np.array([0.5, -1.0, 1.0, 0.0], dtype=np.float32)
    inner = DummyVecEnv([task.make] * 4)
    inner.seed(5)
    env = AdversaryVecEnv(inner, task, [(policy, 1.0), (policy, -1.0)], ball(0.3))
    seen = env.reset()
    assert seen.shape == (4, 5)
    assert seen[:, -1].tolist() == [0, 0, 1, 1]
    single = AdversaryEnv(task, policy, ball(0.3))
    obs, _ = single.reset(seed=5)
    for _ in range(8):
        seen, rewards, dones, _ = env.step(np.tile(action, (4, 1)))
        obs, _, ended, _, _ = single.step(action)
        assert rewards.tolist() == [1, 1, -1, -1]
        if dones[0] or ended:
            assert bool(dones[0]) == ended
            break
        assert np.asarray(seen)[0, :4] == pytest.approx(obs)
    with pytest.raises(ValueError, match="sides"):
        AdversaryVecEnv(inner, task, [(policy, 1.0)] * 3, ball(0.1))
    victims = AttackedVecEnv(inner, task, RandomNoise(ball(0.3)), policy)
    assert victims.reset().shape == (4, 4)
    ends = 0
    for _ in range(30):
        _, _, dones, infos = victims.step(np.zeros(4, dtype=np.int64))
        ends += sum("terminal_observation" in info for info in infos)
        assert bool(all(info["terminal_observation"].shape == (4,) for info, d in zip(infos, dones, strict=True) if d))
    assert ends > 0
    env.close()


class Chain(gym.Env):
    """Three cells; the observation says which, one-hot; right is 0 in the middle, else 1.

    A policy that reads its cell takes 1 each step; every lie about the cell costs it.
    """

    observation_space = spaces.Box(-1.0, 2.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cell, self.t = int(self.np_random.integers(3)), 0
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[self.cell]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        right = int(action) == (0 if self.cell == 1 else 1)
        self.cell, self.t = (self.cell + 1) % 3, self.t + 1
        return self._obs(), float(right), False, self.t >= 9, {}


@pytest.mark.parametrize("kind", ["sa-rl", "pa-ad"])
def test_a_trained_attacker_reaches_the_known_best_attack_on_a_chain(kind: Any) -> None:
    """With radius 0.6 every cell can pass for another: the best attack leaves nothing of 9; noise leaves most."""
    policy = NetworkPolicy(linear(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])), spaces.Discrete(2))
    task = Task(Chain)
    calls: list[int] = []
    before = torch.get_rng_state()
    attack = train_adversary(
        task, policy, ball(0.6), kind=kind, n_steps=4096, generator=1, on_step=lambda done, _: calls.append(done),
        settings={"learning_rate": 5e-3, "n_steps": 64, "n_epochs": 8, "batch_size": 128, "gamma": 0.5},
    )  # fmt: skip
    assert torch.equal(before, torch.get_rng_state()), "global generators are left as found"
    assert calls[-1] == 4096
    clean = collect(policy, task, 20).mean
    noise = collect(policy, task, 20, attack=RandomNoise(ball(0.6))).mean
    learned = collect(policy, task, 20, attack=attack).mean
    assert clean == 9.0
    assert learned < noise
    assert learned < (1.0 if kind == "pa-ad" else 6.0), (learned, noise)


def test_switching_is_a_function_of_the_episode() -> None:
    low, high = ConstantOffset(EpisodeBudget(0.1), (1.0, 0.0, 0.0, 0.0)), RandomNoise(ball(0.5))
    attack = SwitchingAttack((None, low, high), block=2)
    assert attack.active([0, 1, 2, 3, 4, 6]).tolist() == [0, 0, 1, 1, 2, 0]
    assert attack.budget.eps == 0.5
    chance = SwitchingAttack((None, high), block=1, probability=0.3, generator=2)
    chain = chance.active(range(4000))
    assert chain[0] == 0
    assert float(np.mean(np.diff(chain) != 0)) == pytest.approx(0.3, abs=0.03)
    assert chance.active([17, 3]).tolist() == [chain[17], chain[3]]
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    traces = collect(policy, Task("CartPole-v1", max_steps=5), 6, attack=attack, trace=range(6)).traces
    moved = [bool((t.seen != t.obs).any()) for t in traces]
    assert moved == [False, False, True, True, True, True]
    with pytest.raises(ValueError, match="attacks"):
        SwitchingAttack((None,))
    with pytest.raises(ValueError, match="probability"):
        SwitchingAttack((high,), probability=1.5)


def test_bad_input_is_refused() -> None:
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    with pytest.raises(ValueError, match="kind"):
        AdversaryEnv(Task("CartPole-v1"), policy, ball(0.1), kind=cast(Any, "paad"))
    with pytest.raises(ValueError, match="eps"):
        ball(-0.1)
    task = Task("CartPole-v1", max_steps=3)
    env = AdversaryEnv(task, lambda obs: np.zeros(len(obs), int), ball(0.1), kind="pa-ad")
    env.reset(seed=0)
    with pytest.raises(TypeError, match="outputs"):
        env.step(np.zeros(2, np.float32))


class Watched(nn.Module):
    """A victim that keeps what it is shown."""

    n_draws = 0

    def __init__(self) -> None:
        super().__init__()
        self.action_space, self.shown = spaces.Discrete(2), list[Tensor]()

    def act(self, obs: Tensor, memory: Any = None, start: Any = None, *, draws: Any = None) -> tuple[Tensor, Any]:
        self.shown.append(obs.clone())
        return torch.zeros(len(obs), dtype=torch.int64), None


def test_a_smoothed_victim_is_attacked_under_its_noise() -> None:
    task, seen = Task("CartPole-v1", max_steps=50), []
    for sigma in (0.0, 0.5):
        victim = Watched()
        env = AdversaryVecEnv(DummyVecEnv([task.make] * 64), task, [(victim, -1.0)], ball(0.1), sigma=sigma)
        env.seed(0)
        env.reset()
        env.step(np.zeros((64, 4), np.float32))
        env.step(np.ones((64, 4), np.float32))
        seen.append(torch.stack(victim.shown))
    noise = seen[1] - seen[0]
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)
    assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.2, "fresh in every step"


def test_a_short_training_is_as_short_as_asked() -> None:
    told: list[tuple[int, int]] = []
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    train_adversary(Task("CartPole-v1"), policy, ball(0.1), n_steps=200, on_step=lambda *at: told.append(at))
    assert told == [(200, 200)]
