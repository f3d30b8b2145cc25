"""The episode engine: what an episode is does not depend on company, and no account can be overdrawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.ahead import NoiseAhead
from rl_robust.observation import Budget, EpisodeBudget, StepBudget, View
from rl_robust.policy import CallablePolicy, NetworkPolicy
from rl_robust.rollout import BLOCK, LANES, collect
from rl_robust.task import Normaliser, Task
from robust_core.random import SampleStreams
from robust_core.threats import Linf


class Corridor(gym.Env):
    """Half of the episodes end after one step with return 1, the others after twenty with return 20."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 20
        self.x = self.np_random.normal(size=2)
        return self.x.copy(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        self.x = 0.9 * self.x + 0.1 * (2 * action - 1) + 0.01 * self.np_random.normal(size=2)
        return self.x.copy(), 1.0, self.left == 0, False, {}


@dataclass(frozen=True)
class Greedy:
    """Proposes more than any budget allows, in directions of its own that it remembers."""

    budget: Budget

    def perturb(self, view: View) -> Tensor:
        drift = view.kept("drift", view.obs) + view.streams("push").normal(view.obs.shape[1:], chunk=view.step)
        view.keep("drift", drift)
        return view.obs + 10 * drift


def linear(n_frames: int = 1, *, stochastic: bool = False) -> NetworkPolicy:
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * n_frames, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.linspace(-2, 2, 4 * n_frames).reshape(2, -1))
        network[1].bias.zero_()
    return NetworkPolicy(network, spaces.Discrete(2), stochastic=stochastic)


@pytest.mark.quick
@pytest.mark.parametrize("budget", [EpisodeBudget(0.5), StepBudget(Linf(0.1, domain=None))])
def test_an_episode_does_not_depend_on_its_company(budget: Budget) -> None:
    task = Task(Corridor, n_frames=3)
    runs = [
        collect(linear(3, stochastic=True), task, 70, attack=Greedy(budget), sigma=0.3, stochastic=True, n_envs=n)
        for n in (1, 7, 64)
    ]
    for run in runs[1:]:
        for name in ("returns", "lengths", "spent", "episodes"):
            np.testing.assert_array_equal(getattr(run, name), getattr(runs[0], name))
    assert np.all(runs[0].spent <= budget.eps)
    assert runs[0].spent.max() > 0.999 * budget.eps
    tail = collect(linear(3, stochastic=True), task, 10, attack=Greedy(budget), sigma=0.3, stochastic=True, first=60)
    np.testing.assert_array_equal(tail.spent, runs[0].spent[60:])


@pytest.mark.parametrize("shape", [(3,), (90, 90)])
def test_noise_drawn_ahead_is_that_of_each_step(shape: tuple[int, ...]) -> None:
    """Lanes that begin, end and wait at different times, and company of any size."""
    rng, ahead = np.random.default_rng(0), NoiseAhead(3, "noise", 4, shape, torch.device("cpu"))
    episode, step = np.arange(4), np.zeros(4, dtype=np.int64)
    for _ in range(120 if len(shape) == 1 else 8):
        rows = np.flatnonzero(rng.random(4) < 0.8)
        found = ahead.take(rows, episode[rows], step[rows])
        streams = SampleStreams(3, torch.as_tensor(episode[rows]), "noise")
        assert torch.equal(found, streams.normal(shape, chunk=torch.as_tensor(step[rows])))
        step[rows] += 1
        over = rng.random(4) < 0.02
        episode[over], step[over] = episode[over] + 4, 0


def test_environments_serve_all_blocks_and_are_closed_in_the_end() -> None:
    Counted.made, Counted.closed = 0, 0
    whole = collect(linear(), Task(Counted), BLOCK + 20, n_envs=4, sigma=0.1)
    assert (Counted.made, Counted.closed) == (4, 4)
    np.testing.assert_array_equal(
        collect(linear(), Task(Counted), 20, sigma=0.1, first=BLOCK).returns, whole.returns[BLOCK:]
    )
    with pytest.raises(ValueError, match="acts in"):
        collect(NetworkPolicy(nn.Linear(2, 3), spaces.Discrete(3)), Task(Counted))
    assert Counted.made == Counted.closed


