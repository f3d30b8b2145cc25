"""One loop for every iterative attack: a full batch of unbroken samples, refilled as samples break.

An attack is a stateless configuration with two methods, :meth:`IterativeAttack.begin` and
:meth:`IterativeAttack.step`, both vectorised over rows. All that changes during the attack lives in a
:class:`Rows` of tensors whose first axis is the sample, the iteration counter included. The loop
can therefore take broken samples out and put fresh ones in at any time, and what happens to a sample never
depends on its neighbours, the batch size or the order.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from robust_core.checks import check_count, check_inputs, check_labels
from robust_core.models import Classifier, PassCounter, frozen, model_device, padded, predict_logits
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import Threat

__all__ = ["Attack", "AttackResult", "IterativeAttack", "Problem", "Rows", "verify"]

logger = logging.getLogger(__name__)
Rows = dict[str, Tensor]
"""Per-sample state: name -> (B, ...)."""


class Attack(Protocol):
    """What every attack can do; see :class:`IterativeAttack` for the contract."""

    threat: Threat

    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return (B, ...) attacked inputs inside the threat."""
        ...

    def run(
        self, model: Classifier, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> AttackResult:
        """Return the attacked inputs with what happened to each."""
        ...


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        x_adv: (B, ...) in the dtype of the inputs, always inside the threat. Where the attack failed: the point of
            highest loss that it met.
        success: (B,) bool, recomputed at the end on the stored tensor in eval mode: misclassified *and* inside.
        distance: (B,) float64 norm of the stored difference.
        loss: (B,) margin ``max_{i != y} z_i - z_y`` at ``x_adv``; positive means misclassified.
        found_by: name of the attack that broke each sample, ``""`` where none did.
        forwards: samples sent through the model.
        backwards: samples whose gradient was computed.
        notes: what the attack had to do differently, in sentences.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    loss: Tensor
    found_by: tuple[str, ...]
    forwards: int
    backwards: int
    notes: tuple[str, ...] = ()

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that were not broken; a clean misclassification counts as broken."""
        return float((~self.success).double().mean())


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) ``max_{i != y} z_i - z_y``: positive exactly when another class wins; ties count as broken at 0."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - true


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) bool: the arg-max is not ``y``. NaN logits count as misclassified."""
    return logits.argmax(1) != y


def verify(
    model: Classifier, threat: Threat, x_adv: Tensor, x: Tensor, y: Tensor, *, batch_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute success, distance and margin on the stored tensor: each (B,)."""
    logits = predict_logits(model, x_adv, batch_size=batch_size)
    inside = threat.contains(x_adv, x)
    return misclassified(logits, y) & inside, threat.distance(x_adv, x), margin(logits, y)


@dataclass(frozen=True)
class Problem:
    """The rows an attack works on now. ``x``, ``y``, ``index`` and the streams are row-aligned."""

    model: Classifier
    threat: Threat
    x: Tensor
    y: Tensor
    index: Tensor
    seed: int
    init: Tensor | None = None
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, rows: Tensor) -> Problem:
        """Return the same problem on some of the rows."""
        init = None if self.init is None else self.init[rows]
        context = {name: value[rows] for name, value in self.context.items()}
        return Problem(
            self.model, self.threat, self.x[rows], self.y[rows], self.index[rows], self.seed, init, context
        )

    def streams(self, purpose: str) -> SampleStreams:
        """Return the random streams of these rows."""
        return SampleStreams(self.seed, self.index, purpose)

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, C) logits without gradient."""
        with torch.no_grad():
            return self.model(padded(x))[: len(x)]

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, C), losses (B,) and the gradient (B, ...) of each row's loss, from one pass.

        Args:
            x: (B, ...) points.
            loss: maps logits (B, C) to losses (B,), row by row.
        """
        point = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(padded(point))[: len(x)]
            losses = loss(logits)
            (gradient,) = torch.autograd.grad(losses.sum(), point)
        return logits.detach(), losses.detach(), gradient


class IterativeAttack(ABC):
    """Base of the attacks that improve a point step by step.

    A subclass is a frozen dataclass of settings with ``threat``, ``n_iter``, ``batch_size`` and these two methods.
    The engine records, row by row, the first broken point and the point of highest margin.
    """

    threat: Threat
    n_iter: int
    batch_size: int
    name: ClassVar[str]
    check_every: ClassVar[int] = 8
    stop_when_broken: ClassVar[bool] = True
    uses_gradient: ClassVar[bool] = True

    @abstractmethod
    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows. It may use the model.

        An entry ``limit`` (B,) int64 sets the iterations of each row, ``n_iter`` otherwise: attacks that make
        several runs, or as many as there are classes, know it only here.
        """

    @abstractmethod
    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Do one iteration for every row.

        Returns:
            the new state; (B, ...) the point that was evaluated, inside the threat; (B, C) its logits.
        """

    def finish(self, problem: Problem, state: Rows) -> Tensor:
        """Return (B, ...) the points to report for rows that are done, inside the threat.

        By default the engine's record (``state["_point"]``): the first broken point, else that of highest margin.
        """
        del problem
        return state["_point"]

    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        init: Tensor | None = None,
    ) -> Tensor:
        """Return (B, ...) attacked inputs; see :meth:`run`."""
        return self.run(model, x, y, index=index, generator=generator, init=init).x_adv

    def run(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        init: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: maps (B, ...) to logits (B, C); left as found.
            x: (B, ...) inputs inside the domain of the threat.
            y: (B,) int64 labels.
            index: (B,) int64 positions in the original data set, which name the random streams; 0 .. B-1 by default.
            generator: seed of the run; None means 0.
            init: (B, ...) points to start from instead of the attack's own start; projected first.
            on_step: called with (samples decided, samples in all) now and then.

        Raises:
            TypeError, ValueError: bad inputs, before any pass of the model.
        """
        problem = prepare(model, self.threat, x, y, index=index, generator=generator, init=init)
        with frozen(model):
            counter = PassCounter(model)
            problem = Problem(
                counter, problem.threat, problem.x, problem.y, problem.index, problem.seed, problem.init
            )
            x_adv = drive(self, problem, on_step=on_step)
            success, distance, loss = verify(counter, self.threat, x_adv, x, y, batch_size=self.batch_size)
        return AttackResult(
            x_adv,
            success,
            distance,
            loss,
            tuple(self.name if broken else "" for broken in success.tolist()),
            counter.forwards,
            counter.backwards,
            self.notes(problem),
        )

    def notes(self, problem: Problem) -> tuple[str, ...]:
        """Return sentences on what this attack does differently on this problem."""
        return ()


def prepare(
    model: Classifier,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    index: Tensor | None = None,
    generator: Seed = None,
    init: Tensor | None = None,
) -> Problem:
    """Check the arguments common to all attacks and return them as a :class:`Problem`."""
    check_inputs(x, threat.domain)
    check_labels(y, len(x))
    device = model_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}, x on {x.device}; move one of them")
    if index is None:
        index = torch.arange(len(x), device=x.device)
    elif index.shape != (len(x),) or index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; int64 ({len(x)},) is needed")
    if init is not None:
        check_inputs(init, name="init")
        if init.shape != x.shape:
            raise ValueError(f"init has shape {tuple(init.shape)}; that of x, {tuple(x.shape)}, is needed")
        init = threat.project(init.to(x.dtype), x)
    return Problem(model, threat, x.detach(), y, index.to(x.device), resolve_seed(generator), init)


