"""What an operator must know to be bounded: its value, its box, its linear relaxation and its rounding.

Shapes: a value is (B, *shape); linear coefficients are (B, R, *shape), R rows for each sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import UNDERFLOW, WIDE_UNIT, Box, Rounding

__all__ = ["Affine", "Getter", "Operator", "Shape", "adjoint", "contract"]

Shape = tuple[int, ...]
Getter = Callable[[], Tensor]


def contract(rows: Tensor, values: Tensor) -> Tensor:
    """Return (B, R): the inner products of rows (B, R, *shape) with values (B, *shape) or (*shape)."""
    flat = rows.flatten(2)
    if values.ndim == rows.ndim - 2:
        return flat @ values.flatten()
    if flat.device.type == "cpu":  # several times as fast as a product with a single column
        return (flat * values.flatten(1).unsqueeze(1)).sum(2)
    return torch.bmm(flat, values.flatten(1).unsqueeze(2)).squeeze(2)


def adjoint(f: Callable[[Tensor], Tensor], shape: Shape, rows: Tensor) -> Tensor:
    """Return the transpose of the linear map ``f`` on inputs (*shape), applied to rows (N, *output shape)."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = rows.new_zeros((len(rows), *shape)).requires_grad_(True)
        (result,) = torch.autograd.grad(f(x), x, rows, create_graph=differentiable)
    return result


class Operator(ABC):
    """One node of the network.

    Attributes:
        label: how messages name it: its kind and where it stands.
        in_shapes: shapes of its inputs, without the batch.
        shape: shape of its output, without the batch.
        fixed: whether its parameters never change any more.
    """

    linear: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    fixed: bool = False

    def __init__(self, label: str, in_shapes: Sequence[Shape], shape: Shape) -> None:
        self.label = label
        self.in_shapes = tuple(in_shapes)
        self.shape = shape

    @property
    def size(self) -> int:
        """Number of output elements."""
        return int(torch.Size(self.shape).numel())

    @abstractmethod
    def evaluate(self, *values: Tensor) -> Tensor:
        """Return the value."""

    @abstractmethod
    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        """Return a box of the output; with ``rounding``, of every evaluation in that arithmetic."""

    @abstractmethod
    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Pull coefficients of a lower bound back to the inputs.

        Returns:
            coefficients (B, R, *in_shape) for each input, and (B, R) constants or None, such that
            ``rows . output >= sum(coefficients . inputs) + constants`` on the boxes.
        """

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        """Return (B, *shape): what rounding can add to one output element, in a pass of the user and in ours.

        If ``e`` is this tensor, ``|rows| . e`` makes up for the rounding of the forward pass in the user's
        arithmetic and of :meth:`backward` in float64. None: neither rounds.
        """
        return None

    def carry(self, *errors: Tensor) -> Tensor:
        """Return (B, *shape): how far the output can move when the inputs move by at most ``errors``, elementwise."""
        return self.evaluate(*errors)  # rearrangements, concatenation, maxima, activations of slope at most 1


class Affine(Operator):
    """``y = W x + b``: all that differs between linear layers is how W, |W| and their transposes are applied."""

    linear = True

    @property
    @abstractmethod
    def terms(self) -> int:
        """The number of products in the longest sum that makes up one output element."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return W x."""

    @abstractmethod
    def apply_absolute(self, x: Tensor) -> Tensor:
        """Return |W| x."""

    @abstractmethod
    def transpose(self, rows: Tensor) -> Tensor:
        """Return W^T applied to rows (N, *shape): (N, *in_shape)."""

    def bias(self) -> Tensor | None:
        """Return b, broadcastable to the output shape."""
        return None

    def bias_size(self) -> Tensor | None:
        """Return a bound of |b| and of the intermediate results that make it."""
        bias = self.bias()
        return None if bias is None else bias.abs()

    @abstractmethod
    def gain(self) -> float:
        """Return the largest absolute row sum of W."""

    def _plus(self, value: Tensor, bias: Tensor | None) -> Tensor:
        return value if bias is None else value + bias

    def evaluate(self, *values: Tensor) -> Tensor:  # noqa: D102
        return self._plus(self.apply(values[0]), self.bias())

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        """Centre through W, radius through |W|; rounding costs a vector operation, no further product."""
        box = boxes[0]
        if rounding is None:
            result = Box.around(self.evaluate(box.centre), self.apply_absolute(box.radius), outward=False)
            return self.follow_ball(boxes, result, None)
        # Beside the user's rounding, 8 units of float64 for ours: centre and radius from the ends, and back again.
        gamma = rounding.gamma(self.terms + 8) + 8 * WIDE_UNIT
        if box.has_ends:
            centre, radius = (box.lower + box.upper).mul_(0.5), (box.upper - box.lower).mul_(0.5)
            peak = torch.maximum(box.upper.flatten(1).amax(1), -box.lower.flatten(1).amin(1))
        else:
            centre, radius = box.centre, box.radius
            peak = (centre.abs() + radius).flatten(1).amax(1)
        slack = centre.abs().mul_(2 * gamma * (1 + 2 * gamma)).add_(radius, alpha=(1 + gamma) * (1 + 2 * gamma))
        radius, bias, gain = self.apply_absolute(slack), self.bias_size(), self.gain()
        # Partial sums must not overflow in the user's arithmetic, in whatever order they are formed.
        peak, least = peak * gain, (self.terms + 8) * 2 * rounding.tiny + gain * UNDERFLOW
        peak = (peak if bias is None else peak + bias.max()).reshape(-1, *[1] * (radius.ndim - 1))
        radius = torch.where(peak < rounding.largest / 4, radius, torch.inf)
        radius.add_(least) if bias is None else radius.add_(2 * gamma * (1 + 2 * gamma) * bias + least)
        return self.follow_ball(boxes, Box.covered(self.evaluate(centre), radius), rounding)

    def follow_ball(self, boxes: Sequence[Box], result: Box, rounding: Rounding | None) -> Box:
        """Return ``result``, tightened or annotated by what is known of a ball at the input."""
        return result

    def backward(  # noqa: D102
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        bias = self.bias()
        constant = None if bias is None else contract(rows, bias.expand(self.shape))
        pulled = self.transpose(rows.flatten(0, 1))
        return [pulled.unflatten(0, rows.shape[:2])], constant

    def carry(self, *errors: Tensor) -> Tensor:  # noqa: D102
        return self.apply_absolute(errors[0])

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:  # noqa: D102
        n = self.terms + 8
        size = self._plus(self.apply_absolute(boxes[0].magnitude), self.bias_size())
        return (rounding.gamma(n) + rounding.gamma_wide(n + self.size + 8)) * size + 2 * n * rounding.tiny
