"""Initial weights that keep the radii of interval bounds constant through depth (section 3.1 of the paper).

A layer of fan-in n multiplies the mean radius by ``(n / 2) E|W|``, the half being that of ReLU under symmetric
pre-activations. ``E|W| = sigma sqrt(2 / pi)`` gives 1 for ``sigma = sqrt(2 pi) / n``; the first layer, with no ReLU
before it, doubles the radius once. Xavier's and Kaiming's sigma ~ 1 / sqrt(n) multiply it by about sqrt(n) each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds import Graph, trace
from robust_core.certificates.bounds.graph import operator_of
from robust_core.certificates.bounds.operators import Activation, Affine, Scale, Sum
from robust_core.checks import check_choice, check_inputs
from robust_core.errors import UnsupportedLayerError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["ibp_init_", "reference_init_"]

Model = TypeVar("Model", bound=nn.Module)


def ibp_init_(model: Model, x: Tensor, *, residual_halving: bool = True, generator: Seed = None) -> Model:
    """Draw the weights of every hidden layer from N(0, 2 pi / n^2), n its fan-in, and set their biases to 0.

    The layers that give the logits and those of batch normalisation keep what they have.

    Args:
        model: any network of layers that core's bounds support; changed in place and returned.
        x: (B, ...) a batch of inputs, from which the graph is found.
        residual_halving: halve the weights that read the ReLU of a residual sum, whose radii add up.
        generator: seed.

    Raises:
        UnsupportedLayerError: a layer without bounds, or one whose weight is computed (a parametrization).
    """

    def sigma(operator: Affine, halved: bool) -> float:
        return math.sqrt(2 * math.pi) / operator.terms * (0.5 if halved and residual_halving else 1.0)

    return _draw(model, x, sigma, generator)


def reference_init_(model: Model, x: Tensor, kind: str = "xavier", *, generator: Seed = None) -> Model:
    """Draw the same weights as :func:`ibp_init_` the usual way instead, for comparison.

    Args:
        model: the network, changed in place and returned.
        x: (B, ...) a batch of inputs.
        kind: ``"xavier"`` (sigma^2 = 2 / (fan-in + fan-out)) or ``"kaiming"`` (2 / fan-in).
        generator: seed.
    """
    check_choice("kind", kind, ("xavier", "kaiming"))

    def sigma(operator: Affine, halved: bool) -> float:
        if kind == "kaiming":
            return math.sqrt(2 / operator.terms)
        weight: Tensor = operator.weight()  # pyright: ignore[reportAttributeAccessIssue]
        fan_out = weight.shape[0] * math.prod(weight.shape[2:])
        return math.sqrt(2 / (operator.terms + fan_out))

    return _draw(model, x, sigma, generator)


def _draw(model: Model, x: Tensor, sigma: Callable[[Affine, bool], float], generator: Seed) -> Model:
    check_inputs(x)
    graph, seed = trace(model, x), resolve_seed(generator)
    hidden = list(_hidden(graph))
    if not hidden:
        raise ValueError("the model has no hidden layer with weights; a linear classifier needs no initialisation")
    for number, (operator, halved) in enumerate(hidden):
        weight, bias = operator.weight(), operator.bias()  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(weight, nn.Parameter):
            raise UnsupportedLayerError(f"{operator.label} computes its weight; initialise it before parametrizing")
        draw = torch.Generator().manual_seed(derive(seed, "weights", number))
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=draw) * sigma(operator, halved))
            if bias is not None:
                bias.zero_()
    return model


def _hidden(graph: Graph) -> Iterator[tuple[Affine, bool]]:
    """Yield each hidden layer with weights, and whether it reads the activation of a residual sum."""
    last = _classifiers(graph)
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator = operator_of(node)
        if isinstance(operator, Affine) and operator.dense and position not in last:
            yield operator, _reads_residual(graph, node.inputs[0])


def _classifiers(graph: Graph) -> set[int]:
    """Return the layers with weights from which the logits follow without a nonlinearity."""
    found, todo = set(), [len(graph.nodes) - 1]
    while todo:
        position = todo.pop()
        operator = graph.nodes[position].operator
        if operator is None or not operator.linear:
            continue
        if operator.dense:
            found.add(position)
        else:
            todo.extend(graph.nodes[position].inputs)
    return found


def _reads_residual(graph: Graph, position: int) -> bool:
    """Whether a value is ReLU(x + y), perhaps rearranged or pooled, with a normalisation in between or not."""
    rectified = False
    while graph.nodes[position].operator is not None:
        operator = operator_of(graph.nodes[position])
        if isinstance(operator, Sum):
            return rectified
        if isinstance(operator, Activation):
            if rectified:
                return False
            rectified = True
        elif operator.dense or (isinstance(operator, Scale) and not rectified):
            return False
        position = graph.nodes[position].inputs[0]
    return False
