"""Linear bounds pulled backward through the graph: what intervals and CROWN have in common.

A row ``A . z`` of some value ``z`` is bounded below by passing its coefficients through one operator after another,
each replaced by lines that enclose it on its box, and by minimising what arrives at the input over the ball
(Zhang et al. 2018, arXiv 1811.00866). Stopping early, at the boxes of inner values, gives intervals whose last layer
is merged with the rows.

Rounding. Every operator reports how much rounding may add to one of its outputs (``Operator.error``): in the
user's forward pass, and in float64 here. Rounding is then one more bounded perturbation of each value, and costs
a lower bound ``|A| . error`` at each operator that the rows pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.graph import Graph, operator_of
from robust_core.certificates.bounds.operators import contract
from robust_core.certificates.bounds.region import Region, box_minimum

__all__ = ["Analysis", "intervals_are_exact", "margin_rows", "merge_stops"]

SUM_SLACK = 2.0**-40
"""Relative rounding of a float64 sum over the operators of a graph and of the error terms themselves."""
UNDERFLOW = 1e-200


@dataclass
class Analysis:
    """Boxes of all values of a graph on a region, tightened as the analysis goes on.

    Attributes:
        graph: the network.
        region: the inputs.
        boxes: a box of each value known so far.
        rounding: the arithmetic to be covered, or None for plain, differentiable bounds.
    """

    graph: Graph
    region: Region
    boxes: list[Box]
    rounding: Rounding | None
    _errors: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def start(cls, graph: Graph, region: Region, rounding: Rounding | None) -> Analysis:
        """Return the analysis that knows the boxes from intervals."""
        return cls(graph, region, graph.intervals(region.box, rounding), rounding)

    def detached(self) -> Analysis:
        """Return the same analysis cut from the autograd graph."""
        boxes = [Box.ends(box.lower.detach(), box.upper.detach(), outward=box.outward) for box in self.boxes]
        region = Region(self.region.x.detach(), self.region.eps.detach(), self.region.p, boxes[0])
        return Analysis(self.graph, region, boxes, self.rounding)

    def inputs(self, position: int) -> list[Box]:
        """Return the boxes of the inputs of an operator."""
        return [self.boxes[source] for source in self.graph.nodes[position].inputs]

    def error(self, position: int) -> Tensor | None:
        """Return (B, *shape): what rounding may add to a value, where it was computed and where rows meet."""
        if self.rounding is None:
            return None
        if position not in self._errors:
            error = None
            if position:
                error = operator_of(self.graph.nodes[position]).error(self.inputs(position), self.rounding)
            if self.graph.consumers[position] > 1 or not position:
                met = 2.0**-48 * self.boxes[position].magnitude
                error = met if error is None else error + met
            self._errors[position] = error
        return self._errors[position]

    def lower(
        self,
        position: int,
        rows: Tensor,
        *,
        slopes: Mapping[int, Tensor] | None = None,
        stops: frozenset[int] = frozenset(),
    ) -> Tensor:
        """Return (B, R): lower bounds of rows . value at ``position``.

        Args:
            position: a value of the graph.
            rows: (B, R, *shape) coefficients.
            slopes: slopes of the lower lines of some activations, (B, R, *shape) or (B, 1, *shape), each in its
                sound range.
            stops: values at whose box the rows are minimised rather than pulled further.
        """
        pending = {position: rows}
        parts: list[Tensor] = []
        lost: list[Tensor] = []
        for here in range(position, -1, -1):
            arrived = pending.pop(here, None)
            if arrived is None:
                continue
            if here == 0 or here in stops:
                parts.append(self._minimum(here, arrived, lost))
                continue
            node = self.graph.nodes[here]
            error = self.error(here)
            if error is not None:
                lost.append(contract(arrived.abs(), error))
            slope = None if slopes is None else slopes.get(here)
            pulled, constant = operator_of(node).backward(arrived, self.inputs(here), slope, self.rounding)
            if constant is not None:
                parts.append(constant)
            for source, coefficients in zip(node.inputs, pulled, strict=True):
                known = pending.get(source)
                pending[source] = coefficients if known is None else known + coefficients
        return self._total(parts, lost)

    def _minimum(self, here: int, rows: Tensor, lost: list[Tensor]) -> Tensor:
        box = self.boxes[here]
        if self.rounding is not None:
            size = int(torch.Size(self.graph.nodes[here].shape).numel())
            lost.append(contract(rows.abs(), self.rounding.gamma_wide(4 * size + 64) * box.magnitude))
        return self.region.minimum(rows) if here == 0 else box_minimum(rows, box)

    def _total(self, parts: list[Tensor], lost: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        if self.rounding is None:
            return total
        size = torch.stack(parts).abs().sum(0)
        errors = torch.stack(lost).sum(0) * (1 + 2.0**-20)
        return total - (errors + SUM_SLACK * (size + errors) + UNDERFLOW)

    def finite(self) -> Tensor:
        """Return (B,) bool: no box holds NaN or infinity."""
        total = torch.zeros(len(self.region.x), dtype=torch.float64, device=self.region.x.device)
        for box in self.boxes:
            ends = box.lower.flatten(1).double().sum(1) + box.upper.flatten(1).double().sum(1)
            total = total + ends - ends  # NaN or infinity anywhere leaves NaN
        return torch.isfinite(total)


def margin_rows(y: Tensor, n_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows ``e_y - e_j`` (B, K - 1, K) for j != y in rising order, and the classes j (B, K - 1)."""
    others = torch.arange(n_classes - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y[:, None])
    eye = torch.eye(n_classes, dtype=dtype, device=y.device)
    return eye[y][:, None, :] - eye[others], others


def merge_stops(graph: Graph) -> frozenset[int]:
    """Return where rows stop for intervals: behind the last dense layer of each path, or at a nonlinearity.

    Rows pass on to the input where nothing but scales and rearrangements lies between.
    """
    plain = {0}  # values that are scales and rearrangements of the input
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator = operator_of(node)
        if operator.linear and not operator.dense and all(source in plain for source in node.inputs):
            plain.add(position)
    stops: set[int] = set()
    todo = [len(graph.nodes) - 1]
    while todo:
        position = todo.pop()
        if position == 0:
            continue
        operator = operator_of(graph.nodes[position])
        if not operator.linear:
            stops.add(position)
            continue
        sources = graph.nodes[position].inputs
        if operator.dense:
            stops.update(source for source in sources if source not in plain)
        todo.extend(source for source in sources if not operator.dense or source in plain)
    return frozenset(stops)


def intervals_are_exact(graph: Graph) -> frozenset[int]:
    """Return the values whose intervals are exact on a box: at most one dense layer, on a single path."""
    depth = {0: 0}
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator = operator_of(node)
        if len(node.inputs) == 1 and node.inputs[0] in depth and operator.linear:
            reached = depth[node.inputs[0]] + int(operator.dense)
            if reached <= 1:
                depth[position] = reached
    return frozenset(depth)
