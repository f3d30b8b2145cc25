"""Read the user's own Pyomo model as a two-stage robust problem, and put solutions back into it.

The model is an ordinary ``ConcreteModel``: some of its variables are decided first, the others once the uncertain
parameters (mutable ``Param``) are known. Coefficients, right-hand sides and the objective must be affine in those
parameters, and linear in the variables. The affine structure is read by evaluating the model at one point per parameter
and is checked at further random points of the set: what is not affine is refused by name, never approximated.

    problem = read_pyomo(model, first_stage=[model.build], second_stage=[model.ship], uncertain=[model.demand],
                         uncertainty=Budget(deviation, gamma=2, origin=nominal))
    solution = ExactCCG().solve(problem)
    problem.load(solution)  # model.build now holds the first stage
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from optim_robust.two_stage.problem import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.two_stage.solution import TwoStageSolution
from optim_robust.uncertainty import UncertaintySet, from_pyros

__all__ = ["PyomoProblem", "read_pyomo"]

Array = NDArray[np.float64]
AFFINE_TOLERANCE = 1e-7  # relative to the largest figure of a row


class PyomoProblem(TwoStageProblem):
    """A two-stage problem that remembers the model it was read from: ``model``, ``x_vars``, ``y_vars``, ``params``."""

    model: Any
    x_vars: tuple[Any, ...]
    y_vars: tuple[Any, ...]
    params: tuple[Any, ...]

    def load(self, solution: TwoStageSolution) -> None:
        """Write the first stage into the model's variables; the second stage depends on xi and is left alone.

        Raises:
            ValueError: the solution holds no x.
        """
        if solution.x is None:
            raise ValueError(f"the solution holds no first stage (status {solution.status})")
        for variable, value in zip(self.x_vars, solution.x, strict=True):
            variable.set_value(float(value))


@dataclass
class _Picture:
    """The model's figures at one xi: rows ``matrix @ v (<= or ==) bound`` and the objective, over (x, y)."""

    rows: list[tuple[str, dict[int, float], float]]  # name, coefficients, upper bound
    cost: dict[int, float]
    constant: float
    bounds: list[tuple[float, float]]


def read_pyomo(
    model: Any,
    *,
    first_stage: Iterable[Any],
    second_stage: Iterable[Any],
    uncertain: Iterable[Any],
    uncertainty: Any,
    name: str | None = None,
) -> PyomoProblem:
    """Return the model as a :class:`PyomoProblem`; the model is left as it was found.

    Args:
        model: a ConcreteModel with one active objective (minimised or maximised).
        first_stage: variables decided before xi is known (components, indexed or not).
        second_stage: variables decided after.
        uncertain: mutable parameters, in the order of the uncertainty set's coordinates.
        uncertainty: a set of :mod:`optim_robust.uncertainty` or of ``pyomo.contrib.pyros``.
        name: of the problem; by default the model's.

    Raises:
        TypeError: a component of the wrong kind.
        ValueError: something not linear, not affine in the parameters, or not declared; the message names it.
    """
    x_vars, y_vars = _members("first_stage", first_stage, "Var"), _members("second_stage", second_stage, "Var")
    params = _members("uncertain", uncertain, "Param")
    if not params:
        raise ValueError("uncertain is empty: at least one mutable Param is needed")
    known = uncertainty if isinstance(uncertainty, UncertaintySet) else from_pyros(uncertainty)
    if known.dim != len(params):
        raise ValueError(
            f"the uncertainty set has {known.dim} coordinates, {len(params)} uncertain parameters are given"
        )
    _refuse_other_components(model)
    reader = _Reader(model, params, [*x_vars, *y_vars])
    with _borrowed(params):
        pictures, base, steps = _pictures(reader, known)
        problem = _assemble(pictures, base, steps, known, x_vars, y_vars, name or str(model.name), _sense(model))
        _check_affine(reader, problem)
    problem.model, problem.x_vars, problem.y_vars, problem.params = model, tuple(x_vars), tuple(y_vars), tuple(params)
    return problem


