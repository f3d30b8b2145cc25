"""The true worst case ``F(x) = max_xi [c(xi)'x + Q(x, xi)]`` of a first stage, with a certificate.

Which way is taken follows from the problem's structure, and each ends with an attained cost and a proven upper bound:

- a list of scenarios: each of them;
- only costs uncertain, or a bounded second stage of finitely many plans (as where all of it is integer): the adversary
  against the planner's best answers (:func:`.adversary.worst_of_plans`);
- a continuous second stage with uncertain right-hand sides or first-stage coefficients only: the cost is convex in xi,
  so one of the vertices is worst, where they can be listed;
- anything else: branch and bound over boxes of xi. On each, a plan that is feasible for the *whole* box bounds the cost
  from above, and the recourse at its worst point from below; boxes are halved until the bounds meet.

Where constraints are uncertain and recourse is integer, the cost jumps where a plan becomes infeasible, and the
supremum need not be attained. A plan counts as broken only where a row is exceeded by ``ROW_TOLERANCE`` (relative to
1 + |h|).
"""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from optim_robust.solver import Deadline, Program, Status
from optim_robust.two_stage.adversary import cost_ceiling, static_program, worst_of_plans
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import WorstCase
from optim_robust.uncertainty import Discrete
from robust_core.errors import RobustError

__all__ = ["evaluate", "evaluate_boxes", "evaluate_points", "evaluate_pool"]

Array = NDArray[np.float64]


class _Record:
    """The greatest cost met so far, and where."""

    def __init__(self, problem: TwoStageProblem, x: Array, deadline: Deadline) -> None:
        self.problem, self.x, self.deadline = problem, x, deadline
        self.value, self.n = -math.inf, 0
        self.xi: Array | None = None

    def visit(self, xi: Array) -> tuple[float, Array | None, Status]:
        """Solve the recourse at ``xi`` and keep the point if it is worse than all before."""
        answer = self.problem.recourse(self.x, xi, deadline=self.deadline)
        self.n += 1
        cost = self.problem.first_stage_cost(self.x, xi) + answer.value
        if cost > self.value or (self.xi is None and not math.isnan(cost)):
            self.value, self.xi = cost, xi
        return cost, answer.y, answer.status

    def result(self, upper: float, tol: float, status: Status) -> WorstCase:
        near = math.isfinite(self.value) and upper - self.value <= tol * max(1.0, abs(self.value))
        closed = self.value == upper or near
        kept = Status.OPTIMAL if closed else status
        return WorstCase(self.value, max(upper, self.value), self.xi, closed, kept, self.n, self.deadline.elapsed)


def evaluate(problem: TwoStageProblem, x: Array, *, tol: float = 1e-6, deadline: Deadline | None = None) -> WorstCase:
    """Return F(x), choosing the way by the problem's structure (see the module)."""
    clock = deadline if deadline is not None else Deadline()
    if isinstance(problem.uncertainty, Discrete):
        return evaluate_points(problem, x, problem.uncertainty.points, tol=tol, deadline=clock)
    finite = problem.finite_plans and math.isfinite(cost_ceiling(problem, x))
    if problem.objective_only or finite:
        return evaluate_pool(problem, x, tol=tol, deadline=clock)
    if problem.convex_in_xi:
        try:
            vertices = problem.uncertainty.vertices(limit=4096)
        except RobustError:
            return evaluate_boxes(problem, x, tol=tol, deadline=clock)
        return evaluate_points(problem, x, vertices, tol=tol, deadline=clock)
    return evaluate_boxes(problem, x, tol=tol, deadline=clock)


def evaluate_points(
    problem: TwoStageProblem, x: Array, points: Array, *, tol: float = 1e-6, deadline: Deadline
) -> WorstCase:
    """Return the worst of some points; exact for a list of scenarios, and for vertices where the cost is convex."""
    record = _Record(problem, x, deadline)
    for xi in points:
        cost, _, status = record.visit(xi)
        if cost == math.inf:
            return record.result(math.inf, tol, status)
        if math.isnan(cost):
            return record.result(math.inf, tol, status)
    return record.result(record.value, tol, Status.OPTIMAL)


