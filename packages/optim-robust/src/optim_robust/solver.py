"""A thin, persistent layer over HiGHS: what it holds, why it stopped, and whether the point it returned is a solution.

A :class:`Program` grows by variables and rows, changes bounds and costs, and is solved again and again, as the loops of
robust optimisation need (a tiny MILP costs 5 to 20 ms, and no model is walked). Three things are never taken on trust:

- *why it stopped* and *what it holds* are separate: :class:`Answer` has a ``status`` and, maybe, a ``point``;
- every point is checked again here, in float64, against bounds, rows and integrality (``FEASIBILITY``); one that does
  not pass is an answer ``ERROR`` without a point;
- "infeasible or unbounded" is settled by a second solve without the cost.

``bound`` is the one to certify with: the dual bound of the branch and bound, not the value of the incumbent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from robust_core.errors import RobustError

__all__ = ["FEASIBILITY", "Answer", "Deadline", "Program", "SmallMaximum", "SolverError", "Status"]

FEASIBILITY = 1e-5  # relative to 1 + |bound|; HiGHS itself promises 1e-6 on the presolved, scaled problem
Array = NDArray[np.float64]
Indices = NDArray[np.int32]


class SolverError(RobustError):
    """The solver failed numerically, or returned a point that is not a solution."""


class Status(StrEnum):
    """Why a solver stopped; whether it holds a point is another question.

    ``FEASIBLE``: a method that proves no optimality ended of itself. ``TIME_LIMIT``: with or without an incumbent.
    ``NO_SOLUTION``: the policies that a restricted method looks at are infeasible; the problem itself may not be.
    """

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    TIME_LIMIT = "time_limit"
    NO_SOLUTION = "no_solution"
    ERROR = "error"


class Deadline:
    """A wall-clock limit that nested solves share. ``seconds=None`` or infinity: no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"time_limit={seconds!r}: a positive number of seconds, or None for no limit")
        self.start = time.perf_counter()
        self.limit = math.inf if seconds is None else float(seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.limit - self.elapsed)

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0.0

    def at_most(self, seconds: float) -> Deadline:
        """Return a deadline ``seconds`` from now, or this one's if that comes sooner."""
        return Deadline(max(1e-9, min(seconds, self.left)))


@dataclass(frozen=True)
class Answer:
    """What one solve gave.

    Attributes:
        status: why it stopped.
        point: (n,) checked values of all variables, or None.
        value: cost at ``point`` (nan without one).
        bound: proven lower bound on the minimum (-inf if none, +inf if infeasible).
        seconds: wall clock.
    """

    status: Status
    point: Array | None
    value: float
    bound: float
    seconds: float


