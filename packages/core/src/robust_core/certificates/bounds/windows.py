"""Backward bounds of the units of a convolution, on their receptive fields alone.

A unit of a convolutional layer sees a small window of each layer below, so its coefficients need no more room than
that. Rows are kept as windows (B, R, S, C, *window), S being the two signs, whose place in the layer below is
``stride * (place of the unit) + offset``; what lies outside the layer is padding and counts nothing. It holds while
the layers below are a chain of convolutions with zero padding, scales of channels and activations; elsewhere, and
where windows outgrow their layer, the dense rows of :mod:`robust_core.certificates.bounds.backward` serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_core.certificates.bounds.backward import SUM_SLACK, UNDERFLOW, Analysis
from robust_core.certificates.bounds.graph import Graph, operator_of
from robust_core.certificates.bounds.operators import Activation, Convolution, Scale

__all__ = ["window_chain", "windowed_bounds"]

DENSE_LIMIT = 2**22
"""Elements up to which a convolution on windows is multiplied out as one matrix."""


@dataclass(frozen=True)
class Frame:
    """Where windows lie: the window of unit (i, j) starts at stride * (i, j) + offset and has this size."""

    stride: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    """Height and width of the layer of the units."""


def window_chain(graph: Graph, position: int) -> list[int] | None:
    """Return the values from ``position`` down to the input, if windows are to be used for its units."""
    chain = [position]
    frame = _first_frame(graph.nodes[position].shape)
    if frame is None:
        return None
    while chain[-1]:
        node = graph.nodes[chain[-1]]
        operator = operator_of(node)
        if isinstance(operator, Convolution):
            if operator.dims != 2 or operator.mode != "constant":
                return None
            frame = _below(frame, operator)
            if math.prod(frame.size) * 2 > math.prod(operator.in_shapes[0][1:]):
                return None
        elif isinstance(operator, Scale):
            if any(part is not None and not _by_channel(part, node.shape) for part in operator.parts()):
                return None
        elif not isinstance(operator, Activation):
            return None
        chain.append(node.inputs[0])
    return chain


def _first_frame(shape: tuple[int, ...]) -> Frame | None:
    return Frame((1, 1), (0, 0), (1, 1), (shape[1], shape[2])) if len(shape) == 3 else None


def _by_channel(part: Tensor, shape: tuple[int, ...]) -> bool:
    return part.numel() == 1 or (part.ndim == 3 and part.shape == (shape[0], 1, 1))


def _below(frame: Frame, operator: Convolution) -> Frame:
    kernel = operator.weight().shape[2:]
    before = operator.padding[2], operator.padding[0]
    return replace(
        frame,
        stride=_pair(frame.stride[i] * operator.stride[i] for i in range(2)),
        offset=_pair(frame.offset[i] * operator.stride[i] - before[i] for i in range(2)),
        size=_pair(
            (frame.size[i] - 1) * operator.stride[i] + operator.dilation[i] * (kernel[i] - 1) + 1 for i in range(2)
        ),
    )


def _pair(values: object) -> tuple[int, int]:
    first, second = values  # pyright: ignore[reportGeneralTypeIssues]
    return int(first), int(second)


class _Tables:
    """What all units of a layer share: values laid out window by window, and convolutions as matrices."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._windows: dict[tuple[object, ...], Tensor] = {}
        self._matrices: dict[int, Tensor] = {}

    def windows(self, key: tuple[object, ...], values: Tensor, frame: Frame) -> Tensor:
        """(B, C, H, W) -> (B, places, C * window), 0 outside the layer; ``key`` names the values."""
        if key not in self._windows:
            after = [
                (frame.grid[i] - 1) * frame.stride[i] + frame.offset[i] + frame.size[i] - values.shape[2 + i]
                for i in range(2)
            ]
            room = F.pad(values, (-frame.offset[1], after[1], -frame.offset[0], after[0]))
            self._windows[key] = F.unfold(room, frame.size, stride=frame.stride).transpose(1, 2).contiguous()
        return self._windows[key]

    def matrix(self, position: int, operator: Convolution, shape: torch.Size) -> Tensor:
        """Return a transposed convolution on windows (C, *window) as a matrix."""
        if position not in self._matrices:
            height, weight = shape.numel(), operator.weight()
            eye = torch.eye(height, dtype=weight.dtype, device=weight.device).reshape(height, *shape)
            self._matrices[position] = operator.spread(eye).flatten(1)
        return self._matrices[position]


