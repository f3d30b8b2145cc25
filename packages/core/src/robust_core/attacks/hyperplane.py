"""The nearest point of a hyperplane inside a box, in three norms: the geometry that FAB stands on.

``nearest_on_hyperplane(x, w, b, domain, norm)`` solves, row by row and exactly,

    minimise ||d||_p   subject to   <w, x + d> = b   and   low <= x + d <= high.

With ``r = b - <w, x>`` turned positive, every element moves in the direction that raises ``<w, x>``, by a
``u_i`` between 0 and the room it has. For Linf ``u_i = min(t, room_i)`` and for L2 ``u_i = min(t |w_i|, room_i)`` with
one scalar ``t``: ``<|w|, u>`` is piecewise linear and increasing in ``t``, so sorting its breakpoints gives the
root. For L1 the elements of largest ``|w_i|`` are used up one after the other. Where the box does not reach
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
    """Return ``min(t pace, room)``, ``t`` such that ``<slope, .>`` reaches ``need``; pace 1 (Linf) or slope (L2)."""
    pace = slope if norm == "L2" else torch.ones_like(slope)
    limit = torch.where(pace > 0, room / pace.clamp(min=_tiny(slope)), 0).clamp(max=_FAR)  # the t that uses up the room
    limit, order = limit.sort(dim=1)
    most = (slope * room).gather(1, order)
    before = most.cumsum(1) - most  # gained by the elements used up earlier
    gain = (slope * pace).gather(1, order)
    rising = gain.flip(1).cumsum(1).flip(1)  # slope of the sum up to each breakpoint
    place = (before + limit * rising < need[:, None]).sum(1, keepdim=True).clamp(max=slope.shape[1] - 1)
    t = (need[:, None] - before.gather(1, place)) / rising.gather(1, place).clamp(min=_tiny(slope))
    return torch.minimum(t.clamp(min=0, max=_FAR) * pace, room)


def _greedy(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return the lengths that gain ``need`` with the smallest sum: steepest elements first."""
    slope, order = slope.sort(dim=1, descending=True)
    room = room.gather(1, order)
    gained = (slope * room).cumsum(1) - slope * room  # before this element
    length = torch.minimum(((need[:, None] - gained) / slope.clamp(min=_tiny(slope))).clamp(min=0), room)
    length = torch.where(slope > 0, length, 0)
    return torch.zeros_like(length).scatter(1, order, length)
