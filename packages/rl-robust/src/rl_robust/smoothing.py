"""Policy smoothing: the return that is left whatever an adaptive attacker of observations does within a budget.

A policy is played on observations with fresh normal noise. From ordinary, un-attacked, noisy episodes follows one
curve: the certified expected return against the attacker's budget ``eps``, where ``sum_t ||delta_t||^2 <= eps^2`` over
the episode, in the units of the observation at the point where the noise stands. The attacker may know everything but
the noise to come. No gradients, no Lipschitz constant, any policy: recurrent, stacked, random.

Source: Kumar, Levine and Feizi 2022, "Policy Smoothing for Provably Robust Reinforcement Learning" (arXiv 2106.11420).

- :func:`adaptive_bound`: ``P_adv[E] >= Phi(Phi^-1(p) - eps / sigma)`` for every event E of the episode (theorem 1);
- :func:`certify_return`: ``E_adv[F] >= a + int_a Phi(Phi^-1(P[F >= t]) - eps / sigma) dt`` from samples, each threshold
  with the whole budget, survival probabilities bounded jointly (section 4);
- :class:`NoisyObservation`: training noise, once for each raw observation; :class:`SmoothedPolicy`: for deployment.

Reconstructed: one-sided Massart constant (the paper's scripts use the two-sided one, which is looser), returns that
may be negative (``lower`` must bound them, under attack too: a sample minimum does not). Left out: medians, per-step
actions.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from torch import Tensor

from rl_robust.policy import Memory, Policy, as_policy
from rl_robust.task import Normaliser, Task
from robust_core.certificates.statistics import clopper_pearson_lower, normal_cdf_upper, normal_quantile_lower
from robust_core.checks import check_choice, check_number
from robust_core.random import derive

__all__ = [
    "NoisyObservation",
    "ReturnCertificate",
    "SmoothedPolicy",
    "VectorNoisyObservation",
    "adaptive_bound",
    "certify_return",
]


def adaptive_bound(
    p: ArrayLike, eps: ArrayLike, sigma: float, *, side: Literal["lower", "upper"] = "lower"
) -> np.ndarray:
    """Bound the probability of an event of the episode under every adaptive attacker.

    Args:
        p: its probability without attack (for ``"lower"`` a lower bound of it will do, for ``"upper"`` an upper one).
        eps: budget of the attacker for the episode; broadcasts against ``p``.
        sigma: standard deviation of the noise.
        side: which bound.

    Returns:
        float64, rounded to the safe side; attained by half-spaces, so it cannot be improved without knowing more.
    """
    check_choice("side", side, ("lower", "upper"))
    if side == "upper":
        return 1.0 - adaptive_bound(1.0 - np.asarray(p, dtype=np.float64), eps, sigma)
    p, radius = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(eps, dtype=np.float64))
    if not (np.all(p >= 0) and np.all(p <= 1)):
        raise ValueError(f"p={p!r}: probabilities are needed")
    if not np.all(radius >= 0):
        raise ValueError(f"eps={eps!r}: budgets of at least 0 are needed")
    check_number("sigma", sigma, low=0, open_low=bool(np.any(radius > 0)))
    if not np.any(radius > 0):
        return p.copy()
    shift = np.nextafter(radius / sigma, math.inf)
    quantile = np.nextafter(normal_quantile_lower(p) - shift, -math.inf)
    moved = np.maximum(0.0, 1.0 - normal_cdf_upper(-quantile))
    return np.where(radius > 0, np.minimum(moved, p), p)


@dataclass(frozen=True)
class ReturnCertificate:
    """What is left of the return.

    Attributes:
        eps: (K,) budgets, ascending.
        expected_return: (K,) lower bounds of the expected return; all hold together.
        thresholds: (m,) returns of interest, ascending.
        survival: (K, m) lower bounds of the probability that an episode brings at least the threshold, likewise.
        confidence: with which all of this holds.
        n_samples: episodes behind it.
        sigma: noise of the policy that it speaks of.
        lower: least possible return.
        method: as a person would cite it.
    """

    eps: np.ndarray
    expected_return: np.ndarray
    thresholds: np.ndarray
    survival: np.ndarray
    confidence: float
    n_samples: int
    sigma: float
    lower: float
    method: str

    def probability(self, threshold: float) -> np.ndarray:
        """Return (K,) certified probabilities that an episode brings at least ``threshold``."""
        above = np.flatnonzero(self.thresholds >= threshold)
        if threshold <= self.lower:
            return np.ones(len(self.eps))
        return self.survival[:, above[0]] if len(above) else np.zeros(len(self.eps))


def certify_return(
    returns: ArrayLike,
    *,
    sigma: float,
    eps: ArrayLike,
    lower: float,
    upper: float | None = None,
    alpha: float = 0.05,
    method: Literal["dkw", "clopper-pearson"] = "dkw",
    thresholds: Sequence[float] | None = None,
) -> ReturnCertificate:
    """Certify the expected return of the smoothed policy for budgets ``eps``, from un-attacked noisy episodes.

    Args:
        returns: (N,) returns of independent episodes, none of which was used to choose the policy.
        sigma: noise with which they were played.
        eps: budgets; one confidence statement covers them all.
        lower: a bound of the environment: no episode, attacked or not, brings less.
        upper: likewise from above, if known; samples beyond it are refused.
        alpha: failure probability of the whole certificate, at most 1/2.
        method: ``"dkw"`` bounds the survival function everywhere at once; ``"clopper-pearson"`` bounds it at
            ``thresholds`` that were fixed before the data were seen, each with ``alpha / m``. A single threshold is the
            case of an episode that is won or lost.
        thresholds: increasing, above ``lower``.

    Raises:
        ValueError: arguments out of range, returns that are not finite or beyond their bounds.
    """
    sample = _checked(returns, lower, upper)
    check_number("alpha", alpha, low=0, high=0.5, open_low=True)
    check_choice("method", method, ("dkw", "clopper-pearson"))
    budgets = np.unique(np.atleast_1d(np.asarray(eps, dtype=np.float64)))
    n = len(sample)
    if method == "dkw":
        if thresholds is not None:
            raise ValueError('thresholds: method="dkw" takes every value of the sample; leave them out')
        points = np.unique(sample)
        points = points[points > lower] if np.any(points > lower) else np.array([np.nextafter(lower, math.inf)])
        slack = math.nextafter(math.sqrt(math.log(1 / alpha) / (2 * n)), math.inf)
        survival = np.maximum(0.0, _at_least(sample, points) / n - slack)
        told = f"DKW band, N={n:,}"
    else:
        points = _thresholds(thresholds, lower)
        survival = clopper_pearson_lower(_at_least(sample, points), np.full(len(points), n), alpha / len(points))
        told = f"Clopper-Pearson at {len(points)} thresholds, N={n:,}"
    held = adaptive_bound(survival[None, :], budgets[:, None], sigma)
    steps = np.diff(points, prepend=lower)
    gain = np.array([math.fsum(row) for row in held * steps])
    # the products and their sum are off by less than this
    bound = lower + np.maximum(0.0, gain * (1 - 4e-16 * len(points)))
    return ReturnCertificate(
        budgets,
        np.nextafter(bound, -math.inf).clip(min=lower),
        points,
        held,
        1 - alpha,
        n,
        float(sigma),
        float(lower),
        told,
    )


def _checked(returns: ArrayLike, lower: float, upper: float | None) -> np.ndarray:
    sample = np.asarray(returns, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"returns has shape {sample.shape}; (N,) with N of at least 1 is needed")
    if not np.all(np.isfinite(sample)):
        raise ValueError("returns holds NaN or infinity")
    check_number("lower", lower)
    if sample.min() < lower or (upper is not None and sample.max() > upper):
        raise ValueError(
            f"returns lie in [{sample.min():g}, {sample.max():g}], outside lower={lower:g}, upper={upper}: the bounds "
            "must hold for every episode of the environment, also under attack"
        )
    return sample


def _thresholds(thresholds: Sequence[float] | None, lower: float) -> np.ndarray:
    if thresholds is None:
        raise ValueError('method="clopper-pearson" needs thresholds, fixed before the data were seen')
    points = np.asarray(thresholds, dtype=np.float64)
    if (
        points.ndim != 1
        or not len(points)
        or np.any(np.diff(points, prepend=lower) <= 0)
        or not np.isfinite(points[-1])
    ):
        raise ValueError(f"thresholds={thresholds!r}: increasing values above lower={lower:g} are needed")
    return points


def _at_least(sample: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return (m,) int64: how many returns are at least each point."""
    return len(sample) - np.searchsorted(np.sort(sample), points, side="left")


