"""A teacher that adapts to noise: meta-learned over kinds and severities of noise.

    φ'_T = φ - α ∇_φ L_T^support(φ)                      inner steps, for each task T = (kind, severity)
    φ   <- φ - β mean_T ∇ L_T^query(φ'_T)                the outer step, by any optimiser

First order (Finn, Abbeel and Levine 2017, arXiv 1703.03400, section 5.2) takes the query's gradient at φ' and applies
it to φ; second order differentiates through the inner steps; Reptile (Nichol, Achiam and Schulman 2018, arXiv
1803.02999) moves towards φ'. All three are one objective for :func:`robust_core.training.fit`: the first with the inner
gradient held constant, the last as ``½ ‖φ - φ'‖²`` with φ' held constant, whose gradient step of size ε is
``φ + ε (φ' - φ)``.

The start that meta-learning finds is no trained network: ask it for nothing before it is adapted (:func:`adapted`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import SampleStreams, Seed, derive, reseeded, resolve_seed
from robust_core.training import Batch, Loss, RandomObjective
from vision_robust.lidar.intact.perturbation import TargetedPerturbation
from vision_robust.lidar.intact.tasks import Perception, clouds_of
from vision_robust.lidar.types import Clouds

__all__ = ["ORDERS", "MetaLearning", "adapted"]

ORDERS = ("first", "second", "reptile")


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"model has batch statistics ({name}), which would carry noise from one task to the next; "
                "use norms of a point or a sample (LayerNorm, GroupNorm) in the teacher"
            )


def _noisy(
    noise: TargetedPerturbation, family: str, model: nn.Module, task: Perception, batch: Batch, level: Tensor, seed: int
) -> Clouds:
    clouds = clouds_of(batch)
    index = batch.get("index")
    index = torch.arange(len(clouds), device=clouds.points.device) if index is None else index
    streams = SampleStreams(seed, index, f"teacher/{family}")
    return noise.only(family)(model, task, clouds, batch, level, streams).clouds


class MetaLearning(RandomObjective):
    """Learn to adapt to noise. Each step cuts its batch into ``n_tasks`` tasks, each into support and query.

    Args:
        task: what is perceived.
        noise: its families are the kinds of noise, aimed at nothing.
        inner_lr: α.
        inner_steps: 1 to 5 are usual.
        n_tasks: tasks in a step, fewer where the batch holds less than two samples for each.
        order: one of :data:`ORDERS`.
        severity: λ of a task is uniform below it.
        generator: seed of noise and severities.
    """

    def __init__(
        self,
        task: Perception,
        noise: TargetedPerturbation,
        *,
        inner_lr: float = 0.05,
        inner_steps: int = 1,
        n_tasks: int = 4,
        order: str = "first",
        severity: float = 1.0,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        self.task, self.noise = task, noise
        self.inner_lr = check_number("inner_lr", inner_lr, low=0.0, open_low=True)
        self.inner_steps, self.n_tasks = check_count("inner_steps", inner_steps), check_count("n_tasks", n_tasks)
        self.order = check_choice("order", order, ORDERS)
        self.severity = check_number("severity", severity, low=0.0, high=1.0)

    def setup(self, model: nn.Module, n_samples: int, n_classes: int | None) -> None:
        """Refuse a model whose statistics would leak between tasks."""
        del n_samples, n_classes
        _refuse_batch_statistics(model)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss whose gradient is the outer one."""
        seed, rows = self.step_seed(batch), len(batch["x"])
        n_tasks = max(1, min(self.n_tasks, rows // 2))  # the last batch of a pass may be short
        level = self.severity * SampleStreams(seed, torch.arange(n_tasks), "severity").uniform(())
        level = level.to(batch["x"].device)
        families, total, before = list(self.noise.families), [], []
        for number in range(n_tasks):
            cut = slice(rows * number // n_tasks, rows * (number + 1) // n_tasks)
            part = {k: v[cut] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
            family = families[derive(seed, "family", number) % len(families)]
            severity = level[number].expand(len(part["x"]))
            part |= _columns(_noisy(self.noise, family, model, self.task, part, severity, derive(seed, number)))
            outer, start = self._task(model, part)
            total.append(outer)
            before.append(start)
        loss = torch.stack(total).mean()
        return Loss(loss, {"outer": loss.detach(), "before": torch.stack(before).mean()})

    def _task(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the outer loss of a task, and the support's loss before adapting."""
        start = {name: p for name, p in model.named_parameters() if p.requires_grad}
        n, reptile = len(batch["x"]), self.order == "reptile"
        half = n // 2 if n > 1 and not reptile else 0  # what cannot be cut is both
        support = _rows(batch, 0, half or n)
        first, weights = None, dict[str, Tensor](start)
        for _ in range(self.inner_steps):
            loss = self._loss(model, weights, support)
            first = loss.detach() if first is None else first
            steps = torch.autograd.grad(loss, list(weights.values()), create_graph=self.order == "second")
            weights = {k: w - self.inner_lr * g for (k, w), g in zip(weights.items(), steps, strict=True)}
        assert first is not None
        if reptile:
            squares = [(p - weights[name].detach()).square().sum() for name, p in start.items()]
            return 0.5 * torch.stack(squares).sum(), first
        return self._loss(model, weights, _rows(batch, half, n)), first

    def _loss(self, model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        clouds = clouds_of(batch)
        outputs = functional_call(model, weights, (clouds.points, clouds.mask))
        return self.task.loss(outputs, batch).mean()


def _columns(clouds: Clouds) -> dict[str, Tensor]:
    return {"x": clouds.points, "mask": clouds.mask}


def _rows(batch: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    return {k: v[start:end] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def adapted(
    model: nn.Module,
    task: Perception,
    batch: Batch,
    noise: TargetedPerturbation,
    *,
    lr: float = 0.05,
    steps: int = 1,
    severity: float = 0.5,
    generator: Seed = None,
) -> dict[str, nn.Module]:
    """Return family of noise -> a copy of the teacher after ``steps`` inner steps on ``batch`` under that noise.

    Args:
        model: the meta-learned start; left as it is.
        task: what is perceived.
        batch: support, clean.
        noise: its families.
        lr: α, as it was learned with.
        steps: inner steps.
        severity: λ of the noise.
        generator: seed of the noise.
    """
    check_count("steps", steps)
    seed, found = resolve_seed(generator), {}
    level = torch.full((len(batch["x"]),), severity, device=batch["x"].device)
    for family in noise.families:
        copied = copy.deepcopy(model)
        parameters = [p for p in copied.parameters() if p.requires_grad]
        for step in range(steps):
            clouds = _noisy(noise, family, copied, task, batch, level, derive(seed, "adapt", step))
            with reseeded(derive(seed, "layers", step), level.device):  # the copy may have dropout
                loss = task.loss(copied(clouds.points, clouds.mask), batch).mean()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= lr * g
        found[family] = copied.eval()
    return found
