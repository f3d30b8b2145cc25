"""One-step and projected gradient attacks.

Sources: FGSM, Goodfellow et al. 2015 (arXiv 1412.6572); PGD, Madry et al. 2018 (arXiv 1706.06083); momentum, Dong
et al. 2018 (arXiv 1710.06081). Made for evaluation: it stops at a sample's first broken point and else returns the
point of highest margin that it met. Training wants the last of a fixed number of steps:
:class:`~robust_core.training.FastPGD`.

Defaults: ``step_size`` is ``2.5 * eps / n_iter``, which reaches every point of the ball from any start. The loss
is :func:`~robust_core.losses.margin.log_odds`, whose steps are those of the cross-entropy where that has not
saturated. For L1, the sign of the largest twentieth of the gradient's elements moves in each step
(after Tramèr and Boneh 2019, arXiv 1904.13000).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.checks import check_choice, check_count, check_number
from robust_core.losses.margin import dlr, log_odds, margin, misclassified
from robust_core.threats import L1, Threat, row_sums

__all__ = ["FGSM", "LOSSES", "PGD"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": log_odds, "margin": margin, "dlr": dlr}
"""Names of the untargeted losses. ``"ce"`` climbs the log-odds, which order points as the cross-entropy does."""

_L1_SHARE = 20


@dataclass(frozen=True)
class PGD(IterativeAttack):
    """Projected gradient ascent.

    Args:
        threat: what the attacker may do.
        n_iter: steps.
        step_size: length of a step in the norm of the threat; None means ``2.5 * eps / n_iter``.
        loss: ``"ce"``, ``"margin"`` or ``"dlr"``.
        random_start: start at a random point of the ball instead of the original.
        momentum: decay of the accumulated gradient, 0 for none.
        n_restarts: independent starts, tried in turn on the samples still unbroken.
        targeted: ``y`` names the classes wanted, not the true ones.
        batch_size: rows in flight.
    """

    threat: Threat
    n_iter: int = 40
    step_size: float | None = None
    loss: Literal["ce", "margin", "dlr"] = "ce"
    random_start: bool = True
    momentum: float = 0.0
    n_restarts: int = 1
    targeted: bool = False
    batch_size: int = 256
    name: ClassVar[str] = "pgd"
    parallel_phases: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        check_count("n_restarts", self.n_restarts)
        check_count("batch_size", self.batch_size)
        check_number("momentum", self.momentum, low=0)
        check_choice("loss", self.loss, tuple(LOSSES))
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0)

    @property
    def length(self) -> float:
        """Length of a step."""
        return 2.5 * self.threat.eps / self.n_iter if self.step_size is None else self.step_size

    @property
    def evaluations(self) -> int:
        """Calls of ``step`` in each restart: the start, and the point after each step."""
        return self.n_iter + 1

    def phases(self, state: Rows) -> int:
        """Return the number of restarts."""
        return self.n_restarts

    def judge(self, problem: Problem, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) bool, whether the goal is reached, and (B,) how near it is."""
        sign = -1 if self.targeted else 1
        return misclassified(logits, problem.y) != self.targeted, sign * margin(logits, problem.y)

    def begin(self, problem: Problem) -> Rows:
        """Return the starts; :meth:`step` moves on from a point only after it has evaluated it."""
        given = self.random_start or problem.init is not None
        start = problem.start(self.name) if given else problem.x
        state = {"next": start, **self.threat.frame(problem.x)}
        if self.momentum:
            state["velocity"] = torch.zeros_like(start)
        return state

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Evaluate the point at hand and move on from it."""
        point = state["next"]
        if problem.last_step:
            return state, point, problem.logits(point)
        logits, _, gradient = problem.gradient(point, self._climb(problem))
        return self._move(problem, state, gradient), point, logits

    def _climb(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        sign = -1 if self.targeted else 1
        return lambda logits: sign * LOSSES[self.loss](logits, problem.y)

    def _move(self, problem: Problem, state: Rows, gradient: Tensor) -> Rows:
        state = dict(state)
        if self.momentum:
            size = row_sums(gradient.flatten(1).abs()).clamp(min=torch.finfo(gradient.dtype).tiny)
            velocity = self.momentum * state["velocity"]
            velocity += gradient / size.reshape(-1, *[1] * (gradient.ndim - 1))
            state["velocity"] = gradient = velocity
        if isinstance(self.threat, L1):
            share = max(gradient[0].numel() // _L1_SHARE, 1)
            direction = self.threat.spread(gradient, torch.full_like(problem.y, share))
        else:
            direction = self.threat.steepest(gradient)
        point = torch.add(state["next"], direction, alpha=self.length)
        state["next"] = self.threat.project(point, problem.x, frame=state)
        return state


@dataclass(frozen=True)
class FGSM(PGD):
    """One step of length ``eps`` along the gradient, from the original image (or a random point of the ball)."""

    n_iter: int = 1
    random_start: bool = False
    name: ClassVar[str] = "fgsm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_iter != 1:
            raise ValueError(f"n_iter={self.n_iter}: FGSM makes one step; use PGD for more")

    @property
    def length(self) -> float:
        """Length of the step: ``eps`` unless given."""
        return self.threat.eps if self.step_size is None else self.step_size
