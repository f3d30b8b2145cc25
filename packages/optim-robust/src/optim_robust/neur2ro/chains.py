"""The network of one instance as chains of layers: what the programs of the two players embed.

Two exact shortcuts keep undecided units few:

- a variable with two values (a binary) enters phi_x as one of two constants, so that the sum over such variables is
  affine in x, whatever the width of phi_x;
- phi_xi reads one item at a time: its hidden units are functions of few uncertain parameters (of a single one for the
  knapsack), whose bounds are exact intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import nn

from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.neur2ro.model import ValueModel
from optim_robust.relu import Layer

__all__ = ["decision_chain", "encode", "scenario_chain", "two_valued", "value_chain"]

Array = NDArray[np.float64]


def _linears(stack: nn.Sequential) -> list[tuple[Array, Array]]:
    found = []
    for module in stack:
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().double().cpu().numpy()
            bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu().numpy()
            found.append((weight, bias))
    return found


def two_valued(features: ItemFeatures, integer: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (n,) which first-stage variables take two values at most."""
    width = features.x_upper - features.x_lower
    return (width == 0) | (integer & (width == 1))


def _share(model: ValueModel, n: int) -> float:
    return 1.0 / n if model.network.agg == "mean" else 1.0


def _post(stack: nn.Sequential) -> list[Layer]:
    linears = _linears(stack)
    return [Layer.of(w, b, relu=i < len(linears) - 1) for i, (w, b) in enumerate(linears)]


def decision_chain(model: ValueModel, features: ItemFeatures, integer: NDArray[np.bool_]) -> list[Layer]:
    """Return the layers from x (n,) to the code z_x.

    Args:
        model: the network.
        features: of the instance.
        integer: (n,) which variables are integral.
    """
    first, _ = model.static(features)
    linears, n = _linears(model.network.embed_x), len(first)
    share = _share(model, n)
    binary = two_valued(features, integer)
    ends = [_embedded(linears, np.column_stack([np.full(n, end), first])) for end in (0.0, 1.0)]
    slope = np.where((features.x_upper > features.x_lower)[:, None], ends[1] - ends[0], 0.0).T * share  # (e, n)
    constant = ends[0].T * share
    if binary.all():
        offset = constant.sum(1) - slope @ features.x_lower
        return [Layer.of(slope, offset, relu=False), *_post(model.network.post_x)]
    return [*_mixed_front(linears, features, first, binary, slope, constant, share), *_post(model.network.post_x)]


def _embedded(linears: Sequence[tuple[Array, Array]], items: Array) -> Array:
    for position, (weight, bias) in enumerate(linears):
        items = items @ weight.T + bias
        if position < len(linears) - 1:
            items = np.maximum(items, 0.0)
    return items


def _mixed_front(
    linears: Sequence[tuple[Array, Array]],
    features: ItemFeatures,
    first: Array,
    binary: NDArray[np.bool_],
    slope: Array,
    constant: Array,
    share: float,
) -> list[Layer]:
    """Return phi and its sum where some variables take more than two values.

    Those with two pass through units that are always active: ``max(0, x - l + 1)`` is ``x - l + 1``.
    """
    wide, thin = np.flatnonzero(~binary), np.flatnonzero(binary)
    n = len(first)
    select_thin = sparse.csr_matrix((np.ones(len(thin)), (np.arange(len(thin)), thin)), shape=(len(thin), n))
    weight, bias = linears[0]
    value = sparse.csr_matrix((1 / features.span[wide], (np.arange(len(wide)), wide)), shape=(len(wide), n))
    front = sparse.kron(value, weight[:, :1])
    moved = np.outer(features.x_lower[wide] / features.span[wide], weight[:, 0])
    offset = first[wide] @ weight[:, 1:].T + bias - moved
    layers = [
        Layer.of(
            sparse.vstack([front, select_thin]),
            np.concatenate([offset.ravel(), 1 - features.x_lower[thin]]),
            relu=True,
        )
    ]
    for position, (weight, bias) in enumerate(linears[1:], start=1):
        last = position == len(linears) - 1
        if not last:
            block = sparse.block_diag([sparse.kron(sparse.eye(len(wide)), weight), sparse.eye(len(thin))])
            layers.append(Layer.of(block, np.concatenate([np.tile(bias, len(wide)), np.zeros(len(thin))]), relu=True))
            continue
        summed = sparse.hstack(
            [sparse.kron(np.ones((1, len(wide))), weight) * share, sparse.csr_matrix(slope[:, thin])]
        )
        whole = len(wide) * bias * share + constant[:, thin].sum(1) - slope[:, thin].sum(1)
        layers.append(Layer.of(summed, whole, relu=False))
    return layers


def scenario_chain(model: ValueModel, features: ItemFeatures) -> list[Layer]:
    """Return the layers from xi (dim,) to the code z_xi."""
    _, second = model.static(features)
    linears, m = _linears(model.network.embed_xi), len(second)
    share = _share(model, m)
    low, span = model.scale("dynamic_low"), model.scale("dynamic_span")
    weight, bias = linears[0]
    d = len(low)
    follow = np.einsum("hd,mdk->mhk", weight[:, :d] / span, features.slope)
    still = ((features.offset - low) / span) @ weight[:, :d].T + second @ weight[:, d:].T + bias
    layers = [Layer.of(follow.reshape(-1, follow.shape[2]), still.ravel(), relu=len(linears) > 1)]
    for position, (weight, bias) in enumerate(linears[1:], start=1):
        if position < len(linears) - 1:
            layers.append(Layer.of(sparse.kron(sparse.eye(m), weight), np.tile(bias, m), relu=True))
        else:
            layers.append(Layer.of(sparse.kron(np.ones((1, m)), weight) * share, m * bias * share, relu=False))
    return [*layers, *_post(model.network.post_xi)]


def value_chain(model: ValueModel, code: Array, *, of: str) -> list[Layer]:
    """Return the layers from one code to the value, the other code being known.

    Args:
        model: the network.
        code: (post,) the known code.
        of: ``"xi"`` if ``code`` is z_xi, and the layers read z_x; ``"x"`` the other way round.
    """
    linears = _linears(model.network.value)
    weight, bias = linears[0]
    half = weight.shape[1] // 2
    reads, known = (weight[:, :half], weight[:, half:]) if of == "xi" else (weight[:, half:], weight[:, :half])
    layers = [Layer.of(reads, bias + known @ code, relu=len(linears) > 1)]
    for position, (later, offset) in enumerate(linears[1:], start=1):
        layers.append(Layer.of(later, offset, relu=position < len(linears) - 1))
    return layers


def encode(chain: Sequence[Layer], values: Array) -> Array:
    """Return (B, out): the chain on (B, in) values."""
    for layer in chain:
        values = layer(values)
    return values
