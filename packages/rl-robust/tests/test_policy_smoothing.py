"""Certificates of smoothed policies: closed forms, adaptive spenders that cannot break them, coverage, loose ends."""

import math
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rl_robust.smoothing import (
    NoisyObservation,
    SmoothedPolicy,
    VectorNoisyObservation,
    adaptive_bound,
    certify_return,
)
from rl_robust.task import Task


@pytest.mark.quick
def test_the_bound_is_the_papers_and_is_attained_by_half_spaces() -> None:
    steps, sigma, eps, level = 10, 0.5, 0.4, 0.3
    p = stats.norm.cdf(level / sigma)
    bound = float(adaptive_bound(p, eps, sigma))
    assert p == pytest.approx(0.7257, abs=1e-4)
    assert bound == pytest.approx(0.4207, abs=1e-4)
    assert bound <= stats.norm.cdf(stats.norm.ppf(p) - eps / sigma)
    rng = np.random.default_rng(0)
    noise = sigma * rng.standard_normal((400_000, steps))
    even = ((noise + eps / math.sqrt(steps)).sum(1) / math.sqrt(steps) < level).mean()
    late = (((noise.sum(1) + eps) / math.sqrt(steps)) < level).mean()
    assert even == pytest.approx(bound, abs=0.003), "spread evenly, the attack attains the bound"
    assert late > bound + 0.1


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10_000), greed=st.floats(0.1, 3.0), eps=st.floats(0.05, 1.0))
def test_no_adaptive_spender_breaks_it(seed: int, greed: float, eps: float) -> None:
    """An attacker who sees the sums so far and re-times its spending stays above the bound."""
    rng = np.random.default_rng(seed)
    n, steps, sigma = 20_000, 8, 0.5
    level = rng.normal() * sigma
    total, left = np.zeros(n), np.full(n, eps**2)
    for t in range(steps):
        gap = level - total / math.sqrt(steps)
        wish = greed * np.maximum(gap, 0) * rng.random() + eps / math.sqrt(steps) * (rng.random() < 0.5)
        spend = np.minimum(wish, np.sqrt(left)) if t < steps - 1 else np.sqrt(left)
        left = np.maximum(left - spend**2, 0.0)
        total += spend + sigma * rng.standard_normal(n)
    attacked = (total / math.sqrt(steps) < level).mean()
    bound = float(adaptive_bound(stats.norm.cdf(level / sigma), eps, sigma))
    assert attacked >= bound - 4 * math.sqrt(max(bound * (1 - bound), 1e-4) / n)


def laws() -> dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float, float]]:
    return {
        "won or lost": (lambda r, n: (r.random(n) < 0.7).astype(float), 0.7, 0.0),
        "geometric": (lambda r, n: np.minimum(r.geometric(0.2, n), 30).astype(float), _mean_geometric(), 0.0),
        "negative": (lambda r, n: -5 + 3 * r.random(n), -3.5, -5.0),
    }


def _mean_geometric() -> float:
    return sum(0.8 ** (k - 1) for k in range(1, 31))


@pytest.mark.parametrize("name", list(laws()))
@pytest.mark.parametrize("method", ["dkw", "clopper-pearson"])
def test_the_certificate_covers_the_mean(name: str, method: str) -> None:
    draw, truth, lower = laws()[name]
    rng = np.random.default_rng(5)
    grid = {"won or lost": [1.0], "geometric": list(range(1, 31)), "negative": list(np.linspace(-4.9, -2, 30))}[name]
    points = None if method == "dkw" else grid
    runs = 1000
    failed = 0
    for _ in range(runs):
        found = certify_return(
            draw(rng, 200), sigma=1.0, eps=[0.0, 0.3], lower=lower, alpha=0.1, method=method, thresholds=points
        )  # pyright: ignore[reportArgumentType, reportCallIssue]
        failed += int(found.expected_return[0] > truth)
    assert failed <= stats.binom.ppf(0.999, runs, 0.1)