def _noised_space(space: spaces.Space, sigma: float) -> spaces.Box:
    check_number("sigma", sigma, low=0)
    if not isinstance(space, spaces.Box):
        raise ValueError(f"observation space {space}: noise needs a Box of numbers")
    return spaces.Box(-np.inf, np.inf, space.shape, np.float32)


class NoisyObservation(gym.ObservationWrapper):
    """Add normal noise to each raw observation, for training: put it before any stacking of frames.

    Args:
        env: observes a Box; bytes are fine.
        sigma: standard deviation, in units of the scaled observation.
        scale: observations are multiplied by this first; 1/255 for pixels.
        normaliser: frozen statistics, which come next.
        generator: seed of the noise, which shares nothing with the environment's own stream.

    The noised space is unbounded float32: noise on bytes would wrap around in a replay buffer (tell SB3
    ``policy_kwargs={"normalize_images": False}``).
    """

    def __init__(
        self,
        env: gym.Env,
        sigma: float,
        *,
        scale: float = 1.0,
        normaliser: Normaliser | None = None,
        generator: int = 0,
    ) -> None:
        super().__init__(env)
        self.observation_space = _noised_space(env.observation_space, sigma)
        self.sigma, self.scale, self.normaliser = float(sigma), float(scale), normaliser
        self._noise = np.random.default_rng(derive(generator, "noisy observation"))

    def observation(self, observation: Any) -> np.ndarray:
        """Return the scaled observation with noise."""
        clean = np.asarray(observation, dtype=np.float32) * np.float32(self.scale)
        if self.normaliser is not None:
            clean = self.normaliser(np.asarray(observation, dtype=np.float64)[None] * self.scale)[0]
        return clean + np.float32(self.sigma) * self._noise.standard_normal(clean.shape, dtype=np.float32)


