"""How hard training is, from nothing to everything: λ against progress."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import SampleStreams

__all__ = ["SCHEDULES", "Curriculum"]

SCHEDULES = ("linear", "root", "staged", "constant", "uniform")


class Curriculum(nn.Module):
    """Severity λ in [0, 1] of the samples of a step.

    ``linear`` and ``root`` rise to 1 at the share ``warm`` of training and stay; ``staged`` climbs ``levels`` steps,
    each when :meth:`advance` hears a score of at least ``threshold`` or after ``patience`` calls, and without any call
    in equal shares of training; ``constant`` is 1 throughout, ``uniform`` any number, anew for each sample: those two
    are no curricula but what one is compared with. A module, so that checkpoints hold where ``staged`` stands.

    Args:
        schedule: one of :data:`SCHEDULES`.
        warm: share of training after which λ is 1.
        levels: M of ``staged``.
        threshold: τ of ``staged``.
        patience: calls of :meth:`advance` after which a level is left in any case.
        replay: probability that a sample is easier than λ, uniformly, lest what was easy be forgotten.
    """

    def __init__(
        self,
        schedule: str = "linear",
        *,
        warm: float = 0.7,
        levels: int = 5,
        threshold: float | None = None,
        patience: int = 5,
        replay: float = 0.2,
    ) -> None:
        super().__init__()
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.warm = check_number("warm", warm, low=0.0, high=1.0, open_low=True)
        self.levels, self.patience = check_count("levels", levels), check_count("patience", patience)
        self.threshold = threshold
        self.replay = check_number("replay", replay, low=0.0, high=1.0)
        self.register_buffer("stage", torch.zeros(2, dtype=torch.int64))  # level (0: nobody advanced it), calls since

    @property
    def level(self) -> int:
        """Where ``staged`` stands, 1 .. levels; 0 before the first call of :meth:`advance`."""
        return int(self.get_buffer("stage")[0])

    def severity(self, share: float) -> float:
        """Return λ where ``share`` in [0, 1] of training is done."""
        check_number("share", share, low=0.0, high=1.0)
        done = min(share / self.warm, 1.0)
        if self.schedule == "linear":
            return done
        if self.schedule == "root":
            return math.sqrt(done)
        if self.schedule == "staged":
            return (self.level or min(1 + int(done * self.levels), self.levels)) / self.levels
        return 1.0

    def advance(self, score: float) -> int:
        """Hear the validation score under the present level, and return the level from now on."""
        check_number("score", score)
        stage = self.get_buffer("stage")
        level, waited = max(self.level, 1), int(stage[1]) + 1
        if waited >= self.patience or (self.threshold is not None and score >= self.threshold):
            level, waited = min(level + 1, self.levels), 0
        stage.copy_(torch.tensor([level, waited]))
        return level

    def draw(self, share: float, streams: SampleStreams) -> Tensor:
        """Return (B,) the λ of each sample."""
        top = self.severity(share)
        u = streams.uniform((2,))
        chance = {"uniform": 1.0, "constant": 0.0}.get(self.schedule, self.replay)
        return torch.where(u[:, 0] < chance, top * u[:, 1], top)
