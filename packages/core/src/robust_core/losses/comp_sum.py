"""Comp-sum losses: one knob from sum-exponential over cross-entropy to MAE, for training under label noise.

With ``p = softmax(logits)[y]`` and ``s = -log p = log(1 + u)``, ``u = sum_{k != y} exp(z_k - z_y)``, a comp-sum loss
is an outer function of the sum of exponentials (Mao, Mohri and Zhong, ICML 2023, arXiv 2304.07288)::

    loss_tau = ((1 + u)^(1 - tau) - 1) / (1 - tau)      tau != 1      -> :func:`outer`
    loss_1   = log(1 + u)

=========  ======================================  ==================================
``tau``    loss                                    name
=========  ======================================  ==================================
0          ``1/p - 1``                             :class:`SumExponentialLoss`
1          ``-log p``                              cross-entropy
1 + q      ``(1 - p^q) / q``                       :class:`GeneralizedCrossEntropy`
2          ``1 - p``                               :class:`MAELoss`
=========  ======================================  ==================================

Larger ``tau`` forgives badly wrong samples (the weight of a sample is ``(1 + u)^-tau = p^tau`` times that of
sum-exponential), which is what helps when labels are wrong and what makes training slow to start:
warm-start from ``tau = 1``, or anneal, for ``tau >= 1.5``. The default is cross-entropy, which the paper recommends as
the trade-off between the growth rate of the bound and the minimizability gap (``h_consistency``).

Evaluated as ``expm1((1 - tau) s) / (1 - tau)``, exact near ``tau = 1``: the two-term series is used only for
``|1 - tau| < 1e-9``, where it is below rounding. (A series from ``1e-4`` on would be off by 15 % at ``s = 1e4``.)
For ``tau < 1`` the exponent is limited to 60 (500 in float64), beyond which the loss goes on *linearly*: a plain clamp
would give such samples, the worst ones, no gradient at all. Modules count limited samples in ``limited``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_number

__all__ = [
    "CompSumLoss",
    "GeneralizedCrossEntropy",
    "MAELoss",
    "RhoMarginCompSumLoss",
    "SumExponentialLoss",
    "check_tau",
    "comp_sum",
    "label_gaps",
    "outer",
    "rho_margin_comp_sum",
]

Reduction = Literal["none", "mean", "sum"]
_SERIES_BELOW = 1e-9


def check_tau(tau: float) -> float:
    """Return ``tau`` if it is a finite number of at least 0."""
    return check_number("tau", tau, low=0)


def exponent_limit(dtype: torch.dtype) -> float:
    """Return where ``(1 - tau) s`` stops being exponentiated: sums and gradients stay finite beyond."""
    return 500.0 if dtype == torch.float64 else 60.0


def outer(s: Tensor, tau: float) -> Tensor:
    """Return ``Phi_tau(u)`` from ``s = log(1 + u) >= 0``, elementwise.

    ``d Phi_tau / d u = (1 + u)^-tau``: increasing, concave and 1-Lipschitz in ``u`` for ``tau >= 0``.

    Args:
        s: any shape, at least 0.
        tau: at least 0; 1 gives ``s`` itself.
    """
    power = 1.0 - tau
    if abs(power) < _SERIES_BELOW:
        return s * (1.0 + 0.5 * power * s) if power else s
    exponent = power * s
    if power < 0:
        return torch.expm1(exponent) / power
    limit = exponent_limit(s.dtype)
    inside = torch.expm1(exponent.clamp(max=limit))
    beyond = (exponent - limit).clamp(min=0) * torch.tensor(limit, dtype=s.dtype).exp().item()
    return (inside + beyond) / power


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_target(logits: Tensor, target: Tensor) -> bool:
    """Return whether ``target`` holds class probabilities rather than indices.

    Values of tensors on an accelerator are not looked at: that would stall it in every step. There an index
    out of range trips the device's own assertion, and NaN logits give a NaN loss.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(f"logits have shape {tuple(logits.shape)}; (B, C) with B >= 1 and C >= 2 is needed")
    if not logits.is_floating_point():
        raise TypeError(f"logits have dtype {logits.dtype}; floating point is needed")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}; move one of them")
    soft = target.is_floating_point()
    wanted = tuple(logits.shape) if soft else (len(logits),)
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"target is {target.dtype} of shape {tuple(target.shape)}; int64 (B,) = ({len(logits)},) or class "
            f"probabilities (B, C) = {tuple(logits.shape)} are needed"
        )
    if not soft and target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; class indices are int64")
    if logits.device.type == "cpu":
        _check_values(logits, target)
    return soft


def _check_values(logits: Tensor, target: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits hold values that are NaN or infinite; lower the learning rate or clip gradients")
    if target.is_floating_point():
        total = target.detach().double().sum(1)
        if not (bool((target >= 0).all()) and bool(((total - 1).abs() < 1e-3).all())):
            raise ValueError("target holds rows that are no probabilities (negative, NaN, or not adding up to 1)")
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"target holds labels {low} .. {high}; the logits know 0 .. {logits.shape[1] - 1}")