class _Rows:
    """Windows of some units: gathers from layers and the running bound."""

    def __init__(self, tables: _Tables, places: Tensor) -> None:
        self.tables, self.analysis = tables, tables.analysis
        self.places = places  # (B, R) flat place of each unit in its layer
        self.sample = torch.arange(len(places), device=places.device)[:, None]
        self.parts: list[Tensor] = []
        self.lost: list[Tensor] = []

    def gather(self, here: int, name: str, values: Tensor, frame: Frame) -> Tensor:
        """(B, C, H, W) -> (B, R, 1, C, *window), 0 outside the layer; ``name`` tells values at ``here`` apart."""
        table = self.tables.windows((here, name), values, frame)
        chosen = table.flatten(0, 1).index_select(0, (self.sample * table.shape[1] + self.places).flatten())
        return chosen.reshape(*self.places.shape, 1, values.shape[1], *frame.size)

    def lose(self, position: int, rows: Tensor, frame: Frame) -> None:
        """Take off the rounding of one value."""
        error = self.analysis.error(position)
        if error is not None:
            self.lost.append(_inner(rows.abs(), self.gather(position, "error", error, frame)))

    def total(self) -> Tensor:
        total = torch.stack(self.parts).sum(0)
        if self.analysis.rounding is None:
            return total
        size = torch.stack(self.parts).abs().sum(0)
        errors = torch.stack(self.lost).sum(0) * (1 + 2.0**-20)
        return total - (errors + SUM_SLACK * (size + errors) + UNDERFLOW)


def _inner(rows: Tensor, values: Tensor) -> Tensor:
    """Return (B, R, S): inner products of windows (B, R, S, C, *window) with (B, R, 1, C, *window)."""
    return (rows.flatten(3) @ values.flatten(3).transpose(2, 3)).squeeze(3)


def _through_convolution(state: _Rows, rows: Tensor, here: int, operator: Convolution, size: Sequence[int]) -> Tensor:
    """Pull windows (B, R, S, C, *window) back through a convolution."""
    channels = operator.in_shapes[0][0]
    flat = rows.flatten(0, 2)
    height = flat[0].numel()
    if operator.interleaves(rows.dtype):
        pulled = operator.spread(flat)
    elif height * channels * math.prod(size) <= DENSE_LIMIT and height <= 4 * len(flat):
        pulled = flat.flatten(1) @ state.tables.matrix(here, operator, flat.shape[1:])
    else:
        pulled = operator.spread(flat)
    return pulled.reshape(*rows.shape[:3], channels, *size)


def _per_channel(rows: Tensor, values: Tensor) -> Tensor:
    """Return (B, R, S): the sum of rows times a value for each channel."""
    sums = rows.flatten(4).sum(4)
    return (sums * values.flatten()).sum(3)


