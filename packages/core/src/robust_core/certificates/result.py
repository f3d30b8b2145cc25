"""What every certifier returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_FLOOR, Decimal
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["ABSTAIN", "SCHEMA", "About", "Certificate", "Certifier", "Status", "merge", "printed"]

SCHEMA = "robust.certificate/1"
_DTYPES = {
    name: getattr(torch, name) for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64")
}

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

    def select(self, rows: Tensor) -> Certificate:
        """Return the certificates of some rows (an index or boolean tensor); the cost stays that of the whole."""
        details = {name: value[rows] for name, value in self.details.items()}
        chosen = (self.prediction[rows], self.radius[rows], self.status[rows])
        return Certificate(*chosen, self.alpha, self.rigorous, self.about, self.cost, details)

    def as_json(self) -> dict[str, Any]:
        """Return a JSON document of the whole certificate; :meth:`from_json` gives the same bits back."""
        return {
            "schema": SCHEMA,
            "about": asdict(self.about),
            "alpha": self.alpha,
            "rigorous": self.rigorous,
            "cost": dict(self.cost),
            "prediction": self.prediction.tolist(),
            "radius": self.radius.tolist(),
            "status": [Status(status).name.lower() for status in self.status.tolist()],
            "details": {
                name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
                for name, value in self.details.items()
            },
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Certificate:
        """Read what :meth:`as_json` wrote.

        Raises:
            ValueError: the document is something else.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"schema={document.get('schema')!r}: a document of {SCHEMA!r} is needed")
        try:
            details = {
                name: torch.tensor(entry["values"], dtype=_DTYPES[entry["dtype"]])
                for name, entry in document["details"].items()
            }
            status = [int(Status[name.upper()]) for name in document["status"]]
            return cls(
                torch.tensor(document["prediction"], dtype=torch.int64),
                torch.tensor(document["radius"], dtype=torch.float64),
                torch.tensor(status, dtype=torch.int8),
                float(document["alpha"]),
                bool(document["rigorous"]),
                About(**document["about"]),
                {name: float(value) for name, value in document["cost"].items()},
                details,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the document is no certificate: {error!r}") from error

    def __str__(self) -> str:
        """Say what is certified, of which function, with radii rounded *down* to the printed digits."""
        kinds = ", ".join(f"{n} {name}" for name, n in self.counts().items() if n)
        radii = self.radius[self.certified]
        spread = ""
        if len(radii):
            low, middle, high = (printed(float(r)) for r in (radii.min(), radii.median(), radii.max()))
            spread = f"; {self.about.norm} radius {low} to {high}, median {middle}"
        chance = "" if self.alpha == 0 else f"; each fails with probability {self.alpha:g} at most"
        return f"{len(self)} rows of the {self.about.function} function: {kinds}{spread}{chance} ({self.about.method})"

    def expected_failures(self) -> float:
        """Return how many of the certified rows may be false in expectation."""
        return math.fsum([self.alpha] * int(self.certified.sum()))


def printed(radius: float, digits: int = 4) -> str:
    """Return a radius with ``digits`` decimals, rounded down so that the printed number is certified too."""
    if not math.isfinite(radius):
        return str(radius)
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def merge(parts: Sequence[Certificate]) -> Certificate:
    """Return one certificate of batches certified one after the other.

    Costs add up; details that every part has are kept. ``alpha`` is the largest of the parts: it is per row.

    Raises:
        ValueError: nothing to merge, or the parts speak of different functions.
    """
    if not parts:
        raise ValueError("parts: at least one certificate is needed")
    about = parts[0].about
    if any(part.about != about for part in parts):
        raise ValueError("parts: they are about different functions, norms or methods; keep them apart")
    cost: dict[str, float] = {}
    for part in parts:
        for name, value in part.cost.items():
            cost[name] = cost.get(name, 0.0) + value
    shared = [name for name in parts[0].details if all(name in part.details for part in parts)]
    return Certificate(
        torch.cat([part.prediction for part in parts]),
        torch.cat([part.radius for part in parts]),
        torch.cat([part.status for part in parts]),
        max(part.alpha for part in parts),
        all(part.rigorous for part in parts),
        about,
        cost,
        {name: torch.cat([part.details[name] for part in parts]) for name in shared},
    )


class Certifier(Protocol):
    """Anything with a batched ``certify``."""

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify (B, ...) inputs; ``y`` (B,) restricts the work to rows that could count as correct."""
        ...
