"""The adversary's problem against the planner's best answers, and the static plan against all of a set.

Two programs from which everything else is built:

- :func:`worst_of_plans`: ``max_xi min {cost of (x, y) at xi : y feasible at xi}``, where an oracle names the planner's
  answer to a xi. A branch and bound whose nodes are linear programs: an answer y either bounds the cost
  (``theta <= cost_y(xi)``, for one of its costs where the greatest of several counts) or is broken in one of its rows,
  so the node where y is the answer splits into those cases, and no big-M is needed. Answers of one case are cuts for
  all nodes; where only costs are uncertain this is a plain cutting-plane method. To prove that a point is no worse than
  the worst one met, any plan that is good enough there will do: one that was met before, or one that keeps far from
  the rows that xi moves and so serves a wide part of the set, where the best plan breaks at once.
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

from optim_robust.solver import Deadline, Program, SmallMaximum, Status
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.uncertainty import Discrete

__all__ = ["ROW_TOLERANCE", "Oracle", "Worst", "cost_ceiling", "plan_ceiling", "static_program", "worst_of_plans"]

Array = NDArray[np.float64]
Cut = tuple[Array, float]  # row @ (xi, theta) <= number
Oracle = Callable[[Array, float], tuple[float, Array | None, Status]]
Described = tuple[list[tuple[float, Array]], tuple[Array, Array]]  # costs and rows, each a constant and slopes
Forms = Callable[[Array, Array], Described]
ROW_TOLERANCE = 1e-4  # a plan counts as broken at xi when a row is exceeded by this times 1 + |h|
POOL_NUMBERS = 4_000_000  # in the tables of a pool, at most about


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


def plan_ceiling(problem: TwoStageProblem, x: Array, y: Array) -> float:
    """Return what the one plan y costs with x at worst; infinite where some xi breaks a row by ``ROW_TOLERANCE``."""
    row0, row1 = problem.row_form(x, y)
    excess = [row0[r] + row1[r] @ problem.uncertainty.worst(row1[r]) for r in range(len(row0))]
    if (np.array(excess) > ROW_TOLERANCE * (1 + np.abs(problem.h.constant))).any():
        return math.inf
    constant, slopes = problem.cost_form(x, y)
    return constant + float(slopes @ problem.uncertainty.worst(slopes))


@dataclass(frozen=True)
class Worst:
    """``value`` is attained at ``xi``; ``upper`` is proven. ``value`` = +inf: the planner has no answer to ``xi``."""

    value: float
    upper: float
    xi: Array | None
    status: Status
    n_asked: int


class _Plan:
    """One plan of x as affine functions of xi: its costs, of which the greatest counts, and its uncertain rows.

    Rows are by how much they are exceeded, relative to 1 + |h|.
    """

    def __init__(self, problem: TwoStageProblem, described: Described) -> None:
        self.described, (row0, row1) = described  # a problem describes each of its plans by as many costs
        self.costs: list[tuple[float, Array]] = []
        for cost in self.described:  # one that is nowhere the greater is no case
            if not any(_never_above(cost, other, problem) for other in self.costs):
                self.costs = [other for other in self.costs if not _never_above(other, cost, problem)] + [cost]
        scale = (1 + np.abs(problem.h.constant))[problem.uncertain_rows]
        self.row0, self.row1 = row0[problem.uncertain_rows] / scale, row1[problem.uncertain_rows] / scale[:, None]
        breakable = _interval(self.row0, self.row1, problem)[1] >= ROW_TOLERANCE
        self.breakable: list[int] = np.flatnonzero(breakable).tolist()

    @property
    def everywhere(self) -> bool:
        """Whether it serves every xi at one cost."""
        return not self.breakable and len(self.costs) == 1

    @property
    def cuts(self) -> list[Cut]:
        """``theta <= cost``, for each cost."""
        return [(np.append(-slopes, 1.0), constant) for constant, slopes in self.costs]

    def row(self, r: int, *, broken: bool) -> Cut:
        """Row r is broken, or is not."""
        sign = -1.0 if broken else 1.0
        return np.append(sign * self.row1[r], 0.0), sign * (ROW_TOLERANCE - self.row0[r])

    @property
    def cases(self) -> list[list[Cut]]:
        """Where the plan serves, one of its costs bounds theta; elsewhere one of its rows is the first to be broken."""
        kept = [self.row(r, broken=False) for r in self.breakable]
        served = [[*kept, cut] for cut in self.cuts]
        return served + [[*kept[:i], self.row(r, broken=True)] for i, r in enumerate(self.breakable)]


class _Pool:
    """Plans met so far, the latest of them, as tables: which of them serves a point well enough?"""

    def __init__(self, n_rows: int, dim: int) -> None:
        self.most = max(16, POOL_NUMBERS // max(1, n_rows * dim))
        self.plans: list[_Plan] = []
        self.tables: tuple[Array, ...] = ()

    def add(self, plan: _Plan) -> None:
        self.plans = [*self.plans[1 - self.most :], plan]
        new = (np.array([c for c, _ in plan.described]), np.array([s for _, s in plan.described]), plan.row0, plan.row1)
        old = self.tables or tuple(np.empty((0, *t.shape)) for t in new)
        self.tables = tuple(np.concatenate([o[1 - self.most :], n[None]]) for o, n in zip(old, new, strict=True))

    def serving(self, xi: Array, most: float) -> _Plan | None:
        """Return the plan of cost at most ``most`` at ``xi`` that is farthest from its rows, if it holds there."""
        if not self.plans:
            return None
        cost0, cost1, row0, row1 = self.tables
        cost, excess = (cost0 + cost1 @ xi).max(1), (row0 + row1 @ xi).max(1)
        excess[cost > most] = math.inf
        best = int(excess.argmin())
        return self.plans[best] if excess[best] <= 0.0 else None


class _Nodes:
    """The open nodes of the adversary's tree: rows over (xi, theta), best bound first."""

    def __init__(self, problem: TwoStageProblem, ceiling: float) -> None:
        box, above = problem.uncertainty, ceiling + 1.0 + 0.01 * abs(ceiling)
        self.ceiling = ceiling
        self.low, self.up = np.append(box.lower, -math.inf), np.append(box.upper, above)
        matrix, bound = box.constraints()
        rows = np.pad(matrix.toarray(), ((0, 0), (0, 1)))
        self.common: list[Cut] = list(zip(rows, bound.tolist(), strict=True))
        self.tie, self.closed, self.program = itertools.count(), -math.inf, SmallMaximum()
        self.open: list[tuple[float, int, list[Cut]]] = []
        self.push(math.inf, [])

    @property
    def bound(self) -> float:
        """What is proven: no open or closed node exceeds it."""
        return max([self.closed, *(-item[0] for item in self.open[:1])])

    def push(self, bound: float, rows: list[Cut]) -> None:
        heapq.heappush(self.open, (-bound, next(self.tie), rows))

    def pop(self) -> tuple[float, list[Cut]]:
        key, _, rows = heapq.heappop(self.open)
        return -key, rows

    def split(self, bound: float, rows: list[Cut], plan: _Plan) -> None:
        """Replace a node by the cases of a plan; a plan of one case is a cut for all."""
        if plan.everywhere:
            self.common += plan.cuts
        for case in [[]] if plan.everywhere else plan.cases:
            self.push(bound, rows + case)

    def table(self, rows: list[Cut]) -> tuple[Array, Array]:
        held = self.common + rows
        matrix = np.array([a for a, _ in held]).reshape(len(held), len(self.low))
        return matrix, np.array([b for _, b in held])

    def solve(self, rows: list[Cut], floor: float, deadline: Deadline) -> tuple[Array | None, float, Status]:
        """Maximise theta >= floor over a node; (None, -inf, INFEASIBLE) where nothing reaches the floor.

        Above the ceiling no plan bounds theta: there may be no recourse, and nothing is proven.
        """
        low = np.append(self.low[:-1], floor)
        status, point, bound = self.program.solve(*self.table(rows), low, self.up, deadline)
        return None if point is None else point[:-1], math.inf if bound > self.ceiling + 0.5 else bound, status

    def deepest(self, rows: list[Cut], deadline: Deadline) -> Array | None:
        """Return the point of a node farthest inside its rows over xi: a telling witness, not a marginal one."""
        (matrix, rest), n = self.table(rows), len(self.low)
        depth = ((matrix[:, -1] == 0) & (np.arange(len(matrix)) >= len(self.common))).astype(float)
        if not depth.any():
            return None
        program = Program()
        columns = program.add_variables(self.low, self.up)
        tau = program.add_variables(np.zeros(1), 1e6, cost=-1.0)
        program.add_rows([(matrix, columns), (depth[:, None], tau)], upper=rest)
        answer = program.solve(deadline)
        return None if answer.point is None else np.clip(answer.point[: n - 1], self.low[:-1], self.up[:-1])


