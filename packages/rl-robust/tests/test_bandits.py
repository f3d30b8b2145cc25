"""The bandit: hand-computed steps, a regret bound that holds, long runs, bad input."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_robust.bandits import Exp3IX, RewardRangeError
from rl_robust.nondominated.adaptive import replay


@pytest.mark.quick
def test_two_rounds_by_hand() -> None:
    bandit = Exp3IX(2, 100, reward_range=(0.0, 10.0), scale=1.0, generator=3)
    eta = math.sqrt(math.log(2) / 200)
    assert bandit.probabilities() == pytest.approx([0.5, 0.5])
    bandit.update(0, 4.0)
    first = 0.6 / (0.5 + eta / 2)
    p = math.exp(-eta * first) / (math.exp(-eta * first) + 1)
    assert bandit.probabilities() == pytest.approx([p, 1 - p], rel=1e-12)
    bandit.update(1, 10.0)
    assert bandit.totals == pytest.approx([first, 0.0]), "a full reward is no loss"
    gain = Exp3IX(2, 100, reward_range=(0.0, 10.0), scale=1.0, gain=True)
    gain.update(0, 4.0)
    assert gain.totals == pytest.approx([0.4 / (0.5 + eta / 2), 0.0])
    assert gain.probabilities()[0] > 0.5


def test_the_anytime_rate_falls_and_choices_follow_the_probabilities() -> None:
    bandit = Exp3IX(3, reward_range=(0.0, 1.0), scale=1.0)
    assert bandit.rate() == pytest.approx(math.sqrt(math.log(3) / 3))
    counts = np.zeros(3)
    for seed in range(3000):
        fresh = Exp3IX(3, 10, reward_range=(0.0, 1.0), generator=seed)
        fresh.totals[:] = [0.0, 2.0, 5.0]
        counts[fresh.select()] += 1
    fresh = Exp3IX(3, 10, reward_range=(0.0, 1.0))
    fresh.totals[:] = [0.0, 2.0, 5.0]
    assert counts / 3000 == pytest.approx(fresh.probabilities(), abs=0.03)
    bandit.rounds = 99
    assert bandit.rate() == pytest.approx(math.sqrt(math.log(3) / 300))


@pytest.mark.parametrize("horizon", [600, None])
def test_regret_stays_below_the_bound(horizon: int | None) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        half = np.where(np.arange(600) < 300, 0, 1)
        returns = np.clip(rng.random((4, 600)) * 0.4 + np.eye(4)[:, half] * 0.6, 0, 1)
        bandit = Exp3IX(4, horizon, reward_range=(0.0, 1.0), generator=seed)
        found = replay(bandit, returns)
        assert found.regret is not None
        assert found.regret[-1] <= bandit.regret_bound(600, alpha=0.05)


def test_the_bound_is_the_known_one_at_the_best_scale() -> None:
    """With eta = 2 gamma = sqrt(2 ln K / (K T)): 2 sqrt(2 K T ln K) + (1 + sqrt(K T / (2 ln K))) ln(2 / alpha)."""
    k, t, alpha = 5, 10_000_000, 0.1
    bandit = Exp3IX(k, t, reward_range=(0.0, 2.0), scale=math.sqrt(2))
    want = 2 * math.sqrt(2 * k * t * math.log(k)) + (1 + math.sqrt(k * t / (2 * math.log(k)))) * math.log(2 / alpha)
    assert bandit.regret_bound(t, alpha=alpha) == pytest.approx(2.0 * want, rel=1e-9)


def test_long_runs_stay_finite_and_uniform_play_is_beaten() -> None:
    bandit = Exp3IX(3, 500, reward_range=(0.0, 1.0), scale=5.0)
    bandit.totals[:] = [1e9, 0.0, 2e9]
    assert bandit.probabilities() == pytest.approx([0.0, 1.0, 0.0])
    regrets = []
    for seed in range(5):
        returns = np.array([[0.9], [0.5], [0.3]]) + 0.05 * np.random.default_rng(seed).standard_normal((3, 1500))
        found = replay(Exp3IX(3, 1500, reward_range=(0.0, 1.0), generator=seed), returns)
        assert found.regret is not None
        regrets.append(found.regret[-1] / 1500)
    assert np.mean(regrets) < 0.35 * (0.9 - 0.5667)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(rewards=st.lists(st.floats(-50, 50), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_it_goes_on_from_a_file_and_counts_what_it_clips(rewards: list[float], seed: int) -> None:
    bandit = Exp3IX(4, reward_range=(-10.0, 10.0), generator=seed)
    for reward in rewards:
        bandit.update(bandit.select(), reward)
    assert bandit.clipped == sum(abs(r) > 10 for r in rewards)
    again = Exp3IX(4, reward_range=(-10.0, 10.0))
    again.load_state_dict(json.loads(json.dumps(bandit.state_dict())))
    assert again.select() == bandit.select()
    assert np.array_equal(again.probabilities(), bandit.probabilities())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="reward_range"):
        Exp3IX(2, reward_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="n_arms"):
        Exp3IX(0, reward_range=(0.0, 1.0))
    bandit = Exp3IX(2, reward_range=(0.0, 1.0), on_clip="raise")
    with pytest.raises(RewardRangeError, match="outside"):
        bandit.update(0, 1.5)
    with pytest.raises(ValueError, match="arm"):
        bandit.update(2, 0.5)
    with pytest.raises(ValueError, match="reward"):
        bandit.update(0, math.nan)
    with pytest.raises(ValueError, match="totals"):
        bandit.load_state_dict({"totals": [0.0], "rounds": 0, "clipped": 0, "seed": 0})
    with pytest.raises(TypeError, match="gain"):
        Exp3IX(2, reward_range=(0.0, 1.0), gain=True).regret_bound(5)
