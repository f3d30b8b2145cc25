"""All that a training run is, at one instant, and how it becomes tensors plus JSON and back.

No pickle is involved: optimiser and schedule states are nests of tensors, numbers, text, lists and mappings, which
:func:`flatten` splits into named tensors and plain JSON, exactly (floats keep every bit).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.errors import CheckpointError
from robust_core.models import model_device
from robust_core.training.ema import EMA

__all__ = ["TrainState", "flatten", "unflatten"]

_DEPTH = 32
_COUNTERS = ("seed", "stage", "epoch", "batch", "step")


def flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as strict JSON; its tensors go into ``tensors`` under names that begin with ``prefix``.

    Raises:
        TypeError: it holds something that is neither tensor, number, text, None, list, tuple nor mapping.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach()
        return {"tensor": prefix}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list | tuple):
        parts = [flatten(part, f"{prefix}/{i}", tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, Mapping):
        pairs = [
            [flatten(key, f"{prefix}/key", tensors), flatten(part, f"{prefix}/{key}", tensors)]
            for key, part in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy number
        return flatten(value.item(), prefix, tensors)
    raise TypeError(f"{prefix} is a {type(value).__name__}, which cannot be saved without pickle")


def unflatten(value: Any, tensors: Mapping[str, Tensor], *, depth: int = 0) -> Any:
    """Return what :func:`flatten` was given.

    Raises:
        CheckpointError: ``value`` was not made by :func:`flatten`, or a tensor is missing.
    """
    if depth > _DEPTH:
        raise CheckpointError(f"the state is nested more than {_DEPTH} deep")
    if isinstance(value, list):
        return [unflatten(part, tensors, depth=depth + 1) for part in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise CheckpointError(f"the state holds an entry with {len(value)} kinds, not one")
    ((kind, inner),) = value.items()
    if kind == "tensor" and isinstance(inner, str) and inner in tensors:
        return tensors[inner]
    if kind == "float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if kind == "tuple" and isinstance(inner, list):
        return tuple(unflatten(part, tensors, depth=depth + 1) for part in inner)
    if kind in ("dict", "counter") and isinstance(inner, list) and all(_is_pair(pair) for pair in inner):
        made = {
            unflatten(key, tensors, depth=depth + 1): unflatten(part, tensors, depth=depth + 1) for key, part in inner
        }
        return Counter(made) if kind == "counter" else made
    raise CheckpointError(f"the state holds an entry of kind {kind!r} that cannot be read: {str(inner)[:80]}")


def _is_pair(pair: Any) -> bool:
    # A key is a scalar, or a tuple of scalars: a mapping or list would not be hashable.
    return isinstance(pair, list) and len(pair) == 2 and not isinstance(pair[0], list) and "dict" not in str(pair[0])


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a counter holds {value!r}")
    return value


def _on(value: Any, model: nn.Module) -> Any:
    device = model_device(model)
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


@dataclass
class TrainState:
    """A run at one instant.

    Attributes:
        model: the network.
        objectives: the objective of each stage.
        optimiser: of the current stage.
        schedule: of the current stage, or None.
        ema: the running average of the model (``ema.module``), or None.
        scaler: of float16 gradients, or None.
        seed: of the run.
        stage: number of the current stage.
        epoch: passes over the data completed, over all stages.
        batch: batches completed in the current epoch.
        step: optimiser steps taken, over all stages.
        finished: all stages are done.
        window: sums of what was measured since the last record of the log.
    """

    model: nn.Module
    objectives: list[Any]
    optimiser: torch.optim.Optimizer
    schedule: Any = None
    ema: EMA | None = None
    scaler: Any = None
    seed: int = 0
    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    finished: bool = False
    window: dict[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> Any:
        """The objective of the current stage."""
        return self.objectives[self.stage]

    @property
    def averaged(self) -> nn.Module:
        """The network to use afterwards: the running average if there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    def _modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model}
        for number, objective in enumerate(self.objectives[: self.stage + 1]):
            if isinstance(objective, nn.Module):
                found[f"objective/{number}"] = objective
        if self.ema is not None:
            found["ema"] = self.ema
        return found

    def _parts(self) -> dict[str, Any]:
        found = {"optimiser": self.optimiser, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part for name, part in found.items() if part is not None}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (named tensors, JSON) that hold everything; the tensors are the live ones, not copies."""
        tensors: dict[str, Tensor] = {}
        modules = {name: flatten(module.state_dict(), name, tensors) for name, module in self._modules().items()}
        parts = {name: flatten(part.state_dict(), name, tensors) for name, part in self._parts().items()}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        window = flatten(self.window, "window", tensors)
        return tensors, {"counters": counters, "modules": modules, "parts": parts, "window": window}

    def restore(self, tensors: Mapping[str, Tensor], document: Any) -> None:
        """Take the state that :meth:`export` gave; ``stage`` must already be that of the document.

        Raises:
            CheckpointError: it does not fit this model, objective or optimiser.
        """
        try:
            held = {name: unflatten(document["modules"][name], tensors) for name in self._modules()}
            parts = {name: unflatten(document["parts"][name], tensors) for name in self._parts()}
            window = unflatten(document["window"], tensors)
            for name, module in self._modules().items():
                module.load_state_dict(held[name])
            for name, part in self._parts().items():
                part.load_state_dict(parts[name])
            for name in _COUNTERS:
                setattr(self, name, _count(document["counters"][name]))
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {str(error)[:400]}") from error
        self.window = {name: _on(value, self.model) for name, value in window.items()}
