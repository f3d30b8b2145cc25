"""Attacks that follow a gradient within the ball of one step, and the noise that they must beat.

=================================  ====================================================================================
:class:`RandomNoise`               a point drawn in the ball: what a fault would do, and the floor for every attack
:class:`CriticAttack`              descends the victim's own value, Pattanaik et al. 2018 (arXiv 1712.03632)
:class:`MaximalActionDifference`   moves the victim's action distribution as far as it goes, Zhang et al. 2020 (SA-MDP,
                                   arXiv 2003.08938), section 3.5
=================================  ====================================================================================

Against a smoothed policy, gradients are averaged over ``n_smoothing`` noises (expectation over transformation). With a
budget for a whole episode the ball of one step is Euclidean of radius ``eps / sqrt(duration)``, and nothing is spent
after ``duration`` steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from rl_robust.observation import Budget, EpisodeBudget, View
from rl_robust.policy import require
from robust_core.checks import check_count, check_number
from robust_core.threats import L2, Threat

__all__ = [
    "CriticAttack",
    "GradientAttack",
    "MaximalActionDifference",
    "RandomNoise",
    "action_difference",
    "averaged",
    "step_ball",
]


def step_ball(budget: Budget, duration: int) -> Threat:
    """Return the ball of one step: a step budget's own, or an equal share of what an episode may spend."""
    if isinstance(budget, EpisodeBudget):
        return L2(budget.eps / math.sqrt(duration), budget.domain)
    threat = getattr(budget, "threat", None)
    if not isinstance(threat, Threat):
        raise TypeError(f"budget {budget!r}: a StepBudget or an EpisodeBudget is needed")
    return threat


def averaged(view: View, function: Callable[[Tensor], Tensor], seen: Tensor, n_smoothing: int, draw: int) -> Tensor:
    """Return (B, ...) the mean of ``function`` of what the policy would see, over noises of the smoothed policy.

    Args:
        view: of this step.
        function: maps (B, ...) inputs of the policy to (B, ...).
        seen: (B, ...) candidates.
        n_smoothing: noises; 1 and no noise where the policy is not smoothed.
        draw: names the noises: another for each call.
    """
    if view.sigma == 0:
        return function(view.shown(seen))
    streams = view.streams(f"smoothing {draw}")

    def noised(k: int) -> Tensor:
        noise = streams.normal(seen.shape[1:], chunk=view.step * n_smoothing + k, dtype=seen.dtype)
        return function(view.shown(seen + view.sigma * noise))

    total = noised(0)
    for k in range(1, n_smoothing):
        total = total + noised(k)
    return total / n_smoothing


def action_difference(policy: Any, before: Tensor, after: Tensor) -> Tensor:
    """Return (B,) KL divergences of the actions that follow from two outputs.

    Args:
        policy: gives the action space and, for continuous actions, ``spread`` (1 where it has none; without gradient).
        before: (B, K) logits or means.
        after: (B, K) those that changed.
    """
    if isinstance(policy.action_space, spaces.Discrete):
        p, q = F.log_softmax(before, 1), F.log_softmax(after, 1)
        return (p.exp() * (p - q)).sum(1)
    spread = getattr(policy, "spread", None)
    gap = (after - before) if spread is None else (after - before) / spread.detach()
    return 0.5 * gap.square().flatten(1).sum(1)


def _ascend(
    view: View, threat: Threat, start: Tensor, objective: Callable[[Tensor, int], Tensor], *, n_iter: int, step: float
) -> Tensor:
    """Return (B, ...) points after projected steepest ascent of ``objective(seen, k)`` (B,)."""
    seen = start
    for k in range(n_iter):
        x = seen.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(x, k).sum(), x)
        moved = x.detach() + step * threat.steepest(torch.nan_to_num(gradient))
        seen = threat.project(moved, view.obs)
    return seen


def _early(view: View, seen: Tensor, duration: int, budget: Budget) -> Tensor:
    """Return the true observation where an episode's share of steps is used up."""
    if not isinstance(budget, EpisodeBudget):
        return seen
    late = (view.step >= duration).reshape(-1, *[1] * (seen.ndim - 1))
    return torch.where(late, view.obs, seen)


