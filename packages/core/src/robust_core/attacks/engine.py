"""What every iterative attack is, and what it is given.

An attack is a stateless configuration with two methods, :meth:`IterativeAttack.begin` and
:meth:`IterativeAttack.step`, both vectorised over rows. All that changes during the attack lives in a
:class:`Rows` of tensors whose first axis is the sample, any iteration counter included, so that
:mod:`robust_core.attacks.loop` can take broken samples out and put fresh ones in at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from robust_core.attacks.loop import drive
from robust_core.checks import check_inputs, check_labels
from robust_core.errors import NotDifferentiableError
from robust_core.losses.margin import margin, misclassified
from robust_core.models import Classifier, PassCounter, frozen, model_device, padded, predict_logits
from robust_core.random import SampleStreams, Seed, reseeded, resolve_seed
from robust_core.threats import Threat

__all__ = [
    "Attack",
    "AttackResult",
    "IterativeAttack",
    "Problem",
    "Rows",
    "margin",
    "misclassified",
    "prepare",
    "verify",
]

Rows = dict[str, Tensor]
"""Per-sample state: name -> (B, ...)."""


class Attack(Protocol):
    """What every attack can do; see :class:`IterativeAttack` for the contract."""

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        ...

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
        first = (draw == 0).reshape(-1, *[1] * (points.ndim - 1))
        return torch.where(first, self.init, points)

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, C) logits without gradient."""
        with torch.no_grad():
            logits = self._pass(x)
            for _ in range(self.n_draws - 1):
                logits = logits + self._pass(x)
        return logits / self.n_draws if self.n_draws > 1 else logits

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, C), losses (B,) and the gradient (B, ...) of each row's loss, from one pass.

        NaN in the gradient becomes 0, as does what the threat cannot reach.

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
        return logits, losses, self.threat.reach(gradient.nan_to_num_())

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
        return logits if len(logits) == len(x) else logits[: len(x)]


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
    parallel_phases: ClassVar[bool] = False
    """Phases share nothing but what ``begin`` computed, so that several may run side by side."""
    n_draws: int = 1

    @abstractmethod
    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows. It may use the model.

        An entry ``limit`` (B,) int64 sets the calls of ``step`` of each row, ``evaluations`` otherwise, for attacks
        that know it only here. An entry ``left`` (B,) int64, which ``step`` lowers, is for attacks whose calls may do
        the work of several: a row ends where it reaches 0.
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
        with frozen(model), reseeded(problem.seed, x.device):
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
        with frozen(model), reseeded(problem.seed, x.device):
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
