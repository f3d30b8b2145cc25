"""The nearest point of a hyperplane inside a box, in three norms: the geometry that FAB stands on.

``nearest_on_hyperplane(x, w, b, domain, norm)`` solves, row by row and exactly,

    minimise ||d||_p   subject to   <w, x + d> = b   and   low <= x + d <= high.

With ``r = b - <w, x>`` turned positive, every element moves in the direction that raises ``<w, x>``, by a
``u_i`` between 0 and the room it has. For Linf ``u_i = min(t, room_i)`` and for L2 ``u_i = min(t |w_i|, room_i)`` with
one scalar ``t``: ``<|w|, u>`` is piecewise linear, increasing and concave in ``t``, so Newton's method ends at
the root. For L1 the elements of largest ``|w_i|`` are used up one after the other. Where the box does not reach
the hyperplane, the corner nearest to it is returned.

Source: Croce and Hein 2020 (arXiv 1907.02044), section 3.1; the formulation with one scalar is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_on_hyperplane"]

_FAR = 1e30  # stands for infinity, without its 0 * inf


def nearest_on_hyperplane(x: Tensor, w: Tensor, b: Tensor, domain: tuple[float, float] | None, norm: str) -> Tensor:
    """Return (B, d) the smallest steps that bring ``x`` onto ``<w, .> = b`` without leaving the box.

    Args:
        x: (B, d) points inside the box.
        w: (B, d) normals.
        b: (B,) offsets.
        domain: (low, high) of every element, or None for no box.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    """
    gap = b - (w * x).sum(1)
    direction = w.sign() * gap.sign()[:, None]
    slope, need = w.abs(), gap.abs()
    if domain is None:
        length = _unbounded(slope, need, norm)
    else:
        room = torch.where(direction > 0, domain[1] - x, x - domain[0]).clamp(min=0)
        length = _greedy(slope, room, need) if norm == "L1" else _common_pace(slope, room, need, norm)
    return direction * length


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def _unbounded(slope: Tensor, need: Tensor, norm: str) -> Tensor:
    if norm == "L1":
        top, place = slope.max(1)
        return torch.zeros_like(slope).scatter(1, place[:, None], (need / top.clamp(min=_tiny(slope)))[:, None])
    pace = slope if norm == "L2" else (slope > 0).to(slope.dtype)
    return pace * (need / (slope * pace).sum(1).clamp(min=_tiny(slope)))[:, None]


def _common_pace(slope: Tensor, room: Tensor, need: Tensor, norm: str) -> Tensor:
    """Return ``min(t, room)`` (Linf) or ``min(t slope, room)`` (L2), ``t`` such that ``<slope, .>`` reaches ``need``.

    Newton's method from below: the sum is concave in ``t``, so every step falls short of the root or hits it, and sets
    at least one more element to its room. It ends at the root itself, mostly after two to five steps.
    """
    even = norm == "Linf"
    gain, most = slope if even else slope * slope, slope * room
    t = torch.zeros_like(need)
    reach = t[:, None] if even else t[:, None] * slope
    for _ in range(slope.shape[1] + 1):  # the first takes out the elements without any room
        free = reach < room
        short = need - most.masked_fill(free, 0).sum(1)
        further = (short / (gain * free).sum(1).clamp(min=_tiny(slope))).clamp(max=_FAR)
        further = torch.maximum(further, t)
        if torch.equal(further, t):  # for all rows; one more step would change none
            break
        t = further
        reach = t[:, None] if even else t[:, None] * slope
    return torch.minimum(reach, room)


def _greedy(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return the lengths that gain ``need`` with the smallest sum: steepest elements first."""
    slope, order = slope.sort(dim=1, descending=True)
    room = room.gather(1, order)
    gained = (slope * room).cumsum(1) - slope * room  # before this element
    length = torch.minimum(((need[:, None] - gained) / slope.clamp(min=_tiny(slope))).clamp(min=0), room)
    length = torch.where(slope > 0, length, 0)
    return torch.zeros_like(length).scatter(1, order, length)
