"""What a small comp-sum loss implies for the 0-1 error, for the hypothesis set in use.

For a symmetric and complete hypothesis set H, every h in H and every distribution (arXiv 2304.07288, theorem on
comp-sum losses)::

    R_01(h) - R * _01(H) + M_01(H) <= T_tau ^ -1(R_tau(h) - R * _tau(H) + M_tau(H))

================================================  =============================
quantity                                          function
================================================  =============================
``T_tau``                                         :func:`comp_sum_transform`
``T_tau^-1`` and its weaker closed form           :func:`comp_sum_bound`
``C*_tau(H, x)``, H complete                      :func:`conditional_optimum`
``C*_tau(H, x)``, scores bounded                  :func:`bounded_optimum`
bound on ``M_tau(H)``, scores bounded             :func:`minimizability_gap_bounded`
``1 / Phi_tau(1)`` of the adversarial bound       :func:`adversarial_constant`
================================================  =============================

These bounds compare with the best of the hypothesis set. ``comp_sum_bound(training_loss, ...)`` is no certificate of
test error: it ignores ``R*_tau``, the gap and the sampling. The adversarial constant and the bound on the
gap are derived here (the constant by a rank argument: the label at rank k pays at least ``Phi_tau(k - 1)`` under any
scores; the gap by Jensen's inequality); all are tested against random distributions and scores. All
results are float64 and, for :func:`comp_sum_bound`, rounded up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.losses.comp_sum import check_tau, outer

__all__ = [
    "adversarial_constant",
    "bounded_optimum",
    "comp_sum_bound",
    "comp_sum_transform",
    "conditional_optimum",
    "minimizability_gap_bounded",
]

_NEAR_ONE = 1e-7  # closer to tau = 1 than this, cross-entropy's formula is the more exact one
_HALVINGS = 64


def _checked(name: str, value: Tensor | float, low: float, high: float) -> Tensor:
    wide = torch.as_tensor(value, dtype=torch.float64)
    if not bool(((wide >= low) & (wide <= high)).all()):  # NaN fails too
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}] and not be NaN; got {value!r}")
    return wide


def comp_sum_transform(beta: Tensor | float, tau: float, n_classes: int) -> Tensor:
    """Return ``T_tau(beta)``: the least excess of the comp-sum loss that a 0-1 excess of ``beta`` implies.

    Increasing and convex with ``T(0) = 0``; attained for two classes and ``tau <= 2``. With ``a = 1 / (2 - tau)``
    the mean of ``(1 + beta)^a`` and ``(1 - beta)^a`` is formed in logarithms,
    ``a log(1 - beta^2) / 2 + log cosh(a artanh(beta))``, which neither overflows near ``tau = 2`` nor cancels near 1.

    Args:
        beta: any shape, in [0, 1].
        tau: at least 0.
        n_classes: at least 2.

    Returns:
        float64 in the shape of ``beta``.
    """
    beta = _checked("beta", beta, 0, 1)
    check_tau(tau)
    check_count("n_classes", n_classes, low=2)
    if tau >= 2:
        return beta / ((tau - 1) * float(n_classes) ** (tau - 1))
    if abs(1 - tau) < _NEAR_ONE:
        return (_xlogx(1 + beta) + _xlogx(1 - beta)) / 2
    a = 1 / (2 - tau)
    up, down = torch.log1p(beta), torch.log1p(-beta)
    # Each form is exact where the other rounds: the sum near beta = 1, the product near 0.
    total = torch.where(beta > 0.5, up + down, torch.log1p(-(beta**2)))
    log_mean = 0.5 * a * total + _log_cosh(0.5 * a * (up - down))
    log_mean = torch.where(beta == 1, (a - 1) * math.log(2), log_mean)
    scale = 2.0 ** (1 - tau) if tau < 1 else float(n_classes) ** (1 - tau)
    return (scale * -torch.expm1((2 - tau) * log_mean) / (1 - tau)).clamp(min=0)


def _xlogx(value: Tensor) -> Tensor:
    return torch.special.xlogy(value, value)


def _log_cosh(angle: Tensor) -> Tensor:
    small = torch.log1p(2 * torch.sinh(angle.clamp(max=1) / 2) ** 2)
    return torch.where(angle < 1, small, angle + torch.log1p(torch.exp(-2 * angle)) - math.log(2))


def comp_sum_bound(excess: Tensor | float, tau: float, n_classes: int, *, closed_form: bool = False) -> Tensor:
    """Return ``T_tau^-1(excess)``: the greatest 0-1 excess that a comp-sum excess allows, at most 1.

    Args:
        excess: any shape, at least 0: ``R(h) - R*(H) + M(H)`` of the comp-sum loss.
        tau: at least 0.
        n_classes: at least 2.
        closed_form: the weaker ``sqrt(2^tau (2 - tau) t)``, ``sqrt(2 n^(tau-1) t)``, ``(tau - 1) n^(tau-1) t``
            for tau in [0, 1), [1, 2) and [2, inf).

    Returns:
        float64 in the shape of ``excess``. The bisection returns the upper end of its last interval.
    """
    excess = _checked("excess", excess, 0, math.inf)
    check_tau(tau)
    n = float(check_count("n_classes", n_classes, low=2))
    if closed_form:
        if tau >= 2:
            return ((tau - 1) * n ** (tau - 1) * excess).clamp(max=1)
        slope = 2**tau * (2 - tau) if tau < 1 else 2 * n ** (tau - 1)
        return torch.sqrt(slope * excess).clamp(max=1)
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = comp_sum_transform(middle, tau, n_classes) > excess
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high


def conditional_optimum(p: Tensor, tau: float) -> Tensor:
    """Return ``C*``: the least expected comp-sum loss over all scores, given the class probabilities.

    Reached by ``softmax`` proportional to ``p^(1 / (2 - tau))`` for ``tau < 2`` and in the limit of the one-hot at
    the likeliest class for ``tau >= 2``; Shannon's entropy at ``tau = 1``.

    Args:
        p: (..., C) class probabilities.
        tau: at least 0.

    Returns:
        (...) float64.
    """
    check_tau(tau)
    p = _checked("p", p, 0, 1)
    if p.ndim < 1 or p.shape[-1] < 2 or not bool(((p.sum(-1) - 1).abs() < 1e-6).all()):
        raise ValueError(f"p has shape {tuple(p.shape)}; (..., C) with C >= 2 and rows that add up to 1 is needed")
    p = p / p.sum(-1, keepdim=True)
    if tau >= 2:
        # (1 - sum_y p_y q_y^(tau - 1)) / (tau - 1) is convex in q here: the best q is a corner.
        return (1 - p.amax(-1)) / (tau - 1)
    if abs(1 - tau) < _NEAR_ONE:
        return -_xlogx(p).sum(-1)
    log_sum = torch.logsumexp(torch.log(p) / (2 - tau), -1)
    return (torch.expm1((2 - tau) * log_sum) / (1 - tau)).clamp(min=0)


def bounded_optimum(tau: float, n_classes: int, bound: Tensor | float) -> Tensor:
    """Return ``C*(x) = Phi_tau((n - 1) exp(-2 bound))`` for scores in [-bound, bound] and a deterministic label.

    Decreasing in ``tau`` and in ``bound``.

    Args:
        tau: at least 0.
        n_classes: at least 2.
        bound: any shape, at least 0: the largest absolute score ``Lambda(x)``.
    """
    check_tau(tau)
    check_count("n_classes", n_classes, low=2)
    return outer(torch.log1p((n_classes - 1) * torch.exp(-2 * _checked("bound", bound, 0, math.inf))), tau)


def minimizability_gap_bounded(tau: float, n_classes: int, bound: Tensor | float, *, sum_exponential: float) -> Tensor:
    """Return an upper bound on the minimizability gap ``M_tau(H)``, for deterministic labels and bounded scores.

    ``Phi_tau`` is concave and increasing, so ``R*_tau(H) <= Phi_tau(R*_0(H))`` by Jensen's inequality and
    ``M_tau(H) <= Phi_tau(R*_0(H)) - mean_x Phi_tau((n - 1) exp(-2 Lambda(x)))``, which falls as ``tau`` grows.

    Args:
        tau: at least 0.
        n_classes: at least 2.
        bound: any shape, ``Lambda(x)`` of each x (one value if it is the same everywhere).
        sum_exponential: the sum-exponential risk of any hypothesis of the set: an upper bound of ``R*_0(H)``.

    Returns:
        float64 scalar, at least 0.

    Raises:
        ValueError: among others, a risk below the conditional optimum, which no hypothesis can have.
    """
    check_number("sum_exponential", sum_exponential, low=0)
    least = float(bounded_optimum(0.0, n_classes, bound).mean())
    if sum_exponential < least * (1 - 1e-9):
        raise ValueError(f"sum_exponential={sum_exponential:g}: scores within the bound cannot go below {least:g}")
    risk = outer(torch.log1p(torch.tensor(sum_exponential, dtype=torch.float64)), tau)
    return (risk - bounded_optimum(tau, n_classes, bound).mean()).clamp(min=0)


def adversarial_constant(tau: float) -> float:
    """Return ``1 / Phi_tau(1)``: adversarial 0-1 excess <= this * excess of the adversarial comp-sum rho-margin loss.

    1 at ``tau = 0``, ``1 / ln 2`` at 1, 2 at 2. For hypothesis sets that are symmetric and locally rho-consistent;
    the same constant serves the smooth loss while it is an upper bound (``SmoothAdvCompSumLoss.is_upper_bound``).
    """
    return 1.0 / float(outer(torch.tensor(math.log(2.0), dtype=torch.float64), check_tau(tau)))