class Program:
    """A mixed-integer linear program ``min cost @ v + offset`` that is built up and solved repeatedly.

    Args:
        threads: threads of HiGHS; 1 keeps runs repeatable and lets several share a machine.
        mip_gap: relative gap at which a solve counts as optimal.
    """

    def __init__(self, *, threads: int = 1, mip_gap: float = 1e-6) -> None:
        import highspy

        self._highs: Any = highspy.Highs()
        self._module: Any = highspy
        for name, value in (
            ("output_flag", False),
            ("threads", int(threads)),
            ("mip_rel_gap", float(mip_gap)),
            ("mip_abs_gap", 1e-9),
            ("random_seed", 0),
        ):
            self._highs.setOptionValue(name, value)
        self.lower, self.upper, self.cost = np.zeros(0), np.zeros(0), np.zeros(0)
        self.integer = np.zeros(0, dtype=bool)
        self.offset = 0.0
        self.n_rows = 0
        self._rows: list[tuple[Any, Array, Array]] = []

    @property
    def n_variables(self) -> int:
        """Number of variables so far."""
        return len(self.cost)

    def add_variables(
        self, lower: ArrayLike, upper: ArrayLike, *, integer: ArrayLike = False, cost: ArrayLike = 0.0
    ) -> Indices:
        """Add variables (arguments broadcast against ``lower``) and return their indices."""
        low = np.atleast_1d(np.asarray(lower, dtype=np.float64))
        n, first = len(low), self.n_variables
        up, price = (np.broadcast_to(np.asarray(v, dtype=np.float64), n) for v in (upper, cost))
        whole = np.broadcast_to(np.asarray(integer, dtype=bool), n)
        columns = np.arange(first, first + n, dtype=np.int32)
        if n == 0:
            return columns
        self._highs.addVars(n, low, up.copy())
        self.lower, self.upper = np.append(self.lower, low), np.append(self.upper, up)
        self.cost, self.integer = np.append(self.cost, price), np.append(self.integer, whole)
        self._highs.changeColsCost(n, columns, price.copy())
        if whole.any():
            chosen = columns[whole]
            kinds = np.full(len(chosen), int(self._module.HighsVarType.kInteger), dtype=np.uint8)
            self._highs.changeColsIntegrality(len(chosen), chosen, kinds)
        return columns

    def add_rows(
        self,
        terms: Sequence[tuple[sparse.spmatrix | Array, NDArray[np.integer[Any]]]],
        lower: ArrayLike = -math.inf,
        upper: ArrayLike = math.inf,
    ) -> None:
        """Add rows ``lower <= sum(matrix @ v[columns]) <= upper``.

        Args:
            terms: pairs of a matrix (rows, len(columns)) and the variables that it multiplies.
            lower: (rows,) or one number.
            upper: (rows,) or one number.
        """
        parts = []
        for matrix, columns in terms:
            block: Any = sparse.coo_matrix(np.atleast_2d(matrix) if isinstance(matrix, np.ndarray) else matrix)
            shape = (block.shape[0], self.n_variables)
            parts.append(sparse.csr_matrix((block.data, (block.row, np.asarray(columns)[block.col])), shape=shape))
        rows: Any = sparse.csr_matrix(sum(parts[1:], parts[0]))
        rows.sum_duplicates()
        rows.eliminate_zeros()
        n = rows.shape[0]
        if n == 0:
            return
        low, up = (np.broadcast_to(np.asarray(v, dtype=np.float64), n).copy() for v in (lower, upper))
        self._highs.addRows(
            n, low, up, rows.nnz, rows.indptr[:-1].astype(np.int32), rows.indices.astype(np.int32), rows.data
        )
        self._rows.append((rows, low, up))
        self.n_rows += n

    def set_cost(self, columns: NDArray[np.integer[Any]], cost: ArrayLike) -> None:
        """Change the cost of some variables."""
        chosen = np.asarray(columns, dtype=np.int32)
        values = np.broadcast_to(np.asarray(cost, dtype=np.float64), len(chosen)).copy()
        self.cost[chosen] = values
        self._highs.changeColsCost(len(chosen), chosen, values)

    def set_bounds(self, columns: NDArray[np.integer[Any]], lower: ArrayLike, upper: ArrayLike) -> None:
        """Change the bounds of some variables; equal bounds fix them."""
        chosen = np.asarray(columns, dtype=np.int32)
        low, up = (np.broadcast_to(np.asarray(v, dtype=np.float64), len(chosen)).copy() for v in (lower, upper))
        self.lower[chosen], self.upper[chosen] = low, up
        self._highs.changeColsBounds(len(chosen), chosen, low, up)

    def start_from(self, point: ArrayLike) -> None:
        """Hand the solver a point to begin with; ignored if it is not a solution."""
        solution = self._module.HighsSolution()
        solution.col_value = [float(v) for v in np.asarray(point, dtype=np.float64)]
        self._highs.setSolution(solution)

    def violation(self, point: Array) -> float:
        """Return by how much ``point`` breaks bounds, rows or integrality, relative to 1 + |bound|."""
        worst = _excess(point, self.lower, self.upper)
        worst = max(worst, float(np.abs(point - np.round(point))[self.integer].max(initial=0.0)))
        for matrix, low, up in self._rows:
            columns = matrix.shape[1]
            worst = max(worst, _excess(matrix @ point[:columns], low, up))
        return worst

    def row_duals(self) -> Array:
        """Return the (rows,) duals of the last solve of a linear program."""
        return np.asarray(self._highs.getSolution().row_dual, dtype=np.float64)

    def solve(
        self,
        deadline: Deadline | None = None,
        *,
        mip_gap: float | None = None,
        on_bound: Callable[[float, float], None] | None = None,
    ) -> Answer:
        """Solve, check the point again, and say why the solver stopped.

        Args:
            deadline: shared limit; the solve gets what is left of it.
            mip_gap: relative gap for this and later solves.
            on_bound: called with (dual bound, incumbent value) as a branch and bound goes on.
        """
        clock = Deadline()
        if deadline is not None and deadline.passed:
            return Answer(Status.TIME_LIMIT, None, math.nan, -math.inf, 0.0)
        if self.n_variables == 0:
            return self._empty()
        if mip_gap is not None:
            self._highs.setOptionValue("mip_rel_gap", float(mip_gap))
        self._highs.changeObjectiveOffset(self.offset)
        self._run(deadline, on_bound)
        status, codes = self._highs.getModelStatus(), self._module.HighsModelStatus
        if status == codes.kUnboundedOrInfeasible:
            return self._settle(deadline, clock)
        if status == codes.kInfeasible:
            return Answer(Status.INFEASIBLE, None, math.nan, math.inf, clock.elapsed)
        if status == codes.kUnbounded:
            return self._settle(deadline, clock) if self.integer.any() else _unbounded(clock)
        if status == codes.kOptimal:
            return self._checked(Status.OPTIMAL, clock)
        if status in (codes.kTimeLimit, codes.kInterrupt, codes.kSolutionLimit, codes.kIterationLimit):
            return self._checked(Status.TIME_LIMIT, clock)
        return Answer(Status.ERROR, None, math.nan, -math.inf, clock.elapsed)

    def _run(self, deadline: Deadline | None, on_bound: Callable[[float, float], None] | None) -> None:
        limit = math.inf
        if deadline is not None and math.isfinite(deadline.limit):
            limit = self._highs.getRunTime() + deadline.left  # HiGHS counts the run time of the object's whole life
        self._highs.setOptionValue("time_limit", limit)
        if not self.integer.any() or (on_bound is None and not math.isfinite(limit)):
            self._highs.run()
            return

        def watch(event: Any) -> None:
            data = event.data_out
            if on_bound is not None:
                on_bound(float(data.mip_dual_bound), float(data.mip_primal_bound))
            if deadline is not None and deadline.passed:
                event.interrupt()  # HiGHS looks at its own limit less often

        self._highs.cbMipInterrupt.subscribe(watch)
        try:
            self._highs.run()
        finally:
            self._highs.cbMipInterrupt.unsubscribe(watch)

    def _empty(self) -> Answer:
        feasible = all((low <= 0).all() and (up >= 0).all() for _, low, up in self._rows)
        if not feasible:
            return Answer(Status.INFEASIBLE, None, math.nan, math.inf, 0.0)
        return Answer(Status.OPTIMAL, np.zeros(0), self.offset, self.offset, 0.0)

    def _settle(self, deadline: Deadline | None, clock: Deadline) -> Answer:
        """Tell infeasible from unbounded: solve without cost."""
        cost, columns = self.cost.copy(), np.arange(self.n_variables)
        self.set_cost(columns, 0.0)
        self._run(deadline, None)
        status, codes = self._highs.getModelStatus(), self._module.HighsModelStatus
        self.set_cost(columns, cost)
        if status == codes.kInfeasible:
            return Answer(Status.INFEASIBLE, None, math.nan, math.inf, clock.elapsed)
        if status == codes.kOptimal:
            return _unbounded(clock)
        stop = Status.TIME_LIMIT if status == codes.kTimeLimit else Status.ERROR
        return Answer(stop, None, math.nan, -math.inf, clock.elapsed)

    def _polished(self, snapped: Array, raw: Array) -> Array:
        """Fix the integers where they were rounded to and solve for the rest; ``raw`` where that gives nothing.

        An integer off by 1e-6 behind a coefficient of a million is a row off by one: rounding alone would break it.
        """
        whole = np.flatnonzero(self.integer)
        if len(whole) in (0, self.n_variables):
            return raw
        low, up = self.lower[whole].copy(), self.upper[whole].copy()
        self.set_bounds(whole, snapped[whole], snapped[whole])
        self._highs.setOptionValue("time_limit", math.inf)
        self._highs.run()
        found = np.asarray(self._highs.getSolution().col_value, dtype=np.float64)
        solved = self._highs.getModelStatus() == self._module.HighsModelStatus.kOptimal
        self.set_bounds(whole, low, up)
        if not solved or len(found) != self.n_variables:
            return raw
        found[whole] = snapped[whole]
        return found if self.violation(found) <= FEASIBILITY else raw

    def _checked(self, status: Status, clock: Deadline) -> Answer:
        info, is_mip = self._highs.getInfo(), bool(self.integer.any())
        proven = info.mip_dual_bound if is_mip else info.objective_function_value
        bound = float(proven) if is_mip or status == Status.OPTIMAL else -math.inf
        if info.primal_solution_status != 2:  # 2: HiGHS holds a feasible point
            lost = status == Status.OPTIMAL
            return Answer(Status.ERROR if lost else status, None, math.nan, -math.inf if lost else bound, clock.elapsed)
        raw = np.asarray(self._highs.getSolution().col_value, dtype=np.float64)
        snapped = np.clip(np.where(self.integer, np.round(raw), raw), self.lower, self.upper)
        point = snapped if self.violation(snapped) <= 1e-7 else self._polished(snapped, raw)
        if not np.isfinite(point).all() or self.violation(point) > FEASIBILITY:
            return Answer(Status.ERROR, None, math.nan, -math.inf, clock.elapsed)
        value = float(self.cost @ point) + self.offset
        return Answer(status, point, value, min(bound, value), clock.elapsed)


