"""Where a call of a traced module stands, and what its arguments are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from robust_core.certificates.bounds.operators import Operator, Shape
from robust_core.errors import UnsupportedLayerError

__all__ = ["Const", "Made", "Ref", "Site", "as_tuple", "source_of"]


@dataclass(frozen=True)
class Ref:
    """A value that depends on the input: its position in the graph and its shape without the batch."""

    position: int
    shape: Shape


@dataclass(frozen=True)
class Const:
    """A tensor that does not depend on the input, read anew at each use."""

    get: Callable[[], Tensor]
    example: Tensor


@dataclass(frozen=True)
class Site:
    """Where a call stands, and the value that it gave on the example."""

    label: str
    value: Any

    @property
    def shape(self) -> Shape:
        """Shape of the value, without the batch."""
        return tuple(self.value.shape[1:])

    def refuse(self, why: str) -> NoReturn:
        """Raise the error that names this call."""
        raise UnsupportedLayerError(f"{self.label} {why}")


Made = tuple[Operator, Sequence[Ref]] | Ref
"""An operator with its sources, or the source itself where a call does nothing."""


def as_tuple(value: Any, dims: int) -> Shape:
    """Return a setting as one number for each dimension."""
    return tuple(int(v) for v in value) if isinstance(value, tuple | list) else (int(value),) * dims


def source_of(site: Site, value: Any) -> Ref:
    """Return ``value`` if it depends on the input."""
    if not isinstance(value, Ref):
        site.refuse("is called on a constant where a value that depends on the input is needed")
    return value
