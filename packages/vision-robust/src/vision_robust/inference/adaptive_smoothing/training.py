"""Training of the mixing network, and the attacks that know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.attacks.apgd import APGD
from robust_core.attacks.engine import Problem, Rows
from robust_core.attacks.pgd import PGD
from robust_core.checks import check_choice, check_count, check_inputs, check_labels, check_number
from robust_core.losses.margin import cross_entropy, targeted_dlr
from robust_core.models import PassCounter, frozen, predict_logits
from robust_core.random import Seed, derive, resolve_seed
from robust_core.threats import Threat
from robust_core.training.objective import Batch, Loss
from robust_core.training.objectives import RandomObjective
from vision_robust.inference.adaptive_smoothing.mixed import MixedClassifier

__all__ = ["MixingAPGD", "MixingLoss", "MixingObjective", "MixingPGD", "randomised_attack"]


class _Watched(nn.Module):
    """A mixed classifier that remembers gamma of its last pass, for losses that need more than logits."""

    def __init__(self, mixed: MixedClassifier) -> None:
        super().__init__()
        self.mixed = mixed
        self.gamma: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mixture = self.mixed.mix(x)
        self.gamma = mixture.gamma
        return mixture.log_probabilities


def _mixing_loss(problem: Problem, rank: int, ceiling: float) -> Callable[[Tensor], Tensor]:
    """Return ``(1 - w) loss + w BCE(gamma, 1)`` with w ~ U(0, ceiling) for each row; climbing it lowers gamma.

    ``loss`` is the cross-entropy (rank 0) or targeted DLR towards the rank-th most likely other class.
    """
    watched = problem.model.model if isinstance(problem.model, PassCounter) else problem.model
    if not isinstance(watched, _Watched):
        raise TypeError("this attack is for a MixedClassifier; call it through run() or as a function")
    weight = ceiling * problem.streams("mixing-weight").uniform((1,)).squeeze(1)
    target = problem.context["order"][:, rank] if rank else None

    def loss(logits: Tensor) -> Tensor:
        y = problem.y
        base = cross_entropy(logits, y) if target is None else targeted_dlr(logits, y, target)
        if watched.gamma is None:
            return base
        return (1 - weight) * base + weight * F.softplus(-watched.gamma[: len(logits)])

    return loss


class _Aware:
    """What the attacks on a mixture add to core's: they watch gamma, and never stop at the first broken point."""

    stop_when_broken: ClassVar[bool] = False

    def search(self, problem: Problem, *, on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """Rank the other classes by the clean logits, watch the mixture, and search."""
        counter = problem.model if isinstance(problem.model, PassCounter) else None
        mixed = problem.model if counter is None else counter.model
        if not isinstance(mixed, MixedClassifier):
            raise TypeError(f"model is a {type(mixed).__name__}; this attack is for a MixedClassifier")
        order = predict_logits(problem.model, problem.x).scatter(1, problem.y[:, None], -torch.inf)
        order = torch.cat([problem.y[:, None], order.argsort(1, descending=True)[:, :-1]], 1)
        watched: Any = _Watched(mixed)
        if counter is not None:
            counter.model, watched = watched, counter
        try:
            seen = replace(problem, model=watched, context={**problem.context, "order": order})
            return super().search(seen, on_step=on_step)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if counter is not None:
                counter.model = mixed


@dataclass(frozen=True)
class MixingAPGD(_Aware, APGD):
    """Auto-PGD on the mixture that also drives gamma towards the accurate classifier.

    Args:
        target_rank: 0 climbs the cross-entropy; k targets the k-th most likely other class by DLR.
        bce_ceiling: largest weight of the term on gamma; the weight of each sample is uniform below it.
    """

    target_rank: int = 0
    bce_ceiling: float = 0.4

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"mixing-apgd-{'ce' if self.target_rank == 0 else f't{self.target_rank}'}"

    def climb(self, problem: Problem, state: Rows) -> Callable[[Tensor], Tensor]:
        """Return the randomised loss of the paper."""
        return _mixing_loss(problem, self.target_rank, self.bce_ceiling)


@dataclass(frozen=True)
class MixingPGD(_Aware, PGD):
    """PGD on the mixture with the same loss; ``momentum`` decays the accumulated gradient."""

    target_rank: int = 0
    bce_ceiling: float = 0.4
    name: ClassVar[str] = "mixing-pgd"

    def _climb(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        return _mixing_loss(problem, self.target_rank, self.bce_ceiling)


def randomised_attack(
    threat: Threat,
    *,
    kind: Literal["apgd", "pgd"] = "apgd",
    target_rank: int = 0,
    generator: Seed = None,
    mean_iterations: float | None = None,
    eps_range: tuple[float, float] = (0.4, 1.1),
    bce_ceiling: float = 0.4,
    batch_size: int = 256,
) -> MixingAPGD | MixingPGD:
    """Return an attack whose strength is drawn anew: radius, number of iterations and momentum.

    Args:
        threat: its radius is scaled by U(eps_range).
        kind: ``"apgd"`` or ``"pgd"``.
        target_rank: see :class:`MixingAPGD`.
        generator: seed of the draw.
        mean_iterations: the number of iterations is chi-squared with this mean; 75 for APGD and 20 for PGD by default.
        eps_range: range of the factor on the radius.
        bce_ceiling: see :class:`MixingAPGD`.
        batch_size: rows in flight.

    Deviation: radius and iterations are drawn for each attack (batch and target), not for each sample; over training
    their distribution is the same.
    """
    check_choice("kind", kind, ("apgd", "pgd"))
    draw = torch.Generator().manual_seed(resolve_seed(generator))
    low, high = eps_range
    factor, momentum = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
    mean = mean_iterations if mean_iterations is not None else (75.0 if kind == "apgd" else 20.0)
    # chi-squared with k degrees of freedom: a sum of k squared normals
    squares = torch.randn(max(round(mean), 1), generator=draw, dtype=torch.float64).square().sum()
    n_iter = max(1, round(float(squares)))
    radius = threat.with_eps(threat.eps * (low + (high - low) * factor))
    common = {"n_iter": n_iter, "target_rank": target_rank, "bce_ceiling": bce_ceiling, "batch_size": batch_size}
    if kind == "apgd":
        return MixingAPGD(radius, **common)
    return MixingPGD(radius, step_size=5 * radius.eps / n_iter, momentum=0.9 * momentum, **common)


class MixingLoss(nn.Module):
    """``c_BCE BCE(gamma, s) + c_CE CE(f, y) + c_prod BCE CE``: gamma is to tell attacked (s = 1) from clean inputs.

    Args:
        bce: weight of the detection loss.
        ce: weight of the classification loss.
        prod: weight of their product, which counts detection more where the mixture errs.
        clean: factor on clean samples.
    """

    def __init__(self, *, bce: float = 1.5, ce: float = 0.0, prod: float = 0.2, clean: float = 1.0) -> None:
        super().__init__()
        for name, value in {"bce": bce, "ce": ce, "prod": prod, "clean": clean}.items():
            check_number(name, value, low=0)
        self.bce, self.ce, self.prod, self.clean = bce, ce, prod, clean

    def forward(self, log_probabilities: Tensor, y: Tensor, gamma: Tensor, attacked: Tensor) -> Tensor:
        """Return (B,) losses; ``attacked`` (B,) holds 1 for attacked and 0 for clean samples."""
        detection = F.binary_cross_entropy_with_logits(gamma, attacked.to(gamma.dtype), reduction="none")
        classification = F.nll_loss(log_probabilities, y, reduction="none")
        total = self.bce * detection + self.ce * classification + self.prod * detection * classification
        return total * torch.where(attacked > 0, 1.0, self.clean)


class MixingObjective(RandomObjective):
    """Train the mixing network against fresh attacks on the whole mixture.

    Every batch is attacked by the cross-entropy and towards ``n_targets`` classes; clean and attacked copies are
    shuffled together, so that the batch norm of the score sees both.

    Args:
        threat: the attacker at factor 1.
        loss: weights of the three terms.
        n_targets: targeted attacks for each batch.
        kind: ``"apgd"`` or ``"pgd"``.
        mean_iterations: see :func:`randomised_attack`.
        eps_range: range of the factor on the radius.
        bce_ceiling: largest weight of the term on gamma in the attacks.
        generator: seed of the attacks.
    """

    def __init__(
        self,
        threat: Threat,
        *,
        loss: MixingLoss | None = None,
        n_targets: int = 9,
        kind: Literal["apgd", "pgd"] = "apgd",
        mean_iterations: float | None = None,
        eps_range: tuple[float, float] = (0.4, 1.1),
        bce_ceiling: float = 0.4,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        check_count("n_targets", n_targets, low=0)
        self.threat, self.n_targets = threat, n_targets
        self.kind: Literal["apgd", "pgd"] = kind
        self.loss = MixingLoss() if loss is None else loss
        self.mean_iterations, self.eps_range, self.bce_ceiling = mean_iterations, eps_range, bce_ceiling

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters of the mixing network alone."""
        network = _mixed(model).mixing_network
        return [] if network is None else network.parameters()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss on a batch ``{x (B, ...), y (B,), index (B,)}`` and its attacked copies."""
        mixed, x, y = _mixed(model), batch["x"], batch["y"]
        check_inputs(x, self.threat.domain)
        check_labels(y, len(x))
        seed = self.step_seed(batch)
        with frozen(mixed):
            n_targets = min(self.n_targets, mixed(x[:1]).shape[1] - 1)
            attacked = [self._attack(mixed, batch, seed, rank) for rank in range(n_targets + 1)]
        copies = len(attacked)
        inputs = torch.cat([x] * copies + attacked)
        labels, truth = y.repeat(2 * copies), torch.arange(2, device=x.device).repeat_interleave(copies * len(x))
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(derive(seed, "order")))
        losses, rows = [], order.to(x.device)
        for part in rows.chunk(2 * copies):
            mixture = mixed.mix(inputs[part])
            losses.append(self.loss(mixture.log_probabilities, labels[part], mixture.gamma, truth[part]))
        total = torch.cat(losses)
        is_attacked = truth[rows] > 0
        parts = {"clean": total[~is_attacked].mean().detach(), "attacked": total[is_attacked].mean().detach()}
        return Loss(total.mean(), parts)

    def _attack(self, mixed: MixedClassifier, batch: Batch, seed: int, rank: int) -> Tensor:
        attack = randomised_attack(
            self.threat,
            kind=self.kind,
            target_rank=rank,
            generator=derive(seed, "strength", rank),
            mean_iterations=self.mean_iterations,
            eps_range=self.eps_range,
            bce_ceiling=self.bce_ceiling,
        )
        index = self.index(batch)
        return attack(mixed, batch["x"], batch["y"], index=index, generator=derive(seed, "attack", rank))


def _mixed(model: nn.Module) -> MixedClassifier:
    inner = getattr(model, "module", model)  # a data-parallel wrapper keeps the model there
    if not isinstance(inner, MixedClassifier) or inner.mixing_network is None:
        raise TypeError(f"model is a {type(inner).__name__}; a MixedClassifier with a mixing_network is needed")
    return inner
