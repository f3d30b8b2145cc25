"""One loop for every iterative attack: a full batch of unbroken samples, refilled as samples break.

An attack is a stateless configuration with two methods, :meth:`IterativeAttack.begin` and
:meth:`IterativeAttack.step`, both vectorised over rows. All that changes during the attack lives in a
:class:`Rows` of tensors whose first axis is the sample, any iteration counter included. The loop can therefore
take broken samples out and put fresh ones in at any time, and what happens to a sample never depends on its
neighbours, the batch size or the order.

Restarts and targets are *phases*: a row that ends a phase unbroken begins the next at once, in the same batch,
so that the batch stays full over all of them and no target has a drain tail of its own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_count, check_inputs, check_labels
from robust_core.errors import NotDifferentiableError
from robust_core.losses.margin import margin, misclassified
from robust_core.models import Classifier, PassCounter, frozen, model_device, padded, predict_logits
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import Threat

__all__ = [
    "Attack",
    "AttackResult",
    "IterativeAttack",
    "Problem",
    "Rows",
    "drive",
    "margin",
    "misclassified",
    "prepare",
    "verify",
]

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


def verify(
    model: Classifier, threat: Threat, x_adv: Tensor, x: Tensor, y: Tensor, *, batch_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute success, distance and margin on the stored tensor: each (B,)."""
    logits = predict_logits(model, x_adv, batch_size=batch_size)
    inside = threat.contains(x_adv, x)
    return misclassified(logits, y) & inside, threat.distance(x_adv, x), margin(logits, y)