def _members(argument: str, components: Iterable[Any], kind: str) -> list[Any]:
    """Return the scalar members of some components, in order."""
    if hasattr(components, "ctype") or isinstance(components, str):
        components = [components]
    found: list[Any] = []
    for component in components:
        ctype = getattr(getattr(component, "ctype", None), "__name__", type(component).__name__)
        if ctype != kind:
            raise TypeError(f"{argument} holds {component!s}, a {ctype}; a {kind} is needed")
        if kind == "Param" and not getattr(component, "mutable", True):
            raise TypeError(f"{argument} holds {component.name}, which is not mutable: declare it with mutable=True")
        is_group = hasattr(component, "is_indexed") and component.is_indexed()
        found.extend(component[i] for i in component) if is_group else found.append(component)
    return found


@contextmanager
def _borrowed(params: Sequence[Any]) -> Iterator[None]:
    """Put the parameters' values back on exit."""
    before = []
    for p in params:
        try:
            before.append(p.value)
        except ValueError:  # it never had one
            before.append(None)
    try:
        yield
    finally:
        for p, value in zip(params, before, strict=True):
            if value is not None:
                p.set_value(value)


def _refuse_other_components(model: Any) -> None:
    import pyomo.environ as pyo

    known = {pyo.Var, pyo.Param, pyo.Set, pyo.RangeSet, pyo.Constraint, pyo.Objective, pyo.Expression, pyo.Block}
    harmless = {"SetOf", "BuildAction", "BuildCheck", "Suffix", "Any", "AbstractSet"}
    for component in model.component_objects(active=True, descend_into=True):
        ctype = component.ctype
        if ctype not in known and ctype.__name__ not in harmless and "Set" not in ctype.__name__:
            raise ValueError(
                f"{component.name} is a {ctype.__name__}; only variables, linear constraints and one objective"
            )


def _sense(model: Any) -> int:
    import pyomo.environ as pyo

    objectives = list(model.component_data_objects(pyo.Objective, active=True, descend_into=True))
    if len(objectives) != 1:
        raise ValueError(f"the model has {len(objectives)} active objectives; exactly one is needed")
    return 1 if objectives[0].sense == pyo.minimize else -1


class _Reader:
    """Looks at the model at one xi after another."""

    def __init__(self, model: Any, params: Sequence[Any], variables: Sequence[Any]) -> None:
        self.model, self.params, self.variables = model, params, variables
        self.index = {id(v): i for i, v in enumerate(variables)}
        if len(self.index) != len(variables):
            raise ValueError("a variable is named twice in first_stage and second_stage")

    def look(self, xi: Array) -> _Picture:
        """Set the parameters and read every row, the objective, and the variables' bounds."""
        import pyomo.environ as pyo

        for param, value in zip(self.params, xi, strict=True):
            param.set_value(float(value))
        rows: list[tuple[str, dict[int, float], float]] = []
        for constraint in self.model.component_data_objects(pyo.Constraint, active=True, descend_into=True):
            coefficients, constant = _linear(constraint.body, constraint.name, self.index)
            for side, bound in ((1.0, constraint.upper), (-1.0, constraint.lower)):
                limit = None if bound is None else _number(bound)
                if limit is not None and math.isfinite(limit):
                    signed = {i: side * v for i, v in coefficients.items()}
                    rows.append((constraint.name, signed, side * (limit - constant)))
        objective = next(self.model.component_data_objects(pyo.Objective, active=True, descend_into=True))
        cost, constant = _linear(objective.expr, objective.name, self.index)
        sign = 1.0 if objective.sense == pyo.minimize else -1.0
        bounds = [_bounds(v) for v in self.variables]
        return _Picture(rows, {i: sign * v for i, v in cost.items()}, sign * constant, bounds)


def _number(expression: Any) -> float:
    import pyomo.environ as pyo

    value: Any = pyo.value(expression)
    return float(value)


def _bounds(variable: Any) -> tuple[float, float]:
    if variable.fixed:
        return float(variable.value), float(variable.value)
    low, up = variable.lb, variable.ub
    return -math.inf if low is None else float(low), math.inf if up is None else float(up)


