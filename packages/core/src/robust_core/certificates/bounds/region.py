"""The set of inputs that a bound speaks of: a ball cut with the box of valid inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Ball, Box, Rounding, down, up
from robust_core.certificates.bounds.operators import contract
from robust_core.threats import Threat

__all__ = ["Region", "box_minimum"]


def box_minimum(rows: Tensor, box: Box) -> Tensor:
    """Return (B, R): the least value of each row (B, R, *shape) over the box."""
    return contract(rows, box.centre) - contract(rows.abs(), box.radius)


@dataclass(frozen=True)
class Region:
    """Norm balls of one radius for each sample, cut with the domain.

    Attributes:
        x: (B, *shape) centres.
        eps: (B,) radii.
        p: the norm.
        box: the smallest box known to hold the set.
    """

    x: Tensor
    eps: Tensor
    p: float
    box: Box

    @classmethod
    def of(cls, threat: Threat, x: Tensor, eps: Tensor | float, *, rounding: Rounding | None = None) -> Region:
        """Return the region of a threat around ``x``; with ``rounding``, rounded outward (``x`` in float64).

        Outward means: every stored tensor that ``threat.contains`` accepts is inside, although the norm that it
        compares is itself computed in float64.
        """
        radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
        if rounding is not None:
            radius = radius * (1 + rounding.gamma_wide(4 * x[0].numel() + 64))
        wide = radius.reshape(-1, *[1] * (x.ndim - 1))
        lower, upper = x - wide, x + wide
        if rounding is not None:
            lower, upper = down(lower), up(upper)
        if threat.domain is not None:
            lower, upper = lower.clamp_(min=threat.domain[0]), upper.clamp_(max=threat.domain[1])
        box = Box.ends(lower, upper, outward=rounding is not None)
        if not math.isinf(threat.p):
            box.ball = Ball(x, wide.expand_as(x), torch.zeros_like(x))
        return cls(x, radius, threat.p, box)

    def minimum(self, rows: Tensor) -> Tensor:
        """Return (B, R): a lower bound of each row (B, R, *shape) over the set: the better of box and ball."""
        over_box = box_minimum(rows, self.box)
        if math.isinf(self.p):
            return over_box
        order = 2.0 if self.p == 2 else math.inf
        length = torch.linalg.vector_norm(rows.flatten(2), ord=order, dim=2)
        over_ball = contract(rows, self.x) - self.eps[:, None] * length
        return torch.maximum(over_box, over_ball)