@dataclass(frozen=True)
class RandomNoise:
    """Show a point drawn in the ball around the true observation.

    Args:
        budget: of a step or an episode.
        duration: steps among which an episode's budget is shared.
    """

    budget: Budget
    duration: int = 200

    def __post_init__(self) -> None:
        step_ball(self.budget, check_count("duration", self.duration))

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        threat = step_ball(self.budget, self.duration)
        drawn = threat.random_start(view.obs, view.streams("random"), draw=view.step)
        return _early(view, drawn, self.duration, self.budget)


class GradientAttack(ABC):
    """Base of attacks that climb an objective from a random point of the ball; subclasses are frozen dataclasses.

    Attributes:
        budget: of a step or an episode.
        n_iter: steps of the ascent.
        step_size: in units of the observation; ``2.5 * radius / n_iter`` if None.
        duration: steps among which an episode's budget is shared.
        n_smoothing: noises over which a smoothed policy is averaged.
    """

    budget: Budget
    n_iter: int
    step_size: float | None
    duration: int
    n_smoothing: int

    def __post_init__(self) -> None:
        step_ball(self.budget, check_count("duration", self.duration))
        check_count("n_iter", self.n_iter)
        check_count("n_smoothing", self.n_smoothing)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0, open_low=True)

    @abstractmethod
    def objective(self, view: View) -> Callable[[Tensor, int], Tensor]:
        """Return what is climbed: (B, ...) candidates and the number of the step -> (B,)."""

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        objective, threat = self.objective(view), step_ball(self.budget, self.duration)
        step = self.step_size or 2.5 * threat.eps / self.n_iter
        start = threat.random_start(view.obs, view.streams("start"), draw=view.step)
        seen = _ascend(view, threat, start, objective, n_iter=self.n_iter, step=step)
        return _early(view, seen, self.duration, self.budget)


@dataclass(frozen=True)
class CriticAttack(GradientAttack):
    """Show the observation in the ball that the victim's critic likes least.

    Args:
        budget: of a step or an episode.
        n_iter: steps of the descent.
        step_size: in units of the observation; ``2.5 * radius / n_iter`` by default.
        duration: steps among which an episode's budget is shared.
        n_smoothing: noises over which the value of a smoothed policy is averaged.
    """

    budget: Budget
    n_iter: int = 10
    step_size: float | None = None
    duration: int = 200
    n_smoothing: int = 8

    def objective(self, view: View) -> Callable[[Tensor, int], Tensor]:
        """Return minus the critic's value."""
        policy = require(view.policy, "value")
        return lambda seen, k: -averaged(view, policy.value, seen, self.n_smoothing, k)


@dataclass(frozen=True)
class MaximalActionDifference(GradientAttack):
    """Show the observation in the ball at which the victim acts most differently.

    The divergence is KL(pi(.|s) || pi(.|shown)): of the softmax for discrete actions, of Gaussians of equal spread for
    continuous ones (a plain squared distance where the policy has no spread). It is 0 with gradient 0 at the true
    observation, so the ascent starts at a random point.

    Args:
        budget: of a step or an episode.
        n_iter: steps of the ascent.
        step_size: in units of the observation; ``2.5 * radius / n_iter`` by default.
        duration: steps among which an episode's budget is shared.
        n_smoothing: noises over which the outputs of a smoothed policy are averaged.
    """

    budget: Budget
    n_iter: int = 10
    step_size: float | None = None
    duration: int = 200
    n_smoothing: int = 8

    def objective(self, view: View) -> Callable[[Tensor, int], Tensor]:
        """Return the divergence of the action distribution from that of the true observation."""
        policy = require(view.policy, "outputs")
        with torch.no_grad():
            clean = averaged(view, policy.outputs, view.obs, self.n_smoothing, self.n_iter)

        def moved(seen: Tensor, k: int) -> Tensor:
            return action_difference(policy, clean, averaged(view, policy.outputs, seen, self.n_smoothing, k))

        return moved
