"""The radii of dual smoothing, as pure functions in float64, rounded down.

Write ``a`` and ``b`` for the normal quantiles of the winner's votes on the two sides, with their signs: a side on which
the winner has less than half of the votes counts against the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from robust_core.certificates.statistics import SLACK, normal_quantile_lower, normal_quantile_upper
from robust_core.checks import check_number

__all__ = ["dual_radius", "runner_up_radius", "signed_reach"]

CELLS = 256
"""Parts of the search over how an attacker shares the radius between the sides; more only sharpen the bound."""


def signed_reach(p_left: np.ndarray, p_right: np.ndarray) -> np.ndarray:
    """Return ``a + b`` rounded down; -inf where a side has no vote at all."""
    a, b = np.asarray(normal_quantile_lower(p_left)), np.asarray(normal_quantile_lower(p_right))
    with np.errstate(invalid="ignore"):
        total = np.nextafter(a + b, -np.inf)
    return np.where(np.isnan(total), -np.inf, total)  # a vote of 1 beside a vote of 0 promises nothing


def _scale(sigma_left: float, sigma_right: float) -> float:
    """Return ``1 / sqrt(sigma_left^-2 + sigma_right^-2)`` rounded down."""
    left = check_number("sigma_left", sigma_left, low=0.0, open_low=True)
    right = check_number("sigma_right", sigma_right, low=0.0, open_low=True)
    return left / math.hypot(1.0, left / right) * (1.0 - 8 * 2.0**-53)


def dual_radius(
    p_left: Tensor | float, p_right: Tensor | float, sigma_left: float, sigma_right: float | None = None
) -> Tensor:
    """Return the L2 radius ``(a + b) / sqrt(sigma_left^-2 + sigma_right^-2)`` of the theorem.

    With equal noise that is ``sigma / sqrt(2) * (a + b)``. Half-spaces attain it.

    Args:
        p_left: (B,) lower bounds of the winner's vote on the left side.
        p_right: (B,) the same on the right side.
        sigma_left: standard deviation of the noise on the left side.
        sigma_right: that on the right side; the same by default.

    Returns:
        (B,) float64 radii, rounded down; 0 where nothing is certified.
    """
    left, right, device = _pair(p_left, p_right)
    reach = signed_reach(left, right)
    radius = np.nextafter(_scale(sigma_left, sigma_left if sigma_right is None else sigma_right) * reach, -np.inf)
    return torch.as_tensor(np.where((reach > 0) & (radius > 0), radius, 0.0), dtype=torch.float64, device=device)


def runner_up_radius(
    p_left: Tensor | float,
    p_right: Tensor | float,
    q_left: Tensor | float,
    q_right: Tensor | float,
    sigma_left: float,
    sigma_right: float | None = None,
) -> Tensor:
    """Return the L2 radius inside which a class beats one rival, from bounds of both votes on both sides.

    An attacker who spends ``sigma_left s`` on the left and ``sigma_right t`` on the right leaves the class a lead of at
    least ``Phi(a_l - s) + Phi(a_r - t) - Phi(b_l + s) - Phi(b_r + t)``, which falls in s and in t. The least radius
    of a lead of 0 is bounded from *below*: the s-axis is cut into cells, and on each the near end of s is joined to
    what is still safe in t at the far end. It is at least that of :func:`dual_radius`, which holds for any rival.

    Args:
        p_left: (B,) lower bounds of the winner's vote on the left side.
        p_right: (B,) the same on the right side.
        q_left: (B,) upper bounds of the rival's vote on the left side; ``1 - p_left`` is one too.
        q_right: (B,) the same on the right side.
        sigma_left: standard deviation of the noise on the left side.
        sigma_right: that on the right side; the same by default.

    Returns:
        (B,) float64 radii, rounded down; 0 where nothing is certified. With several rivals take the least.
    """
    left, right, device = _pair(p_left, p_right)
    rival_left, rival_right, _ = _pair(q_left, q_right)
    sigma_right = sigma_left if sigma_right is None else sigma_right
    plain = dual_radius(torch.from_numpy(left), torch.from_numpy(right), sigma_left, sigma_right).numpy()
    a, b = np.asarray(normal_quantile_lower(left)), np.asarray(normal_quantile_lower(right))
    c = np.asarray(normal_quantile_upper(np.minimum(rival_left, np.nextafter(1.0 - left, 2.0).clip(max=1.0))))
    d = np.asarray(normal_quantile_upper(np.minimum(rival_right, np.nextafter(1.0 - right, 2.0).clip(max=1.0))))

    def safe(s: np.ndarray, t: np.ndarray) -> np.ndarray:
        lead = ndtr(a - s) + ndtr(b - t) - ndtr(c + s) - ndtr(d + t)
        return lead >= 8.0 * SLACK  # more than the rounding of the line above

    zero = np.zeros_like(a + c)
    far = _largest(lambda s: safe(s, zero), zero)
    # points where the lead ends bound the radius from above: nothing farther than the nearest of them needs cells
    some = far * np.linspace(0.0, 1.0, 17)[:, None]
    reached = np.hypot(sigma_left * some, sigma_right * _largest(lambda t: safe(some, t), np.zeros_like(some))).min(0)
    far = np.minimum(far, reached / sigma_left)
    ends = far * np.linspace(0.0, 1.0, CELLS + 1)[:, None]  # (CELLS + 1, B)
    left_over = _largest(lambda t: safe(ends[1:], t), np.zeros_like(ends[1:]))
    cells = np.hypot(sigma_left * ends[:-1], sigma_right * left_over).min(0)
    least = np.minimum(cells, sigma_left * far) * (1.0 - SLACK)
    radius = np.nan_to_num(np.where(safe(zero, zero), least, 0.0), nan=0.0)
    return torch.as_tensor(np.maximum(radius, plain), dtype=torch.float64, device=device)


def _largest(safe: Callable[[np.ndarray], np.ndarray], zero: np.ndarray) -> np.ndarray:
    """Return where a test that holds up to some point still holds, by bisection; 0 where it never does."""
    low, high = zero, np.full_like(zero, 40.0)  # Phi(-40) is 0 in float64
    for _ in range(48):
        middle = 0.5 * (low + high)
        inside = safe(middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return low


def _pair(left: Tensor | float, right: Tensor | float) -> tuple[np.ndarray, np.ndarray, torch.device]:
    pair = [torch.as_tensor(value, dtype=torch.float64).detach() for value in (left, right)]
    for value in pair:
        if value.ndim > 1 or not bool(((value >= 0) & (value <= 1)).all()):  # NaN fails this test
            raise ValueError("votes: probabilities in [0, 1], as numbers or (B,), are needed")
    first, second = torch.broadcast_tensors(*(value.cpu().reshape(-1) for value in pair))
    return first.numpy(), second.numpy(), pair[0].device
