"""Batch normalisation: a scale whose statistics are the running ones, or those of a batch of clean inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from robust_core.certificates.bounds.operators.affine import Scale
from robust_core.certificates.bounds.operators.base import Getter, Shape

__all__ = ["BatchNorm"]


class BatchNorm(Scale):
    """``(x - mean) / sqrt(var + eps) * weight + offset``, channel by channel.

    Args:
        mean: returns the running mean (C,).
        var: returns the running variance (C,).
        weight: returns the factor (C,), or None.
        offset: returns what is added (C,), or None.
        eps: keeps the root away from 0.
    """

    def __init__(
        self,
        label: str,
        in_shapes: Sequence[Shape],
        shape: Shape,
        *,
        mean: Getter,
        var: Getter,
        weight: Getter | None,
        offset: Getter | None,
        eps: float,
    ) -> None:
        super().__init__(label, in_shapes, shape, self._running_parts, roundings=16)
        self.mean, self.var, self.weight, self.offset, self.eps = mean, var, weight, offset, eps

    def _running_parts(self) -> tuple[Tensor, Tensor, None]:
        return self._parts(self.mean(), torch.rsqrt(self.var() + self.eps))

    def _parts(self, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor, None]:
        wide = (-1, *[1] * (len(self.shape) - 1))
        scale = inverse_std if self.weight is None else inverse_std * self.weight()
        shift = -mean * scale if self.offset is None else torch.addcmul(self.offset(), mean, scale, value=-1)
        return scale.reshape(wide), shift.reshape(wide), None

    def bias_size(self) -> Tensor:
        """Return ``|mean * scale| + |offset|`` or more, from the shift that is their difference."""
        shift = self.parts()[1]
        if shift is None:
            raise RuntimeError("a batch normalisation has a shift")
        if self.offset is None:
            return shift.abs()
        return shift.abs() + 2 * self.offset().abs().reshape(shift.shape)

    def with_statistics(self, mean: Tensor, inverse_std: Tensor) -> Self:
        """Return the same layer with the statistics (C,) of one batch, worked out once and differentiable."""
        lent, parts = object.__new__(type(self)), self._parts(mean, inverse_std)  # several times as fast as copy.copy
        vars(lent).update(vars(self), parts=lambda: parts)
        return lent
