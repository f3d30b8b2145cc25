"""What a training method is: an objective, usable in anyone's own loop in three lines.

::

loss = objective(model, batch)
loss.total.backward()
optimiser.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Loss", "Objective", "Stage"]

Batch = Mapping[str, Any]
"""``{"x": (B, ...), "y": (B,), "index": (B,) int64, ...}``; ``index`` is the position in the original data.

:func:`robust_core.training.fit` adds ``step`` and ``seed`` of the run (int) and ``share`` in [0, 1], how much of the
stage is done; an objective must also work without them."""


@dataclass(frozen=True)
class Loss:
    """The value to minimise, with its named parts for the log.

    Attributes:
        total: scalar with gradient.
        parts: name -> detached scalar.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """An ``nn.Module`` called as ``objective(model, batch) -> Loss``.

    All state (memory banks, EMA targets, sample weights) lives in buffers, so that checkpoints hold it.
    It may also define any of these, which :func:`robust_core.training.fit` calls where they exist:

    - ``setup(model, n_samples, n_classes)`` once before training,
    - ``on_epoch(epoch, epochs)`` before each epoch,
    - ``after_step(model, step)`` after each optimiser step,
    - ``trainable(model) -> iterable of parameters`` where not all of the model is trained.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch."""
        ...


@dataclass(frozen=True)
class Stage:
    """One stage of training: several stages are a list, never another trainer.

    Attributes:
        objective: what is minimised.
        optimiser: builds the optimiser from the trainable parameters.
        epochs: passes over the data.
        schedule: builds a learning-rate scheduler from (optimiser, number of steps), stepped once for each step.
    """

    objective: Objective
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    schedule: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None
