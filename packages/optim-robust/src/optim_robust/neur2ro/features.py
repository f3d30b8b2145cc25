"""What the network sees of an instance: features of decisions, features of uncertain items, and how items follow xi."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ItemFeatures"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ItemFeatures:
    """An instance as two sets of items.

    Attributes:
        first: (n, p) features of each first-stage variable, besides its value.
        second: (m, q) features of each uncertain item, besides those that follow xi.
        slope: (m, d, dim) those that follow xi: ``slope @ xi + offset``.
        offset: (m, d).
        x_lower: (n,) bounds of the first stage, between which its values are scaled to 0 .. 1.
        x_upper: (n,).
        unit: what labels are divided by under ``label_scaling="per_instance"``.
        size: number of items by which ``label_scaling="per_size"`` tells instances apart.
        total: labels are the whole cost of both stages, because that of the first depends on xi; else they are that
            of the second stage alone, and the cost of the first is kept exact.
    """

    first: Array
    second: Array
    slope: Array
    offset: Array
    x_lower: Array
    x_upper: Array
    unit: float
    size: int
    total: bool

    @property
    def span(self) -> Array:
        """(n,) widths of the first stage's bounds, 1 where a variable is fixed."""
        width = self.x_upper - self.x_lower
        return np.where(width > 0, width, 1.0)

    def dynamic(self, xi: Array) -> Array:
        """Return (B, m, d) features of items at (B, dim) scenarios."""
        return np.einsum("mdk,bk->bmd", self.slope, xi) + self.offset
