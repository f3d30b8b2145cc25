"""Doubts about the model itself, settled before anything is measured.

Most wrong robustness figures come from the set-up, not from the attack: a model left in train mode, batch statistics
used at test time, probabilities in place of logits, a cut gradient. Each costs a pass or two to see. What makes every
figure meaningless is refused; what an honest defence may have (randomness, no gradient) is flagged, and the report
says so in red.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_core.errors import NotDifferentiableError
from robust_core.models import Classifier, frozen, padded
from robust_core.random import reseeded

__all__ = ["TOLERANCE", "ModelChecks", "check_model"]

TOLERANCE = 1e-5
"""Largest difference of two passes over the same rows, relative to max(1, |logits|)."""


@dataclass(frozen=True)
class ModelChecks:
    """What the checks found.

    Attributes:
        n_classes: classes that the model tells apart.
        stochastic: two passes over the same rows differ.
        probabilities: rows are non-negative and add up to 1.
        zero_gradient: the gradient of the loss with respect to the input is 0, cut or absent.
        flags: red flags, in sentences.
        notes: what the model itself declares, so that attackers took it into account.
    """

    n_classes: int
    stochastic: bool
    probabilities: bool
    zero_gradient: bool
    flags: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """Return the findings for the result document."""
        return {
            "eval_mode": True,
            "batch_independent": None if self.stochastic else True,
            "stochastic": self.stochastic,
            "probabilities": self.probabilities,
            "zero_gradient": self.zero_gradient,
        }


def check_model(model: Classifier, x: Tensor, y: Tensor) -> ModelChecks:
    """Examine ``model`` on a few rows.

    Args:
        model: maps (B, ...) to logits (B, C).
        x: (B, ...) inputs on the model's device.
        y: (B,) labels.

    Raises:
        ValueError: a part of the model is in train mode; its output is not (B, C), holds NaN, has fewer classes than
            there are labels, or changes with the other rows of the batch.
    """
    _check_mode(model)
    with frozen(model), torch.no_grad(), reseeded(0, x.device):
        first, second = (_logits(model, x) for _ in range(2))
        size = max(1.0, float(first.abs().max()))
        stochastic = float((first - second).abs().max()) > TOLERANCE * size
        if not stochastic:
            _check_batch(model, x, first, TOLERANCE * size)
    if first.shape[1] <= int(y.max()):
        raise ValueError(f"the model has {first.shape[1]} outputs, the labels go up to {int(y.max())}")
    probabilities = bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all())
    zero_gradient = _zero_gradient(model, x, y)
    flags, notes = _sentences(model, stochastic, probabilities, zero_gradient)
    return ModelChecks(first.shape[1], stochastic, probabilities, zero_gradient, tuple(flags), tuple(notes))


def _sentences(
    model: Classifier, stochastic: bool, probabilities: bool, zero_gradient: bool
) -> tuple[list[str], list[str]]:
    found, notes = [], []
    if stochastic and getattr(model, "stochastic", False):
        notes.append("the model is random, as it declares: every figure is that of one draw, repeated by the seed")
    elif stochastic:
        found.append(
            "randomised model: two passes over the same inputs differ, so a single attack run overstates robustness; "
            "average the attack over the randomness (EOT) and repeat the evaluation"
        )
    if probabilities:
        found.append(
            "outputs are probabilities: the model ends in a softmax, whose saturation hides gradients from attacks; "
            "return the logits"
        )
    if zero_gradient and not getattr(model, "differentiable", True):
        notes.append("the model has no input gradient, as it declares: attackers use a surrogate, or queries alone")
    elif zero_gradient:
        found.append(
            "no input gradient: gradient-based attacks cannot work on this model; trust black-box and transfer "
            "attacks only, or give a differentiable surrogate (BPDA)"
        )
    return found, notes


def _check_mode(model: Classifier) -> None:
    if not isinstance(model, nn.Module):
        return
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise ValueError(
            f"model is in train mode ({', '.join(training[:3])}{more}): dropout and batch statistics would be "
            "active; call model.eval() first"
        )


def _logits(model: Classifier, x: Tensor) -> Tensor:
    logits = model(padded(x))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) < len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returned {shape}; a classifier maps (B, ...) to logits (B, C)")
    logits = logits[: len(x)]
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model returned NaN on clean inputs; nothing can be measured")
    return logits


def _check_batch(model: Classifier, x: Tensor, logits: Tensor, tolerance: float) -> None:
    """Row 0 among copies of itself must give what it gives among the others."""
    for row in {0, len(x) - 1}:
        alone = _logits(model, x[row : row + 1])[0]
        gap = float((alone - logits[row]).abs().max())
        if not gap <= tolerance:
            raise ValueError(
                f"model depends on the batch: the logits of one row change by {gap:.3g} with the other rows. "
                "Test-time batch statistics leak between samples; use running statistics, or wrap the method so "
                "that it maps each row by itself"
            )


def _zero_gradient(model: Classifier, x: Tensor, y: Tensor) -> bool:
    point = x.detach().clone().requires_grad_(True)
    with frozen(model), torch.enable_grad():
        try:
            logits = model(padded(point))[: len(x)]
        except NotDifferentiableError:  # a black box refuses inputs that want a gradient
            return True
        if not logits.requires_grad:
            return True
        # of the label's own logit: the cross-entropy of a confident model saturates, and that is not masking
        own = logits.gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(own, point, allow_unused=True)
    return gradient is None or not bool(gradient.any())
