"""What a run was asked to do, checked: its settings and its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.data.views import Views
from robust_core.training.batches import Order, Transform
from robust_core.training.objective import Loss, Objective, Stage
from robust_core.training.state import TrainState

__all__ = ["PRECISIONS", "Settings", "stages_of"]

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`robust_core.training.fit` that steer its loop."""

    batch_size: int
    precision: str
    accumulate: int
    clip_norm: float | None
    channels_last: bool
    num_workers: int
    log_every: int
    checkpoint_every: int | None
    transform: Transform | Views | None
    order: Order
    n_classes: int | None
    on_step: Callable[[TrainState, Loss], object] | None
    on_epoch: Callable[[TrainState], Mapping[str, Any] | None] | None

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("accumulate", self.accumulate)
        check_count("num_workers", self.num_workers, low=0)
        check_count("log_every", self.log_every)
        check_choice("precision", self.precision, tuple(PRECISIONS))
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, low=0, open_low=True)
        if self.checkpoint_every is not None:
            check_count("checkpoint_every", self.checkpoint_every)


def stages_of(
    objective: Any, epochs: int | None, optimiser: Callable[..., Any] | None, schedule: Callable[..., Any] | None
) -> list[Stage]:
    """Return the stages of a run; a lone objective is one stage."""
    if isinstance(objective, Stage):
        objective = [objective]
    if isinstance(objective, Sequence):
        if not objective or not all(isinstance(stage, Stage) for stage in objective):
            raise TypeError("objective is a list, but not of one or more robust_core.training.Stage")
        if not (epochs is optimiser is schedule is None):
            raise ValueError("epochs, optimiser and schedule belong to each Stage when stages are given")
        return list(objective)
    if not callable(objective):
        raise TypeError(f"objective must be callable as objective(model, batch), not {type(objective).__name__}")
    if epochs is None:
        raise ValueError("epochs=None: say how many passes over the data are wanted")
    return [Stage(cast(Objective, objective), optimiser or _adamw, check_count("epochs", epochs), schedule)]