def windowed_bounds(
    analysis: Analysis, chain: Sequence[int], units: Tensor, *, max_elements: int = 2**20
) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds (B, R) of units (B, R), flat positions in the value ``chain[0]``.

    ``max_elements`` limits the elements of the windows that are worked on at a time.
    """
    tables = _Tables(analysis)
    height = max(1, max_elements // (2 * len(units) * _largest_window(analysis.graph, chain)))
    parts = [_part(tables, chain, part) for part in units.split(height, dim=1)]
    return torch.cat([low for low, _ in parts], dim=1), torch.cat([high for _, high in parts], dim=1)


def _largest_window(graph: Graph, chain: Sequence[int]) -> int:
    """Return the number of elements of the largest window on the way down a chain."""
    shape = graph.nodes[chain[0]].shape
    frame, most = Frame((1, 1), (0, 0), (1, 1), (shape[1], shape[2])), shape[0]
    for here in chain[:-1]:
        operator = operator_of(graph.nodes[here])
        if isinstance(operator, Convolution):
            frame = _below(frame, operator)
            most = max(most, operator.in_shapes[0][0] * math.prod(frame.size))
    return most


def _part(tables: _Tables, chain: Sequence[int], units: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of some units."""
    graph, dtype = tables.analysis.graph, tables.analysis.region.x.dtype
    shape = graph.nodes[chain[0]].shape
    frame = Frame((1, 1), (0, 0), (1, 1), (shape[1], shape[2]))
    state = _Rows(tables, units % (shape[1] * shape[2]))
    channel = units // (shape[1] * shape[2])
    signs = torch.tensor([1.0, -1.0], dtype=dtype, device=units.device).reshape(2, 1, 1, 1)
    rows = F.one_hot(channel, shape[0]).to(dtype).reshape(*units.shape, 1, shape[0], 1, 1) * signs
    for here, below in pairwise(chain):
        state.lose(here, rows, frame)
        operator = operator_of(graph.nodes[here])
        if isinstance(operator, Activation):
            rows = _through_activation(state, operator, rows, here, below, frame)
            continue
        bias = operator.bias() if isinstance(operator, Convolution | Scale) else None
        if bias is not None:
            state.parts.append(_per_channel(rows, bias))
        if isinstance(operator, Convolution):
            frame = _below(frame, operator)
            if here == chain[0]:  # rows are units: their coefficients are the weights
                table = tables.matrix(here, operator, rows.shape[3:]).index_select(0, channel.flatten())
                rows = table.reshape(*units.shape, 1, operator.in_shapes[0][0], *frame.size) * signs
            else:
                rows = _through_convolution(state, rows, here, operator, frame.size)
            inside = torch.ones((1, 1, *graph.nodes[below].shape[1:]), dtype=dtype, device=units.device)
            inside = tables.windows((here, "inside"), inside, frame)[0, state.places]
            rows = rows * inside.reshape(*units.shape, 1, 1, *frame.size)
        else:
            scale = operator.parts()[0] if isinstance(operator, Scale) else None
            rows = rows if scale is None else rows * scale
    return _concretise(state, rows, frame)


def _through_activation(
    state: _Rows, operator: Activation, rows: Tensor, here: int, below: int, frame: Frame
) -> Tensor:
    low, low_shift, high, high_shift = operator.known_lines(state.analysis.boxes[below], state.analysis.rounding)
    falling = rows.clamp(max=0)
    state.parts.append(_inner(falling, state.gather(here, "high shift", high_shift, frame)))
    if low_shift is not None:
        state.parts.append(_inner(rows - falling, state.gather(here, "low shift", low_shift, frame)))
    rows = rows * state.gather(here, "low", low, frame)
    return torch.addcmul(rows, falling, state.gather(here, "difference", high - low, frame))


def _concretise(state: _Rows, rows: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    region, rounding = state.analysis.region, state.analysis.rounding
    if rounding is not None:
        size = region.x[0].numel()
        error = rounding.gamma_wide(4 * size + 64) * region.box.magnitude
        state.lost.append(_inner(rows.abs(), state.gather(0, "magnitude", error, frame)))
    centre = _inner(rows, state.gather(0, "centre", region.box.centre, frame))
    best = centre - _inner(rows.abs(), state.gather(0, "radius", region.box.radius, frame))
    if not math.isinf(region.p):
        order = 2.0 if region.p == 2 else math.inf
        length = torch.linalg.vector_norm(rows.flatten(3), ord=order, dim=3)
        best = torch.maximum(
            best, _inner(rows, state.gather(0, "x", region.x, frame)) - region.eps[:, None, None] * length
        )
    state.parts.append(best)
    lower = state.total()
    return lower[..., 0], -lower[..., 1]
