"""The loss of fast certified training: robust cross-entropy and two regularisers while the radius grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.certificates.bounds import BoundCertifier, Crown, IntervalBounds, TrainingPass, robust_cross_entropy
from robust_core.certificates.bounds.box import Box
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import TrainingError
from robust_core.threats import Threat
from robust_core.training import Batch, Loss, RandomObjective, smoothed_ramp

__all__ = ["FastCertified", "SmoothedEps", "relu_balance_loss", "tightness_loss"]

VARIANTS = ("ibp", "crown-ibp")
LEAST_EPS = 1e-6
"""Radius at which the regularisers are measured while that of training is still smaller."""


@dataclass(frozen=True)
class SmoothedEps:
    """The radius as a function of the share of training done: 0, a smooth ramp, and the target.

    Attributes:
        eps: the radius after the ramp.
        begin: share of training at which the ramp begins.
        end: share at which it ends.
        mid: share of the ramp up to which it grows as a power, then linearly with the same slope.
        beta: that power.
    """

    eps: float
    begin: float = 0.0
    end: float = 0.3
    mid: float = 0.25
    beta: float = 4.0

    def __post_init__(self) -> None:
        check_number("eps", self.eps, low=0)
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin={self.begin}, end={self.end}: 0 <= begin < end <= 1, shares of training")
        smoothed_ramp(0.0, mid=self.mid, beta=self.beta)

    @classmethod
    def of_epochs(cls, eps: float, *, start: int, length: int, epochs: int) -> SmoothedEps:
        """Return the ramp as the paper states it: over ``length`` epochs from epoch ``start`` on (counted from 1).

        Args:
            eps: the radius after the ramp.
            start: first epoch of the ramp; 1 grows from the first step.
            length: epochs of the ramp.
            epochs: of the whole training.

        Raises:
            ValueError: the ramp is longer than the training.
        """
        check_count("start", start), check_count("length", length)
        if start - 1 + length > epochs:
            raise ValueError(f"start={start}, length={length}: the ramp ends after the {epochs} epochs of training")
        return cls(eps, (start - 1) / epochs, (start - 1 + length) / epochs)

    def __call__(self, share: float) -> float:
        """Return the radius at a share of training in [0, 1]; exactly ``eps`` from the end of the ramp on."""
        return self.eps * smoothed_ramp((share - self.begin) / (self.end - self.begin), mid=self.mid, beta=self.beta)


def tightness_loss(boxes: Sequence[Box], start: Box, *, tolerance: float = 0.5) -> Tensor:
    """Return L_tight: how far mean radii in front of activations exceed that of the input by more than 1 / tolerance.

    Args:
        boxes: in front of each activation, after batch normalisation.
        start: what the first layer reads (clipped, normalised).
        tolerance: tau of the paper.

    Returns:
        A scalar in [0, 1]: the mean over layers of ``max(0, tau - E[delta_0] / E[delta_i]) / tau``.
    """
    first = start.radius.mean()
    if not boxes:
        return torch.zeros_like(first)
    radii = torch.stack([box.radius.mean() for box in boxes])
    ratio = first / radii.clamp(min=torch.finfo(first.dtype).tiny)
    return (tolerance - ratio).clamp(min=0).mean() / tolerance


def relu_balance_loss(boxes: Sequence[Box], *, tolerance: float = 0.5) -> Tensor:
    """Return L_relu: how unlike active and inactive units are, in the mean and in the spread of their centres.

    Args:
        boxes: in front of each activation, after batch normalisation.
        tolerance: tau of the paper.

    Returns:
        A scalar in [0, 2]: the mean over layers of ``(max(0, tau - alpha) + max(0, tau - beta)) / tau``, where alpha
        and beta are the smaller over the larger of the two sums. Where one of them is 0, the term is 0.
    """
    if not boxes:
        return torch.zeros(())
    # Sums over the masked units stand for the means over all of them: the number of units cancels.
    active, inactive = torch.stack([_masked_sums(box) for box in boxes]).abs().unbind(1)
    low, high = torch.minimum(active, inactive), torch.maximum(active, inactive)
    ratio = low / torch.where(high > 0, high, 1.0)
    return torch.where(low > 0, (tolerance - ratio).clamp(min=0), 0.0).sum(1).mean() / tolerance


def _masked_sums(box: Box) -> Tensor:
    """Return (2, 2): sums over active, then inactive units, of centres and of their squared distance to the mean."""
    centre, radius = box.centre, box.radius
    values = torch.stack([centre, (centre - centre.mean()).square()]).flatten(1)
    masks = torch.stack([centre > radius, centre < -radius]).flatten(1)
    return masks.to(values.dtype) @ values.t()


class FastCertified(RandomObjective):
    """Train for interval certificates within a short warm-up.

    ``fit`` says how far training has come; in a loop of your own put ``share`` (0 to 1) into the batch or call
    ``on_epoch``. An objective that was told neither is that of the end of training: the full radius.

    Args:
        threat: what is certified; its radius is the target.
        schedule: radius by share of training; by default a ramp over the first 30 %.
        variant: ``"ibp"``, or ``"crown-ibp"``, whose bounds are a mixture with linear ones that fades out as the radius
            grows (tighter at first, K - 1 backward passes dearer).
        regularisation: lambda_0, the weight of the regularisers at radius 0; 0.2 or 0.1 for TinyImageNet.
        tolerance: tau of both regularisers.

    Attributes:
        eps: the radius of the last step in train mode.
    """

    def __init__(
        self,
        threat: Threat,
        schedule: SmoothedEps | None = None,
        *,
        variant: str = "ibp",
        regularisation: float = 0.5,
        tolerance: float = 0.5,
    ) -> None:
        super().__init__()
        self.threat = threat
        self.schedule = SmoothedEps(threat.eps) if schedule is None else schedule
        if self.schedule.eps != threat.eps:
            raise ValueError(f"schedule ends at eps={self.schedule.eps}, threat has {threat.eps}: one radius is needed")
        self.variant = check_choice("variant", variant, VARIANTS)
        self.regularisation = check_number("regularisation", regularisation, low=0)
        self.tolerance = check_number("tolerance", tolerance, low=0, high=1, open_low=True)
        self.eps, self._share = 0.0, 1.0
        self._bounds: BoundCertifier | None = None

    def bounds(self, model: nn.Module) -> BoundCertifier:
        """Return the certifier whose bounds are trained, of the model as it was before any compilation."""
        model = getattr(model, "_orig_mod", model)
        if self._bounds is None or self._bounds.model is not model:
            linear = self.variant == "crown-ibp"
            self._bounds = Crown(model, self.threat, "crown-ibp") if linear else IntervalBounds(model, self.threat)
        return self._bounds

    def propagate(self, model: nn.Module, batch: Batch, *, eps: float, kappa: float) -> TrainingPass:
        """Return the clean logits and the bounds to train on; a subclass may bound another set of inputs."""
        return self.bounds(model).training_pass(batch["x"], batch["y"], eps=eps, kappa=kappa)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch.

        Its parts: ``natural`` and ``robust`` cross-entropy, ``tightness_loss`` and ``relu_loss`` where they count, the
        radius ``eps``, and the shares of the batch that are ``correct`` and ``verified`` at that radius.

        Raises:
            TrainingError: a bound is NaN or infinite; the layer is named.
        """
        x, y = batch["x"], batch["y"]
        eps = self.schedule(self.share(batch))
        if model.training:
            self.eps = eps
        weight = self.regularisation * (1 - eps / self.threat.eps) if self.threat.eps else 0.0
        kappa = 1 - eps / self.threat.eps if self.threat.eps and eps else 0.0
        # Half precision would round away the radii.
        with torch.autocast(x.device.type, enabled=False):
            found = self.propagate(model, batch, eps=max(eps, LEAST_EPS) if weight else eps, kappa=kappa)
            natural = F.cross_entropy(found.logits.detach() if eps else found.logits, y)
            robust = robust_cross_entropy(found.margins, y)
            total, parts = robust if eps else natural, {"natural": natural, "robust": robust}
            if weight:
                boxes = [box for _, box in found.activations]
                tightness = tightness_loss(boxes, found.start, tolerance=self.tolerance)
                relu = relu_balance_loss(boxes, tolerance=self.tolerance)
                total = total + weight * (tightness + relu)
                parts |= {"tightness_loss": tightness, "relu_loss": relu}
        parts = {name: value.detach() for name, value in parts.items()}
        if x.device.type == "cpu" and not math.isfinite(float(total.detach())):
            raise TrainingError(f"{_broken(found)}; lower the learning rate or clip gradients (clip_norm=10)")
        return Loss(total, {**parts, **_shares(found, y), "eps": torch.full((), eps, device=x.device)})


def _shares(found: TrainingPass, y: Tensor) -> dict[str, Tensor]:
    """Return which shares of the batch are right, and proven: ties are not."""
    correct = found.logits.detach().argmax(1) == y
    others = found.margins.detach().scatter(1, y[:, None], torch.inf)
    verified = correct & (others > 0).all(1)
    return {"correct": correct.float().mean(), "verified": verified.float().mean()}


def _broken(found: TrainingPass) -> str:
    """Say where the first value that is not finite stands."""
    for node, box in zip(found.analysis.graph.nodes, found.analysis.boxes, strict=True):
        if node.operator is not None and not bool(torch.isfinite(box.upper - box.lower).all()):
            return f"the bounds of {node.operator.label} are NaN or infinite"
    return "the loss is NaN or infinite"