def evaluate_pool(problem: TwoStageProblem, x: Array, *, tol: float = 1e-6, deadline: Deadline) -> WorstCase:
    """Return F(x) by the adversary against the planner's best answers (:func:`.adversary.worst_of_plans`)."""
    record = _Record(problem, x, deadline)
    ceiling = math.inf if problem.objective_only else cost_ceiling(problem, x)

    def oracle(xi: Array, enough: float) -> tuple[float, Array | None, Status]:
        spare = None
        if problem.uncertain_rows.any() and math.isfinite(enough):
            spare = problem.spare_recourse(x, xi, enough, deadline=deadline)
        return record.visit(xi) if spare is None else (*spare, Status.OPTIMAL)

    probes = [problem.uncertainty.nominal] if problem.objective_only else _probes(problem)
    worst = worst_of_plans(
        problem, x, oracle, ceiling=ceiling, tol=tol, deadline=deadline, probes=probes, forms=problem.plan_forms
    )
    if worst.value == math.inf:
        record.xi = worst.xi  # the adversary may know a more telling witness than the first
    return record.result(worst.upper, tol, worst.status)


def _probes(problem: TwoStageProblem) -> list[Array]:
    """Return points at which the planner is asked first, so that the adversary's program starts from a good pool."""
    try:
        corners = list(problem.uncertainty.vertices(limit=32))
    except RobustError:
        corners = []
    return corners + list(problem.uncertainty.sample(64 - len(corners)))


def evaluate_boxes(
    problem: TwoStageProblem, x: Array, *, tol: float = 1e-6, deadline: Deadline, max_boxes: int = 2000
) -> WorstCase:
    """Return F(x) by branch and bound over boxes of xi, bounded from above by plans that serve a whole box."""
    record, tie = _Record(problem, x, deadline), itertools.count()
    whole = problem.uncertainty
    cost, _, status = record.visit(whole.nominal)
    if not math.isfinite(cost):
        return record.result(math.inf, tol, status)
    width = np.maximum(whole.upper - whole.lower, 1e-300)
    queue = [(-math.inf, next(tie), whole.lower, whole.upper)]
    finished, reason = -math.inf, Status.FEASIBLE  # the greatest upper bound among boxes too small to halve
    for _ in range(max_boxes):
        if not queue or deadline.passed:
            reason = Status.TIME_LIMIT if queue else Status.FEASIBLE
            break
        above, _, low, up = heapq.heappop(queue)
        if -above <= record.value + tol * max(1.0, abs(record.value)):
            return record.result(max(-above, finished), tol, Status.OPTIMAL)
        bound, xi = _bound_box(problem, x, low, up, deadline)
        if xi is not None and record.visit(xi)[0] == math.inf:
            return record.result(math.inf, tol, Status.INFEASIBLE)
        bound = min(bound, -above)
        if bound <= record.value + tol * max(1.0, abs(record.value)):
            finished = max(finished, bound)
            continue
        j = int(np.argmax((up - low) / width))
        if (up - low)[j] <= 1e-7 * width[j]:
            finished = max(finished, bound)
            continue
        middle = (low[j] + up[j]) / 2
        for a, b in ((low[j], middle), (middle, up[j])):
            part = low.copy(), up.copy()
            part[0][j], part[1][j] = a, b
            heapq.heappush(queue, (-bound, next(tie), *part))
    remaining = max([finished, record.value, *(-item[0] for item in queue)])
    return record.result(remaining, tol, reason)


def _bound_box(
    problem: TwoStageProblem, x: Array, low: Array, up: Array, deadline: Deadline
) -> tuple[float, Array | None]:
    """Return an upper bound on the cost of x over a box of xi, and a point of it worth visiting (None: none there)."""
    start = _point_of(problem, low, up, np.zeros(problem.dim), deadline)
    if start is None:
        return -math.inf, None  # the box misses the uncertainty set
    program, _, y = static_program(problem, x_fixed=x, box=(low, up))
    answer = program.solve(deadline)
    if answer.status != Status.OPTIMAL or answer.point is None:
        return math.inf, start
    _, slopes = problem.cost_form(x, answer.point[y])
    xi = _point_of(problem, low, up, slopes, deadline)
    return answer.value, start if xi is None else xi


def _point_of(problem: TwoStageProblem, low: Array, up: Array, direction: Array, deadline: Deadline) -> Array | None:
    """Return the worst point in a direction among those of the set in a box; direction 0: near its middle."""
    program = Program()
    xi = program.add_variables(low, up, cost=-direction)
    matrix, bound = problem.uncertainty.constraints()
    program.add_rows([(matrix, xi)], upper=bound)
    middle = (low + up) / 2
    if not direction.any() and (matrix @ middle <= bound).all():
        return middle
    answer = program.solve(deadline)
    return None if answer.point is None else answer.point
