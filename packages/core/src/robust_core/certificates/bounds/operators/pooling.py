"""Maximum and average pooling."""

# ruff: noqa: D102 - operators are documented by their base class
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.operators.base import Affine, Operator, Shape, adjoint, contract

__all__ = ["Average", "MaxPool"]


class Average(Affine):
    """A mean over windows or axes: its weights are at least 0, so |W| = W.

    Args:
        function: (N, *in_shape) -> (N, *shape).
        terms: number of elements in the largest window, and one for the division.
    """

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        *,
        function: Callable[[Tensor], Tensor],
        terms: int,
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.function = function
        self._terms = terms

    @property
    def terms(self) -> int:
        return self._terms

    def apply(self, x: Tensor) -> Tensor:
        return self.function(x)

    def apply_absolute(self, x: Tensor) -> Tensor:
        return self.function(x)

    def transpose(self, rows: Tensor) -> Tensor:
        return adjoint(self.function, self.in_shapes[0], rows)

    def gain(self) -> float:
        return float(self._terms)


class MaxPool(Operator):
    """The greatest element of each window.

    The lower line of a window is its element of greatest lower bound. The upper line is that element where it beats
    all others for certain, and the constant greatest upper bound elsewhere.

    Args:
        function: (N, *in_shape) -> (N, *shape).
        windows: (W, P) int64 flat positions of the W elements of each of the P windows of one channel; the number
            of positions, which is one past the last, stands for padding.
    """

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        *,
        function: Callable[[Tensor], Tensor],
        windows: Tensor,
    ) -> None:
        super().__init__(label, in_shapes, shape)
        self.function, self.windows = function, windows

    def evaluate(self, *values: Tensor) -> Tensor:
        return self.function(values[0])

    def interval(self, boxes: Sequence[Box], rounding: Rounding | None) -> Box:
        box = boxes[0]
        return Box.ends(self.function(box.lower), self.function(box.upper), outward=box.outward)

    def _gather(self, values: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, W, P), padding at minus infinity."""
        flat = torch.nn.functional.pad(values.flatten(2), (0, 1), value=-torch.inf)
        return flat[:, :, self.windows.to(values.device)]

    def backward(
        self, rows: Tensor, boxes: Sequence[Box], slopes: Tensor | None, rounding: Rounding | None
    ) -> tuple[list[Tensor], Tensor | None]:
        box = boxes[0]
        lower, upper = self._gather(box.lower), self._gather(box.upper)
        best, chosen = lower.max(dim=2, keepdim=True)
        rivals = upper.scatter(2, chosen, -torch.inf).amax(2)
        certain = best.squeeze(2) >= rivals
        cap = torch.where(certain, 0.0, upper.amax(2))  # (B, C, P)
        windows = self.windows.to(rows.device)
        position = windows.t()[torch.arange(windows.shape[1], device=rows.device), chosen.squeeze(2)]
        flat = rows.flatten(3)  # (B, R, C, P)
        falling = flat.clamp(max=0)
        constant = contract(falling, cap)
        kept = torch.where(certain.unsqueeze(1), flat, flat - falling)
        pulled = kept.new_zeros((*flat.shape[:3], int(torch.Size(self.in_shapes[0][1:]).numel())))
        pulled = pulled.scatter_add(3, position.unsqueeze(1).expand_as(kept), kept)
        return [pulled.reshape(*rows.shape[:2], *self.in_shapes[0])], constant

    def error(self, boxes: Sequence[Box], rounding: Rounding) -> Tensor | None:
        return 4 * rounding.gamma_wide(self.size + 16) * self.function(boxes[0].magnitude)
