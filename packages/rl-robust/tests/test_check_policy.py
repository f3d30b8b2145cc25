"""Each mistake that is planted is told by name; what is right is left alone."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor, nn

from rl_robust.check import PolicyCheck, check_policy
from rl_robust.policy import NetworkPolicy
from rl_robust.task import Normaliser, Task
from robust_core.random import reseeded

POLE = Task("CartPole-v1", max_steps=20)
TWO = spaces.Discrete(2)


def net(*modules: nn.Module, seed: int = 0) -> NetworkPolicy:
    torch.manual_seed(seed)
    return NetworkPolicy(nn.Sequential(*modules), TWO)


def linear(n: int = 4, k: int = 2) -> NetworkPolicy:
    with reseeded(0):
        return net(nn.Linear(n, k))


class Space(gym.Env):
    """Observations of any kind, drawn from the seed or not."""

    def __init__(self, space: spaces.Box, seeding: str = "good") -> None:
        self.observation_space, self.action_space, self.seeding = space, TWO, seeding
        self.wild = np.random.default_rng()

    def draw(self) -> np.ndarray:
        source = {"good": self.np_random, "wild": self.wild, "none": np.random.default_rng(0)}[self.seeding]
        box: Any = self.observation_space
        return (box.low + source.random(box.shape) * (box.high - box.low)).astype(box.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.draw(), 1.0, False, False, {}


def numbers(high: float = 1.0, seeding: str = "good") -> Task:
    return Task(Space, {"space": spaces.Box(-high, high, (4,), np.float32), "seeding": seeding}, max_steps=10)


def images(**more: Any) -> Task:
    return Task(Space, {"space": spaces.Box(0, 255, (1, 8, 8), np.uint8)}, max_steps=10, **more)


def names(report: PolicyCheck, level: str = "error") -> list[str]:
    return [finding.name for finding in report.findings if finding.level == level]


@pytest.mark.quick
def test_a_sound_policy_is_left_alone_and_as_it_was() -> None:
    policy = linear()
    before = torch.get_rng_state()
    report = check_policy(policy, POLE)
    assert report.ok
    assert not report.findings
    assert report.shown == (4,)
    assert torch.equal(torch.get_rng_state(), before)
    assert "nothing found" in str(report)
    assert check_policy(lambda obs: (obs[:, 2] > 0).astype(int), POLE).ok
    gauss = NetworkPolicy(nn.Linear(3, 1), spaces.Box(-2, 2, (1,), np.float32), spread=0.3)
    assert check_policy(gauss, Task("Pendulum-v1", max_steps=10)).ok


def test_a_stack_that_does_not_fit_is_told_with_the_one_that_does() -> None:
    report = check_policy(linear(16), POLE)
    assert names(report) == ["shape"]
    assert "Task(n_frames=4, layout='concat')" in str(report)
    assert names(check_policy(linear(4), Task("CartPole-v1", n_frames=4))) == ["shape"], "rows of a stack are no batch"
    assert "n_frames=1" in str(check_policy(linear(4), Task("CartPole-v1", n_frames=4)))


def test_the_spaces_of_policy_and_environment_must_agree() -> None:
    assert names(check_policy(NetworkPolicy(nn.Linear(4, 3), spaces.Discrete(3)), POLE)) == ["space"]
    assert names(check_policy(linear(4, 3), POLE)) == ["shape"], "three outputs for two actions"


def test_channels_last_are_told() -> None:
    box = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    conv = net(nn.Conv2d(3, 2, 8), nn.Flatten())
    report = check_policy(conv, Task(Space, {"space": box}, max_steps=10))
    assert names(report) == ["shape"]
    assert "channels first" in str(report)


def test_double_weights_are_told() -> None:
    report = check_policy(linear().double(), POLE)
    assert names(report) == ["dtype"]
    assert "policy.float()" in str(report)


def poisoned(x: Tensor) -> Tensor:
    return torch.where(x[:, :1] > 0, torch.nan, x[:, :2])


class Poison(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return poisoned(x)


@pytest.mark.parametrize(
    ("policy", "name", "message"),
    [
        (lambda obs: np.where(obs[:, 0] > 0, 2, 0), "action", "outside Discrete"),
        (lambda obs: (obs[:, 0] > 0).astype(np.float32), "dtype", "int64"),
        (lambda obs: obs[:3, 0] > 0, "shape", "3"),
        (Poison(), "finite", "NaN"),
    ],
)
def test_wrong_actions_are_told(policy: Callable, name: str, message: str) -> None:
    report = check_policy(policy, numbers())
    assert name in names(report)
    assert message in str(report)


def test_continuous_actions_must_be_finite_and_inside() -> None:
    task = Task("Pendulum-v1", max_steps=10)
    assert "action" in names(check_policy(lambda obs: np.full((len(obs), 1), 3.0), task))
    assert "action" in names(check_policy(lambda obs: np.full((len(obs), 1), np.nan), task))
    assert "action" in names(check_policy(lambda obs: np.zeros((len(obs), 2)), task))


@pytest.mark.quick
def test_batch_norm_in_train_mode_is_named_and_its_statistics_are_kept() -> None:
    policy = net(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    report = check_policy(policy, POLE)
    assert names(report) == ["batch"]
    assert "BatchNorm1d 'network.1' is in train mode" in str(report)
    assert policy.training
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert check_policy(policy.eval(), POLE).ok


def test_greedy_actions_that_are_drawn_are_told() -> None:
    policy = net(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2))
    report = check_policy(policy, POLE)
    assert names(report) == ["determinism"]
    assert "Dropout" in str(report)
    drawn = np.random.default_rng(0)
    assert names(check_policy(lambda obs: drawn.integers(0, 2, len(obs)), POLE)) == ["determinism"]


class Unheeding(NetworkPolicy):
    """Samples from a generator, whatever draws it is given."""

    def act(self, obs: Tensor, memory: Any = None, start: Any = None, *, draws: Tensor | None = None) -> Any:
        if draws is not None:
            draws = torch.rand_like(draws)
        return super().act(obs, memory, start, draws=draws)


def test_samples_that_do_not_heed_their_draws_are_told() -> None:
    report = check_policy(Unheeding(nn.Linear(4, 2), TWO, stochastic=True), POLE)
    assert names(report) == ["determinism"]
    assert "draws" in str(report)


def test_seeds_are_tried() -> None:
    wild = check_policy(linear(), numbers(seeding="wild"))
    assert names(wild) == ["seed"]
    none = check_policy(linear(), numbers(seeding="none"))
    assert none.ok
    assert names(none, "warning") == ["seed"]


def test_forgotten_statistics_are_a_warning() -> None:
    report = check_policy(linear(), numbers(high=500.0))
    assert report.ok
    assert names(report, "warning") == ["scale"]
    assert "VecNormalize" in str(report)
    assert not check_policy(linear(), numbers(high=500.0), bound=1000).findings
    flat = torch.zeros(4, dtype=torch.float64)
    right = Task(Space, numbers(500.0).kwargs, 10, normaliser=Normaliser(flat, flat + 500.0**2))
    assert not check_policy(linear(), right).findings
    wrong = Task(Space, numbers(500.0).kwargs, 10, normaliser=Normaliser(flat, flat + 1))
    assert "another task" in str(check_policy(linear(), wrong))
    short = Task(Space, numbers().kwargs, 10, normaliser=Normaliser(flat[:3], flat[:3] + 1))
    assert names(check_policy(linear(), short)) == ["observation"]


def test_pixels_divided_twice_are_told() -> None:
    env = Space(spaces.Box(0, 255, (1, 48, 48), np.uint8))
    task = Task(Space, {"space": env.observation_space}, max_steps=10)
    with reseeded(0):
        model = PPO("CnnPolicy", env, n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [8]})
    assert not check_policy(model, task, n_steps=4).findings
    twice = Task(Space, task.kwargs, 10, scale=1 / 255)
    report = check_policy(model, twice, n_steps=4)
    assert names(report) == ["pixels"]
    assert "divides by 255 again" in str(report)
    with reseeded(0):
        plain = PPO("CnnPolicy", env, n_steps=8, batch_size=8, device="cpu",
                    policy_kwargs={"net_arch": [8], "normalize_images": False})  # fmt: skip
    assert not check_policy(plain, twice, n_steps=4).findings
    assert names(check_policy(plain, task, n_steps=4), "warning") == ["scale"]


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) / 255)


def test_a_network_that_sees_only_black_is_a_warning() -> None:
    with reseeded(0):
        policy = NetworkPolicy(Divides(), TWO)
    assert not check_policy(policy, images()).findings
    report = check_policy(policy, images(scale=1 / 255))
    assert report.ok
    assert names(report, "warning") == ["pixels"]
    policy.network.forward = lambda x: policy.network.head(x.flatten(1))  # pyright: ignore
    assert not check_policy(policy, images(scale=1 / 255)).findings


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="Task"):
        check_policy(linear(), "CartPole-v1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n_steps"):
        check_policy(linear(), POLE, n_steps=1)
    with pytest.raises(ValueError, match="bound"):
        check_policy(linear(), POLE, bound=0)
