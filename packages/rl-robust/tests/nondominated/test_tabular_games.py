"""Small games exactly: a slow reference, discovery that ends, mixtures, redundancy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_robust.nondominated.tabular import TabularGame, discover, gap, mixed_gap, prune, random_game


def slow_return(game: TabularGame, policy: np.ndarray, attacker: np.ndarray) -> float:
    """Push the distribution of states forward, step by step."""
    here, total = game.start.copy(), 0.0
    for _ in range(game.horizon):
        ahead = np.zeros_like(here)
        for state, weight in enumerate(here):
            action = policy[attacker[state]]
            total += weight * game.reward[state, action]
            ahead += weight * game.transition[state, action]
        here = ahead
    return total


@pytest.mark.quick
def test_payoff_is_that_of_a_slow_reference() -> None:
    game = random_game(7, n_states=3, n_actions=2, horizon=4)
    payoff = game.payoff()
    assert payoff.shape == (8, 8)
    for p, policy in enumerate(game.policies):
        for n, attacker in enumerate(game.attackers):
            assert payoff[p, n] == pytest.approx(slow_return(game, policy, attacker), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_discovery_ends_at_no_gap_and_the_envelope_is_whole(seed: int) -> None:
    payoff = random_game(seed).payoff()
    found = discover(payoff)
    assert np.all(np.diff(found.gaps) <= 1e-12)
    assert found.gaps[-1] == pytest.approx(0, abs=1e-9)
    assert payoff[list(found.chosen)].max(0) == pytest.approx(payoff.max(0), abs=1e-9)
    kept = prune(payoff, found.chosen)
    assert gap(payoff, kept)[0] == pytest.approx(0, abs=1e-9)
    for policy in kept if len(kept) > 1 else ():
        assert gap(payoff, [p for p in kept if p != policy])[0] > 1e-9, "what is left is needed"


def test_the_compromise_is_missed_by_pure_attackers_and_found_by_mixed_ones() -> None:
    """Two specialists hold every pure attacker's best answer; against both by turns the third is better."""
    payoff = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]])
    assert gap(payoff, [0, 1])[0] == 0.0
    value, policy, mixture = mixed_gap(payoff, [0, 1])
    assert (value, policy) == (pytest.approx(0.3), 2)
    assert mixture == pytest.approx([0.5, 0.5])
    assert set(discover(payoff, 0, attackers="mixed").chosen) == {0, 1, 2}
    assert mixed_gap(payoff, [0, 1, 2])[0] == 0.0


def test_the_mixed_gap_is_the_dual_value() -> None:
    """max over mixtures of attackers = max_pi min over mixtures of the set of the worst attacker's loss."""
    payoff = random_game(3, n_states=3, n_actions=2).payoff()
    chosen = discover(payoff).chosen[:2]
    value, policy, mixture = mixed_gap(payoff, chosen)
    attained = float(payoff[policy] @ mixture - (payoff[list(chosen)] @ mixture).max())
    assert value == pytest.approx(attained, abs=1e-9)
    assert value >= gap(payoff, chosen)[0] - 1e-9
    weights = np.linspace(0, 1, 2001)
    mixed = weights[:, None] * payoff[chosen[0]] + (1 - weights)[:, None] * payoff[chosen[1]]
    dual = (payoff[:, None] - mixed[None]).max(2).min(1).max()
    assert value == pytest.approx(dual, abs=2e-3)


def test_duplicates_are_redundant_and_delta_stops_early() -> None:
    payoff = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    assert prune(payoff, [0, 1, 2]) == (1, 2)
    assert prune(payoff, [0, 1, 2], delta=0.5) in {(1,), (0,)}
    assert discover(payoff, 0, delta=0.6).chosen == (0,)
    assert discover(payoff, 0).chosen == (0, 2)
    assert discover(payoff, 0, max_policies=1).gaps == (0.5,)


def test_bad_input_is_refused() -> None:
    game = random_game(0)
    with pytest.raises(ValueError, match="chosen"):
        gap(game.payoff(), [])
    with pytest.raises(ValueError, match="payoff"):
        gap(np.full((2, 2), np.nan), [0])
    with pytest.raises(ValueError, match="transition"):
        TabularGame(game.transition[:, :, :2], game.reward, game.start, game.shown, 3)
    with pytest.raises(ValueError, match="shown"):
        TabularGame(game.transition, game.reward, game.start, game.shown[:2], 3)
    with pytest.raises(ValueError, match="enumerate"):
        random_game(0, n_states=12).payoff()
    with pytest.raises(ValueError, match="attackers"):
        discover(game.payoff(), attackers="both")  # pyright: ignore[reportArgumentType]
