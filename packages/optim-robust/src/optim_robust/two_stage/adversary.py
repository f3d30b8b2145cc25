"""The adversary's problem against the planner's best answers, and the static plan against all of a set.

Two programs from which everything else is built:

- :func:`worst_of_plans`: ``max_xi min {cost of (x, y) at xi : y feasible at xi}``, where an oracle names the planner's
  answer to a xi. A branch and bound whose nodes are linear programs: an answer y either bounds the cost
  (``theta <= cost_y(xi)``, for one of its costs where the greatest of several counts) or is broken in one of its rows,
  so the node where y is the answer splits into those cases, and no big-M is needed. Answers of one case are cuts for
  all nodes; where only costs are uncertain this is a plain cutting-plane method.
- :func:`static_program`: ``min_{x, y} max_xi cost`` with one plan y that is feasible for every xi, by linear duality
  over the polyhedron, row by row (Ben-Tal and Nemirovski).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from optim_robust.solver import Deadline, Program, Status
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.uncertainty import Discrete

__all__ = ["ROW_TOLERANCE", "Oracle", "Worst", "cost_ceiling", "static_program", "worst_of_plans"]

Array = NDArray[np.float64]
Oracle = Callable[[Array], tuple[float, Array | None, Status]]
Forms = Callable[[Array, Array], tuple[list[tuple[float, Array]], tuple[Array, Array]]]
ROW_TOLERANCE = 1e-4  # a plan counts as broken at xi when a row is exceeded by this times 1 + |h|


def _interval(constant: Array | float, slopes: Array, problem: TwoStageProblem) -> tuple[Array, Array]:
    """Return bounds of ``constant + slopes @ xi`` over the bounding box of the uncertainty set."""
    low, up = problem.uncertainty.lower, problem.uncertainty.upper
    positive, negative = np.maximum(slopes, 0), np.minimum(slopes, 0)
    return constant + positive @ low + negative @ up, constant + positive @ up + negative @ low


def cost_ceiling(problem: TwoStageProblem, x: Array) -> float:
    """Return an upper bound on the cost of x with *any* y in its bounds, at any xi; infinite where y is unbounded."""
    constant, slopes = problem.cost_form(x, np.zeros(problem.y.size))
    d_slopes = np.zeros((problem.y.size, problem.dim)) if problem.d.is_constant else problem.d.slopes.toarray()
    low, up = _interval(problem.d.constant, d_slopes, problem)
    corners = [np.where(p == 0, 0.0, p * b) for p in (low, up) for b in (problem.y.lower, problem.y.upper)]
    with np.errstate(invalid="ignore"):
        return float(_interval(constant, slopes, problem)[1] + np.max(corners, axis=0).sum())


@dataclass(frozen=True)
class Worst:
    """``value`` is attained at ``xi``; ``upper`` is proven. ``value`` = +inf: the planner has no answer to ``xi``."""

    value: float
    upper: float
    xi: Array | None
    status: Status
    n_asked: int


class _Nodes:
    """The open nodes of the adversary's tree: rows over (xi, theta), best bound first."""

    def __init__(self, problem: TwoStageProblem, ceiling: float) -> None:
        box = problem.uncertainty
        self.low, self.up = np.append(box.lower, -math.inf), np.append(box.upper, ceiling)
        matrix, bound = box.constraints()
        self.common = [np.append(row, 0.0) for row in matrix.toarray()]
        self.common_rhs = bound.tolist()
        self.tie, self.closed = itertools.count(), -math.inf
        self.open: list[tuple[float, int, list[Array], list[float]]] = [(-ceiling, next(self.tie), [], [])]

    def push(self, bound: float, rows: list[Array], rhs: list[float]) -> None:
        heapq.heappush(self.open, (-bound, next(self.tie), rows, rhs))

    def solve(
        self, rows: list[Array], rhs: list[float], floor: float, deadline: Deadline
    ) -> tuple[Array | None, float, Status]:
        """Maximise theta >= floor over a node; (None, -inf, INFEASIBLE) where nothing reaches the floor."""
        program, low = Program(), self.low.copy()
        low[-1] = floor
        columns = program.add_variables(low, self.up, cost=np.append(np.zeros(len(low) - 1), -1.0))
        if rows or self.common:
            program.add_rows([(np.array(self.common + rows), columns)], upper=np.array(self.common_rhs + rhs))
        answer = program.solve(deadline)
        if answer.point is None:
            return None, math.inf if answer.status == Status.UNBOUNDED else -math.inf, answer.status
        return np.clip(answer.point[:-1], self.low[:-1], self.up[:-1]), -answer.value, answer.status

    def deepest(self, rows: list[Array], rhs: list[float], deadline: Deadline) -> Array | None:
        """Return the point of a node where its broken rows are exceeded most: a telling witness, not a marginal one."""
        matrix = np.array(self.common + rows)
        depth = np.array([float(i >= len(self.common) and row[-1] == 0) for i, row in enumerate(matrix)])
        if not depth.any():
            return None
        program = Program()
        columns = program.add_variables(self.low, self.up)
        tau = program.add_variables(np.zeros(1), 1e6, cost=-1.0)
        rest = np.array(self.common_rhs + rhs)
        program.add_rows([(matrix, columns), (depth[:, None], tau)], upper=rest)
        answer = program.solve(deadline)
        return None if answer.point is None else np.clip(answer.point[: len(self.low) - 1], self.low[:-1], self.up[:-1])


