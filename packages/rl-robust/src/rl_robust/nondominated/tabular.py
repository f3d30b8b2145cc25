"""Non-dominated policies, exactly: small state-adversarial decision processes solved by enumeration.

The environment is in a true state; the attacker shows one of the states allowed there; the policy sees that one only.
With ``J`` the (policies x attackers) matrix of expected returns,

- :func:`gap`: ``max_nu (max_pi J(pi, nu) - max_{pi' in set} J(pi', nu))``, over attackers that do not mix;
- :func:`mixed_gap`: the same over all mixtures of attackers, by one linear programme for each policy. By duality it is
  ``max_pi min_omega max_nu [J(pi, nu) - sum_i omega_i J(pi_i, nu)]``: zero if and only if every policy is dominated by
  a mixture of the set. **This one bounds regret when attackers change**: the best policy in hindsight faces their
  average. A set can hold the best answer to each attacker (``gap`` 0) and still miss the compromise that is best
  against both by turns;
- :func:`discover`: adds the policy that attains the gap until it is at most ``delta``. It ends: each policy added was
  missing, and there are finitely many. (Bounds on how many are needed: section 4 of the paper, not reproduced.)

Liu, Deng, Sun, Liang and Huang 2024 (arXiv 2402.12673), sections 3 and 4. The wording of the decomposition of regret,
and the remark on mixtures, are derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.optimize import linprog

from robust_core.checks import check_choice, check_count, check_number

__all__ = ["Discovered", "TabularGame", "discover", "gap", "mixed_gap", "prune", "random_game"]

_TINY = 1e-9
_MAX_CELLS = 20_000_000


@dataclass(frozen=True)
class TabularGame:
    """A finite state-adversarial Markov decision process.

    Attributes:
        transition: (S, A, S) probabilities.
        reward: (S, A).
        start: (S,) probabilities.
        shown: for each state, the states that may be shown instead (itself included, or not).
        horizon: steps of an episode.
    """

    transition: np.ndarray
    reward: np.ndarray
    start: np.ndarray
    shown: tuple[tuple[int, ...], ...]
    horizon: int

    def __post_init__(self) -> None:
        n_states, n_actions = self.reward.shape
        if self.transition.shape != (n_states, n_actions, n_states) or self.start.shape != (n_states,):
            raise ValueError(
                f"transition {self.transition.shape}, reward {self.reward.shape}, start {self.start.shape}: "
                "(S, A, S), (S, A) and (S,) are needed"
            )
        for name, rows in (("transition", self.transition), ("start", self.start)):
            if (rows < 0).any() or not np.allclose(rows.sum(-1), 1.0, atol=1e-9):
                raise ValueError(f"{name}: probabilities that add to 1 are needed")
        if not np.isfinite(self.reward).all():
            raise ValueError("reward: finite numbers are needed")
        if len(self.shown) != n_states or any(not s or not all(0 <= v < n_states for v in s) for s in self.shown):
            raise ValueError(f"shown={self.shown!r}: for each of {n_states} states the states that may be shown")
        check_count("horizon", self.horizon)

    @property
    def policies(self) -> np.ndarray:
        """(P, S) int64: every deterministic policy, the action for each shown state."""
        n_states, n_actions = self.reward.shape
        return np.array(list(product(range(n_actions), repeat=n_states)))

    @property
    def attackers(self) -> np.ndarray:
        """(N, S) int64: every deterministic attacker, the state shown for each true one."""
        return np.array(list(product(*self.shown)))

    def payoff(self) -> np.ndarray:
        """Return (P, N) expected returns of every policy against every attacker.

        Raises:
            ValueError: too many of them to enumerate.
        """
        n_states, n_actions = self.reward.shape
        cells = float(n_actions) ** n_states * float(np.prod([float(len(s)) for s in self.shown])) * n_states
        if cells > _MAX_CELLS:
            raise ValueError(f"{cells:.0f} values to enumerate, {_MAX_CELLS} are allowed; take a smaller game")
        acts = self.policies[:, self.attackers]  # (P, N, S): pi(nu(s))
        states = np.arange(n_states)
        reward, value = self.reward[states, acts], np.zeros(acts.shape)
        moved = self.transition[states, acts]
        for _ in range(self.horizon):
            value = reward + np.einsum("pnst,pnt->pns", moved, value)
        return value @ self.start


def random_game(
    seed: int, *, n_states: int = 5, n_actions: int = 3, horizon: int = 5, concentration: float = 0.3
) -> TabularGame:
    """Return a random game in which each state may be shown as itself or as its successor in a ring."""
    check_count("n_states", n_states, low=2)
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(n_states, concentration), (n_states, n_actions))
    shown = tuple((s, (s + 1) % n_states) for s in range(n_states))
    reward = rng.random((n_states, n_actions))
    return TabularGame(transition, reward, np.full(n_states, 1 / n_states), shown, horizon)


def _check(payoff: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    payoff = np.asarray(payoff, dtype=np.float64)
    if payoff.ndim != 2 or not payoff.size or not np.isfinite(payoff).all():
        raise ValueError(f"payoff of shape {payoff.shape}: a (policies, attackers) matrix of finite numbers is needed")
    if not len(chosen) or any(not 0 <= i < len(payoff) for i in chosen):
        raise ValueError(f"chosen={list(chosen)!r}: at least one of the {len(payoff)} policies is needed")
    return payoff


def gap(payoff: np.ndarray, chosen: Sequence[int]) -> tuple[float, int, int]:
    """Return (gap, policy, attacker): how much a set loses where it loses most, against attackers that do not mix.

    Args:
        payoff: (P, N) returns.
        chosen: rows that are in the set.
    """
    payoff = _check(payoff, chosen)
    lost = payoff - payoff[list(chosen)].max(0)
    policy, attacker = np.unravel_index(int(lost.argmax()), lost.shape)
    return float(lost[policy, attacker]), int(policy), int(attacker)


def mixed_gap(payoff: np.ndarray, chosen: Sequence[int]) -> tuple[float, int, np.ndarray]:
    """Return (gap, policy, mixture (N,)): how much a set loses against the worst mixture of attackers.

    Args:
        payoff: (P, N) returns.
        chosen: rows that are in the set.
    """
    payoff = _check(payoff, chosen)
    best: tuple[float, int, np.ndarray] = (0.0, int(chosen[0]), np.eye(payoff.shape[1])[0])
    mine = payoff[list(chosen)]
    n = payoff.shape[1]
    # max_q,t  J_pi q - t   with   J_i q <= t for i in the set, q a distribution
    limits = np.hstack([mine, -np.ones((len(mine), 1))])
    total = np.r_[np.ones(n), 0.0][None]
    bounds = [(0.0, None)] * n + [(None, None)]
    for policy in np.flatnonzero(np.all((payoff[:, None] > mine[None]).any(2), axis=-1)):
        found = linprog(
            np.r_[-payoff[policy], 1.0], limits, np.zeros(len(mine)), total, np.ones(1), bounds, method="highs"
        )
        if found.status == 0 and -found.fun > best[0]:
            best = (float(-found.fun), int(policy), np.asarray(found.x[:n]))
    return best


@dataclass(frozen=True)
class Discovered:
    """The course of a discovery.

    Attributes:
        chosen: policies in the order in which they came.
        gaps: before each addition, and at the end.
    """

    chosen: tuple[int, ...]
    gaps: tuple[float, ...]


def _measure(attackers: str) -> Callable[[np.ndarray, Sequence[int]], tuple[float, int, object]]:
    check_choice("attackers", attackers, ("pure", "mixed"))
    return gap if attackers == "pure" else mixed_gap


def discover(
    payoff: np.ndarray,
    initial: int | None = None,
    *,
    delta: float = 0.0,
    attackers: Literal["pure", "mixed"] = "pure",
    max_policies: int | None = None,
) -> Discovered:
    """Add the policy that attains the gap until the gap is at most ``delta``.

    Args:
        payoff: (P, N) returns.
        initial: the first policy; the best on average by default.
        delta: loss that is accepted.
        attackers: ``"pure"`` as the paper, ``"mixed"`` for attackers that may change between episodes.
        max_policies: stop at so many.
    """
    check_number("delta", delta, low=0)
    first = int(np.asarray(payoff).mean(1).argmax()) if initial is None else initial
    measure, chosen, gaps = _measure(attackers), [first], []
    while True:
        value, policy, _ = measure(payoff, chosen)
        gaps.append(value)
        if value <= delta + _TINY or policy in chosen or len(chosen) == max_policies:
            return Discovered(tuple(chosen), tuple(gaps))
        chosen.append(policy)


def prune(
    payoff: np.ndarray,
    chosen: Sequence[int],
    *,
    delta: float = 0.0,
    attackers: Literal["pure", "mixed"] = "pure",
) -> tuple[int, ...]:
    """Return the set without those whose leaving keeps its loss, measured on all of ``payoff``, within ``delta``.

    What the set lost before is not charged to those who leave. The oldest go first: later ones were found because the
    set lacked them.
    """
    check_number("delta", delta, low=0)
    measure = _measure(attackers)
    kept = list(dict.fromkeys(chosen))
    allowed = max(delta, measure(payoff, kept)[0]) + _TINY
    for policy in tuple(kept):
        rest = [p for p in kept if p != policy]
        if rest and measure(payoff, rest)[0] <= allowed:
            kept = rest
    return tuple(kept)
