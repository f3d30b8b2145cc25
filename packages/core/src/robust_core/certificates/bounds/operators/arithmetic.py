"""Sums and differences of two values, concatenation, rearrangements of elements, and pieces of a value."""

# ruff: noqa: D102 - operators are documented by their base class
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Ball, Box, Rounding
from robust_core.certificates.bounds.operators.base import Operator, Shape, adjoint

__all__ = ["Concat", "Piece", "Rearrange", "Sum"]

Index = tuple[slice | int | None, ...]
"""Basic indexing, the batch first: each element is taken once at most."""


class Sum(Operator):
    """``x + sign * y``, of equal shapes (residual connections)."""

    linear = True

    def __init__(self, label: str, in_shapes: Sequence[Shape], shape: Shape, *, sign: int = 1) -> None:
        super().__init__(label, in_shapes, shape)
        self.sign = sign

    def evaluate(self, *values: Tensor) -> Tensor:
        return values[0] + values[1] if self.sign > 0 else values[0] - values[1]

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        first, second = boxes
        centre = self.evaluate(first.centre, second.centre)
        radius = first.radius + second.radius
        if rounding is None:
            return Box.around(centre, radius, outward=False)
        gamma = rounding.gamma(6)
        size = first.centre.abs() + second.centre.abs() + radius
        radius = (1 + 2 * gamma) * (radius + gamma * size) + 2 * rounding.tiny
        return Box.around(centre, torch.where(size < rounding.largest / 4, radius, torch.inf), outward=True)

    def carry(self, *errors: Tensor) -> Tensor:
        return errors[0] + errors[1]

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        return [rows, rows if self.sign > 0 else -rows], None

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        size = boxes[0].magnitude + boxes[1].magnitude
        return (rounding.gamma(4) + rounding.gamma_wide(8)) * size + 2 * rounding.tiny


class Concat(Operator):
    """Values side by side along ``dim`` (counted without the batch)."""

    linear = True

    def __init__(self, label: str, in_shapes: Sequence[Shape], shape: Shape, *, dim: int) -> None:
        super().__init__(label, in_shapes, shape)
        self.dim = dim

    def evaluate(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.dim + 1)

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        lower = torch.cat([box.lower for box in boxes], dim=self.dim + 1)
        upper = torch.cat([box.upper for box in boxes], dim=self.dim + 1)
        return Box.ends(lower, upper, outward=boxes[0].outward)

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        sizes = [shape[self.dim] for shape in self.in_shapes]
        return list(rows.split(sizes, dim=self.dim + 2)), None


class Rearrange(Operator):
    """A map that only moves, repeats or drops elements, or puts in zeros: flatten, reshape, permute, pad.

    Args:
        function: (N, *in_shape) -> (N, *shape).
        back: the inverse, (N, *shape) -> (N, *in_shape), or None where elements repeat or drop out.
    """

    linear = True

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        *,
        function: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.function, self.back = function, back

    def evaluate(self, *values: Tensor) -> Tensor:
        return self.function(values[0])

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        result = boxes[0].map(self.function)
        if boxes[0].ball is not None and self.back is not None:
            result.ball = Ball(*(self.function(part) for part in boxes[0].ball))
        return result

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        flat = rows.flatten(0, 1)
        pulled = self.back(flat) if self.back is not None else adjoint(self.function, self.in_shapes[0], flat)
        return [pulled.unflatten(0, rows.shape[:2])], None

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        if self.back is not None:
            return None
        return 2 * rounding.gamma_wide(self.size + 8) * self.function(boxes[0].magnitude)  # adding up repeats


class Piece(Rearrange):
    """Some elements of a value, by basic indexing: each is taken once at most, so that a ball stays one.

    Args:
        index: (full slice of the batch, then slices, integers or None).
    """

    def __init__(self, label: str, in_shapes: Sequence[Shape], shape: Shape, *, index: Index) -> None:
        super().__init__(label, in_shapes, shape, function=lambda x: x[index])
        self.index = index

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        result = boxes[0].map(self.function)
        if boxes[0].ball is not None:
            result.ball = Ball(*(self.function(part) for part in boxes[0].ball))
        return result

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        flat = rows.flatten(0, 1)
        whole = flat.new_zeros((len(flat), *self.in_shapes[0]))
        if torch.is_grad_enabled() and flat.requires_grad:
            return super().backward(rows, boxes, slopes, rounding)
        whole[self.index] = flat
        return [whole.unflatten(0, rows.shape[:2])], None

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        return None
