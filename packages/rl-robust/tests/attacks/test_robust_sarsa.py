"""Robust Sarsa: Q against the linear equations of a small chain, the attack against closed forms."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.attacks import MaximalActionDifference, RandomNoise
from rl_robust.attacks.sarsa import (
    ActionValue,
    RobustSarsa,
    SarsaObjective,
    Transitions,
    deviation,
    fit_sarsa,
    transitions,
)
from rl_robust.observation import StepBudget, View
from rl_robust.policy import NetworkPolicy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.certificates.bounds import IntervalBounds
from robust_core.random import reseeded
from robust_core.threats import Linf
from robust_core.training import fit

GAMMA = 0.8
REWARD = np.array([[0.0, 1.0], [2.0, -1.0], [0.0, 3.0], [1.0, 0.0]])


class Chain(gym.Env):
    """Four states; action 1 goes on, action 0 goes back to the start; going on from the last ends."""

    observation_space = spaces.Box(0, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.state], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(REWARD[self.state, int(action)])
        ended = self.state == 3 and int(action) == 1
        self.state = (self.state + 1) % 4 if int(action) else 0
        return np.eye(4, dtype=np.float32)[self.state], reward, ended, False, {}


def coin() -> NetworkPolicy:
    """Goes on with probability 0.6, 0.7, 0.5, 0.3."""
    net = nn.Linear(4, 2, bias=False)
    p = torch.tensor([0.6, 0.7, 0.5, 0.3])
    with torch.no_grad():
        net.weight.copy_(torch.stack([(1 - p).log(), p.log()]))
    return NetworkPolicy(net, spaces.Discrete(2), stochastic=True)


def exact() -> np.ndarray:
    """Return (4, 2) Q of the coin from its linear equations."""
    go = np.array([0.6, 0.7, 0.5, 0.3])
    chance = np.stack([1 - go, go], 1)
    matrix, b = np.eye(8), REWARD.reshape(-1)
    for s in range(4):
        for a in range(2):
            if (s, a) != (3, 1):
                after = (s + 1) % 4 if a else 0
                matrix[2 * s + a, 2 * after : 2 * after + 2] -= GAMMA * chance[after]
    return np.linalg.solve(matrix, b).reshape(4, 2)


def values(critic: ActionValue) -> np.ndarray:
    with torch.no_grad():
        return np.stack([critic(torch.eye(4), torch.eye(2)[[a] * 4]).numpy() for a in range(2)], 1)


@pytest.mark.quick
def test_a_successor_is_the_next_step_of_the_same_episode() -> None:
    data = transitions(coin(), Task(Chain, max_steps=5), 200, generator=1)
    state, after = data.obs.argmax(1), data.next_obs.argmax(1)
    action = data.action.argmax(1)
    going = ~data.ended
    assert bool((after == torch.where(action == 1, (state + 1) % 4, 0))[going].all())
    assert bool(((state == 3) & (action == 1) == data.ended).all())
    torch.testing.assert_close(data.reward, torch.as_tensor(REWARD, dtype=torch.float32)[state, action])
    follows = ~data.ended[:-1] & (data.next_obs[:-1] == data.obs[1:]).all(1)
    assert bool((data.next_action[:-1] == data.action[1:]).all(1)[follows].float().mean() > 0.6)
    assert len(data) >= 200


def test_the_step_that_the_time_limit_cuts_is_left_out() -> None:
    task = Task("CartPole-v1", max_steps=7)
    still = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2), stochastic=True)
    data = transitions(still, task, 50)
    assert not data.ended.any()
    assert len(data) % 6 == 0
    with pytest.raises(ValueError, match="one step"):
        transitions(still, replace(task, max_steps=1), 50)
    wide = NetworkPolicy(nn.Linear(12, 2), spaces.Discrete(2), stochastic=True)
    stacked = transitions(wide, replace(task, n_frames=3, layout="concat"), 50)
    assert stacked.obs.shape[1] == 12
    torch.testing.assert_close(stacked.obs[1, 4:8], stacked.obs[0, 8:])
    torch.testing.assert_close(stacked.obs[0, :4], stacked.obs[0, 8:])
    torch.testing.assert_close(stacked.next_obs[0], stacked.obs[1])


def test_q_solves_the_linear_equations_and_shuffled_successors_do_not() -> None:
    data = transitions(coin(), Task(Chain, max_steps=40), 3000, gamma=GAMMA)
    wrong = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    shuffled = replace(data, next_obs=data.next_obs[wrong], next_action=data.next_action[wrong])
    found = []
    for rows in (data, shuffled):
        with reseeded(0):
            critic = ActionValue(rows, discrete=True, hidden=32)
        objective = SarsaObjective(GAMMA, weight=0.0)
        fit(critic, rows.columns, objective, epochs=12, batch_size=64,
            optimiser=lambda p: torch.optim.Adam(p, lr=3e-3))  # fmt: skip
        found.append(np.abs(values(critic) - exact()).max())
    assert found[0] < 0.35
    assert found[1] > 3 * found[0]


def test_the_whole_fit_repeats_itself_and_leaves_the_generators_alone() -> None:
    victim, task, told = coin(), Task(Chain, max_steps=20), []
    before = torch.get_rng_state()
    kwargs: dict[str, Any] = {"n_steps": 300, "epochs": 2, "gamma": GAMMA, "batch_size": 64, "hidden": 8}
    one = fit_sarsa(victim, task, **kwargs, on_step=lambda what, *_: told.append(what))
    two = fit_sarsa(victim, task, **kwargs)
    assert np.array_equal(values(one), values(two))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(told) == {"playing", "fitting"}


def rows(n: int = 40, d: int = 3, k: int = 2) -> Transitions:
    drawn = torch.Generator().manual_seed(0)
    obs, action = torch.randn(n, d, generator=drawn), torch.randn(n, k, generator=drawn)
    reward = obs[:, 0]
    return Transitions(obs, action, reward, obs.roll(-1, 0), action.roll(-1, 0), torch.zeros(n).bool(), reward)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_deviation_bounds_every_change_and_is_pressed_down(discrete: bool) -> None:
    data = rows()
    data = replace(data, action=data.action.softmax(1)) if discrete else data
    spans = []
    for weight in (0.0, 1.0):
        with reseeded(0):
            critic = ActionValue(data, discrete=discrete, hidden=16)
        fit(critic, data.columns, SarsaObjective(0.5, weight=weight, radius=0.1), epochs=20, batch_size=20)
        bound = deviation(critic, IntervalBounds(critic.body, Linf(0.1, domain=None)), data.obs, data.action)
        base, drawn = critic.inputs(data.obs, data.action), torch.Generator().manual_seed(1)
        for _ in range(50):
            moved = base + 0.1 * (2 * torch.rand(base.shape, generator=drawn) - 1)
            change = critic.chosen(critic.body(moved) - critic.body(base), data.action).abs()
            assert bool((change <= bound + 1e-5).all())
        spans.append(float(bound.detach().mean()))
    assert spans[1] < 0.8 * spans[0]


def view_of(policy: NetworkPolicy, obs: Tensor, budget: StepBudget) -> View:
    n = len(obs)
    return View(
        policy=policy, obs=obs, frames=obs[:, None], task=Task("CartPole-v1"), budget=budget, seed=1, sigma=0.0,
        memory=None, spent=torch.zeros(n, dtype=torch.float64), step=torch.zeros(n, dtype=torch.int64),
        episodes=torch.arange(n), start=torch.ones(n, dtype=torch.bool), store={}, lanes=torch.arange(n), n_lanes=n,
    )  # fmt: skip


def with_body(critic: ActionValue, weight: Tensor) -> ActionValue:
    critic.body = nn.Sequential(nn.Linear(weight.shape[1], len(weight)))
    with torch.no_grad():
        critic.body[0].weight.copy_(weight)  # pyright: ignore
    return critic


def test_a_linear_value_of_a_linear_policy_is_descended_to_the_corner() -> None:
    net, budget = nn.Linear(3, 2), StepBudget(Linf(0.2, domain=None))
    policy = NetworkPolicy(net, spaces.Box(-100, 100, (2,), np.float32))
    critic = with_body(ActionValue(rows(), discrete=False), torch.tensor([[5.0, -3.0, 4.0, 1.0, -2.0]]))
    obs = torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    seen = RobustSarsa(budget, critic, n_iter=20).perturb(view_of(policy, obs, budget))
    downhill = -torch.sign(torch.tensor([1.0, -2.0]) @ net.weight.detach())
    torch.testing.assert_close(seen, obs + 0.2 * downhill, atol=1e-5, rtol=0)


def test_the_value_is_that_of_the_true_state() -> None:
    """A Q that heeds the state alone gives no direction: what is shown does not move the true state."""
    budget = StepBudget(Linf(0.2, domain=None))
    policy = NetworkPolicy(nn.Linear(3, 2), spaces.Box(-100, 100, (2,), np.float32))
    critic = with_body(ActionValue(rows(), discrete=False), torch.tensor([[5.0, -3.0, 4.0, 0.0, 0.0]]))
    view = view_of(policy, torch.randn(10, 3), budget)
    start = budget.threat.random_start(view.obs, view.streams("start"), draw=view.step)
    torch.testing.assert_close(RobustSarsa(budget, critic).perturb(view), start)


def test_the_mixture_ends_in_the_action_difference() -> None:
    budget = StepBudget(Linf(0.2, domain=None))
    policy = NetworkPolicy(nn.Linear(3, 2), spaces.Box(-100, 100, (2,), np.float32))
    critic, view = ActionValue(rows(), discrete=False), view_of(policy, torch.randn(10, 3), budget)
    mad = MaximalActionDifference(budget).perturb(view)
    assert torch.equal(RobustSarsa(budget, critic, 0.0).perturb(view), mad)
    half = RobustSarsa(budget, critic, 0.5).perturb(view)
    assert not torch.equal(half, mad)


def test_a_planted_weakness_is_found() -> None:
    push = torch.tensor([2.0, 0.2, 1.0, 1.0])
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(4 * torch.stack([-push, push]))
        net.bias.zero_()
    task, budget = Task("CartPole-v1", max_steps=100), StepBudget(Linf(0.1, domain=None))
    policy = NetworkPolicy(net, spaces.Discrete(2), stochastic=True)
    critic = fit_sarsa(policy, task, n_steps=2000, epochs=15, batch_size=64)
    random = collect(policy, task, 20, attack=RandomNoise(budget))
    for weight in (1.0, 0.5):
        found = collect(policy, task, 20, attack=RobustSarsa(budget, critic, weight, n_iter=5))
        assert found.mean < random.mean - 10
        assert found.spent.max() <= 0.1


def test_what_is_wrong_is_named() -> None:
    budget, critic = StepBudget(Linf(0.1, domain=None)), ActionValue(rows(), discrete=False)
    with pytest.raises(ValueError, match="mixing_weight"):
        RobustSarsa(budget, critic, 1.5)
    with pytest.raises(TypeError, match="fit_sarsa"):
        RobustSarsa(budget, nn.Linear(3, 1))  # pyright: ignore[reportArgumentType]
    policy = NetworkPolicy(nn.Linear(4, 2), spaces.Discrete(2))
    with pytest.raises(ValueError, match="fit it on this victim"):
        RobustSarsa(budget, critic).perturb(view_of(policy, torch.randn(2, 4), budget))
    with pytest.raises(TypeError, match="ActionValue"):
        SarsaObjective()(nn.Linear(3, 1), rows().columns)
    with pytest.raises(ValueError, match="weight"):
        SarsaObjective(weight=-1.0)
    other = ActionValue(replace(rows(), obs=rows().obs + 1), discrete=False)
    assert repr(RobustSarsa(budget, critic)) != repr(RobustSarsa(budget, other))
