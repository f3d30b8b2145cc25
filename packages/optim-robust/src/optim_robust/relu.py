"""A ReLU network inside a mixed-integer program: exact, with a bound of its own for every unit.

What it buys: an optimiser can decide on a network's output. Three ideas keep the program small, for free solvers settle
only 30 to 60 undecided units:

- ``z = max(0, a)`` with ``a`` in ``[l, u]`` needs a binary only where ``l < 0 < u``:
  ``z >= a, 0 <= z <= u q, z <= a - l (1 - q)`` (big-M with M of each unit); else ``z = a`` or ``z = 0``;
- bounds are tightened first (:func:`tighten`): intervals, then the linear relaxation pulled backward of
  ``robust_core.certificates.bounds`` (CROWN), then linear programs over the set of inputs, which know of inequalities
  between inputs (a budget) that no box knows. Bounds of a linear program are taken from its dual solution by weak
  duality, so that the tolerance of the solver costs tightness, never soundness;
- layers are kept sparse, and affine layers stay apart from one another where that keeps them so.

:class:`Embedding` is solver-neutral: columns, rows and what is integral. :func:`embed_relu_network` puts it on a Pyomo
block. Sound means: for every input in the set, the true values of all units satisfy the rows.

Left out: partitions of inputs, complementarity, other activations (pieces of linear functions can be written as ReLUs).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import nn

from optim_robust.solver import Program
from robust_core.certificates.bounds import activation_bounds
from robust_core.checks import check_choice
from robust_core.errors import UnsupportedLayerError

__all__ = ["Embedding", "InputSet", "Layer", "embed", "embed_relu_network", "layers_of", "module_of", "tighten"]

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]
Matrix = Any
"""A ``scipy.sparse.csr_matrix``; scipy comes without types, and those that checkers guess are wrong."""
METHODS = ("interval", "crown", "lp")
SLACK = 1e-9
"""Relative widening of bounds that were computed in float64 without directed rounding."""


@dataclass(frozen=True)
class Layer:
    """``value = weight @ input + bias``, then ``max(0, .)`` where ``relu``.

    ``weight`` is (out, in) sparse, ``bias`` (out,).
    """

    weight: Matrix
    bias: Array
    relu: bool

    @classmethod
    def of(cls, weight: Any, bias: ArrayLike, *, relu: bool) -> Layer:
        """Return the layer, checked.

        Raises:
            ValueError: shapes that differ, NaN or infinity.
        """
        matrix: Matrix = sparse.csr_matrix(weight, dtype=np.float64)
        offset = np.atleast_1d(np.asarray(bias, dtype=np.float64))
        if offset.shape != (matrix.shape[0],):
            raise ValueError(f"bias has shape {offset.shape}; a weight {matrix.shape} needs ({matrix.shape[0]},)")
        if not (np.isfinite(matrix.data).all() and np.isfinite(offset).all()):
            raise ValueError("weight or bias holds NaN or infinity; the network was not trained well, or not at all")
        return cls(matrix, offset, relu)

    def __call__(self, x: Array) -> Array:
        """Return (B, out) values of (B, in) inputs."""
        value = (self.weight @ x.T).T + self.bias
        return np.maximum(value, 0.0) if self.relu else value


@dataclass(frozen=True)
class InputSet:
    """``{v : lower <= v <= upper, matrix @ v <= bound}``: where inputs of the network may lie.

    ``lower`` and ``upper`` are (d,) and finite, ``matrix`` is (m, d) sparse, ``bound`` (m,).
    """

    lower: Array
    upper: Array
    matrix: Matrix
    bound: Array

    @classmethod
    def of(cls, lower: ArrayLike, upper: ArrayLike, matrix: Any = None, bound: ArrayLike | None = None) -> InputSet:
        """Return the set, checked.

        Raises:
            ValueError: bounds that are not finite or contradict each other, shapes that differ.
        """
        low, high = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (lower, upper))
        if low.shape != high.shape or low.ndim != 1 or not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(
                f"lower {low.shape} and upper {high.shape} must be finite vectors of one length: without bounds of the "
                "inputs no unit has a big-M"
            )
        if (low > high).any():
            raise ValueError(f"lower is above upper at input {int(np.flatnonzero(low > high)[0])}")
        rows = sparse.csr_matrix((0, len(low))) if matrix is None else sparse.csr_matrix(matrix, dtype=np.float64)
        limits = np.zeros(0) if bound is None else np.atleast_1d(np.asarray(bound, dtype=np.float64))
        if rows.shape != (len(limits), len(low)):
            raise ValueError(f"matrix {rows.shape} does not fit {len(limits)} bounds and {len(low)} inputs")
        return cls(low, high, rows, limits)


@dataclass(frozen=True)
class Embedding:
    """Columns and rows that say ``outputs = network(inputs)``. Inputs come first, then the new columns.

    Attributes:
        n_inputs: columns that the caller already has.
        lower: (new,) bounds of the new columns.
        upper: (new,).
        integer: (new,) which of them are binary.
        matrix: (rows, n_inputs + new) sparse.
        row_lower: (rows,), -inf where there is none.
        row_upper: (rows,).
        outputs: columns that hold the output, counted from the first input.
        n_relu: units with an activation.
    """

    n_inputs: int
    lower: Array
    upper: Array
    integer: NDArray[np.bool_]
    matrix: Matrix
    row_lower: Array
    row_upper: Array
    outputs: NDArray[np.int64]
    n_relu: int

    @property
    def n_binaries(self) -> int:
        """Units whose sign the bounds left open."""
        return int(self.integer.sum())

    def add_to(self, program: Program, inputs: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Add the new columns and all rows to a program that has the inputs; return the columns of the outputs."""
        new = program.add_variables(self.lower, self.upper, integer=self.integer)
        columns: Any = np.concatenate([np.asarray(inputs, dtype=np.int64), new.astype(np.int64)])
        program.add_rows([(self.matrix, columns)], self.row_lower, self.row_upper)
        return columns[self.outputs]


