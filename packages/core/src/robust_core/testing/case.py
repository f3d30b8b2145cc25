"""A ready case of a method, on which the conformance kit works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """A small, real problem for a method, built in under 5 s.

    Attributes:
        subject: the configured method: an attack, an objective, a certifier, a defence (``nn.Module``), ...
        model: the network it is used on (for a defence: the defence itself).
        x: (B, ...) inputs in [0, 1], B of at least 8; int64 where they are tokens.
        y: (B,) labels: int64, or probabilities for objectives of preferences.
        extra: whatever else the kind needs, by name; ``problem`` (a ``TokenProblem``) for attacks on tokens.
    """

    subject: Any
    model: nn.Module
    x: Tensor
    y: Tensor
    extra: dict[str, Any] = field(default_factory=dict)
