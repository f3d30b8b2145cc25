"""Networks in programs: bounds hold, the program says what torch says, tightening saves binaries."""

import itertools
from typing import Any

import highspy
import numpy as np
import pyomo.environ
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optim_robust import relu
from robust_core.errors import UnsupportedLayerError

pyo: Any = pyomo.environ


def _network(seed: int, widths: tuple[int, ...] = (6, 14, 10, 2)) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential()
    for position, (a, b) in enumerate(itertools.pairwise(widths)):
        network.append(nn.Linear(a, b))
        if position < len(widths) - 2:
            network.append(nn.ReLU())
    return network.double()


def _set(n: int = 6, budget: float = 1.5) -> relu.InputSet:
    return relu.InputSet.of(np.zeros(n), np.ones(n), np.ones((1, n)), [budget])


def _points(inputs: relu.InputSet, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u = rng.random((n, len(inputs.lower)))
    return inputs.bound[0] * rng.random((n, 1)) * u / np.maximum(u.sum(1, keepdims=True), inputs.bound[0] * u.max())


def _solve(
    embedding: relu.Embedding, inputs: relu.InputSet, fixed: Any = None, sign: float = 0.0
) -> tuple[float, np.ndarray]:
    """Minimise ``sign * output[0]`` by HiGHS, with inputs fixed or free."""
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    lower = np.concatenate([inputs.lower if fixed is None else fixed, embedding.lower])
    upper = np.concatenate([inputs.upper if fixed is None else fixed, embedding.upper])
    for low, high in zip(lower, upper, strict=True):
        h.addVar(low, high)
    for j in np.flatnonzero(embedding.integer):
        h.changeColIntegrality(int(j) + embedding.n_inputs, highspy.HighsVarType.kInteger)
    for row in range(embedding.matrix.shape[0]):
        entries = embedding.matrix[[row]]
        h.addRow(embedding.row_lower[row], embedding.row_upper[row], entries.nnz, entries.indices, entries.data)
    if fixed is None:
        for row, bound in zip(inputs.matrix.toarray(), inputs.bound, strict=True):
            h.addRow(-np.inf, bound, len(row), np.arange(len(row), dtype=np.int32), row)
    h.changeColCost(int(embedding.outputs[0]), sign)
    h.run()
    assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return h.getInfo().objective_function_value, np.array(h.getSolution().col_value)


@pytest.mark.parametrize("method", relu.METHODS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_bounds_hold_on_all_inputs(method: str, seed: int) -> None:
    network, inputs = _network(seed), _set()
    layers = relu.layers_of(network)
    bounds = relu.tighten(layers, inputs, method)
    value: Any = np.concatenate([_points(inputs, 500, seed), np.zeros((1, 6)), np.eye(6)])  # vertices too
    for layer, (low, high) in zip(layers, bounds, strict=True):
        before = (layer.weight @ value.T).T + layer.bias
        assert (before >= low).all()
        assert (before <= high).all()
        value = layer(value)


@pytest.mark.quick
@pytest.mark.parametrize("method", relu.METHODS)
def test_the_program_says_what_torch_says(method: str) -> None:
    network, inputs = _network(3), _set()
    layers = relu.layers_of(network)
    embedding = relu.embed(layers, inputs, relu.tighten(layers, inputs, method))
    for point in _points(inputs, 20):
        _, values = _solve(embedding, inputs, fixed=point)
        with torch.no_grad():
            expected = network(torch.from_numpy(point)).numpy()
        assert values[embedding.outputs] == pytest.approx(expected, abs=1e-6)


def test_methods_have_one_optimum_and_ever_fewer_binaries() -> None:
    total = np.zeros(3)
    for seed in range(4):
        layers, inputs = relu.layers_of(_network(seed)), _set(budget=0.7)
        made = [relu.embed(layers, inputs, relu.tighten(layers, inputs, m)) for m in relu.METHODS]
        optima = [_solve(embedding, inputs, sign=-1.0)[0] for embedding in made]
        assert optima == pytest.approx([optima[0]] * 3, abs=1e-5)
        counts = [embedding.n_binaries for embedding in made]
        assert counts == sorted(counts, reverse=True)
        total += counts
    assert total[1] < total[0]
    assert total[2] <= 0.7 * total[0]  # the budget of the inputs is what boxes do not know


def test_linear_programs_are_exact_for_the_first_layer_and_within_reach_beyond() -> None:
    layers, inputs = relu.layers_of(_network(5)), _set()
    (low, high), *_ = relu.tighten(layers, inputs, "lp")
    undecided = (low < 0) & (high > 0)
    vertices = np.concatenate(
        [np.zeros((1, 6)), np.eye(6)]
        + [np.eye(6)[[i]] + 0.5 * np.eye(6)[[j]] for i in range(6) for j in range(6) if i != j]
    )  # of {0 <= v <= 1, sum v <= 1.5}
    values = (layers[0].weight @ vertices.T).T + layers[0].bias
    assert low[undecided] == pytest.approx(values.min(0)[undecided], abs=1e-6)
    assert high[undecided] == pytest.approx(values.max(0)[undecided], abs=1e-6)


def test_known_bounds_are_kept_and_an_expired_deadline_stays_sound() -> None:
    layers, inputs = relu.layers_of(_network(2)), _set()
    full = relu.tighten(layers, inputs, "lp")
    again = relu.tighten(layers, inputs, "lp", known=full[:1])
    for a, b in zip(full, again, strict=True):
        assert np.allclose(a, b)
    late = relu.tighten(layers, inputs, "lp", deadline=0.0)
    crown = relu.tighten(layers, inputs, "crown")
    for a, b in zip(late, crown, strict=True):
        assert np.allclose(a, b)


def test_units_that_are_decided_cost_no_binary() -> None:
    alive, dead = relu.Layer.of(np.eye(2), [3.0, 3.0], relu=True), relu.Layer.of(np.eye(2), [-3.0, -3.0], relu=True)
    inputs = relu.InputSet.of([-1, -1], [1, 1])
    for layer, value in ((alive, [3.5, 2.0]), (dead, [0.0, 0.0])):
        made = relu.embed([layer], inputs, relu.tighten([layer], inputs, "interval"))
        assert made.n_binaries == 0
        _, values = _solve(made, inputs, fixed=np.array([0.5, -1.0])) if made.matrix.shape[0] else (0, np.zeros(4))
        assert values[made.outputs] == pytest.approx(value)


def test_pyomo_reads_it() -> None:
    network = _network(1, (3, 8, 1))
    model = pyo.ConcreteModel()
    model.v = pyo.Var(range(3), bounds=(-1, 1))
    (output,) = relu.embed_relu_network(model, network, list(model.v.values()), lower=-np.ones(3), upper=np.ones(3))
    model.goal = pyo.Objective(expr=output, sense=pyo.maximize)
    pyo.SolverFactory("appsi_highs").solve(model)
    best = torch.tensor([[pyo.value(v) for v in model.v.values()]], dtype=torch.float64)
    with torch.no_grad():
        assert float(network(best)) == pytest.approx(pyo.value(output), abs=1e-5)
        grid = torch.rand(20_000, 3, dtype=torch.float64) * 2 - 1
        assert float(network(grid).max()) <= pyo.value(output) + 1e-6


def test_bad_arguments_are_refused() -> None:
    layers, inputs = relu.layers_of(_network(0)), _set()
    with pytest.raises(ValueError, match="finite"):
        relu.InputSet.of([0.0], [np.inf])
    with pytest.raises(ValueError, match="above"):
        relu.InputSet.of([1.0], [0.0])
    with pytest.raises(ValueError, match="does not fit"):
        relu.InputSet.of([0.0], [1.0], np.ones((1, 2)), [1.0])
    with pytest.raises(ValueError, match="reads 6"):
        relu.tighten(layers, _set(5))
    with pytest.raises(ValueError, match="method"):
        relu.tighten(layers, inputs, "exact")
    with pytest.raises(ValueError, match="bounds for"):
        relu.embed(layers, inputs, [])
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        relu.layers_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(ValueError, match="NaN"):
        relu.Layer.of([[np.nan]], [0.0], relu=False)
