"""The threat model: what an attacker of observations is shown, and what may be spent.

A budget is a ball in every step, or one Euclidean length for the whole episode.

The engine projects what an attack proposes and keeps the accounts; attacks are not trusted with either. Lengths are in
the units of the observation at the point where the attack stands: after scaling and the frozen normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rl_robust.policy import Memory
from rl_robust.task import Task
from robust_core.checks import check_number
from robust_core.random import SampleStreams
from robust_core.threats import L2, Threat

__all__ = ["Budget", "EpisodeBudget", "ObservationAttack", "StepBudget", "View"]


class Budget(Protocol):
    """Projects perturbed observations and says what is left."""

    @property
    def eps(self) -> float:
        """Size of the budget."""
        ...

    def project(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return ``seen`` moved into what is still allowed.

        Args:
            seen: (B, ...) what the attack proposes.
            obs: (B, ...) true observations.
            spent: (B,) float64, what :meth:`account` gave so far.
        """
        ...

    def account(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return (B,) float64: what is spent after this step."""
        ...


@dataclass(frozen=True)
class StepBudget:
    """A norm ball around the observation of every step.

    Args:
        threat: e.g. ``Linf(0.075, domain=None)``; the domain cuts observations that have one, such as pixels.
    """

    threat: Threat

    @property
    def eps(self) -> float:
        """Radius of the ball."""
        return self.threat.eps

    def project(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return ``seen`` inside the ball around ``obs``; the norm of the stored difference is at most ``eps``."""
        return self.threat.project(seen, obs)

    def account(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return the largest distance of the episode so far."""
        return torch.maximum(spent, self.threat.distance(seen, obs))


@dataclass(frozen=True)
class EpisodeBudget:
    """``sum_t ||delta_t||^2 <= eps^2``, the threat model of policy smoothing.

    Args:
        eps: length for the whole episode.
        domain: (lowest, highest) valid value of an observation, or None.
    """

    eps: float
    domain: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_number("eps", self.eps, low=0)

    def left(self, spent: Tensor) -> Tensor:
        """Return (B,) float64: the length that may still be spent, rounded down."""
        square = self.eps * self.eps - spent * spent
        return torch.where(square > 0, (square.clamp(min=0) * (1 - 1e-12)).sqrt(), 0.0)

    def project(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return ``seen`` no farther from ``obs`` than the length that is left."""
        left = self.left(spent)
        ball = L2(1.0, self.domain)
        if self.domain is not None:
            seen = ball.clamp(seen)
        delta = seen.double() - obs.double()
        length = delta.flatten(1).norm(dim=1)
        share = torch.where(length > left, left / length.clamp(min=1e-300), 1.0)
        column = share.reshape(-1, *[1] * (obs.ndim - 1))
        moved = (obs.double() + delta * column).to(obs.dtype)
        # a stored sum may round outwards: then a hair less
        over = (moved.double() - obs.double()).flatten(1).norm(dim=1) > left
        shy = (obs.double() + delta * column * (1 - 1e-5)).to(obs.dtype)
        still = (shy.double() - obs.double()).flatten(1).norm(dim=1) > left
        mask = [-1, *[1] * (obs.ndim - 1)]
        moved = torch.where(over.reshape(mask), shy, moved)
        return torch.where((over & still).reshape(mask), obs, moved)

    def account(self, seen: Tensor, obs: Tensor, spent: Tensor) -> Tensor:
        """Return the length spent since the episode began."""
        step = (seen.double() - obs.double()).flatten(1).square().sum(1)
        return (spent * spent + step).sqrt()


@dataclass(frozen=True)
class View:
    """What an attacker of observations is shown in one step of B episodes.

    Attributes:
        policy: the victim, with its parameters frozen.
        obs: (B, ...) true observations, at the point where the attack stands.
        frames: (B, n_frames, ...) what the victim saw so far, the place of the newest last (still free).
        task: gives :meth:`Task.show`.
        budget: of the attack.
        spent: (B,) float64, by the engine's accounts.
        step: (B,) int64, 0 in the first step of an episode.
        episodes: (B,) int64.
        seed: of the attack's streams.
        sigma: noise that will be added to what the attack returns.
        memory, start: of the policy.
        store: (lane-wise) tensors that the attack wants to keep: use :meth:`keep` and :meth:`kept`.
        lanes: (B,) int64, rows of ``store``.
    """

    policy: Any
    obs: Tensor
    frames: Tensor
    task: Task
    budget: Budget
    spent: Tensor
    step: Tensor
    episodes: Tensor
    seed: int
    sigma: float
    memory: Memory
    start: Tensor
    store: dict[str, Tensor]
    lanes: Tensor
    n_lanes: int

    def shown(self, seen: Tensor) -> Tensor:
        """Return what the policy would see if ``seen`` (B, ...) came in now; with gradient."""
        first = (self.step == 0).reshape(-1, *[1] * (self.frames.ndim - 1))
        past = torch.where(first, seen[:, None], self.frames[:, :-1]) if self.task.n_frames > 1 else self.frames[:, :0]
        return self.task.show(torch.cat([past, seen[:, None]], 1))

    def streams(self, purpose: str) -> SampleStreams:
        """Return random streams that belong to the episodes; use ``chunk=self.step``."""
        return SampleStreams(self.seed, self.episodes.to(self.obs.device), purpose)

    def keep(self, name: str, value: Tensor) -> None:
        """Remember (B, ...) values until the next step of the same episodes."""
        if name not in self.store:
            self.store[name] = value.new_zeros(self.n_lanes, *value.shape[1:])
        self.store[name][self.lanes] = value

    def kept(self, name: str, like: Tensor) -> Tensor:
        """Return what was kept, or zeros like ``like`` (B, ...); zeros too where an episode begins."""
        if name not in self.store:
            return torch.zeros_like(like)
        fresh = (self.step == 0).reshape(-1, *[1] * (like.ndim - 1))
        return torch.where(fresh, 0, self.store[name][self.lanes])


class ObservationAttack(Protocol):
    """An attacker who stands between environment and policy."""

    @property
    def budget(self) -> Budget:
        """What may be spent."""
        ...

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) what the policy shall see instead of ``view.obs``; the engine projects it."""
        ...
