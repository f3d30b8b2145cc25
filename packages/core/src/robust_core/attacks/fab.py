"""FAB: walk along the decision boundary towards the clean input, to the nearest misclassified point.

Every iteration linearises the difference of two logits, projects both the current point and the clean input
onto the resulting hyperplane inside the domain, overshoots a little and steps to a mixture of the two. FAB needs no
step size and does not care about the scale of the logits: a good second opinion on APGD.

Source: Croce and Hein 2020 (arXiv 1907.02044), algorithm 1; FAB-T, one target per run, from Croce and Hein 2020
(arXiv 2003.01690). Defaults are theirs. ``nearest_on_hyperplane`` is their projection; :meth:`FAB.step` their equations
for the step, the mixture and the way back. Their final search between the clean input
and the result, which AutoAttack leaves out, is made with ``minimise``.

Here the pass that tells whether a point is misclassified also gives the gradient for the next step (the published code
needs two forward passes): after a success the boundary is linearised at the success itself, and projected
onto from the point ``beta`` of the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.attacks.hyperplane import nearest_on_hyperplane
from robust_core.attacks.minimum_norm import begin_record, finish_record, fresh_record, record
from robust_core.checks import check_count, check_number
from robust_core.threats import Threat, row_sums

__all__ = ["FAB"]

_SHORTEST = 1e-8  # of a projection, so that the mixture stays defined on the boundary itself


@dataclass(frozen=True)
class FAB(IterativeAttack):
    """Minimum-norm attack along the decision boundary (Linf, L2, L1).

    Args:
        threat: where a success must lie. ``minimise`` looks beyond it as well, but only what lies inside is reported.
        n_iter: iterations of each run.
        n_targets: likely classes that are aimed at one after the other, at most all but the true one (FAB-T); None
            aims at the nearest of all classes in every iteration, at the cost of one gradient for each class.
        n_restarts: runs for each target; from the second on they start at random, at most ``eps / 2`` away.
        alpha_max: largest weight of the step from the clean input.
        eta: overshoot beyond the boundary.
        beta: part of the way that is kept after a success.
        minimise: keep shrinking the distance instead of stopping at the first success inside ``threat``.
        batch_size: rows worked on at a time.
    """

    threat: Threat
    n_iter: int = 100
    n_targets: int | None = 9
    n_restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    minimise: bool = False
    batch_size: int = 256

    name: ClassVar[str] = "fab"

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        check_count("n_restarts", self.n_restarts)
        if self.n_targets is not None:
            check_count("n_targets", self.n_targets)
        check_number("alpha_max", self.alpha_max, low=0, high=1)
        check_number("eta", self.eta, low=1)
        check_number("beta", self.beta, low=0, high=1, open_high=True)

    @property
    def parallel_phases(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Runs have a record in common only where the nearest point of all is asked for."""
        return not self.minimise

    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows: the targets, the current point and the record."""
        state = begin_record(problem)
        others = state["clean"].scatter(1, problem.y[:, None], -torch.inf)
        likely = others.sort(dim=1, descending=True, stable=True).indices
        targets = likely[:, : min(self.n_targets or 1, likely.shape[1] - 1)]
        start = problem.x if problem.init is None else problem.init
        return {**state, "at": start.clone(), "targets": targets}

    def phases(self, state: Rows) -> int:
        """Return the number of runs: one for each target, ``n_restarts`` times."""
        return state["targets"].shape[1] * self.n_restarts

    def restart(self, problem: Problem, state: Rows) -> Rows:
        """Return the starts of the next run: the clean input in the first round over the targets, then random.

        The record of the nearest point is carried on where it is asked for.
        """
        fresh = {} if self.minimise else fresh_record(problem)
        if problem.phase is None or self.n_restarts == 1:
            return {**fresh, "at": problem.x}
        near = problem.threat.with_eps(problem.threat.eps / 2)
        start = near.random_start(problem.x, problem.streams("fab start"), draw=problem.phase)
        first = (problem.phase < state["targets"].shape[1]).reshape(-1, *[1] * (start.ndim - 1))
        return {**fresh, "at": torch.where(first, problem.x, start)}

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Evaluate the current point, note it, and move along the boundary."""
        here, x, targets = state["at"], problem.x, state["targets"]
        if self.n_targets is None:
            logits, ahead, slope = _nearest_class(problem, here, state["clean"].shape[1])
        else:
            phase = torch.zeros_like(problem.y) if problem.phase is None else problem.phase
            target = targets.gather(1, (phase % targets.shape[1])[:, None])
            logits, ahead, slope = _towards(problem, here, target)
        kept, broken, seen, seen_logits = record(problem, state, here, logits, minimise=self.minimise)
        back = torch.where(broken.reshape(-1, *[1] * (x.ndim - 1)), x + self.beta * (here - x), here)
        moved = here if problem.last_step else self._move(problem, here, back, ahead, slope)
        return {**kept, "at": moved, "targets": targets}, seen, seen_logits

    def _move(self, problem: Problem, here: Tensor, back: Tensor, ahead: Tensor, slope: Tensor) -> Tensor:
        """Return the next points: steps onto the boundary linearised at ``here``, from ``back`` and from ``x``."""
        work = torch.promote_types(here.dtype, torch.float32)
        back_flat, clean, w, at = (part.to(work).flatten(1) for part in (back, problem.x, slope, here))
        b = row_sums(w * at) - ahead.to(work)
        steps = nearest_on_hyperplane(
            torch.cat([back_flat, clean]), torch.cat([w, w]), torch.cat([b, b]), problem.threat.domain, self.threat.name
        )
        lengths = problem.threat.norm(steps).clamp(min=_SHORTEST)
        own, from_clean = lengths.chunk(2)
        mixture = (own / (own + from_clean)).clamp(max=self.alpha_max)[:, None]
        own_step, clean_step = steps.chunk(2)
        moved = (1 - mixture) * (back_flat + self.eta * own_step) + mixture * (clean + self.eta * clean_step)
        return problem.threat.clamp(moved.to(here.dtype)).reshape(here.shape)

    def finish(self, problem: Problem, state: Rows) -> Tensor:
        """Return the nearest broken points, or what comes closest to one, inside the threat."""
        return finish_record(problem, state, state["at"], minimise=self.minimise)


def _ahead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (B,) ``z_t - z_y`` in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.gather(1, target) - logits.gather(1, y[:, None])).squeeze(1)


def _towards(problem: Problem, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, ``z_t - z_y`` and its gradient for ``target`` (B, 1)."""
    return problem.gradient(x, lambda logits: _ahead(logits, problem.y, target))


def _nearest_class(problem: Problem, x: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and, for the class whose linearised boundary is nearest, ``z_c - z_y`` and its gradient."""
    logits, ahead, slope = _towards(problem, x, torch.zeros_like(problem.y)[:, None])
    least = torch.full_like(ahead, torch.inf)
    for c in range(n_classes):
        if c:
            _, difference, gradient = _towards(problem, x, torch.full_like(problem.y, c)[:, None])
        else:
            difference, gradient = ahead, slope
        distance = difference.abs() / (problem.threat.dual_norm(gradient) + 1e-12)
        nearer = (distance < least) & (problem.y != c)
        least, ahead = torch.where(nearer, distance, least), torch.where(nearer, difference, ahead)
        slope = torch.where(nearer.reshape(-1, *[1] * (x.ndim - 1)), gradient, slope)
    return logits, ahead, slope