def drive(
    attack: IterativeAttack, problem: Problem, *, on_step: Callable[[int, int], None] | None = None
) -> Tensor:
    """Run ``attack`` on all rows of ``problem`` and return (B, ...) the points found."""
    check_count("batch_size", attack.batch_size)
    n, device = len(problem.x), problem.x.device
    found = problem.x.clone()
    waiting = torch.arange(n, device=device)
    active = waiting[:0]  # original positions of the rows in the batch
    state: Rows = {}
    decided = 0
    while len(active) or len(waiting):
        room = attack.batch_size - len(active)
        if room and len(waiting):
            fresh, waiting = waiting[:room], waiting[room:]
            started = _start(attack, problem.rows(fresh))
            state = {k: torch.cat([state[k], v]) for k, v in started.items()} if state else started
            active = torch.cat([active, fresh])
        here = problem.rows(active)
        for _ in range(attack.check_every):
            state = _advance(attack, here, state)
        done = state["_iteration"] >= state["_limit"]
        if attack.stop_when_broken:
            done |= state["_broken"]
        if bool(done.any()):  # the one synchronisation of a window
            found[active[done]] = attack.finish(here.rows(done), {k: v[done] for k, v in state.items()})
            keep = ~done
            active = active[keep]
            state = {k: v[keep] for k, v in state.items()}
            decided = n - len(active) - len(waiting)
            if on_step is not None:
                on_step(decided, n)
    return found


def _start(attack: IterativeAttack, problem: Problem) -> Rows:
    state = attack.begin(problem)
    n, device = len(problem.x), problem.x.device
    limit = state.pop("limit", None)
    return {
        **state,
        "_limit": torch.full((n,), attack.n_iter, dtype=torch.int64, device=device) if limit is None else limit,
        "_iteration": torch.zeros(n, dtype=torch.int64, device=device),
        "_broken": torch.zeros(n, dtype=torch.bool, device=device),
        "_point": problem.x.clone(),
        "_margin": torch.full((n,), -torch.inf, dtype=torch.float32, device=device),
    }


def _advance(attack: IterativeAttack, problem: Problem, state: Rows) -> Rows:
    """One iteration, then the record of each live row: its first broken point, else that of highest margin."""
    kept = {k: state[k] for k in ("_iteration", "_limit", "_broken", "_point", "_margin")}
    inner = {k: v for k, v in state.items() if k not in kept}
    inner, point, logits = attack.step(problem, inner)
    live = (kept["_iteration"] < kept["_limit"]) & ~kept["_broken"]
    broken = misclassified(logits, problem.y)
    height = margin(logits, problem.y).float()
    better = live & (broken | (height > kept["_margin"]))
    wide = better.reshape(-1, *[1] * (point.ndim - 1))
    return {
        **inner,
        "_iteration": kept["_iteration"] + 1,
        "_limit": kept["_limit"],
        "_broken": kept["_broken"] | (live & broken),
        "_point": torch.where(wide, point, kept["_point"]),
        "_margin": torch.where(better, height, kept["_margin"]),
    }