def layers_of(network: nn.Module) -> list[Layer]:
    """Return the layers of an ``nn.Sequential`` (nested ones too) of Linear, ReLU, Flatten, Identity and Dropout.

    Raises:
        UnsupportedLayerError: another layer, or an activation that follows no Linear.
    """
    found: list[Layer] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().double().cpu().numpy()
            bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu().numpy()
            found.append(Layer.of(weight, bias, relu=False))
        elif isinstance(module, nn.ReLU):
            if not found or found[-1].relu:
                raise UnsupportedLayerError(f"layer '{name}' (ReLU) follows no Linear layer")
            found[-1] = Layer(found[-1].weight, found[-1].bias, relu=True)
        elif not isinstance(module, nn.Sequential | nn.Flatten | nn.Identity | nn.Dropout):
            raise UnsupportedLayerError(
                f"layer '{name}' ({type(module).__name__}) has no exact encoding here: Linear and ReLU in an "
                "nn.Sequential are needed"
            )
    if not found:
        raise UnsupportedLayerError("the network has no Linear layer")
    return found


def module_of(layers: Sequence[Layer]) -> nn.Sequential:
    """Return the layers as a float64 module without gradients of its own."""
    network = nn.Sequential()
    for layer in layers:
        height, width = layer.weight.shape
        linear: Any = nn.utils.skip_init(nn.Linear, width, height, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(layer.weight.toarray()))
            linear.bias.copy_(torch.from_numpy(layer.bias))
        network.append(linear)
        if layer.relu:
            network.append(nn.ReLU())
    return network.requires_grad_(False)


def _check_chain(layers: Sequence[Layer], inputs: InputSet) -> None:
    width = len(inputs.lower)
    for position, layer in enumerate(layers):
        if layer.weight.shape[1] != width:
            raise ValueError(f"layer {position} reads {layer.weight.shape[1]} values, {width} arrive")
        width = layer.weight.shape[0]


# -- bounds ----------------------------------------------------------------------------------------------------


def tighten(
    layers: Sequence[Layer],
    inputs: InputSet,
    method: str = "lp",
    *,
    known: Sequence[Bounds] = (),
    deadline: float | None = None,
) -> list[Bounds]:
    """Return bounds (lower, upper) of each layer's value before its activation, over all inputs of the set.

    Args:
        layers: the network.
        inputs: where inputs lie.
        method: ``"interval"``, ``"crown"`` (intervals and CROWN) or ``"lp"`` (linear programs after CROWN).
        known: bounds of the first layers from an earlier call; they are kept.
        deadline: ``time.perf_counter()`` after which linear programs are no longer solved; what is there is sound.

    Raises:
        ValueError: layers that do not fit each other or the inputs; an unknown method.
    """
    check_choice("method", method, METHODS)
    _check_chain(layers, inputs)
    bounds = _propagate(layers, inputs, known, _certified(layers, inputs, method))
    if method == "lp":
        for position in range(len(known), len(layers)):
            last = position == len(layers) - 1
            if (layers[position].relu or last) and (position or inputs.matrix.shape[0]):
                bounds[position] = _programs(layers, inputs, bounds, position, deadline)
                bounds = _propagate(layers, inputs, bounds[: position + 1], bounds)
    return bounds


