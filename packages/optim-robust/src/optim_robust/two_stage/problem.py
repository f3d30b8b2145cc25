"""Two-stage robust problems with mixed-integer recourse, affine in the uncertain parameters.

The problem of this package, and the one representation that every method works on, is

    min_{x in X}  max_{xi in Xi}  [ c(xi)'x + c0(xi) + min_y { d(xi)'y : T(xi) x + W(xi) y <= h(xi), y in Y } ]

with c, c0, d, T, W, h affine in xi, X and Y given by bounds, integrality and (for X) static rows ``A x <= b``. A
planner decides x, then the adversary picks xi from the uncertainty set, then the planner reacts with y. Everything is
minimised; profits enter with a minus sign, and ``sense=-1`` only tells displays to turn the sign back.

A problem with structure (:mod:`.knapsack`, :mod:`.capital_budgeting`) derives from :class:`TwoStageProblem` and
overrides :meth:`~TwoStageProblem.recourse` or :meth:`~TwoStageProblem.evaluate` by faster oracles, same answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from optim_robust.solver import FEASIBILITY, Deadline, Program, Status
from optim_robust.two_stage.solution import Recourse, WorstCase
from optim_robust.uncertainty import UncertaintySet

__all__ = ["AffineMatrix", "AffineVector", "Stage", "TwoStageProblem"]

Array = NDArray[np.float64]


class AffineVector:
    """A vector ``constant + slopes @ xi``.

    Args:
        constant: (m,) part that is known.
        slopes: (m, dim) change for a unit of each uncertain parameter; None: the vector is certain.
        dim: number of uncertain parameters; needed without slopes.
    """

    def __init__(self, constant: ArrayLike, slopes: ArrayLike | Any | None = None, *, dim: int = 0) -> None:
        self.constant = np.atleast_1d(np.asarray(constant, dtype=np.float64))
        m = len(self.constant)
        self.slopes: Any = (
            sparse.csr_matrix((m, dim)) if slopes is None else sparse.csr_matrix(slopes, dtype=np.float64)
        )
        self.slopes.eliminate_zeros()
        if self.constant.ndim != 1 or self.slopes.shape[0] != m:
            raise ValueError(
                f"constant {self.constant.shape} and slopes {self.slopes.shape} do not fit: (m,), (m, dim)"
            )
        if not (np.isfinite(self.constant).all() and np.isfinite(self.slopes.data).all()):
            raise ValueError("an affine vector holds NaN or infinity")

    @property
    def is_constant(self) -> bool:
        """Whether no entry depends on xi."""
        return self.slopes.nnz == 0

    def at(self, xi: Array) -> Array:
        """Return the (m,) vector at ``xi``."""
        return self.constant if self.is_constant else self.constant + self.slopes @ xi


class AffineMatrix:
    """A sparse matrix ``constant + sum_j xi_j slopes[j]``.

    Args:
        constant: (m, n) part that is known.
        slopes: one (m, n) matrix for each uncertain parameter that matters, by its index.
    """

    def __init__(self, constant: ArrayLike | Any, slopes: Mapping[int, Any] | None = None) -> None:
        self.constant: Any = sparse.csr_matrix(constant, dtype=np.float64)
        given: dict[int, Any] = {j: sparse.csr_matrix(m, dtype=np.float64) for j, m in (slopes or {}).items()}
        self.slopes = {j: m for j, m in sorted(given.items()) if m.nnz}
        for matrix in (self.constant, *self.slopes.values()):
            if matrix.shape != self.constant.shape or not np.isfinite(matrix.data).all():
                raise ValueError(f"the matrices of an affine matrix must be finite and of shape {self.constant.shape}")

    @property
    def is_constant(self) -> bool:
        """Whether no entry depends on xi."""
        return not self.slopes

    def at(self, xi: Array) -> sparse.csr_matrix:
        """Return the (m, n) matrix at ``xi``."""
        matrix = self.constant
        for j, slope in self.slopes.items():
            matrix = matrix + float(xi[j]) * slope
        return sparse.csr_matrix(matrix)

    def times(self, v: Array, dim: int) -> tuple[Array, Array]:
        """Return ``matrix(xi) @ v`` as an affine function of xi: (m,) constant and (m, dim) slopes."""
        slopes = np.zeros((self.constant.shape[0], dim))
        for j, slope in self.slopes.items():
            slopes[:, j] = slope @ v
        return np.asarray(self.constant @ v), slopes


@dataclass(frozen=True, eq=False)
class Stage:
    """Bounds, integrality and names of the variables of one stage; arrays of one length."""

    lower: Array
    upper: Array
    integer: NDArray[np.bool_]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        n: int,
        *,
        lower: ArrayLike = 0.0,
        upper: ArrayLike = 1.0,
        integer: ArrayLike = True,
        names: Sequence[str] | None = None,
    ) -> Stage:
        """Make a stage of ``n`` variables (binary by default); numbers broadcast.

        Raises:
            ValueError: NaN, a lower bound above its upper bound, or a wrong number of names.
        """
        low, up = (np.broadcast_to(np.asarray(v, dtype=np.float64), n).copy() for v in (lower, upper))
        if np.isnan(low).any() or np.isnan(up).any():
            raise ValueError("bounds hold NaN; use -inf or inf for a missing bound")
        wrong = np.flatnonzero(low > up)
        named = tuple(names) if names is not None else tuple(f"v{i}" for i in range(n))
        if len(wrong):
            raise ValueError(f"variable {named[wrong[0]]} has lower bound {low[wrong[0]]:g} above {up[wrong[0]]:g}")
        if len(named) != n:
            raise ValueError(f"{len(named)} names for {n} variables")
        return cls(low, up, np.broadcast_to(np.asarray(integer, dtype=bool), n).copy(), named)

    @property
    def size(self) -> int:
        """Number of variables."""
        return len(self.lower)

    def misses(self, v: Array) -> float:
        """Return by how much ``v`` breaks bounds or integrality."""
        if not np.isfinite(v).all():
            return math.inf
        outside = np.maximum(self.lower - v, v - self.upper).max(initial=0.0)
        return max(float(outside), float(np.abs(v - np.round(v))[self.integer].max(initial=0.0)))


class TwoStageProblem:
    """``min_x max_xi [c(xi)'x + c0(xi) + min_y d(xi)'y : T(xi) x + W(xi) y <= h(xi)]``; all arguments are data.

    Args:
        x: the first stage's variables.
        y: the second stage's variables.
        uncertainty: where xi may lie.
        c: (n_x,) first-stage cost.
        d: (n_y,) second-stage cost.
        technology: T, (m, n_x). A row without y asks x alone to hold for every xi.
        recourse: W, (m, n_y).
        rhs: h, (m,).
        constant: c0, one entry.
        static: (A, b): certain rows ``A x <= b`` of X.
        row_names: (m,) names of the rows, for messages.
        name: of the problem.
        sense: 1, or -1 if users should see the negative (a profit).

    Raises:
        ValueError: shapes that do not fit, naming the part.
    """

    def __init__(
        self,
        *,
        x: Stage,
        y: Stage,
        uncertainty: UncertaintySet,
        c: AffineVector,
        d: AffineVector,
        technology: AffineMatrix,
        recourse: AffineMatrix,
        rhs: AffineVector,
        constant: AffineVector | None = None,
        static: tuple[ArrayLike | Any, ArrayLike] | None = None,
        row_names: Sequence[str] | None = None,
        name: str = "problem",
        sense: int = 1,
    ) -> None:
        k, m = uncertainty.dim, len(rhs.constant)
        self.x, self.y, self.uncertainty = x, y, uncertainty
        self.c, self.d, self.h, self.T, self.W = c, d, rhs, technology, recourse
        self.c0 = constant if constant is not None else AffineVector(np.zeros(1), dim=k)
        matrix, bound = static if static is not None else (sparse.csr_matrix((0, x.size)), np.zeros(0))
        self.A: Any = sparse.csr_matrix(matrix, dtype=np.float64)
        self.b = np.atleast_1d(np.asarray(bound, dtype=np.float64))
        self.name, self.sense = name, int(sense)
        self.row_names = tuple(row_names) if row_names is not None else tuple(f"row {i}" for i in range(m))
        wanted = {
            "c": (c.constant.shape, (x.size,)),
            "d": (d.constant.shape, (y.size,)),
            "constant": (self.c0.constant.shape, (1,)),
            "technology": (technology.constant.shape, (m, x.size)),
            "recourse": (recourse.constant.shape, (m, y.size)),
            "static": (self.A.shape, (len(self.b), x.size)),
            "row_names": ((len(self.row_names),), (m,)),
        }
        for part, (shape, needed) in wanted.items():
            if shape != needed:
                raise ValueError(f"{part} has shape {shape}; {needed} is needed")
        for part, vector in {"c": c, "d": d, "rhs": rhs, "constant": self.c0}.items():
            if not vector.is_constant and vector.slopes.shape[1] != k:
                raise ValueError(f"{part} has slopes for {vector.slopes.shape[1]} parameters; the set has {k}")
        for part, affine in {"technology": technology, "recourse": recourse}.items():
            if any(not 0 <= j < k for j in affine.slopes):
                raise ValueError(f"{part} names an uncertain parameter outside 0 .. {k - 1}")

    # --- structure ---------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Number of uncertain parameters."""
        return self.uncertainty.dim

    @cached_property
    def objective_only(self) -> bool:
        """Whether only costs are uncertain: the feasible recourse does not depend on xi."""
        return self.T.is_constant and self.W.is_constant and self.h.is_constant

    @cached_property
    def uncertain_rows(self) -> NDArray[np.bool_]:
        """(m,) which rows depend on xi."""
        found = np.zeros(len(self.row_names), dtype=bool)
        for matrix in ([] if self.h.is_constant else [self.h.slopes], self.T.slopes.values(), self.W.slopes.values()):
            for slope in matrix:
                found |= np.diff(slope.indptr) > 0
        return found

    @cached_property
    def convex_in_xi(self) -> bool:
        """Whether the cost of every x is convex in xi, so that a vertex is worst: continuous y, certain d and W."""
        return not self.y.integer.any() and self.d.is_constant and self.W.is_constant

    @property
    def finite_plans(self) -> bool:
        """Whether the planner's answers are finitely many, each described at every xi by :meth:`plan_forms`."""
        return bool(self.y.integer.all())

    # --- values ------------------------------------------------------------------------------------------------------

    def first_stage_cost(self, x: Array, xi: Array) -> float:
        """Return ``c(xi)'x + c0(xi)``."""
        return float(self.c.at(xi) @ x + self.c0.at(xi)[0])

    def cost_form(self, x: Array, y: Array) -> tuple[float, Array]:
        """Return the total cost of (x, y) as an affine function of xi: constant and (dim,) slopes."""
        constant = float(self.c.constant @ x + self.c0.constant[0] + self.d.constant @ y)
        slopes = np.zeros(self.dim)
        for vector, weight in ((self.c, x), (self.c0, np.ones(1)), (self.d, y)):
            if not vector.is_constant:
                slopes += vector.slopes.T @ weight
        return constant, slopes

    def row_form(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Return ``T(xi) x + W(xi) y - h(xi)`` as an affine function of xi: (m,) and (m, dim); feasible where <= 0."""
        (t0, t1), (w0, w1) = self.T.times(x, self.dim), self.W.times(y, self.dim)
        slopes = t1 + w1
        if not self.h.is_constant:
            slopes -= self.h.slopes.toarray()
        return t0 + w0 - self.h.constant, slopes

    def plan_forms(self, x: Array, y: Array) -> tuple[list[tuple[float, Array]], tuple[Array, Array]]:
        """Return a plan's costs, affine functions of xi of which the greatest counts, and its rows as in `row_form`.

        A problem whose continuous recourse follows from its integer recourse and xi overrides this.
        """
        return [self.cost_form(x, y)], self.row_form(x, y)

    def violation(self, x: Array, y: Array, xi: Array) -> float:
        """Return by how much (x, y) breaks bounds, integrality, static rows or rows at ``xi`` (relative to 1 + |h|)."""
        rows = self.T.at(xi) @ x + self.W.at(xi) @ y - self.h.at(xi)
        scaled = (rows / (1 + np.abs(self.h.at(xi)))).max(initial=0.0)
        return max(self.first_stage_violation(x), self.y.misses(y), float(scaled))

    def first_stage_violation(self, x: Array) -> float:
        """Return by how much ``x`` leaves X (rows relative to 1 + |b|)."""
        rows = ((self.A @ x - self.b) / (1 + np.abs(self.b))).max(initial=0.0)
        return max(self.x.misses(x), float(rows))

    def check_first_stage(self, x: ArrayLike) -> Array:
        """Return ``x`` as an array if it lies in X.

        Raises:
            ValueError: a wrong shape, or a point outside X.
        """
        point = np.asarray(x, dtype=np.float64)
        if point.shape != (self.x.size,):
            raise ValueError(f"x has shape {point.shape}; ({self.x.size},) is needed")
        miss = self.first_stage_violation(point)
        if not miss <= FEASIBILITY:
            raise ValueError(f"x breaks the first stage's bounds, integrality or rows by {miss:.3g}")
        return point

    # --- oracles -----------------------------------------------------------------------------------------------------

    def recourse(self, x: Array, xi: Array, *, deadline: Deadline | None = None) -> Recourse:
        """Solve the second stage for one first stage and one ``xi``; ``value`` excludes the first stage's cost."""
        program = Program(mip_gap=1e-9)
        cost = self.d.at(xi)
        y = program.add_variables(self.y.lower, self.y.upper, integer=self.y.integer, cost=cost)
        program.add_rows([(self.W.at(xi), y)], upper=self.h.at(xi) - self.T.at(xi) @ x)
        answer = program.solve(deadline)
        if answer.status == Status.INFEASIBLE:
            return Recourse(math.inf, None, answer.status)
        if answer.status == Status.UNBOUNDED:
            return Recourse(-math.inf, None, answer.status)
        if answer.status != Status.OPTIMAL:
            return Recourse(math.nan, None, answer.status)
        return Recourse(answer.value, answer.point, answer.status)

    def spare_recourse(
        self, x: Array, xi: Array, most: float, *, deadline: Deadline | None = None
    ) -> tuple[float, Array] | None:
        """Return (total cost, y) of a plan that costs at most ``most`` at ``xi`` and stays far from uncertain rows.

        Such a plan serves a wide part of the set around ``xi``, where the best one often breaks at once. None: there is
        none, or none was found in time.
        """
        uncertain, program = self.uncertain_rows, Program(mip_gap=0.1)
        cost, first = self.d.at(xi), self.first_stage_cost(x, xi)
        y = program.add_variables(self.y.lower, self.y.upper, integer=self.y.integer)
        room = program.add_variables([0.0], 1.0, cost=-1.0)
        scale = np.where(uncertain, 1 + np.abs(self.h.constant), 0.0)[:, None]
        program.add_rows([(self.W.at(xi), y), (scale, room)], upper=self.h.at(xi) - self.T.at(xi) @ x)
        program.add_rows([(cost[None], y)], upper=most - first)
        answer = program.solve(deadline)
        if answer.point is None:
            return None
        plan = answer.point[y]
        return first + float(cost @ plan), plan

    def evaluate(self, x: ArrayLike, *, tol: float = 1e-6, time_limit: float | None = None) -> WorstCase:
        """Return the true worst case F(x), with a certificate (see :mod:`.evaluate` for how).

        Args:
            x: (n_x,) first stage.
            tol: relative tolerance between the cost attained and its upper bound.
            time_limit: seconds; past it the answer is the interval proven so far.
        """
        from optim_robust.two_stage.evaluate import evaluate

        return evaluate(self, self.check_first_stage(x), tol=tol, deadline=Deadline(time_limit))

    # --- blocks for the methods' programs ----------------------------------------------------------------------------

    def first_stage_block(self, program: Program) -> NDArray[np.int32]:
        """Add x and its static rows to a program; return x's columns. Costs depend on xi and are left to the method."""
        x = program.add_variables(self.x.lower, self.x.upper, integer=self.x.integer)
        program.add_rows([(self.A, x)], upper=self.b)
        return x

    def scenario_block(self, program: Program, x: NDArray[np.int32], xi: Array) -> NDArray[np.int32]:
        """Add a copy of y, feasible with x at ``xi``, to a program; return its columns."""
        y = program.add_variables(self.y.lower, self.y.upper, integer=self.y.integer)
        program.add_rows([(self.T.at(xi), x), (self.W.at(xi), y)], upper=self.h.at(xi))
        return y
