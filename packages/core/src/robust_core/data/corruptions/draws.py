"""Random numbers of a corruption: each image's own, whatever stands beside it in the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.random import SampleStreams, stream

__all__ = ["Draws", "Setting"]

FEW = 128
"""Up to this many numbers for each image come from one hash over the batch, more from a generator of each image."""


@dataclass(frozen=True)
class Setting:
    """What a corruption needs to know besides its constants.

    Attributes:
        profile: ``"imagenet"``, ``"cifar"`` or ``"small"``.
        scale: factor of lengths against the profile's own size (1 except in ``"small"``).
        parity: keep the known quirks of the original code.
        frost: photographs (n, 3, h, w) on the images' device, or None.
    """

    profile: str
    scale: float
    parity: bool
    frost: tuple[Tensor, ...] = ()


class Draws:
    """Draws for a batch of images; each call gives fresh numbers.

    Args:
        seed: seed of the run.
        index: (B,) positions of the images in the original data.
        purpose: corruption and severity.
        device: where the numbers are needed.
    """

    def __init__(self, seed: int, index: Tensor, purpose: str, device: torch.device) -> None:
        self.seed, self.purpose, self.device = seed, purpose, device
        self.index = index.tolist()
        self.streams = SampleStreams(seed, index.to(device), purpose)
        self.calls = 0

    def _fill(self, shape: tuple[int, ...], method: str) -> Tensor:
        self.calls += 1
        if math.prod(shape) <= FEW:
            return getattr(self.streams, method.rstrip("_"))(shape, chunk=self.calls)
        out = torch.empty(len(self.index), *shape, device=self.device)
        for row, index in zip(out, self.index, strict=True):
            getattr(row, method)(generator=self.generator(index))
        return out

    def select(self, rows: Tensor) -> Draws:
        """Return the draws of some images (a boolean mask)."""
        return Draws(self.seed, torch.tensor(self.index)[rows.cpu()], self.purpose, self.device)

    def generator(self, index: int) -> torch.Generator:
        """Return the generator of one image for the current call."""
        return stream(self.seed, index, self.purpose, chunk=self.calls, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Return (B, *shape) draws from U[0, 1)."""
        return self._fill(shape, "uniform_")

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) draws from N(0, 1)."""
        return self._fill(shape, "normal_")

    def poisson(self, rate: Tensor) -> Tensor:
        """Return Poisson draws of the shape of ``rate`` (B, ...)."""
        self.calls += 1
        out = torch.empty_like(rate)
        for row, index in enumerate(self.index):
            out[row] = torch.poisson(rate[row], generator=self.generator(index))
        return out