def worst_of_plans(
    problem: TwoStageProblem,
    x: Array,
    oracle: Oracle,
    *,
    ceiling: float,
    tol: float = 1e-6,
    deadline: Deadline,
    probes: list[Array] | None = None,
    forms: Forms | None = None,
) -> Worst:
    """Return ``max_xi`` of the oracle's cost, which must be the least among finitely many plans feasible at xi.

    Args:
        problem: whose uncertainty set is a polyhedron.
        x: first stage.
        oracle: xi -> (total cost, plan, status): the best plan that exceeds no row by ``ROW_TOLERANCE`` / 2; the plan
            is None, and the cost infinite, where there is none.
        ceiling: bound on the cost of every plan at every xi; infinite is allowed where only costs are uncertain.
        tol: relative gap.
        deadline: past it the interval proven so far is returned.
        probes: points at which to ask first.
        forms: (x, plan) -> its costs, affine in xi, of which the greatest counts, and its rows; the plan's own cost and
            rows when None.
    """
    described = forms if forms is not None else lambda x, y: ([problem.cost_form(x, y)], problem.row_form(x, y))
    value, worst, asked = -math.inf, None, 0
    above = ceiling + 1.0 + 0.01 * abs(ceiling)  # where every plan met so far is broken, more must be asked
    nodes = _Nodes(problem, above)
    limit = ROW_TOLERANCE * (1 + np.abs(problem.h.constant))
    for xi in probes or []:
        cost, y, status = oracle(xi)
        asked += 1
        if y is None:
            return Worst(cost, max(cost, ceiling), xi, status, asked)
        _split(problem, described(x, y), nodes, None, limit)
        if cost > value:
            value, worst = cost, xi
    while nodes.open:
        slack = _slack(value, tol)
        key, _, rows, rhs = heapq.heappop(nodes.open)
        if -key <= value + slack or deadline.passed:
            nodes.push(-key, rows, rhs)
            break
        xi, bound, status = nodes.solve(rows, rhs, value - slack, deadline)
        if xi is None and status != Status.INFEASIBLE:
            nodes.push(-key, rows, rhs)
            return Worst(value, -nodes.open[0][0], worst, status, asked)
        bound = min(bound, -key)
        if xi is None or bound <= value + slack:
            nodes.closed = max(nodes.closed, bound)
            continue
        cost, y, status = oracle(xi)
        asked += 1
        if y is None:
            if cost != math.inf:
                return Worst(value, bound, worst, status, asked)
            deep = nodes.deepest(rows, rhs, deadline)
            kept = deep if deep is not None and oracle(deep)[0] == math.inf else xi
            return Worst(cost, cost, kept, Status.INFEASIBLE, asked)
        if cost > value:
            value, worst = cost, xi
        if cost >= bound - slack / 2:
            nodes.closed = max(nodes.closed, bound)
            continue
        _split(problem, described(x, y), nodes, (bound, rows, rhs), limit)
    upper = max([value, nodes.closed, *(-item[0] for item in nodes.open[:1])])
    done = upper <= value + _slack(value, tol)
    return Worst(value, upper, worst, Status.OPTIMAL if done else Status.TIME_LIMIT, asked)


def _slack(value: float, tol: float) -> float:
    return tol * max(1.0, abs(value)) if math.isfinite(value) else 0.0


def _never_above(one: tuple[float, Array], other: tuple[float, Array], problem: TwoStageProblem) -> bool:
    return bool(_interval(one[0] - other[0], one[1] - other[1], problem)[1] <= 0)


def _split(
    problem: TwoStageProblem,
    plan: tuple[list[tuple[float, Array]], tuple[Array, Array]],
    nodes: _Nodes,
    node: tuple[float, list[Array], list[float]] | None,
    limit: Array,
) -> None:
    """Replace a node by: one of the plan's costs bounds theta, or one of its rows is broken.

    Without a node, or where there is one case only, it becomes a cut for all.
    """
    costs, (row0, row1) = plan
    breakable = np.flatnonzero(_interval(row0, row1, problem)[1] >= limit)
    kept: list[tuple[float, Array]] = []
    for cost in costs:  # one that is nowhere the greater is no case
        if not any(_never_above(cost, other, problem) for other in kept):
            kept = [other for other in kept if not _never_above(other, cost, problem)] + [cost]
    cuts = [(np.append(-slopes, 1.0), constant) for constant, slopes in kept]
    if len(breakable) == 0 and len(cuts) == 1:
        nodes.common.append(cuts[0][0])
        nodes.common_rhs.append(cuts[0][1])
    if node is None:
        return
    bound, rows, rhs = node
    if len(breakable) == 0 and len(cuts) == 1:
        nodes.push(bound, rows, rhs)
        return
    for cut, constant in cuts:
        nodes.push(bound, [*rows, cut], [*rhs, constant])
    for r in breakable:
        nodes.push(bound, [*rows, np.append(-row1[r], 0.0)], [*rhs, float(row0[r] - limit[r])])