class Counted(Corridor):
    made = closed = 0

    def __init__(self) -> None:
        Counted.made += 1

    def close(self) -> None:
        Counted.closed += 1


def test_long_episodes_count_like_short_ones() -> None:
    sample = collect(linear(), Task(Corridor), 400, n_envs=16)
    assert set(sample.returns) == {1.0, 20.0}
    assert abs(sample.mean - 10.5) < 3 * sample.returns.std() / 20
    assert np.array_equal(sample.lengths, sample.returns.astype(int))
    discounted = collect(linear(), Task(Corridor, discount=0.5), 40)
    np.testing.assert_allclose(np.unique(discounted.returns), [1.0, 2 - 2.0**-19])


def test_noise_and_attack_touch_each_raw_frame_once() -> None:
    shown: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shown.append(x[:1].clone())
            return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1)

    policy = NetworkPolicy(Watch(), spaces.Discrete(2))
    task = Task(Corridor, n_frames=4)
    sample = collect(policy, task, 1, first=1, sigma=0.5, attack=Greedy(EpisodeBudget(1.0)), trace=(1,))
    trace = sample.traces[0]
    assert len(trace.obs) == sample.lengths[0] == len(shown)
    for t, frames in enumerate(shown):
        wanted = [trace.seen[max(0, t - k)] for k in (3, 2, 1, 0)]
        np.testing.assert_array_equal(frames[0].numpy(), np.stack(wanted))
    assert np.sqrt((trace.distance**2).sum()) == pytest.approx(sample.spent[0])
    assert trace.reward.sum() == sample.returns[0]


def test_a_vectorised_environment_plays_like_separate_ones() -> None:
    def policy() -> NetworkPolicy:
        net = nn.Linear(4, 2)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[0.0, 0, -1, -1], [0.0, 0, 1, 1]]))
            net.bias.zero_()
        return NetworkPolicy(net, spaces.Discrete(2))

    own = collect(policy(), Task("CartPole-v1", max_steps=60), LANES + 20, sigma=0.2)
    apart = collect(policy(), Task(CartPole, max_steps=60), 200, sigma=0.2)
    error = np.hypot(own.returns.std() / np.sqrt(len(own)), apart.returns.std() / np.sqrt(len(apart)))
    assert abs(own.mean - apart.mean) < 4 * error
    part = collect(policy(), Task("CartPole-v1", max_steps=60), 30, sigma=0.2, first=LANES - 10, n_envs=3)
    np.testing.assert_array_equal(part.returns, own.returns[LANES - 10 : LANES + 20])
    assert own.truncated.any()
    assert np.array_equal(own.truncated, own.lengths == 60) or not own.truncated.all()


class CartPole(gym.Wrapper):
    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1").unwrapped)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    task, done = Task(Corridor), []

    def stop(episodes: int, total: int) -> None:
        done.append(episodes)
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(linear(), task, 150, sigma=0.1, checkpoint=tmp_path, on_step=stop)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert files
    resumed = collect(linear(), task, 150, sigma=0.1, checkpoint=tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    np.testing.assert_array_equal(resumed.returns, collect(linear(), task, 150, sigma=0.1).returns)
    other = collect(linear(), task, 150, sigma=0.2, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len({p.name.split("-")[1] for p in tmp_path.iterdir()})
    assert len(other) == 150


def test_the_frozen_normaliser_stands_before_attack_and_noise(tmp_path: Path) -> None:
    normaliser = Normaliser(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.25]), clip=0.5)
    normaliser.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    assert loaded.sha256 == normaliser.sha256
    raw = np.array([[1.0, 2.0], [3.0, 2.1], [-50.0, 50.0]])
    obs = Task(Corridor, normaliser=loaded).observe(raw)
    torch.testing.assert_close(obs, torch.tensor([[0.0, 0.0], [0.5, 0.2], [-0.5, 0.5]]))
    with pytest.raises(ValueError, match="var"):
        Normaliser(torch.zeros(2), -torch.ones(2))


