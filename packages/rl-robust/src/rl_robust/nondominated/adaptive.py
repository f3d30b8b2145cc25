"""Play a set of policies: one for each episode, chosen by a bandit from the returns alone.

With returns in a known range, T episodes and attackers that may follow the past,

    regret to the best policy there is  <=  T * mixed gap of the set  +  regret of the bandit on the set

(add and subtract the best of the set in hindsight; its competitor meets the average of the attackers). The second term
is :meth:`rl_robust.bandits.Exp3IX.regret_bound`. The choice is made once an episode: a policy that changes within one
plays another game, of which neither term speaks.

:func:`adapt` plays online. :func:`replay` plays on returns that were collected for every arm; since episode t is a
function of (seed, t), it is the same run, and it knows the regret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl_robust.bandits import Exp3IX
from rl_robust.nondominated.sets import PolicySet
from rl_robust.observation import ObservationAttack
from rl_robust.rollout import collect
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, resolve_seed

__all__ = ["Adaptation", "AdaptivePolicy", "adapt", "flip", "replay"]


@dataclass(frozen=True)
class Adaptation:
    """What a run of episodes brought.

    Attributes:
        arms: (T,) int64 policies played.
        returns: (T,) float64.
        regret: (T,) summed regret to the best single arm of all T episodes, where the others' returns are known.
    """

    arms: np.ndarray
    returns: np.ndarray
    regret: np.ndarray | None = None


class AdaptivePolicy:
    """A policy for service: ``obs -> action``, the arm fixed from ``reset()`` until ``finish(total)``.

    Args:
        policies: the set.
        bandit: with one arm for each; its reward range is that of an episode's return.
    """

    def __init__(self, policies: PolicySet, bandit: Exp3IX) -> None:
        if bandit.n_arms != len(policies):
            raise ValueError(f"the bandit has {bandit.n_arms} arms for {len(policies)} policies")
        self.policies, self.bandit = policies, bandit
        self.arm: int | None = None
        self._memory: Any = None
        self._frames: list[torch.Tensor] = []

    def reset(self) -> int:
        """Begin an episode and return its arm. An episode that was not finished counts for nothing."""
        self.arm, self._memory, self._frames = self.bandit.select(), None, []
        return self.arm

    def __call__(self, obs: np.ndarray) -> Any:
        """Return the action for one raw observation of the environment.

        Raises:
            RuntimeError: before :meth:`reset`.
        """
        if self.arm is None:
            raise RuntimeError("no episode has begun; call reset() first")
        task, policy = self.policies.task, self.policies[self.arm]
        now, first = task.observe(np.asarray(obs)[None]), not self._frames
        self._frames = [now] * task.n_frames if first else [*self._frames[1:], now]
        with torch.no_grad():
            shown = task.show(torch.stack(self._frames, 1))
            action, self._memory = policy.act(shown, self._memory, torch.tensor([first]))
        found = action[0].cpu().numpy()
        return int(found) if found.ndim == 0 and found.dtype.kind == "i" else found

    def finish(self, total: float) -> None:
        """End an episode with its return, from which the bandit learns."""
        if self.arm is None:
            raise RuntimeError("no episode has begun; call reset() first")
        self.bandit.update(self.arm, total)
        self.arm = None

    def regret_bound(self, n_rounds: int, *, gap: float = 0.0, alpha: float = 0.05) -> float:
        """Return what the regret to the best policy exceeds with probability at most ``alpha``.

        Args:
            n_rounds: T.
            gap: of the set for attackers that may change, see :func:`rl_robust.nondominated.tabular.mixed_gap`; 0
                compares with the best of the set. Where only measured, the statement is no stronger than the estimate.
            alpha: failure probability.
        """
        return n_rounds * gap + self.bandit.regret_bound(n_rounds, alpha=alpha)


def adapt(
    policies: PolicySet,
    bandit: Exp3IX,
    n_rounds: int,
    *,
    attack: ObservationAttack | Callable[[int, np.ndarray], ObservationAttack | None] | None = None,
    generator: Seed = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Adaptation:
    """Play episodes one after the other.

    Args:
        policies: the set.
        bandit: goes on from its state.
        n_rounds: episodes.
        attack: an attack, or a function of (round, probabilities of the arms) that returns one or None: an attacker
            who follows the bandit.
        generator: seed of the episodes.
        on_step: called with (episodes done, episodes).
    """
    check_count("n_rounds", n_rounds)
    if bandit.n_arms != len(policies):
        raise ValueError(f"the bandit has {bandit.n_arms} arms for {len(policies)} policies")
    seed, arms, returns = resolve_seed(generator), [], []
    for t in range(n_rounds):
        now: Any = attack
        if callable(attack) and not hasattr(attack, "perturb"):
            now = attack(t, bandit.probabilities())
        arm = bandit.select()
        found = collect(policies[arm], policies.task, 1, attack=now, generator=seed, first=t).mean
        bandit.update(arm, found)
        arms.append(arm)
        returns.append(found)
        if on_step is not None:
            on_step(t + 1, n_rounds)
    return Adaptation(np.array(arms), np.array(returns))


def flip(attack: ObservationAttack, *, committed: float = 0.8) -> Callable[[int, np.ndarray], ObservationAttack | None]:
    """Return an attacker of the adaptation itself: it behaves until the bandit has settled, then attacks.

    Args:
        attack: what it does then; in the worst case trained against the policy that is best without attack.
        committed: probability of an arm at which the bandit counts as settled.
    """
    check_number("committed", committed, low=0, high=1, open_low=True)
    begun = [False]

    def choose(t: int, probabilities: np.ndarray) -> ObservationAttack | None:
        begun[0] = (begun[0] and t > 0) or float(np.max(probabilities)) >= committed
        return attack if begun[0] else None

    return choose


def replay(bandit: Exp3IX, returns: np.ndarray) -> Adaptation:
    """Let a bandit choose among known returns.

    Args:
        bandit: goes on from its state.
        returns: (K, T): of every arm in every episode.
    """
    returns = np.asarray(returns, dtype=np.float64)
    if returns.ndim != 2 or len(returns) != bandit.n_arms:
        raise ValueError(f"returns {returns.shape}: ({bandit.n_arms}, T) are needed")
    arms = np.zeros(returns.shape[1], dtype=np.int64)
    for t in range(returns.shape[1]):
        arms[t] = bandit.select()
        bandit.update(int(arms[t]), float(returns[arms[t], t]))
    got = returns[arms, np.arange(returns.shape[1])]
    best = returns[returns.sum(1).argmax()]
    return Adaptation(arms, got, np.cumsum(best - got))
