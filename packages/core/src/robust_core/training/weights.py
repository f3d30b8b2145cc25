"""Arithmetic on the weights of networks of one architecture: mixing, averaging, task vectors.

A *state* is a ``state_dict``. Floating-point entries take part; the others (counters, indices) are taken from the first
state. Mixed BatchNorm statistics describe no network that ever ran: :func:`renew_statistics` measures them again.

Sources: interpolation and ensembling of weights, Wortsman et al. 2022 (arXiv 2109.01903, 2203.05482); task vectors,
Ilharco et al. 2023 (arXiv 2212.04089); renewed statistics, Izmailov et al. 2018 (arXiv 1803.05407).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

__all__ = ["State", "add", "average", "combine", "interpolate", "renew_statistics", "scale", "similarity", "subtract"]

State = Mapping[str, Tensor]


def _check(states: Sequence[State]) -> None:
    if not states:
        raise ValueError("states is empty: at least one is needed")
    first = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
    for number, state in enumerate(states[1:], start=1):
        other = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if other != first:
            names = sorted({name for name in first.keys() | other.keys() if first.get(name) != other.get(name)})
            raise ValueError(f"state {number} is of another architecture than state 0: {', '.join(names[:5])}")


@torch.no_grad()
def _map(states: Sequence[State], formula: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """Apply ``formula`` to each floating-point entry in float64 and store it in the entry's own dtype."""
    _check(states)
    made = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            made[name] = formula([state[name].detach().double() for state in states]).to(tensor.dtype)
        else:
            made[name] = tensor.detach().clone()
    return made


def combine(states: Sequence[State], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return the sum of ``factors[i] * states[i]``."""
    if len(states) != len(factors):
        raise ValueError(f"{len(states)} states and {len(factors)} factors: one factor for each state is needed")

    def formula(tensors: list[Tensor]) -> Tensor:
        total = factors[0] * tensors[0]
        for factor, tensor in zip(factors[1:], tensors[1:], strict=True):
            total = total + factor * tensor
        return total

    return _map(states, formula)


def interpolate(first: State, second: State, weight: float) -> dict[str, Tensor]:
    """Return ``(1 - weight) * first + weight * second``; exact at both ends. ``weight`` may lie outside [0, 1]."""
    return combine([first, second], [1 - weight, weight])


def add(first: State, second: State, *, factor: float = 1.0) -> dict[str, Tensor]:
    """Return ``first + factor * second``: apply a task vector."""
    return combine([first, second], [1.0, factor])


def subtract(first: State, second: State) -> dict[str, Tensor]:
    """Return ``first - second``: the task vector from ``second`` to ``first``."""
    return combine([first, second], [1.0, -1.0])


def scale(state: State, factor: float) -> dict[str, Tensor]:
    """Return ``factor * state``."""
    return combine([state], [factor])


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the mean of the states."""
    return combine(states, [1 / len(states)] * len(states) if states else [])


def similarity(first: State, second: State) -> float:
    """Return the cosine of the angle between two task vectors; 0 where one of them is zero."""
    _check([first, second])
    names = [name for name, tensor in first.items() if tensor.is_floating_point()]
    pairs = [(first[name].detach().double(), second[name].detach().double()) for name in names]
    dot = sum(float((a * b).sum()) for a, b in pairs)
    lengths = [sum(float((pair[side] ** 2).sum()) for pair in pairs) ** 0.5 for side in (0, 1)]
    return dot / (lengths[0] * lengths[1]) if all(lengths) else 0.0


def renew_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the BatchNorm statistics of ``model`` anew over ``batches`` of inputs; all else stays as it is."""
    device = next((parameter.device for parameter in model.parameters()), None)
    update_bn(batches, model, device=device)
