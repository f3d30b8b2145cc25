"""A bandit for adversaries: which of K arms to play when only the played one is seen, and nothing is stationary.

Exp3-IX of Neu 2015 (arXiv 1506.03271), for the choice of one policy for each episode (Liu et al. 2024,
arXiv 2402.12673). Rewards are mapped to losses ``l = 1 - clip((reward - low) / (high - low), 0, 1)``, and

- ``loss_estimate``: ``l / (p_i + gamma)`` on the played arm, 0 elsewhere (implicit exploration);
- probabilities ``p ~ exp(-eta_t * L)`` of the summed estimates ``L``, by a softmax, which cannot overflow;
- ``gamma_t = eta_t / 2`` and ``eta_t = scale * sqrt(ln K / (K T))``, with ``t`` in place of an unknown horizon ``T``;
- :meth:`Exp3IX.regret_bound`: for every non-increasing ``eta_t`` and ``gamma_t = eta_t / 2``, with probability at
  least 1 - alpha, ``regret <= (ln K + ln(2 K / alpha)) / eta_T + K * sum_t eta_t + ln(2 / alpha)``, in units of the
  reward range. It is the sum of three steps of that paper: exponential weights against the estimates, its Lemma 1 for
  their sum (every arm at once), and again for the arm compared with (a union over K). Clipped rewards void it: they are
  counted.

``gain=True`` adds ``g / (p_i + gamma)`` to the played arm instead, as released code of the second paper does. These
estimates are biased down, least where an arm is played often, and the bound does not speak of them: it is there to
compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import RobustError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Exp3IX", "RewardRangeError"]


class RewardRangeError(RobustError):
    """A reward lies outside the range that the bandit was told."""


class Exp3IX:
    """Choose among arms whose rewards an adversary sets.

    Args:
        n_arms: K.
        horizon: rounds to come; None needs no horizon.
        reward_range: (lowest, highest) reward.
        scale: multiplies the learning rate. ``sqrt(2)`` minimises the bound with a horizon, 1 without; 2 is the default
            of the second paper's code and learns faster where arms differ much (its scripts take 5).
        gain: count gains instead of losses; see above.
        on_clip: ``"count"`` clips rewards outside the range and counts them, ``"raise"`` refuses them.
        generator: seed of the choices.
    """

    def __init__(
        self,
        n_arms: int,
        horizon: int | None = None,
        *,
        reward_range: tuple[float, float],
        scale: float = 2.0,
        gain: bool = False,
        on_clip: Literal["count", "raise"] = "count",
        generator: Seed = None,
    ) -> None:
        self.n_arms = check_count("n_arms", n_arms)
        self.horizon = None if horizon is None else check_count("horizon", horizon)
        self.scale = check_number("scale", scale, low=0, open_low=True)
        low, high = (float(end) for end in reward_range)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"reward_range={reward_range!r}: (lowest, highest), finite, the lowest first, is needed")
        self.low, self.high = low, high
        self.gain, self.on_clip = bool(gain), check_choice("on_clip", on_clip, ("count", "raise"))
        self.seed = resolve_seed(generator)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.totals = np.zeros(self.n_arms, dtype=np.float64)
        self.rounds, self.clipped = 0, 0

    def rate(self, t: int | None = None) -> float:
        """Return ``eta`` of round ``t`` (from 1; the coming one by default)."""
        base = math.log(max(self.n_arms, 2)) / self.n_arms
        return self.scale * math.sqrt(base / (self.horizon or (self.rounds + 1 if t is None else t)))

    def probabilities(self) -> np.ndarray:
        """Return (K,) float64: how probable each arm is in the coming round."""
        score = (1.0 if self.gain else -1.0) * self.rate() * self.totals
        weights = np.exp(score - score.max())
        return weights / weights.sum()

    def select(self) -> int:
        """Return the arm of the coming round; the same until :meth:`update` ends it."""
        draw = np.random.default_rng(derive(self.seed, "arm", self.rounds)).random()
        edges = np.cumsum(self.probabilities())
        return min(int(np.searchsorted(edges, draw * edges[-1], side="right")), self.n_arms - 1)

    def update(self, arm: int, reward: float) -> None:
        """End a round.

        Args:
            arm: the one that was played.
            reward: what it brought.

        Raises:
            ValueError: no such arm, or a reward that is not finite.
            RewardRangeError: a reward outside the range, with ``on_clip="raise"``.
        """
        if isinstance(arm, bool) or not 0 <= arm < self.n_arms:
            raise ValueError(f"arm={arm!r}: one of 0 .. {self.n_arms - 1} is needed")
        share = (check_number("reward", float(reward)) - self.low) / (self.high - self.low)
        if not 0.0 <= share <= 1.0:
            if self.on_clip == "raise":
                raise RewardRangeError(f"reward {reward} lies outside [{self.low}, {self.high}]; widen reward_range")
            self.clipped += 1
            share = min(max(share, 0.0), 1.0)
        p = self.probabilities()[arm]
        self.totals[arm] += (share if self.gain else 1.0 - share) / (p + self.rate() / 2)
        self.rounds += 1

    def regret_bound(self, n_rounds: int, *, alpha: float = 0.05) -> float:
        """Return what the regret to the best single arm exceeds with probability at most ``alpha``, in reward units.

        Args:
            n_rounds: T, summed over.
            alpha: failure probability.

        Raises:
            TypeError: the bandit counts gains, of which no bound is known.
        """
        if self.gain:
            raise TypeError("the bound speaks of losses; gain=True has none")
        check_count("n_rounds", n_rounds)
        check_number("alpha", alpha, low=0, high=1, open_low=True, open_high=True)
        k = self.n_arms
        rates = self.rate(1) * np.ones(n_rounds) if self.horizon else self.rate(1) / np.sqrt(np.arange(1, n_rounds + 1))
        found = (math.log(k) + math.log(2 * k / alpha)) / rates[-1] + k * float(rates.sum()) + math.log(2 / alpha)
        return min(found, float(n_rounds)) * (self.high - self.low)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers from which :meth:`load_state_dict` goes on, for a JSON file."""
        return {"totals": self.totals.tolist(), "rounds": self.rounds, "clipped": self.clipped, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: of another number of arms, or damaged.
        """
        totals = np.asarray(state["totals"], dtype=np.float64)
        if totals.shape != (self.n_arms,) or not np.isfinite(totals).all():
            raise ValueError(f"state holds totals of shape {totals.shape}; {self.n_arms} finite numbers are needed")
        self.totals = totals
        self.rounds, self.clipped, self.seed = int(state["rounds"]), int(state["clipped"]), int(state["seed"])
