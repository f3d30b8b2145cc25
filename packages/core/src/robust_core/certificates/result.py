"""What every certifier returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ABSTAIN", "About", "Certificate", "Certifier", "Status"]

ABSTAIN = -1
"""The prediction of a certifier that abstains."""


class Status(IntEnum):
    """Outcome for one sample. Only ``CERTIFIED`` promises anything."""

    CERTIFIED = 0
    FALSIFIED = 1
    UNKNOWN = 2
    ABSTAINED = 3
    TIMEOUT = 4
    ERROR = 5


@dataclass(frozen=True)
class About:
    """The function that a certificate speaks of; certificates of different functions never mix.

    Attributes:
        function: ``"base"``, ``"smoothed"``, ``"mixed"`` or another name of how the model was wrapped.
        fingerprint: SHA-256 of the model (``robust_core.models.fingerprint``) and of what defines the wrapping.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        method: the certifier, with its settings, as a person would cite it.
    """

    function: str
    fingerprint: str
    norm: str
    method: str


@dataclass(frozen=True)
class Certificate:
    """Certificates of a batch.

    Attributes:
        prediction: (B,) int64 class that the radius speaks of, or ``ABSTAIN``.
        radius: (B,) float64 in raw input units: no input closer than this changes the prediction of the function
            in ``about``; 0 unless certified. Certifiers of one threat report its ``eps``.
        status: (B,) int8 of :class:`Status`.
        alpha: failure probability of *each* row; 0 for deterministic certificates.
        rigorous: rounding of the arithmetic is accounted for (always true of ``alpha > 0`` statistics whose
            counts are exact); bounds meant for training losses are not rigorous.
        about: the function certified.
        cost: what it took, e.g. ``{"forwards": 1000, "seconds": 0.3}``; totals for the batch.
        details: further per-sample tensors, e.g. ``{"margin": (B,)}``.
    """

    prediction: Tensor
    radius: Tensor
    status: Tensor
    alpha: float
    rigorous: bool
    about: About
    cost: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.prediction)
        for name in ("radius", "status"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; ({n},) is needed")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: a failure probability in [0, 1) is needed")
        # One gate for every path: a radius counts only if it is a positive test on finite numbers.
        status = self.status.to(torch.int8)
        sound = (status == Status.CERTIFIED) & (self.radius >= 0) & torch.isfinite(self.radius.double())
        sound &= self.prediction >= 0
        status = torch.where((status == Status.CERTIFIED) & ~sound, int(Status.ERROR), status).to(torch.int8)
        object.__setattr__(self, "status", status)
        object.__setattr__(self, "radius", torch.where(sound, self.radius.double(), 0.0))

    def __len__(self) -> int:
        return len(self.prediction)

    @property
    def certified(self) -> Tensor:
        """(B,) bool."""
        return self.status == Status.CERTIFIED

    def counts(self) -> dict[str, int]:
        """Return how many rows have each status, e.g. ``{"certified": 7, ..., "error": 0}``."""
        return {status.name.lower(): int((self.status == status).sum()) for status in Status}

    def accuracy(self, y: Tensor, radius: float = 0.0) -> float:
        """Return the share of rows that are certified at ``radius`` or more *and* predict ``y``."""
        return float((self.certified & (self.radius >= radius) & (self.prediction == y)).double().mean())

    def average_radius(self, y: Tensor) -> float:
        """Return ACR: the mean of the radius, wrong and uncertified rows counting 0."""
        return float(torch.where(self.prediction == y, self.radius, 0.0).mean())

    def expected_failures(self) -> float:
        """Return how many of the certified rows may be false in expectation."""
        return math.fsum([self.alpha] * int(self.certified.sum()))


class Certifier(Protocol):
    """Anything with a batched ``certify``."""

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify (B, ...) inputs; ``y`` (B,) restricts the work to rows that could count as correct."""
        ...