def _robust_row(
    program: Program,
    terms: list[tuple[Any, NDArray[np.int32]]],
    slopes: list[tuple[Any, NDArray[np.int32]]],
    known: Array,
    upper: float,
    shape: tuple[Any, Array, Array, Array],
) -> None:
    """Add ``terms + max_xi (slopes(v) + known) @ xi <= upper`` by the dual of the inner maximum.

    ``slopes`` holds (dim, n) matrices: the coefficient of xi_j as a linear function of the variables.
    """
    matrix, bound, low, up = shape
    dim = len(low)
    multiplier = program.add_variables(np.zeros(matrix.shape[0]), math.inf)
    above, below = (program.add_variables(np.zeros(dim), math.inf) for _ in range(2))
    eye = sparse.identity(dim, format="csr")
    dual = [(matrix.T, multiplier), (eye, above), (-eye, below)]
    program.add_rows([*dual, *((-m, columns) for m, columns in slopes)], lower=known, upper=known)
    worst = [(bound[None], multiplier), (up[None], above), (-low[None], below)]
    program.add_rows([*terms, *worst], upper=upper)


def static_program(
    problem: TwoStageProblem,
    *,
    x_fixed: Array | None = None,
    box: tuple[Array, Array] | None = None,
) -> tuple[Program, NDArray[np.int32], NDArray[np.int32]]:
    """Build ``min theta`` over (x, y, theta) with y the same for all xi; return it with the columns of x and of y.

    Args:
        problem: the two-stage problem.
        x_fixed: fix the first stage to this point.
        box: (lower, upper) that replaces the bounding box of the uncertainty set, to look at a part of it.
    """
    program = Program()
    x = problem.first_stage_block(program)
    if x_fixed is not None:
        program.set_bounds(x, x_fixed, x_fixed)
    y = program.add_variables(problem.y.lower, problem.y.upper, integer=problem.y.integer)
    theta = program.add_variables(np.array([-math.inf]), math.inf, cost=1.0)
    if isinstance(problem.uncertainty, Discrete):
        for xi in problem.uncertainty.points:
            program.add_rows([(problem.T.at(xi), x), (problem.W.at(xi), y)], upper=problem.h.at(xi))
            cost = [(problem.c.at(xi)[None], x), (problem.d.at(xi)[None], y), (-np.ones((1, 1)), theta)]
            program.add_rows(cost, upper=-float(problem.c0.at(xi)[0]))
        return program, x, y
    low, up = box if box is not None else (problem.uncertainty.lower, problem.uncertainty.upper)
    shape = (*problem.uncertainty.constraints(), low, up)
    blank = sparse.csr_matrix((problem.dim, 1))
    slopes = [
        (blank @ sparse.csr_matrix((1, columns.size)) if vector.is_constant else vector.slopes.T, columns)
        for vector, columns in ((problem.c, x), (problem.d, y))
    ]
    known = np.zeros(problem.dim) if problem.c0.is_constant else problem.c0.slopes.toarray()[0]
    cost = [(problem.c.constant[None], x), (problem.d.constant[None], y), (-np.ones((1, 1)), theta)]
    _robust_row(program, cost, slopes, known, -float(problem.c0.constant[0]), shape)
    h_slopes = np.zeros((len(problem.row_names), problem.dim))
    if not problem.h.is_constant:
        h_slopes = problem.h.slopes.toarray()
    uncertain = np.abs(h_slopes).sum(1) > 0
    for affine in (problem.T, problem.W):
        for slope in affine.slopes.values():
            uncertain |= np.diff(slope.indptr) > 0
    sure = np.flatnonzero(~uncertain)
    rows = [(problem.T.constant[sure], x), (problem.W.constant[sure], y)]
    program.add_rows(rows, upper=problem.h.constant[sure])
    for r in np.flatnonzero(uncertain).tolist():
        rows = [(problem.T.constant[[r]], x), (problem.W.constant[[r]], y)]
        lean = [(_row_slopes(affine.slopes, r, problem.dim, n), v) for affine, n, v in
                ((problem.T, x.size, x), (problem.W, y.size, y))]  # fmt: skip
        _robust_row(program, rows, lean, -h_slopes[r], float(problem.h.constant[r]), shape)
    return program, x, y


def _row_slopes(slopes: dict[int, Any], row: int, dim: int, n: int) -> Any:
    """Return the (dim, n) matrix whose row j is row ``row`` of slope j."""
    matrix: Any = sparse.lil_matrix((dim, n))
    for j, slope in slopes.items():
        matrix[j] = slope[row]
    return sparse.csr_matrix(matrix)
