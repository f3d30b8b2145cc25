"""The adversary's problem against a finite pool of second-stage plans, and the static plan against all of a set.

Two programs from which everything else is built:

- :class:`PoolAdversary`: ``max_xi min {cost of (x, y_k) at xi : y_k feasible at xi}`` over a list of plans. A linear
  program where only costs are uncertain; otherwise one binary for each row by which the adversary can break a plan.
- :func:`static_program`: ``min_{x, y} max_xi cost`` with one plan y that is feasible for every xi, by linear duality
  over the polyhedron, row by row (Ben-Tal and Nemirovski).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from optim_robust.solver import Deadline, Program, SolverError, Status
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.uncertainty import Discrete

__all__ = ["ROW_TOLERANCE", "PoolAdversary", "cost_ceiling", "static_program"]

Array = NDArray[np.float64]
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


class PoolAdversary:
    """``max_xi theta`` with, for each plan k, ``theta <= cost_k(xi)`` or plan k infeasible at xi.

    Plans are added one by one to one persistent program, each with its own first stage (k-adaptability shares one).

    Args:
        problem: whose uncertainty set is a polyhedron.
        ceiling: finite upper bound on theta, reached where the adversary breaks every plan; infinite is allowed where
            only costs are uncertain.
    """

    def __init__(self, problem: TwoStageProblem, ceiling: float) -> None:
        self.problem, self.ceiling = problem, ceiling
        self.program = Program(mip_gap=1e-7)
        self.xi = self.program.add_variables(problem.uncertainty.lower, problem.uncertainty.upper)
        self.theta = self.program.add_variables(np.array([-math.inf]), ceiling, cost=-1.0)
        matrix, bound = problem.uncertainty.constraints()
        self.program.add_rows([(matrix, self.xi)], upper=bound)
        self.n_plans = 0

    def add(self, x: Array, y: Array) -> None:
        """Give the planner one more plan."""
        constant, slopes = self.problem.cost_form(x, y)
        row0, row1 = self.problem.row_form(x, y)
        broken = ROW_TOLERANCE * (1 + np.abs(self.problem.h.constant))
        low, up = _interval(row0, row1, self.problem)
        breakable = np.flatnonzero(up >= broken)
        self.n_plans += 1
        one = np.ones((1, 1))
        if len(breakable) == 0:
            self.program.add_rows([(one, self.theta), (-slopes[None], self.xi)], upper=constant)
            return
        if not math.isfinite(self.ceiling):
            raise SolverError("constraints are uncertain and the second stage is unbounded: no finite big-M is known")
        choice = self.program.add_variables(np.zeros(1 + len(breakable)), 1.0, integer=True)
        self.program.add_rows([(np.ones((1, len(choice))), choice)], lower=1.0)
        slack = max(0.0, self.ceiling - float(_interval(constant, slopes, self.problem)[0]))
        self.program.add_rows(
            [(one, self.theta), (-slopes[None], self.xi), (slack * one, choice[:1])], upper=constant + slack
        )
        need = (broken - low)[breakable]  # row >= broken - need * (1 - choice)
        self.program.add_rows(
            [(row1[breakable], self.xi), (-sparse.diags(need), choice[1:])],
            lower=(broken - row0)[breakable] - need,
        )

    def solve(self, deadline: Deadline | None = None) -> tuple[Array | None, float, Status]:
        """Return (xi, proven upper bound on theta, status)."""
        answer = self.program.solve(deadline)
        if answer.status == Status.INFEASIBLE:
            raise SolverError("the uncertainty set is empty")
        xi = None
        if answer.point is not None:
            box = self.problem.uncertainty
            xi = np.clip(answer.point[self.xi], box.lower, box.upper)
        return xi, min(-answer.bound, self.ceiling), answer.status


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
