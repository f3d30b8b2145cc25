"""Auto-PGD: momentum steps whose length halves by itself, with no step size to tune.

Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1 and section 3 (conditions 1 and 2: ``_check``), with
the constants of the paper and its official code; the L1 variant, whose steps move the few elements of largest
gradient and adapt their number, and its schedule of larger radii: Croce and Hein 2021 (arXiv 2103.01208).

Differences from the official code: a row stops at its first broken point; the count of increases at the first
check compares with the loss of the start, not with 0; cross-entropy is climbed as log-odds (same direction, same
order, no saturation); with ``n_draws`` above 1 losses, logits and gradients are all averages over the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.attacks.pgd import LOSSES
from robust_core.checks import check_choice, check_count, check_number
from robust_core.losses.margin import targeted_dlr, targeted_log_odds
from robust_core.models import PassCounter
from robust_core.threats import L1, Threat

__all__ = ["APGD", "TargetedAPGD"]

_SHARE, _SPARSER, _REFINE, _SHORTEST = 0.2, 0.95, 1.5, 10.0  # of the L1 variant, as published
_TARGETED_LOSSES = {"dlr": targeted_dlr, "ce": targeted_log_odds}


@dataclass(frozen=True)
class _Schedule:
    """What happens at each evaluation of a run; every tensor is (evaluations,).

    Attributes:
        first: the evaluation is that of a stage's starting point.
        check: after it, the step size is reconsidered.
        window: iterations since the last check, where there is one.
        radius: radius of the stage, as a multiple of ``eps``.
    """

    first: Tensor
    check: Tensor
    window: Tensor
    radius: Tensor


@lru_cache(maxsize=32)
def _schedule(stages: tuple[tuple[float, int], ...], sparse: bool, device: torch.device) -> _Schedule:
    first, check, window, radius = [], [], [], []
    for factor, n_iter in stages:
        k = max(int((0.04 if sparse else 0.22) * n_iter), 1)
        shorter, least = max(int(0.03 * n_iter), 1), max(int(0.06 * n_iter), 1)
        since = 0
        for i in range(n_iter + 1):
            due = i > 0 and since + 1 == k
            first.append(i == 0)
            check.append(due)
            window.append(k)
            radius.append(factor)
            since = 0 if due or i == 0 else since + 1
            if due and not sparse:
                k = max(k - shorter, least)
    return _Schedule(
        torch.tensor(first, device=device),
        torch.tensor(check, device=device),
        torch.tensor(window, device=device, dtype=torch.float32),
        torch.tensor(radius, device=device, dtype=torch.float64),
    )


@dataclass(frozen=True)
class APGD(IterativeAttack):
    """Auto-PGD.

    Args:
        threat: what the attacker may do.
        n_iter: iterations of each run.
        loss: ``"ce"``, ``"dlr"`` or ``"margin"``.
        n_restarts: independent starts, tried in turn on the samples still unbroken.
        rho: share of increasing steps below which the step size is halved.
        large_eps: spend 30, 30 and 40 % of the iterations at 3, 2 and 1 times the radius (L1 only).
        n_draws: passes over which loss and gradient are averaged, for stochastic models.
        batch_size: rows in flight.
    """

    threat: Threat
    n_iter: int = 100
    loss: Literal["ce", "dlr", "margin"] = "ce"
    n_restarts: int = 1
    rho: float = 0.75
    large_eps: bool = False
    n_draws: int = 1
    batch_size: int = 256

    losses: ClassVar[tuple[str, ...]] = tuple(LOSSES)
    parallel_phases: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("n_iter", "n_restarts", "n_draws", "batch_size"):
            check_count(field, getattr(self, field))
        check_number("rho", self.rho, low=0, high=1)
        check_choice("loss", self.loss, self.losses)
        if self.large_eps and not isinstance(self.threat, L1):
            raise ValueError(f"large_eps=True is for L1 threats, not for {self.threat}")

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name in reports, e.g. ``"apgd-ce"``."""
        return f"apgd-{self.loss}"

    @property
    def stages(self) -> tuple[tuple[float, int], ...]:
        """(multiple of the radius, iterations), in order."""
        if not self.large_eps:
            return ((1.0, self.n_iter),)
        third = math.ceil(0.3 * self.n_iter)
        return tuple(s for s in ((3.0, third), (2.0, third), (1.0, self.n_iter - 2 * third)) if s[1] > 0)

    @property
    def evaluations(self) -> int:
        """Calls of ``step`` in each run: every stage evaluates its start too."""
        return sum(n_iter + 1 for _, n_iter in self.stages)

    def phases(self, state: Rows) -> int:
        """Return the number of restarts."""
        return self.n_restarts

    def begin(self, problem: Problem) -> Rows:
        """Return the state at a random start, not yet evaluated."""
        x, threat = problem.x, self.threat
        sparse = isinstance(threat, L1)
        start = self._sparse_start(problem, threat) if sparse else problem.start(self.name)
        row = torch.zeros(len(x), dtype=torch.float32, device=x.device)
        state = {
            **threat.frame(x),
            "next": start,
            "best": start,
            "best_gradient": torch.zeros_like(x),
            "best_loss": row,
            "evaluation": torch.zeros_like(problem.index),
            "length": row,
        }
        if sparse:
            return {**state, "count": torch.ones_like(problem.y), "moved": torch.ones_like(problem.y)}
        return {**state, "old": start, "ups": row, "last_loss": row, "checked_loss": row, "halved": row > 0}

    def _sparse_start(self, problem: Problem, threat: L1) -> Tensor:
        if problem.init is not None:
            return problem.start(self.name)
        draw = 0 if problem.phase is None else problem.phase
        noise = problem.streams(self.name).normal(problem.x.shape[1:], chunk=draw, dtype=torch.float64)
        radius = torch.full_like(problem.y, 1, dtype=torch.float64) * (self.stages[0][0] * threat.eps)
        return threat.project_within((problem.x + noise).to(problem.x.dtype), problem.x, radius)

    def climb(self, problem: Problem, state: Rows) -> Callable[[Tensor], Tensor]:
        """Return the loss to climb, from logits (B, C) to (B,)."""
        return lambda logits: LOSSES[self.loss](logits, problem.y)

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Evaluate the point at hand, record the best, and move on."""
        point = state["next"]
        if problem.last_step:
            return state, point, problem.logits(point)
        logits, loss, gradient = problem.gradient(point, self.climb(problem, state))
        loss = loss.float()
        plan = _schedule(self.stages, isinstance(self.threat, L1), point.device)
        at = state["evaluation"]
        first, check = plan.first[at], plan.check[at]
        better = (loss > state["best_loss"]) | first
        state = {
            **state,
            "best": _choose(better, point, state["best"]),
            "best_gradient": _choose(better, gradient, state["best_gradient"]),
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "evaluation": (at + 1).clamp(max=len(plan.first) - 1),
        }
        if isinstance(self.threat, L1):
            if self.large_eps:
                logits = _withhold(logits, problem.y, plan.radius[at] > 1)
            state["next"] = self._sparse_move(self.threat, problem, state, plan, at, gradient)
        else:
            self._check(state, plan, at, loss, first, check)
            state["next"] = self._move(problem, state, point, gradient, first, check)
        return state, point, logits

    def _check(self, state: Rows, plan: _Schedule, at: Tensor, loss: Tensor, first: Tensor, check: Tensor) -> None:
        """Reconsider the step size; afterwards ``state["halved"]`` says which rows were cut at their last check."""
        state["ups"] = (state["ups"] + (loss > state["last_loss"])).masked_fill(first, 0.0)
        state["last_loss"] = loss
        state["length"] = state["length"].masked_fill(first, 2 * self.threat.eps)
        state["halved"] = state["halved"] | first  # rules condition 2 out at the first check
        state["checked_loss"] = torch.where(first, loss, state["checked_loss"])
        if not _any(check):
            return
        oscillates = state["ups"] <= self.rho * plan.window[at]
        stalls = ~state["halved"] & (state["checked_loss"] >= state["best_loss"])
        cut = check & (oscillates | stalls)
        state["length"] = torch.where(cut, state["length"] / 2, state["length"])
        state["halved"] = torch.where(check, cut, state["halved"])
        state["checked_loss"] = torch.where(check, state["best_loss"], state["checked_loss"])
        state["ups"] = state["ups"].masked_fill(check, 0.0)

    def _move(
        self, problem: Problem, state: Rows, point: Tensor, gradient: Tensor, first: Tensor, check: Tensor
    ) -> Tensor:
        threat, old = self.threat, state["old"]
        if _any(check):
            back = check & state["halved"]
            point = _choose(back, state["best"], point)
            gradient = _choose(back, state["best_gradient"], gradient)
        state["old"] = point
        ahead = threat.steepest(gradient).mul_(_column(state["length"], point)).add_(point)
        ahead = threat.project(ahead, problem.x, frame=state)
        # ahead + momentum: point + 3/4 (ahead - point) + 1/4 (point - old), or ahead alone in the first step
        blend = torch.mul(point, 0.5).add_(ahead, alpha=0.75).sub_(old, alpha=0.25)
        if _any(first):
            blend = _choose(first, ahead, blend)
        return threat.project(blend, problem.x, frame=state)

    def _sparse_move(
        self, threat: L1, problem: Problem, state: Rows, plan: _Schedule, at: Tensor, gradient: Tensor
    ) -> Tensor:
        x, size = problem.x, problem.x[0].numel()
        first, check = plan.first[at], plan.check[at]
        eps = (threat.eps * plan.radius[at]).float()
        point = state["next"]
        sparser = check
        if _any(check | first):
            moved = (state["best"] != x).flatten(1).sum(1)
            sparser = check & (moved < _SPARSER * state["moved"])
            cold = first & (at == 0) if problem.init is None else torch.zeros_like(first)
            fewer = (moved / _REFINE).long().clamp(min=1)  # rounded down, so that it goes on falling in low dimension
            state["count"] = torch.where(check | first, fewer, state["count"])
            state["moved"] = torch.where(check | first, moved, state["moved"])
            state["count"] = state["count"].masked_fill(cold, math.ceil(_SHARE * size))
            state["moved"] = state["moved"].masked_fill(cold, size)
            shorter = torch.maximum(state["length"] / _REFINE, eps / _SHORTEST)
            state["length"] = torch.where(check, shorter, state["length"])
            state["length"] = torch.where(first | sparser, eps, state["length"])
        point = _choose(sparser, state["best"], point)
        gradient = _choose(sparser, state["best_gradient"], gradient)
        ahead = point + threat.spread(gradient, state["count"]) * _column(state["length"], point).to(point.dtype)
        # The next stage starts from the best point of this one, on the smaller ball.
        following = plan.first[state["evaluation"]] & ~first
        ahead = _choose(following, state["best"], ahead)
        return threat.project_within(ahead, x, threat.eps * plan.radius[state["evaluation"]])


@dataclass(frozen=True)
class TargetedAPGD(APGD):
    """Auto-PGD towards each of the most likely other classes in turn.

    Args:
        n_targets: classes tried, at most; ``C - 1`` where the model has fewer. They are ranked by the logits of the
            clean input.
        loss: ``"dlr"`` (targeted) or ``"ce"``.
        n_restarts: runs for each target.
    """

    loss: Literal["ce", "dlr", "margin"] = "dlr"
    n_targets: int = 9

    losses: ClassVar[tuple[str, ...]] = tuple(_TARGETED_LOSSES)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_targets", self.n_targets)

    @property
    def name(self) -> str:
        """Name in reports."""
        return "apgd-t" if self.loss == "dlr" else f"apgd-t-{self.loss}"

    def phases(self, state: Rows) -> int:
        """Return targets times restarts."""
        return state["targets"].shape[1] * self.n_restarts

    def begin(self, problem: Problem) -> Rows:
        """Rank the targets and return the state at a random start."""
        logits = problem.context.get("clean_logits")
        if logits is None:
            logits = problem.logits(problem.x)
        others = logits.scatter(1, problem.y[:, None], -torch.inf)
        targets = others.topk(min(self.n_targets, logits.shape[1] - 1), dim=1).indices
        return {**super().begin(problem), "targets": targets}

    def restart(self, problem: Problem, state: Rows) -> Rows:
        """Return the state at the start of the run for the next target."""
        return {**super().begin(problem), "targets": state["targets"]}

    def climb(self, problem: Problem, state: Rows) -> Callable[[Tensor], Tensor]:
        """Return the targeted loss, from logits (B, C) to (B,)."""
        phase = torch.zeros_like(problem.y) if problem.phase is None else problem.phase
        target = state["targets"].gather(1, (phase // self.n_restarts)[:, None]).squeeze(1)
        return lambda logits: _TARGETED_LOSSES[self.loss](logits, problem.y, target)

    def notes(self, problem: Problem) -> tuple[str, ...]:
        """Say what few classes change."""
        n_classes = problem.model.n_classes if isinstance(problem.model, PassCounter) else 0
        notes = []
        if 0 < n_classes - 1 < self.n_targets:
            notes.append(f"{self.name}: {n_classes - 1} targets instead of {self.n_targets}, one for each other class")
        if self.loss == "dlr" and 0 < n_classes < 4:
            kind = "the margin" if n_classes == 2 else "DLR's denominator"
            notes.append(f"{self.name}: targeted DLR needs 4 classes; with {n_classes}, {kind} takes its place")
        return tuple(notes)


def _any(mask: Tensor) -> bool:
    """False only where that is known without waiting for a device."""
    return mask.device.type != "cpu" or bool(mask.any())


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the rows of ``mask`` (B,), ``old`` elsewhere."""
    if not _any(mask):
        return old
    return torch.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _withhold(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Logits that count as no success at all, for rows whose point lies outside the threat still."""
    others = torch.arange(logits.shape[1], device=y.device) != y[:, None]
    return logits.masked_fill(rows[:, None] & others, -torch.inf)
