"""The two steps of CRMT as objectives, with its adversarial and mixup variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_finite, check_number
from robust_core.models import frozen
from robust_core.random import Seed, stream
from robust_core.threats import L2
from robust_core.training import Batch, FastPGD, Loss, Stage
from robust_core.training.inner import refuse_bad_labels
from robust_core.training.objectives import RandomObjective
from vision_robust.certified.crmt.model import Packed
from vision_robust.certified.crmt.radius import margin_over_slopes, score_lipschitz

__all__ = ["CRMTMargins", "CRMTWeights", "crmt_stages", "unimodal_margin_loss"]

Variant = Literal["joint", "adversarial", "mixup"]
FLOOR = 1e-5
"""Added inside the logarithm, as in the official code: beyond a margin of about 11 nothing is left to gain."""


def unimodal_margin_loss(
    scores: Sequence[Tensor], y: Tensor, other: Tensor | None = None, mix: Tensor | float = 1.0
) -> Tensor:
    """Return (B,) ``log(1e-5 + sum_m sum_{k != y} exp(s_k^m - s_y^m))``: a smooth maximum of negated margins.

    For mixed inputs the reference is ``mix s_y + (1 - mix) s_other`` and the sum leaves both labels out.

    Args:
        scores: (B, K) of each modality, before class weights.
        y: (B,) labels.
        other: (B,) labels of the inputs mixed in, if any.
        mix: share of ``y``'s input, a number or (B,).
    """
    found = torch.stack(list(scores), dim=1)  # (B, M, K)
    found = found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
    out = F.one_hot(y, found.shape[2]).to(found.dtype)
    reference, left_out = (found * out[:, None, :]).sum(2), out.bool()
    if other is not None:
        second = F.one_hot(other, found.shape[2]).to(found.dtype)
        share = torch.as_tensor(mix, dtype=found.dtype, device=found.device).reshape(-1, 1)
        reference = share * reference + (1 - share) * (found * second[:, None, :]).sum(2)
        left_out = left_out | second.bool()
    gaps = (found - reference[:, :, None]).masked_fill(left_out[:, None, :], -torch.inf).flatten(1)
    return torch.cat([gaps, gaps.new_full((len(gaps), 1), math.log(FLOOR))], dim=1).logsumexp(1)


def _scored(model: nn.Module) -> Any:
    if not (hasattr(model, "scores") and hasattr(model, "fusion")):
        raise TypeError(f"model is a {type(model).__name__}; CRMT trains a Packed or MultiModalClassifier")
    return model


class CRMTMargins(RandomObjective):
    """Step 1: cross entropy of the fused logits, and ``rho`` times the loss of the single modalities' margins.

    Args:
        variant: ``"joint"`` on inputs as they are; ``"adversarial"`` (CRMT-AT) on attacked ones; ``"mixup"``
            (CRMT-Mix) on mixtures of two samples with one share for all modalities.
        rho: weight of the margins; 0 trains the fusion alone.
        attack: of the adversarial variant; 5 steps of eps / 5 in L2 0.1 over all modalities together when None.
        concentration: both parameters of the Beta distribution of shares.
        generator: seed.
    """

    def __init__(
        self,
        variant: Variant = "joint",
        rho: float = 2.0,
        *,
        attack: FastPGD | None = None,
        concentration: float = 1.0,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        self.variant = check_choice("variant", variant, ("joint", "adversarial", "mixup"))
        self.rho = check_number("rho", rho, low=0)
        self.concentration = check_number("concentration", concentration, low=0, open_low=True)
        self.attack = attack or FastPGD(L2(0.1), n_iter=5, step_size=0.02, random_start=False)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``fused`` and ``margins``."""
        net, x, y = _scored(model), batch["x"], batch["y"]
        if isinstance(x, Tensor) and x.device.type == "cpu":
            check_finite("x", x)
        other, share = None, torch.ones(())
        if self.variant == "adversarial":
            x = self.attack(model, x, y, index=self.index(batch), generator=self.step_seed(batch))
        elif self.variant == "mixup":
            x, other, share = self._mixed(batch)
        scores = net.scores(x)
        logits = net.fusion.combine(scores)
        refuse_bad_labels(logits, y)
        fused = share * F.cross_entropy(logits, y)
        if other is not None:
            fused = fused + (1 - share) * F.cross_entropy(logits, other)
        margins = unimodal_margin_loss(scores, y, other, share).mean()
        return Loss(fused + self.rho * margins, {"fused": fused.detach(), "margins": margins.detach()})

    def _mixed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return mixed inputs, the labels mixed in, and the share of each sample's own input."""
        x, y = batch["x"], batch["y"]
        generator = stream(self.step_seed(batch), 0, "mixup")
        ends = torch.full((2,), self.concentration)
        gammas = torch._standard_gamma(ends, generator=generator)
        share = (gammas[0] / gammas.sum().clamp(min=1e-30)).to(x)
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        return share * x + (1 - share) * x[partner], y[partner], share

    def after_step(self, model: nn.Module, step: int) -> None:
        """Keep class weights at 0 or above."""
        del step
        _scored(model).fusion.clip()


