"""AutoAttack: a fixed set of complementary attacks, so that a robust accuracy means the same everywhere.

Source: Croce and Hein 2020 (arXiv 2003.01690), section 5; for L1, 2021 (arXiv 2103.01208). A sample counts as robust
only if it is classified correctly and every attack fails on it; each attack starts from the originals of the
samples that are left, cheap attacks first.

=============  ==============================================================================================
``standard``   APGD-CE, APGD-T (9 targets), FAB-T (9), Square (5000 queries); for L1, APGD-CE with 5 restarts
               and APGD-T with 5 targets, both with the schedule of larger radii
``plus``       APGD-CE (5 restarts), APGD-DLR (5), APGD-T (9), FAB-T (9), Square, FAB (5)
``rand``       APGD-CE and APGD-DLR, gradients averaged over 20 draws
``fast``       APGD-CE and APGD-T only: an upper bound of the standard robust accuracy, and labelled so
=============  ==============================================================================================

A model that is a defence declares what attackers must know (``stochastic``, ``differentiable``,
``optimises_at_test_time``, ``surrogate()``); :func:`plan` turns that into a strategy, which the result records. A
random model that does not declare it is found out by two passes over a few inputs.

Differences from the official code: a sample leaves an attack at its first broken point; the number of targets
follows the number of classes; random starts belong to samples; models whose gradients do not exist are
attacked by queries alone instead of failing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust_core.attacks.adaptive import BPDA, persistent
from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.engine import AttackResult, IterativeAttack, Problem, prepare
from robust_core.attacks.fab import FAB
from robust_core.attacks.square import Square
from robust_core.checks import check_choice, check_count
from robust_core.errors import CheckpointError, NotDifferentiableError
from robust_core.io.files import parse_json
from robust_core.io.tensors import load_tensors, save_tensors
from robust_core.losses.margin import margin, misclassified
from robust_core.models import Classifier, PassCounter, fingerprint, frozen, padded
from robust_core.random import Seed, reseeded
from robust_core.threats import L1, Threat

__all__ = ["VERSIONS", "AttackLog", "AutoAttack", "AutoAttackResult", "Strategy", "plan"]

logger = logging.getLogger(__name__)
VERSIONS = ("standard", "plus", "rand", "fast")
_PROBED, _SAME = 32, 1e-4  # inputs passed twice to find randomness; relative difference that is still rounding
SCHEMA = "robust.autoattack/1"


@dataclass(frozen=True)
class AttackLog:
    """What one attack of the set did.

    Attributes:
        name: the attack; ``"clean"`` for the first pass.
        attempted: samples that were still robust before it.
        broken: how many of them it broke.
        robust_accuracy: share of all samples that are robust after it.
        forwards: samples sent through the model.
        backwards: samples whose gradient was computed.
        seconds: wall-clock time.
        skipped: why it was not run, ``""`` if it was.
    """

    name: str
    attempted: int
    broken: int
    robust_accuracy: float
    forwards: int
    backwards: int
    seconds: float
    skipped: str = ""


@dataclass(frozen=True)
class AutoAttackResult(AttackResult):
    """An :class:`AttackResult` with the course of the evaluation.

    Attributes:
        version: the set of attacks.
        clean_accuracy: share classified correctly before any attack.
        strategy: how the declarations of the model were met.
        log: one entry for each attack, in order.
        reevaluated: for random models, the robust accuracy on ``x_adv`` in each of several fresh draws; the flags in
            ``success`` come from averaged logits, so report both.
    """

    version: str = "standard"
    clean_accuracy: float = 0.0
    strategy: str = "gradients"
    log: tuple[AttackLog, ...] = ()
    reevaluated: tuple[float, ...] = ()

    @property
    def reevaluated_mean_sd(self) -> tuple[float, float] | None:
        """Mean and standard deviation over the fresh draws, None for deterministic models."""
        if len(self.reevaluated) < 2:
            return None
        draws = torch.tensor(self.reevaluated, dtype=torch.float64)
        return float(draws.mean()), float(draws.std())


@dataclass(frozen=True)
class Strategy:
    """How a model will be attacked.

    Attributes:
        name: ``"gradients"``, ``"eot"``, ``"bpda"``, ``"transfer"`` or ``"black-box"``, joined by ``+``.
        white_box: what the gradient attacks climb; None leaves only queries.
        stochastic: results vary from pass to pass.
        notes: the reasons, in sentences.
    """

    name: str
    white_box: Classifier | None
    stochastic: bool
    notes: tuple[str, ...]


def plan(model: Classifier, *, stochastic: bool | None = None) -> Strategy:
    """Return how to attack ``model``, from what it declares (absent: deterministic and differentiable).

    A surrogate serves backwards (BPDA) where the model itself has no gradient. Where the model optimises at test
    time, its surrogate is attacked instead and the points are transferred, since no gradient through the model is
    to be trusted. Without a surrogate either is attacked by queries alone.

    Args:
        model: the classifier.
        stochastic: what a probe found, which overrides a declaration of False.
    """
    random = bool(getattr(model, "stochastic", False))
    notes = []
    if stochastic and not random:
        notes.append("the model is random without declaring it: gradients are averaged over draws")
        random = True
    optimises = bool(getattr(model, "optimises_at_test_time", False))
    smooth = bool(getattr(model, "differentiable", True))
    if smooth and not optimises:
        return Strategy("eot" if random else "gradients", model, random, tuple(notes))
    build = getattr(model, "surrogate", None)
    surrogate: Any = build() if callable(build) else None
    reason = "optimises at test time" if optimises else "declares no usable gradient"
    if surrogate is None:
        notes.append(f"the model {reason} and offers no surrogate: it is attacked by queries alone")
        return Strategy("black-box", None, random, tuple(notes))
    name = "transfer" if optimises else "bpda"
    how = "points found on its surrogate are transferred" if optimises else "its surrogate gives the gradients (BPDA)"
    notes.append(f"the model {reason}: {how}; Square queries the model itself")
    white_box = surrogate if optimises else BPDA(model, surrogate)
    return Strategy(f"eot+{name}" if random else name, white_box, random, tuple(notes))


@dataclass(frozen=True)
class AutoAttack:
    """The ensemble of attacks; see the table at the top of the module.

    Args:
        threat: what the attacker may do.
        version: ``"standard"``, ``"plus"``, ``"rand"`` or ``"fast"``.
        attacks: attacks of your own to run instead of a version's, in this order.
        n_draws: passes over which gradients of random models are averaged.
        n_evaluations: fresh draws in which the result on a random model is re-evaluated.
        batch_size: rows in flight.
    """

    threat: Threat
    version: Literal["standard", "plus", "rand", "fast"] = "standard"
    attacks: tuple[IterativeAttack, ...] = ()
    n_draws: int = 20
    n_evaluations: int = 10
    batch_size: int = 256
    name: ClassVar[str] = "autoattack"

    def __post_init__(self) -> None:
        check_choice("version", self.version, VERSIONS)
        for count in ("n_draws", "n_evaluations", "batch_size"):
            check_count(count, getattr(self, count))
        for attack in self.attacks:
            if attack.threat != self.threat:
                raise ValueError(f"attacks: {attack.name} has the threat {attack.threat}; {self.threat} is needed")

    def stages(self, *, stochastic: bool = False) -> tuple[IterativeAttack, ...]:
        """Return the attacks in the order in which they run."""
        if self.attacks:
            return self.attacks
        threat, batch = self.threat, self.batch_size
        if stochastic or self.version == "rand":
            return tuple(APGD(threat, loss=loss, n_draws=self.n_draws, batch_size=batch) for loss in ("ce", "dlr"))
        sparse = isinstance(threat, L1)
        restarts = 5 if sparse or self.version == "plus" else 1
        ce = APGD(threat, n_restarts=restarts, large_eps=sparse, batch_size=batch)
        n_targets = 5 if sparse and self.version != "plus" else 9
        targeted = TargetedAPGD(threat, n_targets=n_targets, large_eps=sparse, batch_size=batch)
        fab, square = FAB(threat, batch_size=batch), Square(threat, batch_size=batch)
        if self.version == "fast":
            return ce, targeted
        if self.version == "standard":
            return ce, targeted, fab, square
        untargeted = FAB(threat, n_targets=None, n_restarts=5, batch_size=batch)
        return ce, replace(ce, loss="dlr"), targeted, fab, square, untargeted

    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return (B, ...) attacked inputs; see :meth:`run`."""
        return self.run(model, x, y, index=index, generator=generator).x_adv

    def run(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        state_path: str | PathLike[str] | None = None,
        on_attack: Callable[[AttackLog], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> AutoAttackResult:
        """Attack a batch with every attack of the set.

        Args:
            model: maps (B, ...) to logits (B, C); left as found.
            x: (B, ...) inputs inside the domain of the threat.
            y: (B,) int64 labels.
            index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
            generator: seed of the run; None means 0.
            state_path: file (safetensors) in which the state is kept after every attack; a run with the same
                arguments goes on from there, and ends with the same result.
            on_attack: called after each attack.
            on_step: called with (samples decided, samples in all) now and then within an attack.

        Raises:
            TypeError, ValueError: bad inputs, before any pass of the model.
            CheckpointError: the state file belongs to another run.
        """
        problem = prepare(model, self.threat, x, y, index=index, generator=generator)
        evaluation = _Evaluation(self, model, problem, state_path, on_attack, on_step)
        with frozen(model), reseeded(problem.seed, x.device):
            return evaluation.run()


@dataclass
class _Progress:
    """What is carried from attack to attack, and kept in the state file."""

    x_adv: Tensor
    broken: Tensor
    height: Tensor
    found_by: list[str]
    logs: list[AttackLog] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Evaluation:
    """One run of :class:`AutoAttack`."""

    def __init__(
        self,
        settings: AutoAttack,
        model: Classifier,
        problem: Problem,
        state_path: str | PathLike[str] | None,
        on_attack: Callable[[AttackLog], None] | None,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self.settings, self.model, self.problem = settings, model, problem
        self.counter = PassCounter(model)
        self.state_path = None if state_path is None else Path(state_path)
        self.on_attack, self.on_step = on_attack, on_step
        self.n = len(problem.x)

    def run(self) -> AutoAttackResult:
        started = time.perf_counter()
        identity = self._identity() if self.state_path is not None else {}
        strategy = plan(self.model, stochastic=self._random())
        stages = self.settings.stages(stochastic=strategy.stochastic)
        if strategy.stochastic and not any(isinstance(s, Square) for s in stages) and strategy.white_box is None:
            stages = (Square(self.settings.threat, batch_size=self.settings.batch_size),)
        self.n_draws = self.settings.n_draws if strategy.stochastic else 1
        clean = self._logits(self.problem.x)
        self.problem = replace(self.problem, context={"clean_logits": clean})
        progress = self._resume(identity)
        if progress is None:
            progress = self._clean(clean, strategy, started)
            self._save(progress, identity)
        done = len(progress.logs) - 1
        for attack in stages[done:]:
            self._attack(attack, strategy, progress)
            self._save(progress, identity)
        return self._result(progress, strategy)

    def _random(self) -> bool:
        """Whether two passes over a few inputs differ by more than rounding."""
        x = self.problem.x[:_PROBED]
        with torch.no_grad():
            first, second = (self.counter(padded(x))[: len(x)].double() for _ in range(2))
        scale = first.norm(dim=1).clamp(min=1e-12)
        return bool(((first - second).norm(dim=1) > _SAME * scale).any())

    def _logits(self, x: Tensor) -> Tensor:
        here = replace(self.problem, model=self.counter, n_draws=self.n_draws)
        return torch.cat([here.logits(part) for part in x.split(self.settings.batch_size)])

    def _clean(self, clean: Tensor, strategy: Strategy, started: float) -> _Progress:
        x, y = self.problem.x, self.problem.y
        broken = misclassified(clean, y)
        progress = _Progress(
            x.clone(), broken, margin(clean, y), ["clean" if wrong else "" for wrong in broken.tolist()]
        )
        progress.notes.extend(strategy.notes)
        self._log(progress, "clean", self.n, int(broken.sum()), (0, 0), started)
        return progress

    def _attack(self, attack: IterativeAttack, strategy: Strategy, progress: _Progress) -> None:
        started, before = time.perf_counter(), (self.counter.forwards, self.counter.backwards)
        rows = (~progress.broken).nonzero().squeeze(1)
        if not len(rows):
            return self._log(progress, attack.name, 0, 0, before, started, skipped="no robust sample was left")
        target = strategy.white_box if attack.uses_gradient else self.model
        if target is None:
            skipped = "the model has no gradient and offers no surrogate"
            return self._log(progress, attack.name, len(rows), 0, before, started, skipped=skipped)
        meter = self.counter if target is self.model else PassCounter(target)
        here = replace(self.problem.rows(rows), model=meter, n_draws=max(self.n_draws, attack.n_draws))
        try:
            # On a surrogate the first broken point only just crosses the border: it would not transfer.
            chosen = persistent(attack) if "transfer" in strategy.name and target is not self.model else attack
            with frozen(target):
                points = chosen.search(here, on_step=self.on_step)
        except NotDifferentiableError as error:
            progress.notes.append(f"{attack.name} was skipped: {error}")
            return self._log(progress, attack.name, len(rows), 0, before, started, skipped="no gradient")
        if meter is not self.counter:
            self.counter.forwards += meter.forwards
            self.counter.backwards += meter.backwards
        progress.notes.extend(note for note in attack.notes(here) if note not in progress.notes)
        broken = self._record(attack.name, rows, points, progress)
        return self._log(progress, attack.name, len(rows), broken, before, started)

    def _record(self, name: str, rows: Tensor, points: Tensor, progress: _Progress) -> int:
        """Judge the stored points on the model itself and keep those that break it, or come nearer to it."""
        y, x = self.problem.y[rows], self.problem.x[rows]
        logits = self._logits(points)
        inside = self.settings.threat.contains(points, x)
        broken, height = misclassified(logits, y) & inside, margin(logits, y)
        better = broken | (inside & (height > progress.height[rows]))
        progress.x_adv[rows[better]] = points[better]
        progress.height[rows[better]] = height[better]
        progress.broken[rows[broken]] = True
        for row in rows[broken].tolist():
            progress.found_by[row] = name
        return int(broken.sum())

    def _log(
        self,
        progress: _Progress,
        name: str,
        attempted: int,
        broken: int,
        before: tuple[int, int],
        started: float,
        *,
        skipped: str = "",
    ) -> None:
        entry = AttackLog(
            name,
            attempted,
            broken,
            float((~progress.broken).double().mean()),
            self.counter.forwards - before[0],
            self.counter.backwards - before[1],
            time.perf_counter() - started,
            skipped,
        )
        progress.logs.append(entry)
        logger.info(
            "%s: %d of %d broken, robust accuracy %.2f %%", name, broken, attempted, 100 * entry.robust_accuracy
        )
        if self.on_attack is not None:
            self.on_attack(entry)

    def _result(self, progress: _Progress, strategy: Strategy) -> AutoAttackResult:
        settings, y = self.settings, self.problem.y
        draws = []
        if strategy.stochastic:
            self.n_draws = 1
            for _ in range(settings.n_evaluations):
                right = ~misclassified(self._logits(progress.x_adv), y)
                draws.append(float(right.double().mean()))
        version = "custom" if settings.attacks else settings.version
        if strategy.stochastic and not settings.attacks:
            version = "rand"
        elif version == "fast":
            progress.notes.append("'fast' leaves out FAB and Square: an upper bound of the standard robust accuracy")
        return AutoAttackResult(
            progress.x_adv,
            progress.broken,
            settings.threat.distance(progress.x_adv, self.problem.x),
            progress.height,
            tuple(progress.found_by),
            sum(entry.forwards for entry in progress.logs),
            sum(entry.backwards for entry in progress.logs),
            tuple(progress.notes),
            version=version,
            clean_accuracy=progress.logs[0].robust_accuracy,
            strategy=strategy.name,
            log=tuple(progress.logs),
            reevaluated=tuple(draws),
        )

    # -- state file ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a state file must agree with."""
        problem = self.problem
        digest = sha256()
        for tensor in (problem.x, problem.y, problem.index):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            "schema": SCHEMA,
            "settings": repr(self.settings),
            "seed": problem.seed,
            "model": fingerprint(self.model),
            "data": digest.hexdigest(),
        }

    def _save(self, progress: _Progress, identity: dict[str, Any]) -> None:
        if self.state_path is None:
            return
        record = {
            **identity,
            "found_by": progress.found_by,
            "logs": [asdict(entry) for entry in progress.logs],
            "notes": progress.notes,
        }
        text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        arrays = {"x_adv": progress.x_adv, "broken": progress.broken, "height": progress.height}
        save_tensors(self.state_path, {**{k: v.cpu() for k, v in arrays.items()}, "record": text})

    def _resume(self, identity: dict[str, Any]) -> _Progress | None:
        if self.state_path is None or not self.state_path.exists():
            return None
        arrays = load_tensors(self.state_path)
        if set(arrays) != {"x_adv", "broken", "height", "record"}:
            raise CheckpointError(f"{self.state_path} is no state of AutoAttack: it holds {', '.join(arrays)}")
        record = parse_json(arrays["record"].numpy().tobytes(), source=str(self.state_path))
        for key, value in identity.items():
            if record.get(key) != value:
                raise CheckpointError(
                    f"{self.state_path} was written with another {key} ({record.get(key)!r}, now {value!r}); "
                    "give another state_path, or remove the file to start again"
                )
        device = self.problem.x.device
        return _Progress(
            arrays["x_adv"].to(device),
            arrays["broken"].to(device),
            arrays["height"].to(device),
            list(record["found_by"]),
            [AttackLog(**entry) for entry in record["logs"]],
            list(record["notes"]),
        )
