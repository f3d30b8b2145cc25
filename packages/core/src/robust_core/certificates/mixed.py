"""Certificates of a mixture of an accurate and a robust classifier, from what is known of the robust one alone.

``f = (1 - m) g + m h`` on probabilities, with the mixing weight m in [1/2, 1] on the robust classifier h. Whatever g
does (it may answer anything, it may be fooled completely), f answers y wherever ``h_y - h_i >= (1 - m) / m`` for every
other class i. (Bai, Anderson, Kim and Sojoudi, arXiv 2301.12554; margin lemma, Lipschitz and smoothing theorems.)

* :func:`certify_mixed_lipschitz`: h has Lipschitz probabilities: ``min_i (m (h_y - h_i) + m - 1) / (m (L_y + L_i))``.
* :func:`certify_mixed_smoothing`: h is a Gaussian-smoothed probability or vote. The paper's radius is
  ``sigma / 2 (Phi^-1(m p_y) - Phi^-1(m p_2 + 1 - m))``. Ours is larger: h itself, not its image in [0, m], moves by
  at most t / sigma in units of Phi^-1, so ``m Phi(Phi^-1(p_y) - t) >= m Phi(Phi^-1(p_2) + t) + 1 - m`` is all that is
  needed at ``sigma t``; from ``p_y`` alone that is ``sigma (Phi^-1(p_y) - Phi^-1(1 / 2m))``. Half-spaces attain it.
* :func:`mixed_certificate`: makes a certificate about the function ``"mixed"`` of one of these.

A weight that depends on the input is covered if its least value over the whole ball stands for m: give that bound,
one for each row. Weights below 1/2 certify nothing. The probabilities must be bounds that hold: the frequencies of a
Monte-Carlo run in place of ``p_lower`` give a curve, not a certificate. The published constant sqrt(2/pi)/sigma for
the Lipschitz constant of smoothed probabilities is for values in [-1, 1]; :func:`smoothed_lipschitz` has that for
[0, 1], half as large and sharp.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from robust_core.certificates.result import ABSTAIN, About, Certificate, Status
from robust_core.certificates.statistics import SLACK, normal_quantile_lower, normal_quantile_upper
from robust_core.checks import check_choice, check_number

__all__ = ["certify_mixed_lipschitz", "certify_mixed_smoothing", "mixed_certificate", "smoothed_lipschitz"]


def smoothed_lipschitz(sigma: float) -> float:
    """Return the L2-Lipschitz constant ``1 / (sigma sqrt(2 pi))`` of any smoothed probability, rounded up."""
    check_number("sigma", sigma, low=0.0, open_low=True)
    return (1.0 + SLACK) / (sigma * math.sqrt(2.0 * math.pi))


def certify_mixed_lipschitz(
    probabilities: Tensor, lipschitz: Tensor | float, mixing_weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the classes and the radii of the mixture, from Lipschitz probabilities of the robust classifier.

    Args:
        probabilities: (B, C) rows of the robust classifier, in the simplex.
        lipschitz: upper bounds of the Lipschitz constants of the *probabilities*: one number, (C,) or (B, C). The
            norm of the radius is theirs.
        mixing_weight: weight of the robust classifier, or a lower bound of it over the ball: a number or (B,).

    Returns:
        (B,) int64 class, ``ABSTAIN`` where nothing is certified; (B,) float64 radius, rounded down, 0 there.
    """
    p = _simplex(probabilities)
    m = _weight(mixing_weight, p)
    bound = torch.as_tensor(lipschitz, dtype=torch.float64, device=p.device)
    if not bool(torch.isfinite(bound).all()) or bool((bound < 0).any()):
        raise ValueError("lipschitz: finite constants of at least 0 are needed")
    try:
        bound = torch.broadcast_to(bound, p.shape)
    except RuntimeError as error:
        raise ValueError(f"lipschitz has shape {tuple(bound.shape)}; one number, (C,) or (B, C) is needed") from error
    label = p.argmax(1, keepdim=True)
    gap = m[:, None] * (p.gather(1, label) - p) + m[:, None] - 1.0
    slope = m[:, None] * (bound.gather(1, label) + bound)
    gap = gap - 4.0 * SLACK  # the rounding of a few operations on numbers of at most 1
    radius = torch.where(gap > 0, gap / slope, 0.0).scatter(1, label, torch.inf).amin(1)
    radius = torch.nextafter(radius * (1.0 - SLACK), torch.zeros_like(radius))
    # a constant function is robust everywhere; what is reported stays a number
    return _answer(label.squeeze(1), radius.clamp(max=torch.finfo(torch.float64).max), m)