class CRMTWeights(nn.Module):
    """Step 2: raise the mean of the paper's r(x) over class weights a alone, against the strongest rival.

    Encoders and directions rest, in eval mode; the Lipschitz constants of the scores do not depend on ``a`` and are
    worked out once, as rigorous upper bounds.

    Attributes:
        lipschitz: (M, K) constants, from ``setup`` or the first batch.
    """

    lipschitz: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lipschitz", None)

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Work out the Lipschitz constants.

        Raises:
            TypeError: the model is not packed, or its fusion has no class weights to train.
        """
        del n_samples, n_classes
        if not isinstance(model, Packed) or not isinstance(model.fusion.weights, nn.Parameter):
            raise TypeError("model: a Packed classifier whose fusion has class weights to train (OrthogonalFusion)")
        self.lipschitz = score_lipschitz(model).to(model.fusion.weights)

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the class weights."""
        return [_scored(model).fusion.weights]

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return minus the mean radius, with part ``radius``."""
        if self.lipschitz is None:
            self.setup(model, 0, 0)
        net, y = _scored(model), batch["y"]
        with frozen(model), torch.no_grad():
            scores = torch.stack(net.scores(batch["x"]))
            bias = net.fusion.bias.clone()
        logits = (net.fusion.weights[:, None, :] * scores).sum(0) + bias
        refuse_bad_labels(logits, y)
        rival = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
        lipschitz = self.get_buffer("lipschitz")
        radius = margin_over_slopes(logits, y, rival, net.fusion.weights, lipschitz).mean()
        return Loss(-radius, {"radius": radius.detach()})

    def after_step(self, model: nn.Module, step: int) -> None:
        """Keep class weights at 0 or above."""
        del step
        _scored(model).fusion.clip()


def _step_decay(optimiser: torch.optim.Optimizer, n_steps: int, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    every = max(1, round(60 * n_steps / epochs))
    return torch.optim.lr_scheduler.StepLR(optimiser, step_size=every, gamma=0.1)


def crmt_stages(
    *,
    epochs: int = 140,
    weight_epochs: int | None = None,
    lr: float = 1e-3,
    rho: float = 2.0,
    variant: Variant = "joint",
    attack: FastPGD | None = None,
    generator: Seed = None,
) -> list[Stage]:
    """Return the official schedule for ``fit``: SGD with momentum; step 2 at 0.03 of the rate for a third of the time.

    Args:
        epochs: of step 1; the rate falls to a tenth every 60.
        weight_epochs: of step 2; ``epochs // 3 - 1``, at least 1, when None. 0 leaves it out.
        lr: rate of step 1.
        rho: weight of the margins; as the following, see :class:`CRMTMargins`.
        variant: ``"joint"``, ``"adversarial"`` or ``"mixup"``.
        attack: of the adversarial variant.
        generator: seed of what step 1 draws.
    """
    weight_epochs = max(epochs // 3 - 1, 1) if weight_epochs is None else weight_epochs
    check_count("weight_epochs", weight_epochs, low=0)
    first: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4)
    second = partial(torch.optim.SGD, lr=0.03 * lr, momentum=0.9, weight_decay=1e-2)
    margins = CRMTMargins(variant, rho, attack=attack, generator=generator)
    stages = [Stage(margins, first, epochs, partial(_step_decay, epochs=epochs))]
    return stages + ([Stage(CRMTWeights(), second, weight_epochs)] if weight_epochs else [])
