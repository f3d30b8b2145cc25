"""The student, and what it is compared with: one objective, one trainer, everything else by arguments.

    L = (1 - μ) L_task(g(X)) + μ L_task(g(X̃)) + κ T² KL(f(X)^{1/T} ‖ g(X̃)^{1/T})            :class:`CurriculumTraining`

X̃ is X under noise of the curriculum's severity, aimed by the teacher's saliency w where the batch has it. κ = 0, or no
teacher, leaves out the last term; μ = 0 and κ = 0 together are standard training, step for step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.models import frozen
from robust_core.random import SampleStreams, Seed, derive, resolve_seed
from robust_core.training import Batch, Loss, RandomObjective, TrainState, fit
from vision_robust.lidar.intact.curriculum import Curriculum
from vision_robust.lidar.intact.perturbation import TargetedPerturbation
from vision_robust.lidar.intact.saliency import SALIENCIES, robust_saliency
from vision_robust.lidar.intact.tasks import Perception, clouds_of
from vision_robust.lidar.intact.teacher import MetaLearning, adapted

__all__ = ["METHODS", "CurriculumTraining", "Hardened", "Settings", "harden", "points_of_view"]

METHODS = ("standard", "noise", "curriculum", "adversarial", "intact", "intact-without-shift")


class CurriculumTraining(RandomObjective):
    """Minimise the loss above.

    The batch holds ``x``, targets, ``mask`` where points are absent, ``saliency`` (B, N) where noise is aimed, and the
    ``teacher``'s outputs (B, ...) where they were kept; with none of its own there, ``teacher`` is asked.

    Args:
        task: what is perceived.
        noise: what disturbs.
        curriculum: how much.
        mu: μ, weight of the disturbed clouds.
        kappa: κ, weight of distillation.
        temperature: T.
        teacher: asked in eval mode where the batch holds no outputs of it.
        generator: seed of noise and severities.
    """

    def __init__(
        self,
        task: Perception,
        noise: TargetedPerturbation,
        curriculum: Curriculum | None = None,
        *,
        mu: float = 0.5,
        kappa: float = 0.1,
        temperature: float = 1.0,
        teacher: nn.Module | None = None,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        self.task, self.noise = task, noise
        self.curriculum = Curriculum() if curriculum is None else curriculum
        self.mu = check_number("mu", mu, low=0.0, high=1.0)
        self.kappa = check_number("kappa", kappa, low=0.0)
        self.temperature = check_number("temperature", temperature, low=0.0, open_low=True)
        self._teacher = (teacher,)  # in a tuple: its weights are no state of the student's training

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch, with its parts."""
        clouds, parts, terms = clouds_of(batch), {}, []
        if self.mu < 1:
            clean = self.task.loss(model(clouds.points, clouds.mask), batch).mean()
            parts["clean"] = clean.detach()
            terms.append(clean if self.mu == 0 else (1 - self.mu) * clean)
        wants_teacher = self.kappa > 0 and ("teacher" in batch or self._teacher[0] is not None)
        if self.mu > 0 or wants_teacher:
            index = batch.get("index")
            index = torch.arange(len(clouds), device=clouds.points.device) if index is None else index
            seed = self.step_seed(batch)
            level = self.curriculum.draw(self.share(batch), SampleStreams(seed, index, "severity"))
            found = self.noise(
                model,
                self.task,
                clouds,
                batch,
                level,
                SampleStreams(seed, index, "noise"),
                weights=batch.get("saliency"),
            ).clouds
            outputs = model(found.points, found.mask)
            noisy = self.task.loss(outputs, batch).mean()
            parts |= {"noisy": noisy.detach(), "severity": level.mean()}
            terms.append(self.mu * noisy)
            if wants_teacher:
                far = self.task.distance(outputs, self._say(batch), self.temperature).mean()
                parts["distance"] = far.detach()
                terms.append(self.kappa * far)
        return Loss(sum(terms[1:], terms[0]), parts)

    def _say(self, batch: Batch) -> Any:
        teacher = self._teacher[0]
        if "teacher" in batch or teacher is None:
            return batch["teacher"]
        clouds = clouds_of(batch)
        with frozen(teacher), torch.no_grad():
            return teacher(clouds.points, clouds.mask)