def _surprise(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor | None]:
    """Return ``s`` (B,) of the labels and None, or ``s`` (B, C) of all classes and the weights (B, C)."""
    soft = _check_target(logits, target)
    logits = _wide(logits)
    if not soft and not label_smoothing:
        return F.cross_entropy(logits, target, reduction="none"), None
    weights = target.to(logits.dtype) if soft else F.one_hot(target, logits.shape[1]).to(logits.dtype)
    if label_smoothing:
        weights = weights * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return -F.log_softmax(logits, dim=1), weights


def comp_sum(logits: Tensor, target: Tensor, tau: float, *, label_smoothing: float = 0.0) -> Tensor:
    """Return (B,) comp-sum losses.

    Args:
        logits: (B, C), C at least 2. Half precision is computed in float32.
        target: (B,) int64 labels, or (B, C) class probabilities: the expected loss over them.
        tau: at least 0.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1].

    Raises:
        TypeError, ValueError: shapes, dtypes, values out of range, non-finite logits.
    """
    check_tau(tau)
    check_number("label_smoothing", label_smoothing, low=0, high=1)
    s, weights = _surprise(logits, target, label_smoothing)
    return _reduce_classes(outer(s, tau), weights)


def _reduce_classes(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses if weights is None else (losses * weights).sum(1)


def label_gaps(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins ``z_y - z_k`` (B, C), 0 at ``k = y``, and the mask (B, C) of ``k != y``."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
    return logits.gather(1, y[:, None]) - logits, others


def rho_margin_comp_sum(logits: Tensor, y: Tensor, tau: float, *, rho: float = 1.0) -> Tensor:
    """Return (B,) ``Phi_tau(sum_{k != y} min(max(0, 1 - (z_y - z_k) / rho), 1))``.

    The supremum of this over a ball bounds the adversarial 0-1 loss from above, up to the constant
    ``h_consistency.adversarial_constant``. Its gradient vanishes where every margin is outside (0, rho): train with
    :class:`~robust_core.losses.SmoothAdvCompSumLoss`.

    Args:
        logits: (B, C).
        y: (B,) int64 labels.
        tau: at least 0.
        rho: margin at which a pair of classes costs nothing, above 0, in units of the logits.
    """
    check_tau(tau)
    check_number("rho", rho, low=0, open_low=True)
    if _check_target(logits, y):
        raise TypeError("y holds class probabilities; the margin loss needs int64 labels (B,)")
    gaps, others = label_gaps(_wide(logits), y)
    ramp = (1 - gaps / rho).clamp(0, 1) * others
    return outer(torch.log1p(ramp.sum(1)), tau)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean, the sum, or the losses themselves."""
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


class CompSumLoss(nn.Module):
    """The comp-sum family as a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        tau: 0 sum-exponential, 1 cross-entropy, 1 + q generalised cross-entropy, 2 MAE; at least 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1].

    Attributes:
        limited: how many losses have passed the exponent limit since the module was made (only if ``tau < 1``).
    """

    limited: Tensor

    def __init__(self, tau: float = 1.0, reduction: Reduction = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tau = check_tau(tau)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=1)
        self.register_buffer("limited", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, C) against labels (B,) or class probabilities (B, C)."""
        s, weights = _surprise(logits, target, self.label_smoothing)
        if self.tau < 1:
            with torch.no_grad():
                beyond = (1 - self.tau) * s > exponent_limit(s.dtype)
                counted = beyond if weights is None else (beyond & (weights > 0)).any(1)
                self.limited = self.limited + counted.sum().to(self.limited.device)
        return reduce(_reduce_classes(outer(s, self.tau), weights), self.reduction)

    def extra_repr(self) -> str:  # noqa: D102
        return f"tau={self.tau:g}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing:g}"


class GeneralizedCrossEntropy(CompSumLoss):
    """``(1 - p^q) / q``: the comp-sum loss of ``tau = 1 + q``, the factor ``1 / q`` included.

    Args:
        q: in (0, 1]; towards 0 cross-entropy, 1 MAE. 0.7 is the usual choice for noisy labels (Zhang and Sabuncu 2018).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: as in :class:`CompSumLoss`.
    """

    def __init__(self, q: float = 0.7, reduction: Reduction = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(1.0 + check_number("q", q, low=0, high=1, open_low=True), reduction, label_smoothing)


class MAELoss(CompSumLoss):
    """``1 - p``: the comp-sum loss of ``tau = 2``, half of ``|onehot - p|_1``."""

    def __init__(self, reduction: Reduction = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(2.0, reduction, label_smoothing)


class SumExponentialLoss(CompSumLoss):
    """``1/p - 1``: the comp-sum loss of ``tau = 0``."""

    def __init__(self, reduction: Reduction = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(0.0, reduction, label_smoothing)


class RhoMarginCompSumLoss(nn.Module):
    """:func:`rho_margin_comp_sum` as a module.

    Args:
        tau: at least 0.
        rho: margin at which a pair of classes costs nothing, above 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(self, tau: float = 1.0, rho: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.tau = check_tau(tau)
        self.rho = check_number("rho", rho, low=0, open_low=True)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, C) against labels (B,)."""
        return reduce(rho_margin_comp_sum(logits, target, self.tau, rho=self.rho), self.reduction)

    def extra_repr(self) -> str:  # noqa: D102
        return f"tau={self.tau:g}, rho={self.rho:g}, reduction={self.reduction!r}"