def _certified(layers: Sequence[Layer], inputs: InputSet, method: str) -> list[Bounds | None]:
    """Return core's bounds of each layer that an activation reads, and of the last one."""
    network = module_of(layers)
    low, high = (torch.from_numpy(end)[None] for end in (inputs.lower, inputs.upper))
    found = activation_bounds(network, low, high, method="interval" if method == "interval" else "crown")
    boxes = iter((box.lower[0].numpy(), box.upper[0].numpy()) for box in found)
    last = len(layers) - 1
    behind = layers[last].relu  # the box of the output is then behind the last activation: of no use here
    return [next(boxes) if layer.relu or (i == last and not behind) else None for i, layer in enumerate(layers)]


def _propagate(
    layers: Sequence[Layer], inputs: InputSet, known: Sequence[Bounds], cuts: Sequence[Bounds | None]
) -> list[Bounds]:
    """Return intervals layer by layer, cut with other sound bounds; those of the first layers are taken as known."""
    found: list[Bounds] = []
    low, high = inputs.lower, inputs.upper
    for position, layer in enumerate(layers):
        cut = cuts[position]
        box = known[position] if position < len(known) else _affine(layer, low, high)
        if cut is not None and position >= len(known):
            box = _cut(box, cut)
        found.append(box)
        low, high = (np.maximum(end, 0.0) if layer.relu else end for end in box)
    return found


def _affine(layer: Layer, low: Array, high: Array) -> Bounds:
    """Return the interval of ``W v + b``, widened by more than float64 can lose."""
    plus, minus = layer.weight.maximum(0), layer.weight.minimum(0)
    size = abs(layer.weight) @ np.maximum(np.abs(low), np.abs(high)) + np.abs(layer.bias)
    return (
        plus @ low + minus @ high + layer.bias - SLACK * size,
        plus @ high + minus @ low + layer.bias + SLACK * size,
    )


def _cut(box: Bounds, other: Bounds) -> Bounds:
    low, high = np.maximum(box[0], other[0]), np.minimum(box[1], other[1])
    return low, np.maximum(low, high)  # two sound boxes meet; rounding may leave a gap of an ulp


def _programs(
    layers: Sequence[Layer], inputs: InputSet, bounds: Sequence[Bounds], position: int, deadline: float | None
) -> Bounds:
    """Tighten the units of one layer that are undecided (all of the last one) by two linear programs each."""
    low, high = (v.copy() for v in bounds[position])
    layer = layers[position]
    units = np.flatnonzero((low < 0) & (high > 0)) if layer.relu else np.arange(len(low))
    if not len(units):
        return low, high
    front = embed(layers[:position], inputs, bounds[:position]) if position else _nothing(inputs)
    relaxation = _Relaxation(front, inputs)
    for unit in units:
        row = np.zeros(relaxation.n_columns)
        row[front.outputs] = layer.weight[[unit]].toarray()[0]
        for sign in (1.0, -1.0):
            if deadline is not None and time.perf_counter() > deadline:
                return low, high
            least = relaxation.minimum(sign * row) + sign * layer.bias[unit]
            least -= SLACK * (abs(least) + abs(layer.bias[unit]))
            if sign > 0:
                low[unit] = min(max(low[unit], least), high[unit])
            else:
                high[unit] = max(min(high[unit], -least), low[unit])
            if layer.relu and (low[unit] >= 0 or high[unit] <= 0):
                break  # decided: how far it lies beyond 0 is of no use
    return low, high


def _nothing(inputs: InputSet) -> Embedding:
    """Return the embedding of no layer at all: the outputs are the inputs."""
    n, none = len(inputs.lower), np.zeros(0)
    matrix = sparse.csr_matrix((0, n))
    return Embedding(n, none, none, none.astype(bool), matrix, none, none, np.arange(n, dtype=np.int64), 0)