@dataclass(frozen=True)
class Problem:
    """The rows an attack works on now; everything is row-aligned.

    Attributes:
        model: the classifier, frozen and in eval mode.
        threat: what the attacker may do.
        x: (B, ...) originals.
        y: (B,) labels.
        index: (B,) names of the random streams.
        seed: seed of the run.
        init: (B, ...) given starting points, inside the threat, or None.
        context: further (B, ...) tensors, e.g. ``"clean_logits"`` where the caller has them.
        phase: (B,) which restart or target each row is at.
        last_step: no row uses the gradient at the next point any more.
        n_draws: passes over which gradient, loss and logits are averaged (EOT), for stochastic models.
        n_labels: least number of classes that the labels ask for.
    """

    model: Classifier
    threat: Threat
    x: Tensor
    y: Tensor
    index: Tensor
    seed: int
    init: Tensor | None = None
    context: Mapping[str, Tensor] = field(default_factory=dict)
    phase: Tensor | None = None
    last_step: bool = False
    n_draws: int = 1
    n_labels: int = 0

    def rows(self, rows: Tensor) -> Problem:
        """Return the same problem on some of the rows."""
        return replace(
            self,
            x=self.x[rows],
            y=self.y[rows],
            index=self.index[rows],
            init=None if self.init is None else self.init[rows],
            context={name: value[rows] for name, value in self.context.items()},
            phase=None if self.phase is None else self.phase[rows],
        )

    def streams(self, purpose: str) -> SampleStreams:
        """Return the random streams of these rows."""
        return SampleStreams(self.seed, self.index, purpose)

    def start(self, purpose: str) -> Tensor:
        """Return (B, ...) random starts: a row's own in each phase. ``init`` takes the place of the first."""
        draw = torch.zeros_like(self.index) if self.phase is None else self.phase
        points = self.threat.random_start(self.x, self.streams(purpose), draw=draw)
        if self.init is None:
            return points
        return torch.where(_wide(draw == 0, points), self.init, points)

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, C) logits without gradient."""
        with torch.no_grad():
            logits = self._pass(x)
            for _ in range(self.n_draws - 1):
                logits = logits + self._pass(x)
        return logits / self.n_draws if self.n_draws > 1 else logits

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, C), losses (B,) and the gradient (B, ...) of each row's loss, from one pass.

        NaN in the gradient becomes 0.

        Args:
            x: (B, ...) points.
            loss: maps logits (B, C) to losses (B,), row by row.

        Raises:
            NotDifferentiableError: the logits do not depend on the input in a way that autograd knows.
        """
        total = self._gradient(x, loss)
        for _ in range(self.n_draws - 1):
            total = tuple(a + b for a, b in zip(total, self._gradient(x, loss), strict=True))
        logits, losses, gradient = (t / self.n_draws for t in total) if self.n_draws > 1 else total
        return logits, losses, gradient.nan_to_num_()

    def _gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        point = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self._pass(point)
            losses = loss(logits)
            if not losses.requires_grad:
                raise NotDifferentiableError(_NO_GRADIENT)
            (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
        if gradient is None:
            raise NotDifferentiableError(_NO_GRADIENT)
        return logits.detach(), losses.detach(), gradient

    def _pass(self, x: Tensor) -> Tensor:
        logits = self.model(padded(x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < max(2, self.n_labels):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model returned {shape}; a classifier maps (B, ...) to logits (B, C), and y needs "
                f"C of at least {max(2, self.n_labels)}"
            )
        return logits[: len(x)]


_NO_GRADIENT = (
    "the model's logits have no gradient with respect to its input: attack a differentiable surrogate (BPDA, "
    "Transfer), or by queries (Square)"
)


class IterativeAttack(ABC):
    """Base of the attacks that improve a point step by step.

    A subclass is a frozen dataclass of settings with ``threat``, ``n_iter``, ``batch_size`` and these two methods:
    ``begin`` and ``step``. In each phase of a row ``step`` is called ``evaluations`` times (``n_iter`` unless
    overridden). The loop records, row by row, the first broken point, else the point of highest margin.
    """

    threat: Threat
    n_iter: int
    batch_size: int
    name: ClassVar[str]
    check_every: ClassVar[int] = 8
    stop_when_broken: ClassVar[bool] = True
    uses_gradient: ClassVar[bool] = True
    n_draws: int = 1

    @abstractmethod
    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows. It may use the model.

        An entry ``limit`` (B,) int64 sets the calls of ``step`` of each row, ``evaluations`` otherwise, for attacks
        that know it only here.
        """

    @abstractmethod
    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Do one iteration for every row.

        Returns:
            the new state; (B, ...) the point that was evaluated, inside the threat; (B, C) its logits.
        """

    @property
    def evaluations(self) -> int:
        """Calls of ``step`` in each phase."""
        return self.n_iter

    def phases(self, state: Rows) -> int:
        """Return how many phases (restarts, targets) every row has, given the state of rows that have begun."""
        del state
        return 1

    def restart(self, problem: Problem, state: Rows) -> Rows:
        """Return the state of rows that enter phase ``problem.phase``; ``state`` is that of their last phase."""
        del state
        return self.begin(problem)

    def finish(self, problem: Problem, state: Rows) -> Tensor:
        """Return (B, ...) the points to report for rows that are done, inside the threat.

        By default the loop's record (``state["_point"]``): the first broken point, else that of highest margin.
        """
        del problem
        return state["_point"]

    def judge(self, problem: Problem, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) bool, whether the goal is reached, and (B,) how near it is (positive: reached)."""
        return misclassified(logits, problem.y), margin(logits, problem.y)

    def search(self, problem: Problem, *, on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """Return (B, ...) the points found."""
        return drive(self, problem, on_step=on_step)

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
        """Return (B, ...) attacked inputs; see :meth:`run`. Nothing is re-evaluated."""
        problem = prepare(model, self.threat, x, y, index=index, generator=generator, init=init)
        with frozen(model):
            return self.search(replace(problem, n_draws=self.n_draws))

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
        counter = PassCounter(model)
        problem = replace(problem, model=counter, n_draws=self.n_draws)
        with frozen(model):
            x_adv = self.search(problem, on_step=on_step)
            logits = predict_logits(counter, x_adv, batch_size=self.batch_size)
        reached, height = self.judge(problem, logits)
        success = reached & self.threat.contains(x_adv, x)
        return AttackResult(
            x_adv,
            success,
            self.threat.distance(x_adv, x),
            height,
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
    return Problem(
        model,
        threat,
        x.detach(),
        y,
        index.to(x.device),
        resolve_seed(generator),
        init,
        phase=torch.zeros(len(x), dtype=torch.int64, device=x.device),
        n_labels=int(y.max()) + 1,
    )


def drive(attack: IterativeAttack, problem: Problem, *, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Run ``attack`` on all rows of ``problem`` and return (B, ...) the points found."""
    check_count("batch_size", attack.batch_size)
    return _Loop(attack, problem, on_step).run()


class _Loop:
    """The batch in flight.

    How many iterations each row has left is known on the host, so the device is asked only which rows broke: after
    every iteration while rows keep breaking (and always on the CPU, where asking is free), else ever more rarely.
    """

    def __init__(self, attack: IterativeAttack, problem: Problem, on_step: Callable[[int, int], None] | None) -> None:
        self.attack, self.everything, self.on_step = attack, problem, on_step
        self.device = problem.x.device
        self.found = problem.x.clone()
        self.n = len(problem.x)
        self.begun = 0
        self.active = torch.empty(0, dtype=torch.int64, device=self.device)
        self.here = problem
        self.state: Rows = {}
        self.left = np.empty(0, dtype=np.int64)
        self.phase = np.empty(0, dtype=np.int64)
        self.dead = np.empty(0, dtype=bool)
        self.patience = 1

    def run(self) -> Tensor:
        while True:
            room = self.attack.batch_size - len(self.active)
            if self.begun < self.n and (4 * room >= self.attack.batch_size or not len(self.active)):
                self._refill(min(room, self.n - self.begun))
            if not len(self.active):
                return self.found
            window = int(min(self.patience, self.left.min()))
            ends = bool((self.left == window).all())
            for i in range(window):
                self._advance(last=ends and i == window - 1)
            self._settle(window)

    def _refill(self, count: int) -> None:
        attack = self.attack
        fresh = torch.arange(self.begun, self.begun + count, device=self.device)
        problem = self.everything.rows(fresh)
        state = attack.begin(problem)
        left = self._limit(state, count)
        state = _opened(problem, state)
        self.state = {k: torch.cat([self.state[k], v]) for k, v in state.items()} if self.state else state
        self.active = torch.cat([self.active, fresh])
        self.here = self.everything.rows(self.active)
        self.begun += count
        self.left = np.append(self.left, left)
        self.phase = np.append(self.phase, np.zeros(count, dtype=np.int64))
        self.dead = np.append(self.dead, np.zeros(count, dtype=bool))
        self._tell_phase()

    def _limit(self, state: Rows, count: int) -> np.ndarray:
        limit = state.pop("limit", None)
        return np.full(count, self.attack.evaluations) if limit is None else limit.cpu().numpy().copy()

    def _tell_phase(self) -> None:
        self.here = replace(self.here, phase=torch.from_numpy(self.phase).to(self.device))

    def _advance(self, *, last: bool) -> None:
        """One iteration, then the record of each row: its first broken point, else that of highest margin."""
        attack, state = self.attack, self.state
        inner = {k: v for k, v in state.items() if k not in _RECORD}
        problem = replace(self.here, last_step=True) if last else self.here
        inner, point, logits = attack.step(problem, inner)
        reached, height = attack.judge(problem, logits)
        height = height.float()
        better = height > state["_margin"]
        if attack.stop_when_broken:
            better = (better | reached) & ~state["_broken"]
        self.state = {
            **inner,
            "_broken": state["_broken"] | reached,
            "_point": torch.where(_wide(better, point), point, state["_point"]),
            "_margin": torch.where(better, height, state["_margin"]),
        }

    def _settle(self, window: int) -> None:
        """Let rows that are done leave and rows that end a phase begin the next."""
        self.left -= window
        ended = self.left == 0
        if self.attack.stop_when_broken:  # the one synchronisation of a window
            dead = self.state["_broken"].cpu().numpy()
            calm = dead.sum() == self.dead.sum() and self.device.type != "cpu"
            self.patience = min(2 * self.patience, self.attack.check_every) if calm else 1
            self.dead = dead
        else:
            self.patience = max(self.left.max(), 1)
        done = self.dead | ended
        if ended.any():
            final = self.phase + 1 >= self.attack.phases(self.state)
            self._next_phase(ended & ~self.dead & ~final)
            done = self.dead | (ended & final)
        if (ended & done).any() or 32 * done.sum() >= len(done):
            self._leave(done)

    def _next_phase(self, again: np.ndarray) -> None:
        if not again.any():
            return
        rows = torch.from_numpy(np.flatnonzero(again)).to(self.device)
        self.phase[again] += 1
        self._tell_phase()
        fresh = self.attack.restart(self.here.rows(rows), {k: v[rows] for k, v in self.state.items()})
        self.left[again] = self._limit(fresh, len(rows))
        for key, value in fresh.items():
            if key not in _RECORD:
                self.state[key] = self.state[key].index_copy(0, rows, value)

    def _leave(self, done: np.ndarray) -> None:
        out = torch.from_numpy(np.flatnonzero(done)).to(self.device)
        stay = torch.from_numpy(np.flatnonzero(~done)).to(self.device)
        leaving = {k: v[out] for k, v in self.state.items()}
        self.found.index_copy_(0, self.active[out], self.attack.finish(self.here.rows(out), leaving))
        self.state = {k: v[stay] for k, v in self.state.items()} if len(stay) else {}
        self.active = self.active[stay]
        self.here = self.here.rows(stay)
        self.left, self.phase, self.dead = self.left[~done], self.phase[~done], self.dead[~done]
        if self.on_step is not None:
            self.on_step(self.begun - len(self.active), self.n)


_RECORD = ("_broken", "_point", "_margin")


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _opened(problem: Problem, state: Rows) -> Rows:
    n, device = len(problem.x), problem.x.device
    return {
        **state,
        "_broken": torch.zeros(n, dtype=torch.bool, device=device),
        "_point": problem.x.clone(),
        "_margin": torch.full((n,), -torch.inf, dtype=torch.float32, device=device),
    }