def _pictures(reader: _Reader, known: UncertaintySet) -> tuple[list[_Picture], Array, Array]:
    """Look at the model at the nominal point, and with each parameter moved alone; return also the moves."""
    base = np.clip(known.nominal, known.lower, known.upper)
    steps = np.where(known.upper - base >= base - known.lower, known.upper - base, known.lower - base)
    found = [reader.look(base)]
    for j, step in enumerate(steps):
        point = base.copy()
        point[j] += step
        found.append(reader.look(point) if step else found[0])
    return found, base, steps


def _linear(expression: Any, name: str, index: dict[int, int]) -> tuple[dict[int, float], float]:
    """Return (coefficients, constant) of a linear expression over the declared variables."""
    from pyomo.repn import generate_standard_repn

    form: Any = generate_standard_repn(expression, compute_values=True)
    if not form.is_linear():
        raise ValueError(f"{name} is not linear in the variables")
    coefficients: dict[int, float] = {}
    for variable, value in zip(form.linear_vars, form.linear_coefs, strict=True):
        if id(variable) not in index:
            raise ValueError(f"{name} holds {variable.name}, which is in neither first_stage nor second_stage")
        i = index[id(variable)]
        coefficients[i] = coefficients.get(i, 0.0) + float(value)
    constant = float(form.constant)
    if not all(map(math.isfinite, (*coefficients.values(), constant))):
        raise ValueError(f"{name} holds NaN or infinity at a point of the uncertainty set's bounding box")
    return coefficients, constant


def _table(pictures: Sequence[_Picture], n: int) -> tuple[list[Any], list[Array], list[Array], list[float]]:
    """Return, of each picture, (matrix of rows, upper bounds, cost, constant)."""
    names = [name for name, _, _ in pictures[0].rows]
    matrices, bounds, costs, constants = [], [], [], []
    for picture in pictures:
        if [name for name, _, _ in picture.rows] != names:
            changed = set(names) ^ {name for name, _, _ in picture.rows} or set(names)
            raise ValueError(f"{sorted(changed)[0]}: which rows exist depends on the uncertain parameters")
        entries = [(r, i, v) for r, (_, row, _) in enumerate(picture.rows) for i, v in row.items()]
        r, i, v = zip(*entries, strict=True) if entries else ((), (), ())
        matrices.append(sparse.csr_matrix((v, (r, i)), shape=(len(names), n)))
        bounds.append(np.array([bound for _, _, bound in picture.rows]))
        cost = np.zeros(n)
        cost[list(picture.cost)] = list(picture.cost.values())
        costs.append(cost)
        constants.append(picture.constant)
    return matrices, bounds, costs, constants


def _assemble(
    pictures: Sequence[_Picture],
    base: Array,
    steps: Array,
    known: UncertaintySet,
    x_vars: Sequence[Any],
    y_vars: Sequence[Any],
    name: str,
    sense: int,
) -> PyomoProblem:
    """Build the affine form from the pictures: slope j is the change over the move of parameter j."""
    n_x, n = len(x_vars), len(x_vars) + len(y_vars)
    matrices, bounds, costs, constants = _table(pictures, n)
    moved = [j for j, step in enumerate(steps) if step]
    matrix_slopes = {j: _clean((matrices[j + 1] - matrices[0]) / steps[j], matrices[0]) for j in moved}
    flat = [np.concatenate([b, c, [k]]) for b, c, k in zip(bounds, costs, constants, strict=True)]
    slopes = np.zeros((len(flat[0]), len(base)))
    for j in moved:
        change = flat[j + 1] - flat[0]
        slopes[:, j] = np.where(np.abs(change) <= 1e-12 * (1 + np.abs(flat[0])), 0.0, change / steps[j])
    matrix = matrices[0] - sum((base[j] * s for j, s in matrix_slopes.items()), sparse.csr_matrix((len(bounds[0]), n)))
    vector = flat[0] - slopes @ base
    m = len(bounds[0])
    names = [row_name for row_name, _, _ in pictures[0].rows]
    certain = np.abs(slopes[:m]).sum(1) == 0
    for slope in matrix_slopes.values():
        certain &= np.diff(slope.indptr) == 0
    first_only = np.diff(sparse.csr_matrix(matrix[:, n_x:]).indptr) == 0
    static, dynamic = np.flatnonzero(certain & first_only), np.flatnonzero(~(certain & first_only))
    return PyomoProblem(
        x=_stage(x_vars), y=_stage(y_vars), uncertainty=known,
        c=AffineVector(vector[m : m + n_x], slopes[m : m + n_x]),
        d=AffineVector(vector[m + n_x : m + n], slopes[m + n_x : m + n]),
        constant=AffineVector(vector[-1:], slopes[-1:]),
        technology=AffineMatrix(matrix[dynamic, :n_x], {j: s[dynamic, :n_x] for j, s in matrix_slopes.items()}),
        recourse=AffineMatrix(matrix[dynamic, n_x:], {j: s[dynamic, n_x:] for j, s in matrix_slopes.items()}),
        rhs=AffineVector(vector[dynamic], slopes[dynamic]),
        static=(matrix[static, :n_x], vector[static]),
        row_names=[names[i] for i in dynamic], name=name, sense=sense,
    )  # fmt: skip


