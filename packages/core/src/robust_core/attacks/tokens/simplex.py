"""Relaxed tokens: the projections that keep a mixture of tokens a mixture.

- nearest point of the simplex, ``argmin |v - u|, v >= 0, sum v = 1``: ``max(u - mu, 0)`` for the one ``mu`` that sums
  to 1 (Duchi et al. 2008, "Efficient projections onto the l1-ball", section 3) -> :func:`project_simplex`, by Newton's
  method from below, which ends at the exact set of positive entries; no sorting of the vocabulary. It starts from the
  ``mu`` of some entries alone (the largest of each block), which lies below, as fewer entries sum to less;
- mixtures of little entropy: Geisler et al. 2024 (arXiv 2402.09154) bound the Tsallis entropy of order 2, which is the
  Gini index ``1 - sum u^2`` -> :func:`project_entropy`. Reconstructed: the points of a face of n entries whose index is
  S form a sphere around its centre, of radius ``sqrt(1 - S - 1 / n)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["project_entropy", "project_simplex"]

_BLOCK, _LARGE = 16, 4096


def project_simplex(u: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the nearest points of the probability simplex along the last axis.

    Args:
        u: (..., C) finite numbers.
        valid: (..., C) bool, entries that may be positive; None means all. Rows without any come back as 0.
    """
    if u.dtype in (torch.float16, torch.bfloat16):
        return project_simplex(u.float(), valid).to(u.dtype)
    low = torch.finfo(u.dtype).min / 4
    u = u if valid is None else u.masked_fill(~valid, low)
    point = (u - _threshold(u)).clamp_(min=0)
    return point / point.sum(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)  # takes rounding out


def _threshold(u: Tensor) -> Tensor:
    """Return (..., 1) ``mu`` with ``sum max(u - mu, 0) = 1`` along the last axis."""
    n = u.shape[-1]
    mu = u.amax(-1, keepdim=True) - 1  # from below: the largest entry alone sums to 1
    if n >= _LARGE:
        mu = torch.maximum(mu, _threshold(u[..., : n - n % _BLOCK].unflatten(-1, (_BLOCK, -1)).amax(-2)))
    for _ in range(n):
        rest = (u - mu).clamp_(min=0)
        # f(mu) = sum max(u - mu, 0) - 1 is convex and falls: Newton from below never passes its root
        above = rest.sum(-1, keepdim=True) - 1
        step = above / rest.sign_().sum(-1, keepdim=True).clamp(min=1)
        further = torch.maximum(mu + step, mu)
        if not bool((further > mu).any()):
            break
        mu = further
    return mu


def project_entropy(u: Tensor, gini: float, valid: Tensor | None = None) -> Tensor:
    """Return mixtures whose Gini index ``1 - sum u^2`` is at most ``gini``, from points of the simplex.

    Points of too much entropy are moved away from the centre of their face, onto the sphere of the bound, and projected
    back onto the simplex where an entry became negative, which leaves them on a smaller face, and so on (the paper
    does it once). The centre of a face stays: no direction leads away from it.

    Args:
        u: (..., C) points of the simplex.
        gini: the bound, 0 (one token) .. 1.
        valid: see :func:`project_simplex`.
    """
    slack = 8 * torch.finfo(u.dtype).eps
    for _ in range(u.shape[-1]):
        face = u > 0
        size = face.sum(-1, keepdim=True).clamp(min=1).to(u.dtype)
        away = torch.where(face, u - 1 / size, 0)
        length = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
        radius = (1 - gini - 1 / size).clamp(min=0).sqrt()
        outside = (length < radius * (1 - slack)) & (length > slack)
        if not bool(outside.any()):
            break
        moved = u + away * (radius / length.clamp(min=slack) - 1)
        u = torch.where(outside, project_simplex(torch.where(face, moved, -1.0), valid), u)
    return u
