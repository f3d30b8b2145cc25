"""Bounds of what stands in front of each activation, over a box: what an encoding of a network in a MILP needs.

The box may have another width for each input, which a threat has not; everything else is the machinery of
:class:`~robust_core.certificates.bounds.Crown`, in float64 and rounded outward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds.backward import Analysis
from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.crown import tighten
from robust_core.certificates.bounds.graph import trace
from robust_core.certificates.bounds.operators import Activation
from robust_core.certificates.bounds.region import Region
from robust_core.checks import check_choice, check_count, check_inputs

__all__ = ["LayerBounds", "activation_bounds"]


@dataclass(frozen=True)
class LayerBounds:
    """What one value of a network is known to lie between.

    Attributes:
        name: label of the activation that reads the value; ``"output"`` for the network's output.
        lower: (B, ...) float64.
        upper: (B, ...) float64.
    """

    name: str
    lower: Tensor
    upper: Tensor


def activation_bounds(
    model: nn.Module, lower: Tensor, upper: Tensor, *, method: str = "crown", max_elements: int = 2**24
) -> list[LayerBounds]:
    """Return bounds of the input of every activation, first to last, and of the output, over a box of inputs.

    Args:
        model: an ``nn.Module`` of supported layers; left as found, bounded in eval mode.
        lower: (B, ...) lower ends of the boxes, finite.
        upper: (B, ...) upper ends.
        method: ``"crown"`` (never looser) or ``"interval"``.
        max_elements: elements of the largest tensor of linear coefficients.

    Returns:
        bounds in float64 that enclose real arithmetic and every float64 evaluation; infinite where weights are NaN.

    Raises:
        TypeError, ValueError: the ends do not fit each other.
        UnsupportedLayerError: a layer without a sound rule.
    """
    check_choice("method", method, ("crown", "interval"))
    check_count("max_elements", max_elements)
    check_inputs(lower, name="lower")
    check_inputs(upper, name="upper")
    if lower.shape != upper.shape or bool((lower > upper).any()):
        raise ValueError(
            f"lower {tuple(lower.shape)} and upper {tuple(upper.shape)} must have one shape, and lower <= upper"
        )
    with torch.no_grad():
        box = Box.ends(lower.double(), upper.double(), outward=True)
        graph = trace(copy.deepcopy(model).double().eval().requires_grad_(False), box.centre, fixed=True)
        rounding = Rounding.of(torch.float64)
        region = Region(box.centre, box.radius.flatten(1).amax(1), torch.inf, box)
        analysis = Analysis.start(graph, region, rounding)
        if method == "crown":
            tighten(analysis, max_elements=max_elements)
        found = []
        for position, node in enumerate(graph.nodes):
            if isinstance(node.operator, Activation):
                inner = analysis.inputs(position)[0]
                found.append(LayerBounds(node.operator.label, inner.lower, inner.upper))
        last = analysis.boxes[-1]
        low, high = last.lower, last.upper
        if method == "crown":
            eye = torch.eye(low[0].numel(), dtype=low.dtype, device=low.device).expand(len(low), -1, -1)
            rows = torch.cat([eye, -eye], dim=1).reshape(len(low), -1, *low.shape[1:])
            both = analysis.lower(len(graph.nodes) - 1, rows)
            below, above = both.chunk(2, dim=1)
            low = torch.maximum(low, below.reshape(low.shape))
            high = torch.minimum(high, -above.reshape(high.shape))
        # NaN in the weights or above them: known to lie nowhere in particular
        return [
            LayerBounds(b.name, b.lower.where(~b.lower.isnan(), -torch.inf), b.upper.where(~b.upper.isnan(), torch.inf))
            for b in (*found, LayerBounds("output", low, high))
        ]