def certify_mixed_smoothing(
    p_lower: Tensor | float,
    p2_upper: Tensor | float | None = None,
    *,
    sigma: float,
    mixing_weight: Tensor | float,
    bound: str = "sharp",
) -> Tensor:
    """Return the L2 radius of the mixture with a Gaussian-smoothed robust classifier.

    Args:
        p_lower: (B,) lower bounds of the smoothed probability (or vote) of the class in question, e.g.
            ``certificate.details["p_lower"]``.
        p2_upper: (B,) upper bounds of that of every other class; ``1 - p_lower`` by default. Two bounds that each
            fail with probability alpha / 2 make a claim that fails with probability alpha.
        sigma: standard deviation of the noise.
        mixing_weight: weight of the robust classifier, or a lower bound of it over the ball: a number or (B,).
        bound: ``"sharp"``, attained by half-spaces, or ``"published"``, the paper's smaller one.

    Returns:
        (B,) float64 radii, rounded down; 0 where nothing is certified.
    """
    check_number("sigma", sigma, low=0.0, open_low=True)
    check_choice("bound", bound, ("sharp", "published"))
    p = _probability("p_lower", torch.as_tensor(p_lower, dtype=torch.float64)).reshape(-1)
    m = _weight(mixing_weight, p)
    if p2_upper is None:
        second = 1.0 - p
    else:
        second = _probability("p2_upper", torch.as_tensor(p2_upper, dtype=torch.float64, device=p.device))
        second = torch.minimum(second.reshape(-1), 1.0 - p)
    first, rival, weight = (tensor.cpu().numpy() for tensor in (p, second.expand_as(p) + 2.0**-53, m))
    reach = _sharp_reach if bound == "sharp" else _published_reach
    step = reach(first, np.minimum(rival, 1.0), weight)
    radius = np.nextafter(sigma * step * (1.0 - SLACK), -np.inf)
    radius = np.clip(np.nan_to_num(radius, nan=0.0), 0.0, np.finfo(np.float64).max)
    return torch.where(m >= 0.5, torch.as_tensor(radius, dtype=torch.float64, device=p.device), 0.0)


def _published_reach(p: np.ndarray, rival: np.ndarray, m: np.ndarray) -> np.ndarray:
    own = np.asarray(normal_quantile_lower(m * p * (1.0 - 2.0**-52)))
    other = np.asarray(normal_quantile_upper(np.minimum(m * rival + (1.0 - m) + 2.0**-51, 1.0)))
    with np.errstate(invalid="ignore"):
        return 0.5 * (own - other)


def _sharp_reach(p: np.ndarray, rival: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Return the largest t with ``m Phi(Phi^-1(p) - t) >= m Phi(Phi^-1(rival) + t) + 1 - m``, by bisection."""
    own, other = np.asarray(normal_quantile_lower(p)), np.asarray(normal_quantile_upper(rival))

    def holds(t: np.ndarray) -> np.ndarray:
        worst = m * (ndtr(own - t) - ndtr(other + t)) - (1.0 - m)
        return worst >= 4.0 * SLACK  # more than the rounding of the line above

    low, high = np.zeros_like(p), np.full_like(p, 40.0)  # Phi(-40) is 0 in float64
    for _ in range(60):
        middle = 0.5 * (low + high)
        inside = holds(middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return low


def mixed_certificate(
    prediction: Tensor,
    radius: Tensor,
    *,
    robust: Certificate | About,
    accurate_fingerprint: str,
    mixing_weight: Tensor | float,
    norm: str = "L2",
    alpha: float = 0.0,
    method: str = "",
) -> Certificate:
    """Return the certificate about the function ``"mixed"``.

    Args:
        prediction: (B,) int64 class of each row.
        radius: (B,) radii of one of the theorems; rows of 0 are abstentions.
        robust: what is known of the robust classifier: its certificate (whose ``alpha`` is then taken over) or what
            that is about.
        accurate_fingerprint: ``robust_core.models.fingerprint`` of the accurate classifier.
        mixing_weight: as given to the theorem.
        norm: norm of the radius.
        alpha: failure probability of each row, where ``robust`` is no certificate.
        method: how the radius was found.
    """
    check_choice("norm", norm, ("Linf", "L2", "L1"))
    about = robust.about if isinstance(robust, Certificate) else robust
    if isinstance(robust, Certificate):
        alpha = robust.alpha
    weight = torch.as_tensor(mixing_weight, dtype=torch.float64).reshape(-1)
    wrapping = f"{about.fingerprint}|{accurate_fingerprint}|{weight.tolist()}"
    how = method or f"mixed with weight {float(weight.min()):g} or more; {about.method}"
    certified = (radius > 0) & (prediction >= 0)
    return Certificate(
        torch.where(certified, prediction, ABSTAIN),
        torch.where(certified, radius.double(), 0.0),
        torch.where(certified, int(Status.CERTIFIED), int(Status.ABSTAINED)),
        alpha,
        robust.rigorous if isinstance(robust, Certificate) else True,
        About("mixed", hashlib.sha256(wrapping.encode()).hexdigest(), norm, how),
        dict(robust.cost) if isinstance(robust, Certificate) else {},
    )


def _weight(mixing_weight: Tensor | float, rows: Tensor) -> Tensor:
    m = torch.as_tensor(mixing_weight, dtype=torch.float64, device=rows.device)
    if m.ndim > 1 or (m.ndim == 1 and len(m) != len(rows)):
        raise ValueError(f"mixing_weight has shape {tuple(m.shape)}; a number or ({len(rows)},) is needed")
    return _probability("mixing_weight", m).expand(len(rows))


def _probability(name: str, value: Any) -> Tensor:
    if value.ndim > 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; a number or (B,) is needed")
    if not bool(((value >= 0) & (value <= 1)).all()):  # NaN fails this test
        raise ValueError(f"{name} holds values outside [0, 1]")
    return value


def _simplex(probabilities: Tensor) -> Tensor:
    if not isinstance(probabilities, Tensor) or probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError("probabilities: a tensor (B, C) with C of at least 2 is needed")
    p = probabilities.detach().double()
    whole = (p.sum(1) - 1.0).abs() < 1e-4
    if not bool(((p >= 0) & (p <= 1)).all()) or not bool(whole.all()):
        raise ValueError("probabilities: rows must lie in the simplex (softmax the logits first)")
    return p


def _answer(label: Tensor, radius: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    certified = (m >= 0.5) & (radius > 0)
    return torch.where(certified, label, ABSTAIN), torch.where(certified, radius, 0.0)
