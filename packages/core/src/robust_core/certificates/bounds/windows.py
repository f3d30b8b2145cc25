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


class _Rows:
    """Windows of some units: gathers from layers and the running bound."""

    def __init__(self, analysis: Analysis, places: Tensor) -> None:
        self.analysis = analysis
        self.places = places  # (B, R) flat place of each unit in its layer
        self.sample = torch.arange(len(places), device=places.device)[:, None]
        self.parts: list[Tensor] = []
        self.lost: list[Tensor] = []

    def gather(self, values: Tensor, frame: Frame) -> Tensor:
        """(B, C, H, W) -> (B, R, 1, C, *window), 0 outside the layer."""
        after = [
            (frame.grid[i] - 1) * frame.stride[i] + frame.offset[i] + frame.size[i] - values.shape[2 + i]
            for i in range(2)
        ]
        room = F.pad(values, (-frame.offset[1], after[1], -frame.offset[0], after[0]))
        columns = F.unfold(room, frame.size, stride=frame.stride).transpose(1, 2)  # (B, places, C * window)
        columns = columns.contiguous()[self.sample, self.places]
        return columns.reshape(*self.places.shape, 1, values.shape[1], *frame.size)

    def lose(self, position: int, rows: Tensor, frame: Frame) -> None:
        """Take off the rounding of one value."""
        error = self.analysis.error(position)
        if error is not None:
            self.lost.append((rows.abs() * self.gather(error, frame)).flatten(3).sum(3))

    def total(self) -> Tensor:
        total = torch.stack(self.parts).sum(0)
        if self.analysis.rounding is None:
            return total
        size = torch.stack(self.parts).abs().sum(0)
        errors = torch.stack(self.lost).sum(0) * (1 + 2.0**-20)
        return total - (errors + SUM_SLACK * (size + errors) + UNDERFLOW)


def _through_convolution(rows: Tensor, operator: Convolution, size: Sequence[int]) -> Tensor:
    """Pull windows (B, R, S, C, *window) back through a convolution."""
    weight = operator.weight()
    channels = operator.in_shapes[0][0]
    flat = rows.flatten(0, 2)

    def transpose(values: Tensor) -> Tensor:
        return F.conv_transpose2d(values, weight, None, operator.stride, 0, 0, operator.groups, operator.dilation)

    height = flat[0].numel()
    if height * channels * math.prod(size) <= DENSE_LIMIT and height <= len(flat):
        eye = torch.eye(height, dtype=rows.dtype, device=rows.device).reshape(height, *flat.shape[1:])
        pulled = flat.flatten(1) @ transpose(eye).flatten(1)
    else:
        pulled = transpose(flat)
    return pulled.reshape(*rows.shape[:3], channels, *size)


def _per_channel(rows: Tensor, values: Tensor) -> Tensor:
    """Return (B, R, S): the sum of rows times a value for each channel."""
    sums = rows.flatten(4).sum(4)
    return (sums * values.flatten()).sum(3)


def windowed_bounds(analysis: Analysis, chain: Sequence[int], units: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds (B, R) of units (B, R), flat positions in the value ``chain[0]``."""
    graph, dtype = analysis.graph, analysis.region.x.dtype
    shape = graph.nodes[chain[0]].shape
    frame = Frame((1, 1), (0, 0), (1, 1), (shape[1], shape[2]))
    state = _Rows(analysis, units % (shape[1] * shape[2]))
    channel = F.one_hot(units // (shape[1] * shape[2]), shape[0]).to(dtype)
    signs = torch.tensor([1.0, -1.0], dtype=dtype, device=units.device)
    rows = (channel.unsqueeze(2) * signs[:, None]).reshape(*units.shape, 2, shape[0], 1, 1)
    for here, below in zip(chain, [*chain[1:], None], strict=True):
        if below is None:
            break
        state.lose(here, rows, frame)
        operator = operator_of(graph.nodes[here])
        if isinstance(operator, Activation):
            rows = _through_activation(state, operator, rows, below, frame)
            continue
        bias = operator.bias() if isinstance(operator, Convolution | Scale) else None
        if bias is not None:
            state.parts.append(_per_channel(rows, bias))
        if isinstance(operator, Convolution):
            frame = _below(frame, operator)
            rows = _through_convolution(rows, operator, frame.size)
            inside = torch.ones((len(units), 1, *graph.nodes[below].shape[1:]), dtype=dtype, device=units.device)
            rows = rows * state.gather(inside, frame)
        else:
            scale = operator.parts()[0] if isinstance(operator, Scale) else None
            rows = rows if scale is None else rows * scale
    return _concretise(state, rows, frame)


def _through_activation(state: _Rows, operator: Activation, rows: Tensor, below: int, frame: Frame) -> Tensor:
    analysis = state.analysis
    low, low_shift, high, high_shift = operator.lines(analysis.boxes[below], analysis.rounding)
    falling = rows.clamp(max=0)
    state.parts.append((falling * state.gather(high_shift, frame)).flatten(3).sum(3))
    if low_shift is not None:
        state.parts.append(((rows - falling) * state.gather(low_shift, frame)).flatten(3).sum(3))
    return torch.addcmul(rows * state.gather(low, frame), falling, state.gather(high - low, frame))


def _concretise(state: _Rows, rows: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    region, rounding = state.analysis.region, state.analysis.rounding
    if rounding is not None:
        size = region.x[0].numel()
        error = rounding.gamma_wide(4 * size + 64) * region.box.magnitude
        state.lost.append((rows.abs() * state.gather(error, frame)).flatten(3).sum(3))
    centre = (rows * state.gather(region.box.centre, frame)).flatten(3).sum(3)
    best = centre - (rows.abs() * state.gather(region.box.radius, frame)).flatten(3).sum(3)
    if not math.isinf(region.p):
        order = 2.0 if region.p == 2 else math.inf
        length = torch.linalg.vector_norm(rows.flatten(3), ord=order, dim=3)
        middle = (rows * state.gather(region.x, frame)).flatten(3).sum(3)
        best = torch.maximum(best, middle - region.eps[:, None, None] * length)
    state.parts.append(best)
    lower = state.total()
    return lower[..., 0], -lower[..., 1]
