"""Local tightness of any supported network: exact and interval widths of its margins in the limit of small boxes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds import Graph, trace
from robust_core.certificates.bounds.backward import margin_rows, merge_stops
from robust_core.certificates.bounds.graph import operator_of
from robust_core.certificates.bounds.operators import Rectifier, contract
from robust_core.certificates.bounds.region import Region
from robust_core.checks import check_count, check_inputs, check_labels
from robust_core.models import model_device
from robust_core.threats import Linf, Threat

__all__ = ["box_region", "check_box", "double_graph", "graph_widths", "local_tightness", "local_widths", "output_rows"]


def double_graph(model: nn.Module, x: Tensor) -> Graph:
    """Return the graph of a float64 copy of the model in eval mode."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; tightness looks inside the model and needs an nn.Module")
    device = model_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
    return trace(copy.deepcopy(model).double().eval().requires_grad_(False), x.double(), fixed=True)


def check_box(threat: Threat) -> None:
    """Refuse threats that are no box with an inside.

    Raises:
        TypeError: another threat than Linf.
        ValueError: a radius of 0.
    """
    if not isinstance(threat, Linf):
        raise TypeError(f"threat is {threat!r}; tightness speaks of boxes: Linf(eps) is needed")
    if threat.eps == 0:
        raise ValueError("threat has eps=0: a point has no width to be tight about; give a radius above 0")


def box_region(x: Tensor, threat: Threat) -> Region:
    """Return the box of a threat around ``x`` in float64; cut with the domain, its half-widths are the radii."""
    check_box(threat)
    check_inputs(x, threat.domain)
    return Region.of(threat, x.double(), threat.eps)


def output_rows(graph: Graph, x: Tensor, y: Tensor | None) -> Tensor:
    """Return (B, R, K) the outputs that are measured: margins ``e_y - e_j``, or all logits without labels."""
    if y is None:
        return torch.eye(graph.n_classes, dtype=torch.float64, device=x.device).expand(len(x), -1, -1)
    if graph.n_classes < 2:
        raise ValueError("the model has a single output, so there is no margin; leave y out")
    return margin_rows(check_labels(y, len(x), graph.n_classes), graph.n_classes, torch.float64)[0]


@dataclass(frozen=True)
class _Linearised:
    """A graph with the values of all its nodes at some inputs: what its layers do to small changes there.

    Every supported nonlinear layer is increasing, so that its Jacobian equals its absolute value.
    """

    graph: Graph
    values: list[Tensor]

    @classmethod
    def at(cls, graph: Graph, x: Tensor) -> _Linearised:
        values = [x]
        for node in graph.nodes[1:]:
            values.append(operator_of(node).evaluate(*(values[source] for source in node.inputs)))
        return cls(graph, values)

    def _state(self, position: int, operator: Rectifier) -> Tensor:
        """Return the slopes of a ReLU: autograd would call a pre-activation of exactly 0 inactive."""
        z = self.values[self.graph.nodes[position].inputs[0]]
        return torch.where(z >= 0, z.new_ones(()), z.new_tensor(operator.slope))

    def radii(self, radius: Tensor) -> list[Tensor]:
        """Return the radius of every value when intervals carry ``radius`` (B, *shape) through, layer by layer."""
        radii = [radius]
        for position, node in enumerate(self.graph.nodes[1:], start=1):
            operator, arrived = operator_of(node), [radii[source] for source in node.inputs]
            if operator.linear:
                radii.append(operator.carry(*arrived))
            elif isinstance(operator, Rectifier):
                radii.append(self._state(position, operator) * arrived[0])
            else:
                # The transpose of the transpose: forward-mode derivatives would compile TorchScript when first used.
                transposed = self.transposed(position)
                start = torch.zeros_like(self.values[position])
                radii.append(torch.func.vjp(transposed, start)[1](arrived[0])[0])
        return radii

    def transposed(self, position: int) -> Callable[[Tensor], Tensor]:
        """Return the transpose (B, *shape) -> (B, *in_shape) of the Jacobian of a layer."""
        node = self.graph.nodes[position]
        pulled = torch.func.vjp(operator_of(node).evaluate, self.values[node.inputs[0]])[1]
        return lambda row: pulled(row)[0]

    def pull(self, position: int, rows: Tensor) -> list[Tensor]:
        """Return rows (B, R, *shape) of a value as rows of its inputs."""
        node = self.graph.nodes[position]
        operator = operator_of(node)
        if operator.linear:
            return operator.backward(rows, (), None, None)[0]
        if isinstance(operator, Rectifier):
            return [rows * self._state(position, operator).unsqueeze(1)]
        return [torch.func.vmap(self.transposed(position), in_dims=1, out_dims=1)(rows)]

    def widths(self, rows: Tensor, radii: list[Tensor], stops: frozenset[int] = frozenset()) -> Tensor:
        """Return (B, R): the half-width of rows . logits, rows going back as far as ``stops``, by default to the input.

        One product of all layers is exact; a row that stops at the value before the last dense layer gives intervals.
        """
        pending = {len(self.graph.nodes) - 1: rows}
        total = rows.new_zeros(rows.shape[:2])
        for here in range(len(self.graph.nodes) - 1, -1, -1):
            arrived = pending.pop(here, None)
            if arrived is None:
                continue
            if here == 0 or here in stops:
                total = total + contract(arrived.abs(), radii[here])
                continue
            for source, part in zip(self.graph.nodes[here].inputs, self.pull(here, arrived), strict=True):
                known = pending.get(source)
                pending[source] = part if known is None else known + part
        return total