class Faulty(Corridor):
    def __init__(self, fault: str = "nan") -> None:
        self.fault = fault

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, *rest = super().step(action)
        return (obs * np.nan, reward, *rest) if self.fault == "nan" else (obs, np.inf, *rest)


class Overdraw(Greedy):
    def perturb(self, view: View) -> Tensor:
        return view.obs * torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collect(linear(), Task(Faulty), 5), "observation that is not finite"),
        (lambda: collect(linear(), Task(Faulty, {"fault": "reward"}), 5), "reward that is not finite"),
        (lambda: collect(lambda o: np.full(len(o), 7), Task(Corridor), 5), r"outside Discrete\(2\)"),
        (lambda: collect(lambda o: np.zeros(1), Task(Corridor), 5), "action each is needed"),
        (lambda: collect(linear(), Task("MountainCar-v0"), 5), "acts in"),
        (lambda: collect(linear(), Task("NoSuchThing-v0"), 5), "NoSuchThing"),
        (lambda: collect(linear(), Task("FrozenLake-v1"), 5), "Box of numbers"),
        (lambda: collect(linear(), Task(Corridor), 0), "n_episodes"),
        (lambda: collect(linear(), Task(Corridor), 5, sigma=-1), "sigma"),
        (lambda: collect(linear(), Task(Corridor), 5, attack=Overdraw(EpisodeBudget(1.0))), "not finite"),
        (lambda: Task(Corridor, n_frames=0), "n_frames"),
        (lambda: Task(Corridor, layout="sideways"), "layout"),  # pyright: ignore[reportArgumentType]
        (lambda: EpisodeBudget(-1.0), "eps"),
    ],
)
def test_what_is_wrong_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        call()


def test_callables_act() -> None:
    policy = CallablePolicy(lambda o: (o.sum(1) > 0).astype(np.int64), spaces.Discrete(2))
    assert len(collect(policy, Task(Corridor), 5)) == 5
    with pytest.raises(TypeError, match="callable"):
        CallablePolicy(3, spaces.Discrete(2))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.7])
def test_the_episode_budget_is_never_overdrawn(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    budget, spent = EpisodeBudget(eps), torch.zeros(500, dtype=torch.float64)
    obs = 100 * torch.randn(500, 3, generator=generator)
    total = torch.zeros(500, dtype=torch.float64)
    for _ in range(30):
        wish = obs + torch.randn(500, 3, generator=generator) * eps
        seen = budget.project(wish, obs, spent)
        total += (seen.double() - obs.double()).square().sum(1)
        spent = budget.account(seen, obs, spent)
    assert bool((total.sqrt() <= eps).all())
    torch.testing.assert_close(spent, total.sqrt())


@dataclass(frozen=True, repr=False)
class Learned(Greedy):
    """An attack with weights, which its ``repr`` does not show."""

    net: nn.Module

    def perturb(self, view: View) -> Tensor:
        return self.net(view.obs)


def test_finished_blocks_are_known_by_weights_and_statistics(tmp_path: Path) -> None:
    nets = [nn.Linear(2, 2) for _ in range(2)]
    with torch.no_grad():
        for scale, net in enumerate(nets):
            net.weight.copy_(torch.eye(2))
            net.bias.fill_(float(scale))
    attacks = [Learned(EpisodeBudget(3.0), net) for net in nets]
    runs = [collect(linear(), Task(Corridor), 20, attack=attack, checkpoint=tmp_path) for attack in attacks]
    assert runs[0].spent.max() == 0
    assert runs[1].spent.max() > 1
    with pytest.raises(ValueError, match="no weights"):
        collect(lambda obs: np.zeros(len(obs), np.int64), Task(Corridor), 5, checkpoint=tmp_path)