def _clean(slope: Any, reference: Any) -> Any:
    """Drop what is rounding of the difference of two equal coefficients."""
    slope = sparse.csr_matrix(slope)
    scale = 1e-12 * (1 + float(np.abs(reference.data).max(initial=0.0)))
    slope.data[np.abs(slope.data) <= scale] = 0.0
    slope.eliminate_zeros()
    return slope


def _stage(variables: Sequence[Any]) -> Stage:
    for v in variables:
        if not (v.is_continuous() or v.is_integer() or v.is_binary()):
            raise ValueError(f"{v.name} has domain {v.domain}; continuous, integer and binary variables are known")
    bounds = np.array([_bounds(v) for v in variables]).reshape(-1, 2)
    return Stage.of(len(variables), lower=bounds[:, 0], upper=bounds[:, 1], names=[v.name for v in variables],
                    integer=[not v.is_continuous() for v in variables])  # fmt: skip


def _check_affine(reader: _Reader, problem: PyomoProblem) -> None:
    """Compare the affine form with the model at further points of the bounding box.

    Raises:
        ValueError: a row, a bound or the objective differs, named.
    """
    known, rng = problem.uncertainty, np.random.default_rng(0)
    stages = [np.concatenate([getattr(problem.x, e), getattr(problem.y, e)]) for e in ("lower", "upper")]
    dynamic = set(problem.row_names)
    for _ in range(3):
        xi = known.lower + (known.upper - known.lower) * rng.random(known.dim)
        picture = reader.look(xi)
        (matrix,), (upper,), (cost,), (constant,) = _table([picture], len(reader.variables))
        wanted = sparse.hstack([problem.T.at(xi), problem.W.at(xi), problem.h.at(xi)[:, None]]).toarray()
        blank = sparse.csr_matrix((len(problem.b), problem.y.size))
        first = sparse.hstack([problem.A, blank, problem.b[:, None]]).toarray()
        rows, others = iter(wanted), iter(first)
        for row, bound, (name, _, _) in zip(matrix.toarray(), upper, picture.rows, strict=True):
            seen = np.append(row, bound)
            target = next(rows) if name in dynamic else next(others)
            if np.abs(seen - target).max() > AFFINE_TOLERANCE * (1 + np.abs(seen).max()):
                raise ValueError(f"{name} is not affine in the uncertain parameters")
        form = np.concatenate([problem.c.at(xi), problem.d.at(xi), problem.c0.at(xi)])
        if np.abs(form - np.append(cost, constant)).max() > AFFINE_TOLERANCE * (1 + np.abs(form).max()):
            raise ValueError("the objective is not affine in the uncertain parameters")
        if not np.array_equal(np.array(picture.bounds).T.reshape(2, -1), np.stack(stages)):
            raise ValueError("variable bounds depend on the uncertain parameters: write them as constraints")