@dataclass(frozen=True)
class Settings:
    """How INTACT, and what it is compared with, are trained.

    Attributes:
        noise: families, sizes and the attacker; ``standard`` ignores it, ``adversarial`` keeps its shift alone.
        schedule: of the curriculum.
        warm: share of training after which severity is 1.
        replay: share of easier samples.
        mu: weight of disturbed clouds.
        kappa: weight of distillation.
        temperature: of distillation.
        teacher_steps: outer steps of the teacher.
        teacher_lr: β, of Adam.
        inner_lr: α.
        inner_steps: of the teacher.
        n_tasks: tasks in an outer step.
        order: ``first``, ``second`` or ``reptile``.
        n_draws: K of the saliency.
        saliency: ``gradient`` or ``core_shift``.
        smooth: neighbours that saliency is averaged over; 0 for none.
    """

    noise: TargetedPerturbation = field(default_factory=TargetedPerturbation)
    schedule: str = "linear"
    warm: float = 0.7
    replay: float = 0.2
    mu: float = 0.5
    kappa: float = 0.1
    temperature: float = 1.0
    teacher_steps: int = 300
    teacher_lr: float = 2e-3
    inner_lr: float = 0.01
    inner_steps: int = 1
    n_tasks: int = 4
    order: str = "first"
    n_draws: int = 8
    saliency: str = "gradient"
    smooth: int = 0

    def __post_init__(self) -> None:
        check_choice("saliency", self.saliency, SALIENCIES)
        check_count("teacher_steps", self.teacher_steps)


@dataclass(frozen=True, eq=False)
class Hardened:
    """A trained student.

    Attributes:
        model: the student, trained in place.
        state: the last of its training.
        teacher: the meta-learned start, before it is adapted; None for methods without.
        saliency: (S, N) of the training set; None for methods without.
    """

    model: nn.Module
    state: TrainState
    teacher: nn.Module | None = None
    saliency: Tensor | None = None


