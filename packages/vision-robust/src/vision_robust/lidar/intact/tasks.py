"""What is to be perceived: how wrong an answer is, what an attacker climbs, how far a student is from its teacher."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from robust_core.checks import check_finite
from robust_core.losses import distillation_kl
from robust_core.losses.margin import cross_entropy, log_odds
from robust_core.training import Batch
from robust_core.training.inner import refuse_bad_labels
from vision_robust.lidar.types import Clouds

__all__ = ["Classification", "Perception", "clouds_of"]


class Perception(Protocol):
    """A task of perception. ``outputs`` are whatever the models of the task return for B clouds."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return (B,) losses that training minimises."""
        ...

    def gap(self, outputs: Any, batch: Batch) -> Tensor:
        """Return (B,) values that grow as answers get worse, and whose gradient does not vanish on sure ones."""
        ...

    def distance(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Return (B,) distances of the student's outputs from the teacher's."""
        ...


class Classification:
    """``model(points, mask) -> (B, C)`` logits; ``batch["y"]`` holds (B,) int64 classes."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        refuse_bad_labels(outputs, batch["y"])
        return cross_entropy(outputs, batch["y"])

    def gap(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the log-odds against the class: the cross-entropy's own direction, which never underflows."""
        refuse_bad_labels(outputs, batch["y"])
        return log_odds(outputs, batch["y"])

    def distance(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return T² KL(teacher ‖ student)."""
        return distillation_kl(student, teacher, temperature=temperature)


def clouds_of(batch: Batch) -> Clouds:
    """Return the clouds of a batch: ``x`` (B, N, C), and ``mask`` (B, N) where not all points are there."""
    x = batch["x"]
    if x.device.type == "cpu":  # looking makes an accelerator wait; there NaN is met in the loss
        check_finite("x", x)
    return Clouds.full(x) if batch.get("mask") is None else Clouds(x, batch["mask"])
