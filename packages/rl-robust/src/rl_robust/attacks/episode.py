"""Attacks with one Euclidean budget for a whole episode: the threat of policy smoothing.

:class:`ConstantOffset` adds the same small vector to the first observations. It knows nothing of the policy but a
direction, and on control tasks it does more harm than gradients do: :func:`offsets` makes one for each axis.

:class:`BudgetedPGD` is the attack of Kumar, Levine and Feizi 2022 (arXiv 2106.11420), section 5: wherever the victim's
action values say that another action is worse by more than ``gap``, it looks for the shortest change that brings the
worst such action about, and pays for it; what is left carries over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from rl_robust.attacks.gradient import averaged
from rl_robust.observation import EpisodeBudget, View
from rl_robust.policy import require
from robust_core.checks import check_count, check_number

__all__ = ["BudgetedPGD", "ConstantOffset", "offsets"]


@dataclass(frozen=True)
class ConstantOffset:
    """Add ``eps / sqrt(duration)`` along a direction to each of the first ``duration`` observations.

    Args:
        budget: of the episode.
        direction: one number for each element of an observation, flattened; its length does not count.
        duration: steps.
    """

    budget: EpisodeBudget
    direction: tuple[float, ...]
    duration: int = 60

    def __post_init__(self) -> None:
        check_count("duration", self.duration)
        length = math.sqrt(math.fsum(d * d for d in self.direction))
        if not length > 0 or not math.isfinite(length):
            raise ValueError(f"direction={self.direction!r}: finite numbers that are not all 0 are needed")

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        along = torch.tensor(self.direction, dtype=torch.float64, device=view.obs.device)
        if along.numel() != view.obs[0].numel():
            raise ValueError(f"direction has {along.numel()} numbers, an observation {view.obs[0].numel()}")
        step = along / along.norm() * (self.budget.eps / math.sqrt(self.duration))
        moved = view.obs + step.reshape(view.obs.shape[1:]).to(view.obs.dtype)
        early = (view.step < self.duration).reshape(-1, *[1] * (view.obs.ndim - 1))
        return torch.where(early, moved, view.obs)


def offsets(budget: EpisodeBudget, size: int, durations: Sequence[int] = (60, 200)) -> dict[str, ConstantOffset]:
    """Return an offset along each axis of an observation of ``size`` elements, both ways, for each duration."""
    check_count("size", size)
    found = {}
    for duration in durations:
        for axis in range(size):
            for sign in (1.0, -1.0):
                direction = tuple(sign if k == axis else 0.0 for k in range(size))
                name = f"offset{'+' if sign > 0 else '-'}{axis}x{duration}"
                found[name] = ConstantOffset(budget, direction, duration)
    return found


@dataclass(frozen=True)
class BudgetedPGD:
    """Bring about the worst action within reach, wherever that is worth it.

    Args:
        budget: of the episode.
        gap: an action is a target where its value is this much below the best.
        step_size: length of a step.
        n_iter: steps at most; the paper takes ``2 * left / step_size``.
        n_smoothing: noises over which action values of a smoothed policy are averaged (the paper: 128).
    """

    budget: EpisodeBudget
    gap: float = 0.0
    step_size: float = 0.01
    n_iter: int = 100
    n_smoothing: int = 128

    def __post_init__(self) -> None:
        check_number("gap", self.gap, low=0)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_iter", self.n_iter)
        check_count("n_smoothing", self.n_smoothing)

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        policy = require(view.policy, "outputs")
        if not isinstance(policy.action_space, spaces.Discrete):
            raise TypeError("BudgetedPGD aims at actions that can be counted; use MaximalActionDifference")
        with torch.no_grad():
            values = averaged(view, policy.outputs, view.obs, self.n_smoothing, self.n_iter)
        best = values.amax(1)
        result, price = view.obs.clone(), torch.full_like(best, torch.inf)
        left = self.budget.left(view.spent).to(view.obs.device)
        for action in range(values.shape[1]):
            worth = values[:, action]
            wanted = (worth <= best - self.gap) & (values.argmax(1) != action) & (left > 0)
            if not bool(wanted.any()):
                continue
            seen, done = self._towards(view, policy, action, wanted, left)
            better = done & (worth < price)
            mask = better.reshape(-1, *[1] * (result.ndim - 1))
            result, price = torch.where(mask, seen, result), torch.where(better, worth, price)
        return result

    def _towards(self, view: View, policy: object, action: int, wanted: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first points at which the policy takes ``action``, and where there are any."""
        seen, done = view.obs, torch.zeros_like(wanted)
        column = [-1, *[1] * (seen.ndim - 1)]
        outputs = policy.outputs  # pyright: ignore[reportAttributeAccessIssue]
        target = torch.full((len(seen),), action, device=seen.device)
        reach = torch.minimum(left / self.step_size * 2, torch.full_like(left, float(self.n_iter)))
        for k in range(int(reach.amax())):
            x = seen.detach().requires_grad_(True)
            with torch.enable_grad():
                out = averaged(view, outputs, x, self.n_smoothing, k)
                (gradient,) = torch.autograd.grad(-F.cross_entropy(out, target, reduction="sum"), x)
            done = done | (wanted & (out.detach().argmax(1) == action))
            live = wanted & ~done & (k < reach)
            if not bool(live.any()):
                break
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(column)
            moved = self.budget.project(x.detach() + self.step_size * gradient / length, view.obs, view.spent)
            seen = torch.where(live.reshape(column), moved, seen)
        with torch.no_grad():
            out = averaged(view, outputs, seen, self.n_smoothing, self.n_iter)
        return seen, done | (wanted & (out.argmax(1) == action))
