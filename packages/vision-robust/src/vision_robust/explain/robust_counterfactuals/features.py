"""Which features may move, where to, and on which grid; everything else stays exactly as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.data import Column

__all__ = ["MutableSpec"]


@dataclass(frozen=True, eq=False)
class MutableSpec:
    """What a counterfactual may change.

    Noise and gradients act on mutable features only, and noise leaves one-hot groups alone: half a category exists
    nowhere. Searches relax integers and groups (a group to its simplex) and :meth:`snap` what they return and judge.

    Args:
        mutable: boolean, shaped like one input; None lets everything move.
        low: least value of each feature, a number or shaped like one input.
        high: greatest value, likewise; a category whose ``high`` is below 1 is forbidden.
        step: spacing of the grid (through 0) of integer features, 0 where a feature is continuous; shaped like one
            input. An integer column that was scaled by 1 / 40 has the step 1 / 40.
        groups: one-hot groups, as positions in the flattened input.

    Raises:
        TypeError, ValueError: shapes, ranges or groups that contradict each other.
    """

    mutable: Tensor | None = None
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0
    step: Tensor | None = None
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.mutable is not None and self.mutable.dtype != torch.bool:
            raise TypeError(f"mutable has dtype {self.mutable.dtype}; a boolean mask is needed")
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        if not bool((low <= high).all()):
            raise ValueError("low must not exceed high, in any feature; NaN is neither")
        if self.step is not None and not bool((self.step >= 0).all()):
            raise ValueError("step must be at least 0 everywhere: 0 for continuous features, the spacing for integers")
        members = [position for group in self.groups for position in group]
        if len(set(members)) != len(members) or any(len(group) < 2 or min(group) < 0 for group in self.groups):
            raise ValueError(f"groups={self.groups}: disjoint groups of at least two flat positions are needed")
        for group in self.groups:
            chosen = None if self.mutable is None else self.mutable.flatten()[list(group)]
            if chosen is not None and bool(chosen.any()) != bool(chosen.all()):
                raise ValueError(f"group {group} is partly mutable; a category moves as a whole or not at all")

    @classmethod
    def of_columns(
        cls,
        columns: Sequence[Column],
        *,
        immutable: Sequence[str] = (),
        ranges: Mapping[str, tuple[float, float]] | None = None,
    ) -> MutableSpec:
        """Return the specification of a table.

        Args:
            columns: ``Dataset.columns``.
            immutable: names of columns that must stay.
            ranges: name -> (least, greatest) value in the user's units.

        Raises:
            ValueError: no columns, or a name or range that does not fit them.
        """
        if not columns:
            raise ValueError("columns is empty: the data are no table; build MutableSpec from masks")
        names = {column.name: column for column in columns}
        for name in [*immutable, *(ranges or {})]:
            if name not in names:
                raise ValueError(f"{name!r} is no column; there are {', '.join(names)}")
        width = 1 + max(position for column in columns for position in column.positions)
        mutable = torch.ones(width, dtype=torch.bool)
        low, high, step = torch.zeros(width), torch.ones(width), torch.zeros(width)
        for column in columns:
            if column.kind == "integer":
                step[list(column.positions)] = 1.0 / (column.high - column.low)
        for name in immutable:
            mutable[list(names[name].positions)] = False
        for name, (least, greatest) in (ranges or {}).items():
            column = names[name]
            if column.kind == "category" or not least <= greatest:
                raise ValueError(f"ranges[{name!r}]={(least, greatest)}: rising bounds of a numeric column are needed")
            scaled = [(bound - column.low) / (column.high - column.low) for bound in (least, greatest)]
            low[column.positions[0]], high[column.positions[0]] = scaled
        groups = tuple(column.positions for column in columns if len(column.positions) > 1)
        return cls(mutable, low, high, step, groups)

    @property
    def discrete(self) -> bool:
        """Whether :meth:`snap` can change anything."""
        return bool(self.groups) or (self.step is not None and bool((self.step > 0).any()))

    def check(self, x: Tensor) -> None:
        """Raise ValueError if (B, ...) inputs do not fit."""
        shape = x.shape[1:]
        for name in ("mutable", "low", "high", "step"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.ndim and value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; one input has {tuple(shape)}")
        size = math.prod(shape)
        if any(position >= size for group in self.groups for position in group):
            raise ValueError(f"groups name positions beyond the {size} features of an input")
        for group in self.groups:
            values = x.flatten(1)[:, list(group)]
            if not bool(((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all()):
                raise ValueError(f"x holds rows that are not one-hot in the group {group}")

    def movable(self, x: Tensor) -> Tensor:
        """Return (...) 1 where a feature may move, in the type of ``x``."""
        if self.mutable is None:
            return torch.ones_like(x[0])
        return self.mutable.to(x.device, x.dtype)

    def noisy(self, x: Tensor) -> Tensor:
        """Return (...) 1 where noise acts: the movable features outside one-hot groups."""
        mask = self.movable(x).flatten().clone()
        for group in self.groups:
            mask[list(group)] = 0
        return mask.reshape(x.shape[1:])

    def project(self, x: Tensor, start: Tensor) -> Tensor:
        """Return the nearest points (B, ...) that differ from ``start`` in movable features only, within their ranges.

        The set is convex, so a point of it that was the centre of a ball stays at most as far away.
        """
        low, high = (torch.as_tensor(bound).to(x) for bound in (self.low, self.high))
        moved = torch.minimum(torch.maximum(x, low), high)
        if self.groups:
            flat, limit = moved.flatten(1).clone(), high.expand(x.shape[1:]).flatten()
            for group in map(list, self.groups):
                flat[:, group] = _on_simplex(x.flatten(1)[:, group], limit[group] >= 1)
            moved = flat.reshape(x.shape)
        return torch.where(self.movable(x) > 0, moved, start)

    def snap(self, x: Tensor, start: Tensor) -> Tensor:
        """Return projected points (B, ...) with integers on their grid and one category in each group."""
        if not self.discrete:
            return x
        low, high = (torch.as_tensor(bound).to(x) for bound in (self.low, self.high))
        moved = x
        if self.step is not None:
            step = self.step.to(x)
            unit = torch.where(step > 0, step, torch.ones_like(step))
            least, most = torch.ceil(low / unit - 1e-4), torch.floor(high / unit + 1e-4)
            moved = torch.where(step > 0, torch.minimum(torch.maximum(torch.round(x / unit), least), most) * unit, x)
        flat, limit = moved.flatten(1).clone(), high.expand(x.shape[1:]).flatten()
        for group in map(list, self.groups):
            values = flat[:, group].masked_fill(limit[group] < 1, -math.inf)
            flat[:, group] = torch.nn.functional.one_hot(values.argmax(1), len(group)).to(x)
        return torch.where(self.movable(x) > 0, flat.reshape(x.shape), start)


def _on_simplex(x: Tensor, allowed: Tensor) -> Tensor:
    """Return the nearest points of the simplex over the allowed columns, row by row (Duchi et al. 2008)."""
    if not bool(allowed.any()):
        raise ValueError("high forbids every category of a group")
    masked = x.masked_fill(~allowed, -math.inf)
    falling = masked.sort(1, descending=True).values[:, : int(allowed.sum())]
    count = torch.arange(1, falling.shape[1] + 1, device=x.device, dtype=x.dtype)
    excess = (falling.cumsum(1) - 1) / count
    last = (falling > excess).sum(1, keepdim=True).clamp(min=1)
    return (masked - excess.gather(1, last - 1)).clamp(min=0)