class _Relaxation:
    """The linear relaxation of an embedding over its inputs, of which many functions are minimised."""

    def __init__(self, embedding: Embedding, inputs: InputSet) -> None:
        self.lower = np.concatenate([inputs.lower, embedding.lower])
        self.upper = np.concatenate([inputs.upper, embedding.upper])
        self.n_columns = len(self.lower)
        wide = sparse.csr_matrix(
            (inputs.matrix.data, inputs.matrix.indices, inputs.matrix.indptr),
            shape=(inputs.matrix.shape[0], self.n_columns),
        )
        self.matrix: Matrix = sparse.csr_matrix(sparse.vstack([wide, embedding.matrix]))
        self.row_lower = np.concatenate([np.full(len(inputs.bound), -np.inf), embedding.row_lower])
        self.row_upper = np.concatenate([inputs.bound, embedding.row_upper])
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.n_columns, self.matrix.shape[0]
        lp.col_cost_ = np.zeros(self.n_columns)
        lp.col_lower_, lp.col_upper_ = self.lower, self.upper
        lp.row_lower_, lp.row_upper_ = self.row_lower, self.row_upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = self.matrix.indptr
        lp.a_matrix_.index_ = self.matrix.indices
        lp.a_matrix_.value_ = self.matrix.data
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.solver.setOptionValue("threads", 1)
        self.solver.passModel(lp)

    def minimum(self, costs: Array) -> float:
        """Return a number that no feasible point falls below: the dual value, whatever the solver's status."""
        columns = np.arange(self.n_columns, dtype=np.int32)
        self.solver.changeColsCost(self.n_columns, columns, costs)
        self.solver.run()
        duals = np.array(self.solver.getSolution().row_dual)
        if len(duals) != self.matrix.shape[0] or not np.isfinite(duals).all():
            duals = np.zeros(self.matrix.shape[0])
        duals = np.where((duals > 0) & np.isinf(self.row_lower), 0.0, duals)
        duals = np.where((duals < 0) & np.isinf(self.row_upper), 0.0, duals)
        reduced = costs - self.matrix.T @ duals
        lower, upper = np.where(duals > 0, self.row_lower, 0.0), np.where(duals < 0, self.row_upper, 0.0)
        parts = np.concatenate([duals * (lower + upper), np.minimum(reduced * self.lower, reduced * self.upper)])
        return float(parts.sum() - SLACK * np.abs(parts).sum())


# -- the program -----------------------------------------------------------------------------------------------


class _Rows:
    """Rows and columns as they are collected."""

    def __init__(self, n_inputs: int) -> None:
        none = np.zeros(0)
        self.n_inputs = self.n_columns = n_inputs
        self.height = 0
        self.column_parts: list[tuple[Array, Array, NDArray[np.bool_]]] = [(none, none, none.astype(bool))]
        self.row_parts: list[Bounds] = [(none, none)]
        nowhere = np.zeros(0, dtype=np.int64)
        self.entries: list[tuple[Array, NDArray[np.int64], NDArray[np.int64]]] = [(none, nowhere, nowhere)]

    def columns(self, lower: Array, upper: Array, *, integer: bool = False) -> NDArray[np.int64]:
        """Add columns and return their positions."""
        found = np.arange(self.n_columns, self.n_columns + len(lower), dtype=np.int64)
        self.n_columns += len(lower)
        self.column_parts.append((lower, upper, np.full(len(lower), integer)))
        return found

    def rows(self, terms: Sequence[tuple[Any, NDArray[np.int64]]], lower: Array, upper: Array) -> None:
        """Add ``lower <= sum of matrix @ columns <= upper``; a matrix that is a vector means its diagonal."""
        for factor, columns in terms:
            part: Any = sparse.coo_matrix(sparse.diags(factor) if np.ndim(factor) == 1 else factor)
            self.entries.append((part.data, part.row.astype(np.int64) + self.height, columns[part.col]))
        self.row_parts.append((lower, upper))
        self.height += len(lower)

    def finish(self, outputs: NDArray[np.int64], n_relu: int) -> Embedding:
        """Return everything in one piece."""
        lower, upper, integer = (np.concatenate(part) for part in zip(*self.column_parts, strict=True))
        row_lower, row_upper = (np.concatenate(part) for part in zip(*self.row_parts, strict=True))
        data, row, column = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        matrix = sparse.csr_matrix((data, (row, column)), shape=(self.height, self.n_columns))
        matrix.eliminate_zeros()
        return Embedding(self.n_inputs, lower, upper, integer, matrix, row_lower, row_upper, outputs, n_relu)