def test_the_curve_behaves() -> None:
    rng = np.random.default_rng(1)
    sample = rng.integers(0, 201, 2000).astype(float)
    eps = np.linspace(0, 1, 11)
    found = certify_return(sample, sigma=0.2, eps=eps, lower=0.0)
    assert np.all(np.diff(found.expected_return) < 0)
    assert found.expected_return[0] <= sample.mean()
    near = certify_return(sample, sigma=0.2, eps=[0.0, 1e-9], lower=0.0).expected_return
    assert near[0] - near[1] < 1e-5
    larger = certify_return(np.tile(sample, 5), sigma=0.2, eps=eps, lower=0.0)
    assert np.all(larger.expected_return >= found.expected_return)
    surer = certify_return(sample, sigma=0.2, eps=eps, lower=0.0, alpha=0.01)
    assert np.all(surer.expected_return <= found.expected_return)
    moved = certify_return(3 * sample - 7, sigma=0.2, eps=eps, lower=-7.0)
    np.testing.assert_allclose(moved.expected_return, 3 * found.expected_return - 7, rtol=1e-10)
    assert np.all(found.probability(150.0) <= found.probability(50.0))
    assert np.all(found.probability(0.0) == 1)
    assert np.all(found.probability(1e9) == 0)


def test_negative_returns_lose_when_they_are_attacked() -> None:
    """An integral from 0 would raise a negative return by attacking it."""
    sample = -np.random.default_rng(0).random(1000)
    found = certify_return(sample, sigma=1.0, eps=[0, 1, 50], lower=-1.0)
    assert np.all(np.diff(found.expected_return) < 0)
    assert found.expected_return[-1] == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": []}, "at least 1"),
        ({"returns": [1.0, np.nan]}, "NaN"),
        ({"lower": 0.5}, "outside lower"),
        ({"upper": 0.9}, "outside lower"),
        ({"alpha": 0.6}, "alpha"),
        ({"alpha": 0.0}, "alpha"),
        ({"eps": [-0.1]}, "eps"),
        ({"sigma": 0.0}, "sigma"),
        ({"method": "hope"}, "method"),
        ({"method": "clopper-pearson"}, "thresholds"),
        ({"method": "clopper-pearson", "thresholds": [2.0, 1.0]}, "increasing"),
        ({"thresholds": [1.0]}, "leave them out"),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str) -> None:
    arguments = {"returns": [0.0, 1.0], "sigma": 0.5, "eps": [0.1], "lower": 0.0, **change}
    with pytest.raises(ValueError, match=message):
        certify_return(arguments.pop("returns"), **arguments)


def test_training_noise_is_normal_fresh_and_not_in_bytes() -> None:
    class Bytes(gym.Env):
        observation_space = spaces.Box(0, 255, (50, 40), np.uint8)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            return np.full((50, 40), 250, np.uint8), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.full((50, 40), 250, np.uint8), 0.0, False, False, {}

    env = NoisyObservation(Bytes(), 0.1, scale=1 / 255)
    first, _ = env.reset()
    second, *_ = env.step(0)
    assert env.observation_space.contains(first)
    noise = np.concatenate([first, second]) - np.float32(250 / 255)
    assert stats.kstest(noise.ravel() / 0.1, "norm").pvalue > 0.01
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    again, _ = NoisyObservation(Bytes(), 0.1, scale=1 / 255).reset()
    np.testing.assert_array_equal(again, first)
    lanes = VectorNoisyObservation(gym.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point"), 0.5)
    shown, _ = lanes.reset(seed=0)
    assert lanes.observation_space.contains(shown)
    assert np.abs(shown).max() > 0.06, "raw CartPole begins within 0.05"
    with pytest.raises(ValueError, match="sigma"):
        NoisyObservation(Bytes(), -1.0)
    with pytest.raises(ValueError, match="Box"):
        NoisyObservation(gym.make("FrozenLake-v1"), 1.0)


def test_a_deployed_policy_keeps_its_noise_secret() -> None:
    shown: list[np.ndarray] = []

    def act(obs: np.ndarray) -> np.ndarray:
        shown.append(obs)
        return np.zeros(len(obs), np.int64)

    task = Task("CartPole-v1", n_frames=3)
    raw = np.zeros((2, 4))
    for _ in range(2):
        policy = SmoothedPolicy(act, task, 0.3, lanes=2)
        policy.reset()
        policy(raw)
        policy.reset([True, False])
        policy(raw)
    assert shown[0].shape == (2, 3, 4)
    assert not np.array_equal(shown[0], shown[2]), "two services share their noise"
    np.testing.assert_array_equal(shown[0][0, 0], shown[0][0, 2])
    np.testing.assert_array_equal(shown[1][1, 1], shown[0][1, 2])
    np.testing.assert_array_equal(shown[1][0, 0], shown[1][0, 2])
    with pytest.raises(ValueError, match="lanes"):
        policy(np.zeros((3, 4)))
