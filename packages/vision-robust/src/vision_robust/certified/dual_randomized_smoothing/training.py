"""Training of the two sides: one objective on each, and the regulariser of clean pre-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_number
from robust_core.training import Batch, Loss, Objective
from robust_core.training.inner import refuse_bad_labels
from vision_robust.certified.dual_randomized_smoothing.sides import DualClassifier

__all__ = ["EachSide", "StableCrossEntropy", "stability"]


class EachSide(nn.Module):
    """Train both sides of a :class:`DualClassifier` at once: the sum of an objective on each of them.

    The sides share no parameter, so optimisers that work parameter by parameter (SGD, Adam) do what two runs would.

    Args:
        left: objective of the left side, e.g. ``NoiseConsistency(sigma, 4, 15.0, entropy=0.75)``.
        right: that of the right side; the same by default, which is right for objectives that keep nothing between
            steps.
    """

    def __init__(self, left: Objective, right: Objective | None = None) -> None:
        super().__init__()
        self.left, self.right = left, left if right is None else right

    def setup(self, model: DualClassifier, n_samples: int, n_classes: int) -> None:
        """Let both objectives prepare."""
        self._both("setup", model, n_samples, n_classes)

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Tell both objectives of an epoch."""
        for objective in (self.left, self.right):
            hook: Callable[..., Any] | None = getattr(objective, "on_epoch", None)
            if hook is not None:
                hook(epoch, epochs)

    def after_step(self, model: DualClassifier, step: int) -> None:
        """Tell both objectives of a step."""
        self._both("after_step", model, step)

    def _both(self, name: str, model: DualClassifier, *more: int) -> None:
        for objective, side in zip((self.left, self.right), model.sides, strict=True):
            hook: Callable[..., Any] | None = getattr(objective, name, None)
            if hook is not None:
                hook(side, *more)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the sum of both losses, with their parts as ``left/...`` and ``right/...``."""
        if not isinstance(model, DualClassifier):
            raise TypeError(f"model must be a DualClassifier, not {type(model).__name__}")
        left, right = (o(s, batch) for o, s in zip((self.left, self.right), model.sides, strict=True))
        named = (("left", left), ("right", right))
        parts = {f"{name}/{key}": value for name, loss in named for key, value in loss.parts.items()}
        totals = {name: loss.total.detach() for name, loss in named}
        return Loss(left.total + right.total, {**totals, **parts})


def stability(logits: Tensor, y: Tensor, *, ceiling: float = 0.99) -> Tensor:
    """Return the mean of ``Phi^-1(min(p_y, ceiling))`` over the rows that are right, 0 where none is.

    Args:
        logits: (B, C).
        y: (B,) int64 labels.
        ceiling: largest probability that is rewarded, in (0.5, 1).
    """
    check_number("ceiling", ceiling, low=0.5, high=1.0, open_low=True, open_high=True)
    p, label = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1).max(1)
    right = label == y
    reach = torch.special.ndtri(torch.where(right, p, 0.5).clamp(max=ceiling))
    return reach.sum() / right.sum().clamp(min=1)


class StableCrossEntropy(nn.Module):
    """Cross entropy minus ``weight`` times :func:`stability`: pre-training on clean images, before noise comes.

    Args:
        weight: of the stability; 0.5 as published.
        ceiling: largest probability that is rewarded; 0.99 as published.
    """

    def __init__(self, weight: float = 0.5, *, ceiling: float = 0.99) -> None:
        super().__init__()
        self.weight = check_number("weight", weight, low=0)
        self.ceiling = check_number("ceiling", ceiling, low=0.5, high=1.0, open_low=True, open_high=True)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``natural`` and ``stability``."""
        logits = model(batch["x"])
        refuse_bad_labels(logits, batch["y"])
        natural = F.cross_entropy(logits, batch["y"])
        reward = stability(logits, batch["y"], ceiling=self.ceiling)
        return Loss(natural - self.weight * reward, {"natural": natural.detach(), "stability": reward.detach()})
