"""What an attacker of observations may spend: a ball in every step, or one Euclidean length for the whole episode.

The engine projects what an attack proposes and keeps the accounts; attacks are not trusted with either. Lengths are in
the units of the observation at the point where the attack stands: after scaling and the frozen normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_core.checks import check_number
from robust_core.threats import L2, Threat

__all__ = ["Budget", "EpisodeBudget", "StepBudget"]


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
