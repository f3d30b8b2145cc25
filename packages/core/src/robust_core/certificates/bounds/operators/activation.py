"""Elementwise nonlinear layers: ReLU and its leaky form, sigmoid, tanh.

Between pre-activation bounds ``l <= z <= u`` an activation lies between two lines (Zhang et al. 2018, "Efficient
Neural Network Robustness Certification with General Activation Functions", arXiv 1811.00866). The upper line of
an unstable ReLU is its chord, the lower line ``a z`` with any ``a`` in [0, 1]; by default 1 where ``u > -l`` and
0 elsewhere.
"""

# ruff: noqa: D102 - operators are documented by their base class
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Box, Rounding, down, up
from robust_core.certificates.bounds.operators.base import Operator, Shape, contract

__all__ = ["Activation", "Lines", "Rectifier", "SShape"]

Lines = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""Slope and intercept of the lower line, then of the upper line; (B, *shape) each."""


class Activation(Operator):
    """An elementwise, increasing function."""

    @abstractmethod
    def lines(self, box: Box, rounding: Rounding | None) -> Lines:
        """Return lines that enclose the function between the bounds."""

    def known_lines(self, box: Box, rounding: Rounding | None) -> Lines:
        """Return :meth:`lines`, worked out once for each box."""
        key = (self, rounding, torch.is_grad_enabled())
        if key not in box.memo:
            box.memo[key] = self.lines(box, rounding)
        return box.memo[key]

    def carry(self, *errors: Tensor) -> Tensor:
        return errors[0]

    def unstable(self, box: Box) -> Tensor:
        """Return (B, *shape) bool: where tighter bounds of the input would help."""
        return box.upper > box.lower

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        low_slope, low_shift, high_slope, high_shift = self.known_lines(boxes[0], rounding)
        low = low_slope.unsqueeze(1) if slopes is None else slopes
        falling = rows.clamp(max=0)
        constant = contract(falling, high_shift)
        if low_shift is not None:
            constant = constant + contract(rows - falling, low_shift)
        # Twice as fast as choosing between the slopes; its extra rounding is within what :meth:`error` allows.
        pulled = torch.addcmul(rows * low, falling, high_slope.unsqueeze(1) - low)
        return [pulled], constant


class Rectifier(Activation):
    """``max(z, k z)`` with ``0 <= k < 1``; ReLU at ``k = 0``."""

    def __init__(self, label: str, in_shapes: Sequence[Shape], shape: Shape, *, slope: float = 0.0) -> None:
        super().__init__(label, in_shapes, shape)
        self.slope = slope

    def evaluate(self, *values: Tensor) -> Tensor:
        return torch.where(values[0] >= 0, values[0], self.slope * values[0]) if self.slope else values[0].relu()

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        box = boxes[0]
        if not self.slope and not box.has_ends and (box.spare or not box.outward):  # no more passes than needed
            lower, upper = box.centre - box.radius, box.centre + box.radius
            return Box.ends(lower.relu_(), upper.relu_(), outward=box.outward)
        if not self.slope:
            return Box.ends(box.lower.relu(), box.upper.relu(), outward=box.outward)
        lower, upper = self.evaluate(box.lower), self.evaluate(box.upper)
        if rounding is None:
            return Box.ends(lower, upper, outward=False)
        slack = 2 * rounding.gamma(4)  # the slope itself is rounded to the user's dtype
        return Box.ends(
            lower - slack * (lower < 0) * lower.abs() - rounding.tiny,
            upper + slack * (upper < 0) * upper.abs() + rounding.tiny,
            outward=True,
        )

    def unstable(self, box: Box) -> Tensor:
        return (box.lower < 0) & (box.upper > 0)

    def lines(self, box: Box, rounding: Rounding | None) -> Lines:
        lower, upper = box.lower, box.upper
        negative, positive = lower.clamp(max=0), upper.clamp(min=0)
        width = (positive - negative).clamp(min=torch.finfo(lower.dtype).tiny)
        high = ((positive - self.slope * negative) / width).clamp(self.slope, 1.0)
        low = torch.where(upper > -lower, 1.0, self.slope).to(lower.dtype)
        on, off = lower >= 0, upper <= 0
        high = torch.where(on, 1.0, torch.where(off, self.slope, high))
        low = torch.where(on, 1.0, torch.where(off, self.slope, low))
        # The chord's intercept from its own, rounded slope: above the function at both ends, hence between them.
        shift = torch.maximum((self.slope - high) * negative, (1 - high) * positive)
        if rounding is not None:
            shift = shift * (1 + 1e-14)
        return low, None, high, torch.where(on | off, 0.0, shift)

    def slope_range(self, box: Box) -> tuple[Tensor, Tensor]:
        """Return the least and greatest sound slope of the lower line."""
        on, off = box.lower >= 0, box.upper <= 0
        least = torch.where(on, 1.0, self.slope).to(box.lower.dtype)
        return least, torch.where(off, self.slope, 1.0).to(box.lower.dtype)

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        wide = 4 * rounding.gamma_wide(self.size + 16)
        evaluation = 2 * rounding.gamma(4) if self.slope else 0.0
        return (wide + evaluation) * boxes[0].magnitude + rounding.tiny * bool(self.slope)


class SShape(Activation):
    """Sigmoid or tanh: increasing, convex below 0 and concave above, with slopes in (0, 1]."""

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        *,
        function: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.function, self.derivative = function, derivative

    def evaluate(self, *values: Tensor) -> Tensor:
        return self.function(values[0])

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        box = boxes[0]
        lower, upper = self.function(box.lower), self.function(box.upper)
        if rounding is None:
            return Box.ends(lower, upper, outward=False)
        slack = self._evaluation(rounding)
        return Box.ends(down(lower - slack), up(upper + slack), outward=True)

    @staticmethod
    def _evaluation(rounding: Rounding) -> float:
        """Vendors' exponentials are good to a few units in the last place; 32 are allowed for, of values up to 1."""
        return 64 * rounding.unit

    def lines(self, box: Box, rounding: Rounding | None) -> Lines:
        lower, upper = box.lower, box.upper
        f_low, f_high = self.function(lower), self.function(upper)
        middle = (lower + upper) / 2
        chord = (f_high - f_low) / (upper - lower).clamp(min=1e-12)
        tangent = self.derivative(middle)
        least = torch.minimum(self.derivative(lower), self.derivative(upper))
        concave, convex = lower >= 0, upper <= 0
        narrow = (upper - lower) < 1e-6
        low_slope = torch.where(narrow, least, torch.where(concave, chord, torch.where(convex, tangent, least)))
        high_slope = torch.where(narrow, least, torch.where(convex, chord, torch.where(concave, tangent, least)))
        low_shift = self._shift(box, low_slope, middle, convex & ~narrow, torch.minimum)
        high_shift = self._shift(box, high_slope, middle, concave & ~narrow, torch.maximum)
        slack = 1e-6 if lower.dtype == torch.float32 else 1e-13
        slack = slack * (1 + box.magnitude)
        return low_slope, low_shift - slack, high_slope, high_shift + slack

    def _shift(
        self,
        box: Box,
        slope: Tensor,
        middle: Tensor,
        tangent: Tensor,
        outer: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the intercept: through the point of contact of a tangent, else through the outer end."""
        ends = outer(self.function(box.lower) - slope * box.lower, self.function(box.upper) - slope * box.upper)
        return torch.where(tangent, self.function(middle) - slope * middle, ends)

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        size = 1 + boxes[0].magnitude
        return 8 * rounding.gamma_wide(self.size + 16) * size + self._evaluation(rounding)
