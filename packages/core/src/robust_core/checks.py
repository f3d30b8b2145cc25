"""Argument checks shared by every public entry point: each names the argument, the value and the remedy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_count",
    "check_domain",
    "check_finite",
    "check_inputs",
    "check_labels",
    "check_number",
    "check_same_length",
]


def check_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` if it is a finite number in the given interval.

    Raises:
        TypeError: not a real number.
        ValueError: not finite, or outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not (math.isfinite(value) and inside):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}={value!r}: a finite number in {interval} is needed")
    return value


def check_count(name: str, value: int, *, low: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}={value}: an integer of at least {low} is needed")
    return value


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
    return value


def check_finite(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it holds neither NaN nor infinity."""
    if not value.is_floating_point() or math.isfinite(float(value.detach().sum())):
        return value  # one NaN or infinity would have shown in the sum, which costs a tenth of looking at each value
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} holds {bad} values that are NaN or infinite; clean the data first")
    return value


def check_domain(name: str, value: Tensor, domain: tuple[float, float] | None) -> Tensor:
    """Return ``value`` if all of it lies in ``domain`` (no tolerance)."""
    if domain is None or value.numel() == 0:
        return value
    low, high = float(value.amin()), float(value.amax())
    if low < domain[0] or high > domain[1]:
        raise ValueError(
            f"{name} spans [{low:.9g}, {high:.9g}], outside the domain [{domain[0]:g}, {domain[1]:g}]. "
            "Give inputs before normalisation (put it into the model: robust_core.models.Normalize); if they "
            "are only off by rounding, clamp them first"
        )
    return value


def check_inputs(x: Tensor, domain: tuple[float, float] | None = None, *, name: str = "x") -> Tensor:
    """Return ``x`` if it is a non-empty floating-point batch (B, ...), finite and inside ``domain``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; floating point is needed (uint8 images: x.float() / 255)")
    if x.ndim < 2 or x.shape[0] == 0 or x[0].numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; a batch (B, ...) of at least one sample is needed")
    return check_domain(name, check_finite(name, x), domain)


def check_labels(y: Tensor, n: int, n_classes: int | None = None, *, name: str = "y") -> Tensor:
    """Return ``y`` if it is (n,) int64 with values in 0 .. n_classes - 1."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(y).__name__}")
    if y.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {y.dtype}; class indices are int64")
    if y.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(y.shape)}; ({n},) is needed, one label for each input")
    low, high = (int(y.min()), int(y.max())) if n else (0, 0)
    if low < 0 or (n_classes is not None and high >= n_classes):
        limit = "" if n_classes is None else f" .. {n_classes - 1}"
        raise ValueError(f"{name} holds labels {low} .. {high}; the model knows 0{limit}")
    return y


def check_same_length(**lengths: int) -> int:
    """Return the common length, or name the arguments that differ."""
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lengths differ: {', '.join(f'{k} has {v}' for k, v in lengths.items())}")
    return next(iter(lengths.values()))