def graph_widths(graph: Graph, region: Region, rows: Tensor, max_elements: int) -> tuple[Tensor, Tensor]:
    """Return the local half-widths (B, R) of :func:`local_widths` for a graph, in chunks that fit memory."""
    stops = merge_stops(graph)
    per_chunk = max(1, max_elements // (graph.widest * rows.shape[1]))
    height = max(1, max_elements // (graph.widest * min(per_chunk, len(rows))))
    exact, loose = [], []
    with torch.no_grad():
        for x, radius, some in zip(
            region.x.split(per_chunk), region.box.radius.split(per_chunk), rows.split(per_chunk), strict=True
        ):
            here = _Linearised.at(graph, x)
            radii = here.radii(radius)
            exact.append(torch.cat([here.widths(part, radii) for part in some.split(height, dim=1)], dim=1))
            loose.append(torch.cat([here.widths(part, radii, stops) for part in some.split(height, dim=1)], dim=1))
    return torch.cat(exact), torch.cat(loose)


def local_widths(
    model: nn.Module, x: Tensor, y: Tensor | None = None, *, threat: Threat, max_elements: int = 2**24
) -> tuple[Tensor, Tensor]:
    """Return the half-widths of the margins of the network linearised at each input: exact, and of intervals.

    ``|d(C f)/dx| r`` and ``|C W_L| D .. |W_2| D |W_1| r``, with ``r`` the half-width of the box cut with the domain
    and ``D`` the slopes of the activations at ``x``. K - 1 rows go back through the network together.

    Args:
        model: an ``nn.Module`` of supported layers, taken in eval mode; left as found.
        x: (B, ...) inputs.
        y: (B,) labels: the margins ``z_y - z_j``, j in rising order. Without them the logits.
        threat: an ``Linf`` ball; ``domain=None`` for boxes of one radius.
        max_elements: elements of the largest tensor of rows; limits memory (a few times this).

    Returns:
        (B, K - 1) or (B, K) float64 each.

    Raises:
        UnsupportedLayerError: a layer without a rule; the message names it.
    """
    check_count("max_elements", max_elements)
    region = box_region(x, threat)
    graph = double_graph(model, x)
    return graph_widths(graph, region, output_rows(graph, x, y), max_elements)


def local_tightness(
    model: nn.Module, x: Tensor, y: Tensor | None = None, *, threat: Threat, max_elements: int = 2**24
) -> Tensor:
    """Return (B, K - 1) or (B, K) in [0, 1]: the local tightness of interval bounds, NaN where they have width 0.

    It depends on the radius only through the relative half-widths of boxes at the border of the domain, and can lie
    above or below :func:`true_tightness` at a radius that flips units. See :func:`local_widths` for the arguments.
    """
    exact, loose = local_widths(model, x, y, threat=threat, max_elements=max_elements)
    return torch.where(loose > 0, exact / loose, torch.nan)