class _Search:
    """One search: what was asked, the worst point met, the open nodes."""

    def __init__(
        self, problem: TwoStageProblem, x: Array, oracle: Oracle, ceiling: float, tol: float, forms: Forms | None
    ) -> None:
        self.problem, self.x, self.oracle, self.forms, self.tol = problem, x, oracle, forms, tol
        self.nodes = _Nodes(problem, ceiling)
        self.pool = _Pool(int(problem.uncertain_rows.sum()), problem.dim)
        self.value, self.worst, self.asked = -math.inf, None, 0

    @property
    def slack(self) -> float:
        return self.tol * max(1.0, abs(self.value)) if math.isfinite(self.value) else 0.0

    def ask(self, xi: Array, enough: float) -> tuple[float, _Plan | None, Status]:
        """Return cost and plan at ``xi``; without a plan, infinity where there is none."""
        cost, y, status = self.oracle(xi, enough)
        self.asked += 1
        if cost > self.value and (y is not None or cost == math.inf):
            self.value, self.worst = cost, xi
        if y is None:
            return cost, None, status
        costs = [self.problem.cost_form(self.x, y)], self.problem.row_form(self.x, y)
        plan = _Plan(self.problem, costs if self.forms is None else self.forms(self.x, y))
        if self.problem.uncertain_rows.any():
            self.pool.add(plan)
        return cost, plan, status

    def probe(self, xi: Array) -> Status:
        """Ask for the best plan at a point; one of a single case is a cut for all nodes."""
        _, plan, status = self.ask(xi, -math.inf)
        if plan is not None and plan.everywhere:
            self.nodes.common += plan.cuts
        return Status.OPTIMAL if plan is not None else status

    def step(self, deadline: Deadline) -> Status:
        """Take the node of the greatest bound; return OPTIMAL unless the search must stop, and leave it open then."""
        nodes = self.nodes
        key, rows = nodes.pop()
        xi, bound, status = nodes.solve(rows, self.value - self.slack, deadline)
        bound = min(bound, key)
        if xi is None and status != Status.INFEASIBLE:
            nodes.push(key, rows)
            return status
        if xi is None or bound <= self.value + self.slack:
            nodes.closed = max(nodes.closed, bound)
            return Status.OPTIMAL
        plan = self.pool.serving(xi, self.value + self.slack / 4)
        if plan is None:
            cost, plan, status = self.ask(xi, self.value)  # no more than that: it would say nothing about the best
            if plan is None:
                if cost == math.inf:
                    deep = nodes.deepest(rows, deadline)
                    self.worst = deep if deep is not None and self.oracle(deep, -math.inf)[0] == math.inf else xi
                nodes.push(bound, rows)
                return status
            if cost >= bound - self.slack / 2:
                nodes.closed = max(nodes.closed, bound)
                return Status.OPTIMAL
        nodes.split(bound, rows, plan)
        return Status.OPTIMAL

    def result(self, status: Status) -> Worst:
        upper = max(self.value, self.nodes.bound)
        return Worst(self.value, upper, self.worst, status, self.asked)


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

    Past the deadline the interval proven so far is returned, whenever it comes.

    Args:
        problem: whose uncertainty set is a polyhedron.
        x: first stage.
        oracle: (xi, enough) -> (total cost, plan, status): the best plan that exceeds no row by ``ROW_TOLERANCE`` / 2,
            or any such plan that costs at most ``enough``, if it can one that stays far from its rows; the plan is None
            where there is none (the cost is then infinite) or none was found in time.
        ceiling: bound on the cost of every plan at every xi; infinite is allowed where only costs are uncertain.
        tol: relative gap.
        deadline: see above.
        probes: points at which to ask first.
        forms: (x, plan) -> its costs, affine in xi, of which the greatest counts, and its rows; the plan's own cost and
            rows when None.
    """
    search = _Search(problem, x, oracle, ceiling, tol, forms)
    for xi in probes or []:
        status = search.probe(xi)
        if status != Status.OPTIMAL:
            return search.result(status)
    while search.nodes.bound > search.value + search.slack:
        status = Status.TIME_LIMIT if deadline.passed else search.step(deadline)
        if status != Status.OPTIMAL:
            return search.result(status)
    return search.result(Status.OPTIMAL)


def _never_above(one: tuple[float, Array], other: tuple[float, Array], problem: TwoStageProblem) -> bool:
    return bool(_interval(one[0] - other[0], one[1] - other[1], problem)[1] <= 0)


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
    sure = np.flatnonzero(~problem.uncertain_rows)
    rows = [(problem.T.constant[sure], x), (problem.W.constant[sure], y)]
    program.add_rows(rows, upper=problem.h.constant[sure])
    for r in np.flatnonzero(problem.uncertain_rows).tolist():
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