class VectorNoisyObservation(gym.vector.VectorObservationWrapper):
    """:class:`NoisyObservation` for vector environments."""

    def __init__(self, env: gym.vector.VectorEnv, sigma: float, *, scale: float = 1.0, generator: int = 0) -> None:
        super().__init__(env)
        self.single_observation_space = _noised_space(env.single_observation_space, sigma)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)
        self.sigma, self.scale = float(sigma), float(scale)
        self._noise = np.random.default_rng(derive(generator, "noisy observation"))

    def observations(self, observations: Any) -> np.ndarray:
        """Return the scaled observations with noise."""
        clean = np.asarray(observations, dtype=np.float32) * np.float32(self.scale)
        return clean + np.float32(self.sigma) * self._noise.standard_normal(clean.shape, dtype=np.float32)


class SmoothedPolicy:
    """A smoothed policy for service: the noise comes from a secret of the operating system, fresh in every process.

    The certificate holds against attackers who do not know the noise to come, so it must not follow from a seed that
    somebody can read. Reports use :func:`rl_robust.rollout.collect` with ``sigma`` and a seed instead.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes.
        task: scaling, normaliser and frames, as in training.
        sigma: standard deviation of the noise.
        lanes: episodes that are played side by side.
    """

    def __init__(self, policy: Any, task: Task, sigma: float, *, lanes: int = 1) -> None:
        env = task.make()
        self.policy: Policy = as_policy(policy, env.action_space)
        env.close()
        self.task, self.sigma, self.lanes = task, check_number("sigma", sigma, low=0), lanes
        self._secret = torch.Generator().manual_seed(secrets.randbits(63))
        self._frames: Tensor | None = None
        self._memory: Memory = None
        self._start = torch.ones(lanes, dtype=torch.bool)

    def reset(self, mask: ArrayLike | None = None) -> None:
        """Begin new episodes on all lanes, or on those of a (lanes,) mask."""
        chosen = (
            torch.ones(self.lanes, dtype=torch.bool) if mask is None else torch.as_tensor(np.asarray(mask, dtype=bool))
        )
        self._start = self._start | chosen

    def __call__(self, observation: ArrayLike) -> np.ndarray:
        """Return (lanes, ...) actions for (lanes, ...) raw observations."""
        obs = self.task.observe(np.asarray(observation))
        if len(obs) != self.lanes:
            raise ValueError(f"{len(obs)} observations for lanes={self.lanes}: one each is needed")
        seen = obs + self.sigma * torch.randn(obs.shape, generator=self._secret)
        first = self._start.reshape(-1, *[1] * obs.ndim)
        past = seen[:, None].expand(-1, self.task.n_frames, *obs.shape[1:]) if self._frames is None else self._frames
        pushed = torch.cat([past[:, 1:], seen[:, None]], 1)
        self._frames = torch.where(first, seen[:, None].expand_as(pushed), pushed)
        with torch.no_grad():
            actions, self._memory = self.policy.act(self.task.show(self._frames), self._memory, self._start)
        self._start = torch.zeros_like(self._start)
        return actions.cpu().numpy()
