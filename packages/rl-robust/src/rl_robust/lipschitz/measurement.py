"""Attackers of measurements with a Euclidean ball in every step.

:func:`worst_measurements` looks for the whole sequence of errors that costs most, through a differentiable model of the
plant: gradients come from one adjoint sweep (back-propagation through time). ``"sweep"`` then moves each error to the
point of its ball along its gradient. For a linear plant, a linear policy and a convex quadratic cost the cost is convex
in the errors, so each sweep can only raise it and ends at a stationary point: the strongest attack known for this
problem, yet a lower bound of the worst case, hence the restarts. ``"pgd"`` takes projected steps, for anything else.

:class:`ModelAttack` plans so for ``horizon`` steps ahead in each step of the episode engine; :class:`BangBang` needs no
model. Random errors are :class:`rl_robust.attacks.RandomNoise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl_robust.observation import StepBudget, View
from rl_robust.policy import Policy
from robust_core.checks import check_choice, check_count, check_finite, check_number
from robust_core.errors import NotDifferentiableError
from robust_core.models import frozen
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import L2

__all__ = ["BangBang", "ModelAttack", "WorstCase", "linear_model", "worst_measurements"]

Step = Callable[[Tensor, Tensor], Tensor]
"""(B, n) states, (B, m) actions -> (B, n) next states, or (B,) costs; differentiable."""


@dataclass(frozen=True)
class WorstCase:
    """The costliest errors found.

    Attributes:
        deltas: (B, T, n), each of length at most zeta.
        cost: (B,) under them.
        nominal: (B,) without errors.
    """

    deltas: Tensor
    cost: Tensor
    nominal: Tensor


def linear_model(A: Tensor, B: Tensor, Q: Tensor, R: Tensor) -> tuple[Step, Step]:
    """Return the step ``A x + B u`` and the cost ``x'Qx + u'Ru``; (n, n), (n, m), (n, n), (m, m)."""

    def step(x: Tensor, u: Tensor) -> Tensor:
        return x @ A.T + u @ B.T

    def cost(x: Tensor, u: Tensor) -> Tensor:
        return ((x @ Q) * x).sum(1) + ((u @ R) * u).sum(1)

    return step, cost


def _play(policy: Policy, step: Step, cost: Step, x: Tensor, deltas: Tensor) -> Tensor:
    """Return (B,) the cost of the sequence."""
    total = x.new_zeros(len(x))
    for t in range(deltas.shape[1]):
        u = policy.act(x + deltas[:, t])[0]
        total = total + cost(x, u)
        x = step(x, u)
    return total


def _within(deltas: Tensor, zeta: float) -> Tensor:
    length = deltas.norm(dim=2, keepdim=True)
    return deltas * (zeta * (1 - 1e-7) / length.clamp(min=1e-300)).clamp(max=1.0)


def _search(
    policy: Policy, step: Step, cost: Step, x: Tensor, deltas: Tensor, *, zeta: float, n_iter: int, rate: float | None
) -> tuple[Tensor, Tensor]:
    """Return the best (B, T, n) and (B,) met; ``rate`` None moves to the surface of the balls."""
    best, worth = deltas, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for k in range(n_iter + 1):
        free = deltas.detach().requires_grad_(True)
        with torch.enable_grad():
            total = _play(policy, step, cost, x, free)
            if not total.requires_grad:
                raise NotDifferentiableError(f"{type(policy).__name__}.act, step or cost passes no gradient")
            (gradient,) = torch.autograd.grad(total.sum(), free)
        total = total.detach()
        better = total > worth * (1 + torch.sign(worth) * 1e-12)
        best = torch.where(better[:, None, None], deltas, best)
        worth = torch.maximum(total, worth)
        if k == n_iter or (rate is None and not bool(better.any())):
            break
        length = gradient.norm(dim=2, keepdim=True)
        along = gradient / length.clamp(min=1e-30)
        # a gradient of 0 (the planted state is the equilibrium, say) leaves the error where it is
        moved = zeta * along if rate is None else deltas + rate * along
        deltas = _within(torch.where(length > 0, moved, deltas), zeta)
    return best, worth


def worst_measurements(
    policy: Policy,
    step: Step,
    cost: Step,
    x0: Tensor,
    *,
    zeta: float,
    horizon: int,
    method: Literal["sweep", "pgd"] = "sweep",
    n_iter: int = 50,
    n_restarts: int = 3,
    generator: Seed = None,
) -> WorstCase:
    """Search the sequence of measurement errors that raises the cost of an episode most.

    Args:
        policy: differentiable.
        step: differentiable model of the plant; :func:`linear_model` makes one.
        cost: differentiable, of state and action.
        x0: (B, n) initial states, of the policy's dtype.
        zeta: largest length of each error.
        horizon: steps.
        method: ``"sweep"`` for convex costs, ``"pgd"`` for the rest.
        n_iter: adjoint sweeps.
        n_restarts: random starts; the worst counts.
        generator: seed.
    """
    check_number("zeta", zeta, low=0)
    check_count("horizon", horizon)
    check_count("n_iter", n_iter)
    check_choice("method", method, ("sweep", "pgd"))
    check_finite("x0", x0)
    streams = SampleStreams(resolve_seed(generator), torch.arange(len(x0), device=x0.device), "measurement errors")
    rate = None if method == "sweep" else 2.5 * zeta / n_iter
    with frozen(policy):  # pyright: ignore[reportArgumentType]
        zero = x0.new_zeros(len(x0), horizon, x0.shape[1])
        with torch.no_grad():
            nominal = _play(policy, step, cost, x0, zero)
        check_count("n_restarts", n_restarts)
        drawn = torch.cat([streams.normal(zero.shape[1:], chunk=k, dtype=x0.dtype) for k in range(n_restarts)])
        start = _within(zeta * drawn / drawn.norm(dim=2, keepdim=True).clamp(min=1e-30), zeta)
        found, total = _search(
            policy, step, cost, x0.repeat(n_restarts, 1), start, zeta=zeta, n_iter=n_iter, rate=rate
        )  # fmt: skip
        # no error at all is a candidate too
        found = torch.cat([zero, found]).unflatten(0, (n_restarts + 1, len(x0)))
        total = torch.cat([nominal, total]).unflatten(0, (n_restarts + 1, len(x0)))
        worth, which = total.max(0)
        best = found[which, torch.arange(len(x0), device=x0.device)]
    return WorstCase(best, worth, nominal)


def _ball(budget: StepBudget) -> StepBudget:
    if not isinstance(budget, StepBudget):
        raise TypeError(f"budget {budget!r}: a StepBudget is needed")
    return budget


@dataclass(frozen=True)
class ModelAttack:
    """Plan the worst errors ahead through a differentiable model of the plant, and show the first.

    Args:
        budget: a Euclidean ball in each step.
        step, cost: the model, on observations as the policy sees them.
        horizon: steps planned.
        method, n_iter: see :func:`worst_measurements`.
    """

    budget: StepBudget
    step: Step
    cost: Step
    horizon: int = 20
    method: Literal["sweep", "pgd"] = "pgd"
    n_iter: int = 10

    def __post_init__(self) -> None:
        if not isinstance(_ball(self.budget).threat, L2):
            raise TypeError(f"budget {self.budget!r}: a Euclidean ball is needed")
        check_count("horizon", self.horizon)
        check_count("n_iter", self.n_iter)
        check_choice("method", self.method, ("sweep", "pgd"))

    def perturb(self, view: View) -> Tensor:
        """Return (B, n) observations to show."""
        if view.frames.shape[1] != 1 or view.obs.ndim != 2:
            raise ValueError(f"observations {tuple(view.obs.shape)}: vectors in one frame are needed for a model")
        zeta, size = self.budget.eps, view.obs.shape[1]
        drawn = view.streams("plan").normal((self.horizon, size), chunk=view.step, dtype=view.obs.dtype)
        start = _within(zeta * drawn / drawn.norm(dim=2, keepdim=True).clamp(min=1e-30), zeta)
        rate = None if self.method == "sweep" else 2.5 * zeta / self.n_iter
        found, _ = _search(
            view.policy, self.step, self.cost, view.obs, start, zeta=zeta, n_iter=self.n_iter, rate=rate
        )  # fmt: skip
        return view.obs + found[:, 0]


@dataclass(frozen=True)
class BangBang:
    """Hold a random corner of the ball for some steps, then another: needs neither gradient nor model.

    Args:
        budget: a ball in each step.
        period: steps for which an error is held.
    """

    budget: StepBudget
    period: int = 10

    def __post_init__(self) -> None:
        _ball(self.budget)
        check_count("period", self.period)

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        signs = view.streams("bang-bang").signs(view.obs.shape[1:], chunk=view.step // self.period)
        threat = self.budget.threat
        return view.obs + self.budget.eps * threat.steepest(signs.to(view.obs.dtype))
