"""Fully connected and convolutional layers, and elementwise scales and shifts (normalisation, constants)."""

# ruff: noqa: D102 - operators are documented by their base class
from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_core.certificates.bounds.box import Ball, Box, Rounding, down, up
from robust_core.certificates.bounds.operators.base import Affine, Getter, Shape, adjoint

__all__ = ["Convolution", "Dense", "Scale", "TransposedConvolution"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _Weighted(Affine):
    """A layer with a weight and perhaps a bias, read anew at each use so that training may go on."""

    dense = True

    def __init__(
        self, label: str, in_shapes: Sequence[Shape], shape: Shape, weight: Getter, bias: Getter | None
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.weight = weight
        self._bias = bias
        self._absolute: Tensor | None = None
        self._gain: float | None = None

    def absolute_weight(self) -> Tensor:
        """Return |W|; kept where the weights are fixed (writes to ``weight.data`` leave no trace by which to tell).

        Elsewhere it is worked out anew, outside of autograd into the same memory: fresh memory costs more than |W|.
        """
        known = self._absolute
        if self.fixed and known is not None:
            return known
        weight = self.weight()
        if torch.is_grad_enabled() and not self.fixed:
            return weight.abs()
        weight = weight.detach()
        alike = known is not None and known.shape == weight.shape and not known.is_inference()
        if known is None or not alike or (known.dtype, known.device) != (weight.dtype, weight.device):
            known = self._absolute = torch.empty_like(weight)
        return torch.abs(weight, out=known)

    def gain(self) -> float:
        if self._gain is None or not self.fixed:
            self._gain = self.largest_row()
        return self._gain

    @abstractmethod
    def largest_row(self) -> float:
        """Return the largest absolute row sum of W, or more."""

    def bias_shape(self) -> Shape:
        """Return how the bias broadcasts to the output."""
        return (-1, *[1] * (len(self.shape) - 1))

    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias().reshape(self.bias_shape())

    def apply(self, x: Tensor) -> Tensor:
        return self.map(x, self.weight())

    def apply_absolute(self, x: Tensor) -> Tensor:
        return self.map(x, self.absolute_weight())

    def evaluate(self, *values: Tensor) -> Tensor:
        return self.map(values[0], self.weight(), None if self._bias is None else self._bias())

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer with another weight and bias."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def follow_ball(self, boxes: Sequence[Box], result: Box, rounding: Rounding | None) -> Box:
        """Intersect with the bound from the norms of the rows: one standard deviation, so to speak."""
        ball = boxes[0].ball
        if ball is None:
            return result
        point = self.evaluate(ball.point)
        reach = self.map(ball.spread.square(), self.weight().square()).clamp(min=0).sqrt()
        if rounding is None:
            return result.intersect(point - reach, point + reach)
        error = self.error(boxes, rounding)
        reach = reach * (1 + 1e-9) + self.apply_absolute(ball.slack) * (1 + 1e-9)
        reach = reach if error is None else reach + error * (1 + 1e-9)
        return result.intersect(down(point - reach), up(point + reach))


class Dense(_Weighted):
    """``x W^T + b`` on the last axis."""

    @property
    def terms(self) -> int:
        return self.in_shapes[0][-1]

    def bias_shape(self) -> Shape:
        return (-1,)

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def transpose(self, rows: Tensor) -> Tensor:
        return rows @ self.weight()

    def largest_row(self) -> float:
        return float(self.absolute_weight().sum(1).max())


class Convolution(_Weighted):
    """Convolution in one to three dimensions, with every stride, dilation, grouping and padding mode.

    Args:
        weight: returns (out, in / groups, *kernel).
        stride: one number for each dimension.
        padding: (before, after) for each dimension, the last dimension first, as ``F.pad`` takes it.
        dilation: one number for each dimension.
        groups: number of groups.
        mode: ``"constant"`` (zeros), ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        weight: Getter,
        bias: Getter | None,
        *,
        stride: Shape,
        padding: Shape,
        dilation: Shape,
        groups: int,
        mode: str = "constant",
    ) -> None:
        super().__init__(label, in_shapes, shape, weight, bias)
        self.stride, self.padding, self.dilation, self.groups, self.mode = stride, padding, dilation, groups, mode
        self.dims = len(stride)
        pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
        self.even = mode == "constant" and all(before == after for before, after in pairs)
        self.inner_padding = tuple(before for before, _ in pairs) if self.even else (0,) * self.dims

    @property
    def terms(self) -> int:
        return math.prod(self.weight().shape[1:])

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, mode=self.mode)

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if self.even else self._pad(x)
        return _CONVOLVE[self.dims](x, weight, bias, self.stride, self.inner_padding, self.dilation, self.groups)

    def _padded_shape(self) -> Shape:
        before_after = zip(self.padding[::2], self.padding[1::2], strict=True)
        grown = [a + b for a, b in before_after][::-1]
        channels, *spatial = self.in_shapes[0]
        return (channels, *(size + more for size, more in zip(spatial, grown, strict=True)))

    def transpose(self, rows: Tensor) -> Tensor:
        weight = self.weight()
        target = self.in_shapes[0] if self.even else self._padded_shape()
        extra = tuple(
            target[1 + i]
            - ((self.shape[1 + i] - 1) * self.stride[i] - 2 * self.inner_padding[i])
            - self.dilation[i] * (weight.shape[2 + i] - 1)
            - 1
            for i in range(self.dims)
        )
        pulled = self._pull(rows, weight, target, extra)
        if self.even:
            return pulled
        return adjoint(self._pad, self.in_shapes[0], pulled)

    def interleaves(self, dtype: torch.dtype) -> bool:
        """Whether an ordinary convolution gives the transposed one faster: few channels to go to, in float32."""
        plain = self.dims == 2 and self.groups == 1 and self.dilation == (1, 1)
        return plain and dtype == torch.float32 and self.in_shapes[0][0] <= 4

    def spread(self, rows: Tensor) -> Tensor:
        """Return the transpose on rows (N, out, h, w) of any height and width, without taking padding off."""
        weight = self.weight()
        if self.interleaves(rows.dtype):
            full = tuple((rows.shape[2 + i] - 1) * self.stride[i] + weight.shape[2 + i] for i in range(2))
            return _interleaved(rows, weight, self.stride, (0, 0), (self.in_shapes[0][0], *full))
        return F.conv_transpose2d(rows, weight, None, self.stride, 0, 0, self.groups, self.dilation)

    def _pull(self, rows: Tensor, weight: Tensor, target: Shape, extra: Shape) -> Tensor:
        """Return the transposed convolution by whichever kernel is fastest on CPUs for this shape."""
        if self.interleaves(rows.dtype):
            return _interleaved(rows, weight, self.stride, self.inner_padding, target)
        if self.dims == 2 and self.groups == 1 and target[0] == 1:  # one channel: one product, then overlap-add
            columns = torch.matmul(weight.flatten(1).t(), rows.flatten(2))
            return F.fold(columns, target[1:], weight.shape[2:], self.dilation, self.inner_padding, self.stride)
        if self.dims == 2 and rows.dtype == torch.float64 and rows.device.type == "cpu":  # up to five times as fast
            like = rows.new_zeros(()).expand(len(rows), *target)
            where = (list(self.stride), list(self.inner_padding), list(self.dilation), False, [0, 0], self.groups)
            return torch.ops.aten.convolution_backward(rows, like, weight, None, *where, [True, False, False])[0]
        if self.dims == 2 and rows.dtype == torch.float32:
            rows = rows.contiguous(memory_format=torch.channels_last)  # three times as fast
        return _TRANSPOSED[self.dims](
            rows, weight, None, self.stride, self.inner_padding, extra, self.groups, self.dilation
        ).contiguous()

    def largest_row(self) -> float:
        return float(self.absolute_weight().flatten(1).sum(1).max())


def _interleaved(rows: Tensor, weight: Tensor, stride: Shape, padding: Shape, target: Shape) -> Tensor:
    """Return a transposed convolution (N, *target) of rows (N, out, h, w) by an ordinary one.

    Output ``s g + p`` of stride ``s`` is the sum over taps ``m`` of ``rows[g - m] weight[s m + p]``: each of the
    phases ``p`` is a convolution of its own, and all of them together one with ``s * s`` times the channels.
    """
    out, channels, *kernel = weight.shape
    taps = [-(-size // step) for size, step in zip(kernel, stride, strict=True)]
    room = (0, taps[1] * stride[1] - kernel[1], 0, taps[0] * stride[0] - kernel[0])
    phases = F.pad(weight, room).reshape(out, channels, taps[0], stride[0], taps[1], stride[1]).flip(2, 4)
    phases = phases.permute(3, 5, 1, 0, 2, 4).reshape(-1, out, *taps)
    pulled = F.conv2d(rows, phases, None, 1, (taps[0] - 1, taps[1] - 1))
    pulled = pulled.unflatten(1, (*stride, channels)).permute(0, 3, 4, 1, 5, 2)
    pulled = pulled.flatten(4, 5).flatten(2, 3)
    (top, left), (height, width) = padding, pulled.shape[2:]
    crop = (-left, target[2] + left - width, -top, target[1] + top - height)
    return F.pad(pulled, crop) if any(crop) else pulled


class TransposedConvolution(_Weighted):
    """Transposed convolution; its transpose is a convolution."""

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        weight: Getter,
        bias: Getter | None,
        *,
        stride: Shape,
        padding: Shape,
        output_padding: Shape,
        dilation: Shape,
        groups: int,
    ) -> None:
        super().__init__(label, in_shapes, shape, weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.output_padding = output_padding
        self.dims = len(stride)

    @property
    def terms(self) -> int:
        weight = self.weight()
        return weight.shape[0] // self.groups * math.prod(weight.shape[2:])

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _TRANSPOSED[self.dims](
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def transpose(self, rows: Tensor) -> Tensor:
        pulled = _CONVOLVE[self.dims](rows, self.weight(), None, self.stride, self.padding, self.dilation, self.groups)
        return pulled[(..., *(slice(size) for size in self.in_shapes[0][1:]))]

    def largest_row(self) -> float:
        # Each tap reaches an output element at most once: the sum over all taps bounds every row.
        return (
            float(self.absolute_weight().sum(0).flatten(1).sum(1).max())
            if self.groups == 1
            else float(self.absolute_weight().sum())
        )


class Scale(Affine):
    """``a * x + b`` element by element: batch normalisation in eval mode, normalisation, constants.

    Args:
        parts: returns ``(a, b, size of b)``, each broadcastable to the output shape; the size bounds the
            intermediate results of whatever computes ``b``. ``a`` or ``b`` is None where there is none.
        roundings: how many roundings an evaluation does on the way, generously.
    """

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        parts: Callable[[], tuple[Tensor | None, Tensor | None, Tensor | None]],
        *,
        roundings: int = 12,
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.parts = parts
        self._terms = roundings

    @property
    def terms(self) -> int:
        return self._terms

    def _spread_out(self, x: Tensor) -> Tensor:
        """Broadcast over axes that the constants add."""
        return x if x.shape[1:] == self.shape else x.expand(len(x), *self.shape)

    def apply(self, x: Tensor) -> Tensor:
        scale = self.parts()[0]
        return self._spread_out(x if scale is None else x * scale)

    def apply_absolute(self, x: Tensor) -> Tensor:
        scale = self.parts()[0]
        return self._spread_out(x if scale is None else x * scale.abs())

    def transpose(self, rows: Tensor) -> Tensor:
        scale = self.parts()[0]
        return rows if scale is None else rows * scale

    def evaluate(self, *values: Tensor) -> Tensor:
        scale, shift, _ = self.parts()
        if scale is None or shift is None or values[0].shape[1:] != self.shape:
            return super().evaluate(*values)
        return torch.addcmul(shift, values[0], scale)  # one pass over the values

    def bias(self) -> Tensor | None:
        return self.parts()[1]

    def bias_size(self) -> Tensor | None:
        return self.parts()[2]

    def gain(self) -> float:
        scale = self.parts()[0]
        return 1.0 if scale is None else max(1.0, float(scale.abs().max()))

    def follow_ball(self, boxes: Sequence[Box], result: Box, rounding: Rounding | None) -> Box:
        """Carry the ball along: it stays an ellipsoid with the same axes."""
        ball = boxes[0].ball
        if ball is not None:
            slack = self.apply_absolute(ball.slack)
            if rounding is not None:
                error = self.error(boxes, rounding)
                slack = slack * (1 + 1e-9) if error is None else (slack + error) * (1 + 1e-9)
            spread = self.apply_absolute(ball.spread) * (1 + 1e-14)
            result.ball = Ball(self.evaluate(ball.point), spread, slack)
        return result