def embed(layers: Sequence[Layer], inputs: InputSet, bounds: Sequence[Bounds]) -> Embedding:
    """Return the program that says ``outputs = network(inputs)`` exactly.

    Args:
        layers: the network.
        inputs: where inputs lie; its own inequalities are the caller's to keep.
        bounds: of each layer before its activation, from :func:`tighten`; they must hold on all inputs.

    Raises:
        ValueError: layers, inputs and bounds that do not fit each other.
    """
    _check_chain(layers, inputs)
    if len(bounds) != len(layers):
        raise ValueError(f"{len(bounds)} bounds for {len(layers)} layers")
    program = _Rows(len(inputs.lower))
    columns = np.arange(len(inputs.lower), dtype=np.int64)
    live = np.ones(len(columns), dtype=bool)  # units that are not known to be 0
    for layer, (low, high) in zip(layers, bounds, strict=True):
        weight = sparse.csr_matrix(layer.weight[:, np.flatnonzero(live)])
        columns, live = _embed_layer(program, weight, layer, columns, low, high)
    if not live.all():  # dead units of a last layer with an activation: constants
        whole = np.zeros(len(live), dtype=np.int64)
        whole[live] = columns
        whole[~live] = program.columns(np.zeros(int((~live).sum())), np.zeros(int((~live).sum())))
        columns = whole
    n_relu = sum(layer.weight.shape[0] for layer in layers if layer.relu)
    return program.finish(columns, n_relu)


def _embed_layer(
    program: _Rows, weight: Matrix, layer: Layer, columns: NDArray[np.int64], low: Array, high: Array
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Add one layer; return the columns of its units that may differ from 0, and which units these are."""
    active = (low >= 0) if layer.relu else np.ones(len(low), dtype=bool)
    undecided = ~active & (high > 0)
    live = active | undecided
    found = np.zeros(len(low), dtype=np.int64)
    for chosen, lower in ((np.flatnonzero(active), low), (np.flatnonzero(undecided), np.zeros_like(low))):
        if len(chosen):
            found[chosen] = program.columns(lower[chosen], high[chosen])
    fixed, open_ = np.flatnonzero(active), np.flatnonzero(undecided)
    if len(fixed):  # z = W h + b
        terms = [(np.ones(len(fixed)), found[fixed]), (-weight[fixed], columns)]
        program.rows(terms, layer.bias[fixed], layer.bias[fixed])
    if len(open_):
        one, low, high, bias = np.ones(len(open_)), low[open_], high[open_], layer.bias[open_]
        z, never, sign = found[open_], np.full(len(open_), np.inf), -weight[open_]
        q = program.columns(np.zeros(len(open_)), one, integer=True)
        program.rows([(one, z), (sign, columns)], bias, never)  # z >= a
        program.rows([(one, z), (sign, columns), (-low, q)], -never, bias - low)  # z <= a - l (1 - q)
        program.rows([(one, z), (-high, q)], -never, np.zeros(len(open_)))  # z <= u q
    return found[live], live


def embed_relu_network(
    block: Any, network: nn.Module, inputs: Sequence[Any], *, lower: ArrayLike, upper: ArrayLike, method: str = "crown"
) -> list[Any]:
    """Put a network on a Pyomo block and return the Pyomo variables that hold its outputs.

    Args:
        block: a Pyomo block or ConcreteModel without components named ``relu_*``.
        network: an ``nn.Sequential`` of Linear and ReLU layers.
        inputs: Pyomo variables or expressions, one for each input of the network.
        lower: (d,) bounds that hold for the inputs on all feasible points: they are added as constraints.
        upper: (d,).
        method: how bounds are tightened, see :func:`tighten`.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        UnsupportedLayerError: a layer without an exact encoding.
    """
    import pyomo.environ

    pyo: Any = pyomo.environ  # its components are built by metaclasses, which checkers do not see through
    layers, region = layers_of(network), InputSet.of(lower, upper)
    if len(inputs) != len(region.lower):
        raise ValueError(f"inputs holds {len(inputs)} variables; bounds are given for {len(region.lower)}")
    made = embed(layers, region, tighten(layers, region, method))
    block.relu_values = pyo.Var(range(len(made.lower)))
    for i, variable in block.relu_values.items():
        variable.setlb(float(made.lower[i]))
        variable.setub(float(made.upper[i]))
        variable.domain = pyo.Binary if made.integer[i] else pyo.Reals
    columns = [*inputs, *block.relu_values.values()]
    block.relu_rows = pyo.ConstraintList()
    for value, low, high in zip(inputs, region.lower, region.upper, strict=True):
        block.relu_rows.add((float(low), value, float(high)))
    for row in range(made.matrix.shape[0]):
        entries = made.matrix[[row]]
        body = sum(float(a) * columns[j] for a, j in zip(entries.data, entries.indices, strict=True))
        low, high = (None if np.isinf(v) else float(v) for v in (made.row_lower[row], made.row_upper[row]))
        block.relu_rows.add((low, body, high))
    return [columns[j] for j in made.outputs]
