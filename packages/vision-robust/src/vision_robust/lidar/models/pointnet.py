"""PointNet (Qi, Su, Mo and Guibas 2017, arXiv 1612.00593): one small network for each point, a maximum, a classifier.

Absent points are left out of the maximum, never filled up with zeros or copies, so the answer depends on neither their
place nor their number. Left out: the two transform networks, which the authors found to add about one point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count

__all__ = ["NORMS", "PointNet"]

NORMS = ("none", "layer")
"""Of each point's features; statistics over a batch would carry noise from one condition to the next."""


class PointNet(nn.Module):
    """Classify clouds: ``model(points (B, N, C), mask (B, N)) -> (B, n_classes)`` logits.

    Args:
        n_classes: number of classes.
        widths: of the layers for each point; the last is pooled.
        head: widths of the layers after the maximum.
        channels: C, columns that are read, the first three are coordinates.
        frequencies: coordinates are joined by their sines and cosines at so many octaves, from half a period a unit.
        norm: one of :data:`NORMS`.
        dropout: before the last layer.
    """

    def __init__(
        self,
        n_classes: int,
        widths: Sequence[int] = (64, 64, 64, 128, 1024),
        head: Sequence[int] = (512, 256),
        *,
        channels: int = 3,
        frequencies: int = 0,
        norm: str = "layer",
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        check_count("n_classes", n_classes, low=2)
        check_count("channels", channels, low=3)
        check_choice("norm", norm, NORMS)
        if not widths:
            raise ValueError("widths=(): at least one layer is needed")
        self.channels = channels
        self.register_buffer("octaves", math.pi * 2.0 ** torch.arange(frequencies), persistent=False)
        self.points = _layers((channels + 6 * frequencies, *widths), norm)
        tail = _layers((widths[-1], *head), norm)
        self.head = nn.Sequential(*tail, nn.Dropout(dropout), nn.Linear((widths[-1], *head)[-1], n_classes))

    def features(self, points: Tensor) -> Tensor:
        """Return (B, N, F) features of each point by itself."""
        x = points[..., : self.channels]
        octaves = self.get_buffer("octaves")
        if len(octaves):
            angles = (x[..., :3, None] * octaves).flatten(-2)
            x = torch.cat([x, angles.sin(), angles.cos()], -1)
        return self.points(x)

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits; all points are there where ``mask`` is None."""
        found = self.features(points)
        if mask is not None:
            found = found.masked_fill(~mask[..., None], -torch.inf)
        return self.head(found.amax(1))


def _layers(widths: Sequence[int], norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norm == "layer" else []), nn.ReLU()]
    return nn.Sequential(*layers)