class SmallMaximum:
    """``max v[-1] : rows @ v <= upper, low <= v <= high``, dense and of few variables, for trees that solve thousands.

    No model is grown and nothing is presolved: a solve of five variables and a hundred rows takes some .2 ms.
    """

    def __init__(self) -> None:
        import highspy

        self._highs, self._module = highspy.Highs(), highspy
        for name, value in (("output_flag", False), ("threads", 1), ("presolve", "off"), ("random_seed", 0)):
            self._highs.setOptionValue(name, value)

    def solve(
        self, rows: Array, upper: Array, low: Array, high: Array, deadline: Deadline | None = None
    ) -> tuple[Status, Array | None, float]:
        """Return (status, point, bound): -inf for an infeasible program, infinite where nothing is proven.

        The bound is that of weak duality, computed here from the multipliers: it holds however exact they are.
        """
        if deadline is not None and deadline.passed:
            return Status.TIME_LIMIT, None, math.inf
        m, n = rows.shape
        program = self._module.HighsLp()
        program.num_col_, program.num_row_ = n, m
        program.col_cost_ = np.append(np.zeros(n - 1), -1.0)
        program.col_lower_, program.col_upper_ = low, high
        program.row_lower_, program.row_upper_ = np.full(m, -math.inf), upper
        program.a_matrix_.format_ = self._module.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.arange(m + 1) * n
        program.a_matrix_.index_, program.a_matrix_.value_ = np.tile(np.arange(n), m), rows.ravel()
        self._highs.passModel(program)
        self._highs.run()
        status, codes = self._highs.getModelStatus(), self._module.HighsModelStatus
        if status == codes.kInfeasible:
            return Status.INFEASIBLE, None, -math.inf
        if status in (codes.kUnbounded, codes.kUnboundedOrInfeasible):
            return Status.UNBOUNDED, None, math.inf
        if status != codes.kOptimal:
            return Status.ERROR, None, math.inf
        solution = self._highs.getSolution()
        point = np.clip(np.asarray(solution.col_value, dtype=np.float64), low, high)
        multipliers = np.maximum(0.0, -np.asarray(solution.row_dual, dtype=np.float64))
        rest = np.append(np.zeros(n - 1), 1.0) - multipliers @ rows
        if math.isinf(high[-1]) and rest[-1] != 0.0 and (weight := float(multipliers @ rows[:, -1])) > 0.5:
            multipliers = multipliers / weight  # the last variable has no upper end: nothing of it may be left
            rest = np.append(-(multipliers @ rows[:, :-1]), 0.0)
        with np.errstate(invalid="ignore"):
            ends = np.where(rest == 0.0, 0.0, np.maximum(rest * low, rest * high))
        parts = np.append(multipliers * np.where(multipliers > 0, upper, 0.0), ends)
        return Status.OPTIMAL, point, float(parts.sum() + 1e-14 * np.abs(parts).sum())


def _unbounded(clock: Deadline) -> Answer:
    return Answer(Status.UNBOUNDED, None, -math.inf, -math.inf, clock.elapsed)


def _excess(values: Array, lower: Array, upper: Array) -> float:
    """Return how far ``values`` leave [lower, upper], relative to 1 + |bound|; 0 inside, infinity for NaN."""
    below = np.where(np.isfinite(lower), (lower - values) / (1 + np.abs(np.where(np.isfinite(lower), lower, 0))), -1.0)
    above = np.where(np.isfinite(upper), (values - upper) / (1 + np.abs(np.where(np.isfinite(upper), upper, 0))), -1.0)
    worst = max(float(below.max(initial=0.0)), float(above.max(initial=0.0)))
    return worst if math.isfinite(worst) else math.inf
