"""Boxes and the arithmetic that widens them: what a rigorous bound adds for rounding.

A certificate must hold for the network that runs, and that network rounds. With unit roundoff ``u`` and
``gamma(n) = n u / (1 - n u)``, a sum of ``n`` products evaluated in *any* order, with or without fused
multiply-add, is off by at most ``gamma(n)`` times the sum of the absolute products (Higham, "Accuracy and Stability
of Numerical Algorithms", section 3.1). A rigorous bound computes in float64 and widens each layer by that term
with the ``u`` of the dtype in which the user runs the model, so it encloses the exact network *and* every IEEE
evaluation of it. Not covered: TF32, Winograd or FFT convolutions and half-precision accumulators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_core.errors import CertificationError

__all__ = ["Ball", "Box", "Rounding", "down", "up"]

WIDE_UNIT = 2.0**-53
"""Unit roundoff of float64."""
UNDERFLOW = 1e-300
"""More than what float64 loses by underflow."""


def _gamma(n: int, unit: float) -> float:
    if n * unit >= 0.25:
        raise CertificationError(
            f"a sum of {n} terms in an arithmetic of unit roundoff {unit:g} has no useful error bound; "
            "run the model in float64"
        )
    return n * unit / (1 - n * unit)


@dataclass(frozen=True)
class Rounding:
    """The arithmetic that a rigorous bound covers.

    Attributes:
        unit: unit roundoff of the dtype in which the user runs the model.
        tiny: smallest normal number of that dtype: an underflowing product is off by at most this.
        largest: largest finite number of that dtype.
    """

    unit: float
    tiny: float
    largest: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rounding:
        """Return the arithmetic of a dtype.

        Raises:
            ValueError: half precision, for which no useful certificate exists.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype {dtype}: certificates need a model in float32 or float64 (model.float()); "
                "half precision breaks bounds"
            )
        info = torch.finfo(dtype)
        return cls(info.eps / 2, info.tiny, info.max)

    def gamma(self, n: int) -> float:
        """Return the relative error of a sum of ``n`` products in the user's arithmetic."""
        return _gamma(n, self.unit)

    def gamma_wide(self, n: int) -> float:
        """Return the relative error of a sum of ``n`` products in float64, in which bounds are computed."""
        return _gamma(n, WIDE_UNIT)


def up(x: Tensor) -> Tensor:
    """Return the next larger float64."""
    return torch.nextafter(x, x.new_tensor(math.inf))


def down(x: Tensor) -> Tensor:
    """Return the next smaller float64."""
    return torch.nextafter(x, x.new_tensor(-math.inf))


class Ball(NamedTuple):
    """An ellipsoid, kept while each element is still a function of one input element (L2 and L1 threats).

    The value is ``point + spread * d + e`` with ``norm(d)_2 <= 1`` and ``|e| <= slack``, all (B, *shape).
    """

    point: Tensor
    spread: Tensor
    slack: Tensor


class Box:
    """Elementwise bounds (B, ...), kept as ends or as centre and radius and converted when asked.

    With ``outward`` each conversion rounds away from the enclosed set; without, it is plain and differentiable.
    """

    __slots__ = ("_centre", "_lower", "_radius", "_upper", "ball", "memo", "outward", "spare")

    def __init__(self, *, outward: bool) -> None:
        self.outward = outward
        self.spare = False
        self.memo: dict[object, Any] = {}
        self._lower: Tensor | None = None
        self._upper: Tensor | None = None
        self._centre: Tensor | None = None
        self._radius: Tensor | None = None
        self.ball: Ball | None = None

    @classmethod
    def ends(cls, lower: Tensor, upper: Tensor, *, outward: bool) -> Box:
        """Return the box between two tensors."""
        box = cls(outward=outward)
        box._lower, box._upper = lower, upper
        return box

    @classmethod
    def around(cls, centre: Tensor, radius: Tensor, *, outward: bool) -> Box:
        """Return the box of a centre and a radius of at least 0."""
        box = cls(outward=outward)
        box._centre, box._radius = centre, radius
        return box

    @classmethod
    def covered(cls, centre: Tensor, radius: Tensor) -> Box:
        """Return the box of a centre and a radius to which the rounding of ``centre +- radius`` was added already."""
        box = cls.around(centre, radius, outward=True)
        box.spare = True
        return box

    @property
    def has_ends(self) -> bool:
        """Whether the ends are already there."""
        return self._lower is not None

    @property
    def lower(self) -> Tensor:
        """(B, ...) lower ends."""
        if self._lower is None:
            lower = self.centre - self.radius
            self._lower = down(lower) if self.outward and not self.spare else lower
        return self._lower

    @property
    def upper(self) -> Tensor:
        """(B, ...) upper ends."""
        if self._upper is None:
            upper = self.centre + self.radius
            self._upper = up(upper) if self.outward and not self.spare else upper
        return self._upper

    @property
    def centre(self) -> Tensor:
        """(B, ...) centres."""
        if self._centre is None:
            self._centre = (self.lower + self.upper).mul_(0.5)
        return self._centre

    @property
    def radius(self) -> Tensor:
        """(B, ...) radii."""
        if self._radius is None:
            if self.outward:
                self._radius = up(torch.maximum(self.upper - self.centre, self.centre - self.lower))
            else:
                self._radius = (self.upper - self.lower).mul_(0.5)
        return self._radius

    @property
    def magnitude(self) -> Tensor:
        """(B, ...) largest absolute values."""
        return torch.maximum(self.upper.abs(), self.lower.abs())

    def intersect(self, lower: Tensor, upper: Tensor) -> Box:
        """Return the intersection with further bounds of the same set; NaN ends stay NaN."""
        return Box.ends(torch.maximum(self.lower, lower), torch.minimum(self.upper, upper), outward=self.outward)

    def map(self, move: Callable[[Tensor], Tensor]) -> Box:
        """Return the box after ``move``, which only moves elements."""
        if self.has_ends:
            return Box.ends(move(self.lower), move(self.upper), outward=self.outward)
        moved = Box.around(move(self.centre), move(self.radius), outward=self.outward)
        moved.spare = self.spare
        return moved