def points_of_view(
    teacher: nn.Module,
    task: Perception,
    columns: Mapping[str, Tensor],
    settings: Settings,
    *,
    batch_size: int = 256,
    keep_outputs: bool = True,
    generator: Seed = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Return what the adapted teacher says of the training set: ``saliency`` (S, N), and ``teacher`` outputs.

    The teacher is adapted once for each family of noise, on the first ``batch_size`` samples; the outputs are those of
    the copy adapted to the first family, on undisturbed clouds.
    """
    seed, n = resolve_seed(generator), len(columns["x"])
    options = {"lr": settings.inner_lr, "steps": settings.inner_steps, "generator": derive(seed, "adapt")}
    models = adapted(teacher, task, _cut(columns, 0, batch_size), settings.noise, **options)
    first = next(iter(models.values()))
    found: list[Tensor] = []
    said: list[Tensor] = []
    for start in range(0, n, batch_size):
        part = _cut(columns, start, start + batch_size)
        found.append(
            robust_saliency(
                models, task, part, settings.noise, n_draws=settings.n_draws, method=settings.saliency,
                smooth=settings.smooth, seed=derive(seed, "saliency"),
            )
        )  # fmt: skip
        if keep_outputs:
            with frozen(first), torch.no_grad():
                clouds = clouds_of(part)
                said.append(first(clouds.points, clouds.mask))
        if on_step is not None:
            on_step("saliency", min(start + batch_size, n), n)
    extra: dict[str, Any] = {"saliency": torch.cat(found), "reference": first}
    return extra | ({"teacher": torch.cat(said)} if keep_outputs else {})


def _cut(columns: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {"index": torch.arange(len(columns["x"]))[start:end], **{k: v[start:end] for k, v in columns.items()}}


def harden(
    student: nn.Module,
    columns: Mapping[str, Tensor],
    method: str = "intact",
    *,
    task: Perception,
    teacher: nn.Module | None = None,
    settings: Settings | None = None,
    epochs: int = 40,
    batch_size: int = 64,
    optimiser: Callable[[Any], torch.optim.Optimizer] | None = None,
    keep_outputs: bool = True,
    generator: Seed = None,
    on_step: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Hardened:
    """Train ``student`` in place by one of :data:`METHODS`.

    ==========================  ====================================================================================
    ``standard``                clean clouds only
    ``noise``                   all families but the shift, of any severity, aimed at nothing
    ``curriculum``              the same, from nothing to everything
    ``adversarial``             the shift at full strength, the same for every point
    ``intact-without-shift``    a meta-learned teacher aims all families but the shift; curriculum; distillation
    ``intact``                  all of it
    ==========================  ====================================================================================

    Args:
        student: called as ``model(points, mask)``.
        columns: ``x`` (S, N, C), targets, ``mask`` (S, N) where points are absent, ``owner`` and ``region`` of scenes.
        method: one of :data:`METHODS`.
        task: what is perceived.
        teacher: an untrained network without batch statistics, trained in place; needed by the two methods with one.
        settings: of noise, curriculum, teacher and distillation.
        epochs: passes over the training set.
        batch_size: samples in a step.
        optimiser: as of :func:`robust_core.training.fit`.
        keep_outputs: keep the teacher's outputs instead of asking it at each step; only where they are one tensor.
        generator: seed of everything.
        on_step: called with (phase, steps done, steps in all).
        options: further arguments of :func:`robust_core.training.fit`; ``checkpoint`` resumes the student's training,
            and the teacher's in a folder below.

    Raises:
        ValueError: an unknown method, no teacher where one is needed.
    """
    check_choice("method", method, METHODS)
    settings, seed = settings or Settings(), resolve_seed(generator)
    intact = method.startswith("intact")
    if intact and teacher is None:
        raise ValueError(f"teacher=None: method={method!r} needs an untrained network for its teacher")
    plain = settings.noise.only(*(f for f in settings.noise.families if f != "shift"))
    noise = {"adversarial": settings.noise.only("shift"), "intact": settings.noise}.get(method, plain)
    settings = replace(settings, noise=noise)
    schedule = {"noise": "uniform", "adversarial": "constant"}.get(method, settings.schedule)
    extra: dict[str, Any] = {}
    if teacher is not None and intact:
        _teach(teacher, columns, task, settings, batch_size, seed, options.get("checkpoint"), on_step)
        extra = points_of_view(
            teacher, task, columns, settings, keep_outputs=keep_outputs, generator=derive(seed, "view"), on_step=on_step
        )
    objective = CurriculumTraining(
        task,
        noise,
        Curriculum(schedule, warm=settings.warm, replay=settings.replay),
        mu=0.0 if method == "standard" else settings.mu,
        kappa=settings.kappa if intact else 0.0,
        temperature=settings.temperature,
        teacher=extra.pop("reference", None),
        generator=derive(seed, "student"),
    )
    total = epochs * -(-len(columns["x"]) // batch_size)

    def tell(state: TrainState, loss: Loss) -> None:
        if on_step is not None:
            on_step(method, state.step, total)

    options.setdefault("on_step", tell)
    state = fit(
        student, {**columns, **extra}, objective, epochs=epochs, batch_size=batch_size, optimiser=optimiser,
        generator=seed, **options,
    )  # fmt: skip
    return Hardened(student, state, teacher if intact else None, extra.get("saliency"))


def _teach(
    teacher: nn.Module,
    columns: Mapping[str, Tensor],
    task: Perception,
    settings: Settings,
    batch_size: int,
    seed: int,
    checkpoint: Any,
    on_step: Callable[[str, int, int], None] | None,
) -> None:
    """Meta-learn the teacher for ``teacher_steps`` steps."""
    objective = MetaLearning(
        task, settings.noise, inner_lr=settings.inner_lr, inner_steps=settings.inner_steps, n_tasks=settings.n_tasks,
        order=settings.order, generator=derive(seed, "teacher"),
    )  # fmt: skip
    batch_size = max(batch_size, 2 * settings.n_tasks)

    def tell(state: TrainState, loss: Loss) -> bool:
        if on_step is not None:
            on_step("teacher", state.step, settings.teacher_steps)
        return state.step < settings.teacher_steps

    fit(
        teacher, columns, objective, epochs=-(-settings.teacher_steps * batch_size // len(columns["x"])) + 1,
        batch_size=batch_size, optimiser=lambda p: torch.optim.Adam(p, lr=settings.teacher_lr),
        generator=derive(seed, "teacher order"), on_step=tell, n_classes=max(int(columns["y"].max()), 0) + 1,
        checkpoint=None if checkpoint is None else f"{checkpoint}/teacher",
    )  # fmt: skip
