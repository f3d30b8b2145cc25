"""K-adaptability (Hanasusanto, Kuhn and Wiesemann 2015; branch and bound of Subramanyam, Gounaris and Wiesemann 2020).

K second-stage plans are fixed in advance; once xi is known the best feasible one is used. A node of the tree assigns
the scenarios met so far to plans and solves for (x, y_1 .. y_K). The adversary against those K plans
(:func:`.adversary.worst_of_plans`) gives their true worst case, an upper bound, and, if it exceeds the node's value, a
scenario that is assigned to each plan in turn. K = 1 is the static plan, K times which is the first incumbent: where
rows are uncertain a tree alone may search long before its plans serve the whole set.

The tree's bound is one on the best K plans, not on the two-stage optimum: ``info["k_adaptable_bound"]``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optim_robust.solver import Answer, Program, Status
from optim_robust.two_stage.adversary import ROW_TOLERANCE, static_program, worst_of_plans
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import TwoStageSolution, relative_gap
from optim_robust.two_stage.static import restricted
from optim_robust.two_stage.tracking import OnStep, Tracker, scenario_bound
from optim_robust.uncertainty import Discrete
from robust_core.checks import check_count

__all__ = ["KAdaptability"]

Array = NDArray[np.float64]
Assignment = tuple[tuple[int, ...], ...]

STATIC_SHARE = 0.4
"""Of the time limit, at most, for the static plan."""


@dataclass(frozen=True)
class KAdaptability:
    """The best first stage with K plans prepared in advance.

    Attributes:
        k: number of plans.
        tol: relative gap at which the tree stops.
    """

    k: int = 2
    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the x of the best K plans found, its true worst case with full recourse, and the plans.

        Raises:
            RobustError: the uncertainty set is neither a polyhedron nor a list.
        """
        check_count("k", self.k)
        run = Tracker(problem, f"k-adaptability({self.k})", time_limit=time_limit, on_step=on_step, tol=self.tol)
        scenarios = run.scenarios
        scenarios.append(problem.uncertainty.worst(np.zeros(problem.dim)))
        early = run.deadline.at_most(0.1 * run.deadline.limit)
        run.raise_bound(scenario_bound(problem, [problem.uncertainty.nominal], early))
        tie = itertools.count()
        root: Assignment = ((0,),) + ((),) * (self.k - 1)
        queue: list[tuple[float, int, Assignment]] = [(-math.inf, next(tie), root)]
        best, plans, x_best = self._alike(problem, run)
        stop, nodes = Status.FEASIBLE, 0
        closed = math.inf  # the least bound among nodes that were not split further
        while queue and not run.deadline.passed:
            bound, _, node = queue[0]
            if relative_gap(best, bound) <= self.tol:
                break
            heapq.heappop(queue)
            nodes += 1
            answer, x, ys = self._node(problem, scenarios, node, run)
            if answer.status == Status.UNBOUNDED:
                return run.finish(Status.UNBOUNDED if nodes == 1 else Status.ERROR)
            if answer.point is None:
                if answer.status != Status.INFEASIBLE:
                    heapq.heappush(queue, (bound, next(tie), node))
                    stop = answer.status
                    break
                continue
            if relative_gap(best, answer.bound) <= self.tol:
                closed = min(closed, answer.bound)
                continue
            xi, value = _worst_of_plans(problem, x, ys, run)
            if value < best:
                best, plans, x_best = value, ys, x
                run.evaluate(x, known=value)
            if xi is None or (math.isfinite(value) and value <= answer.value + self.tol * max(1e-9, abs(value)) / 2):
                closed = min(closed, answer.bound)
                continue
            scenarios.append(xi)
            for child in _children(node, len(scenarios) - 1):
                heapq.heappush(queue, (max(answer.bound, bound), next(tie), child))
        if run.deadline.passed and queue:
            stop = Status.TIME_LIMIT
        tree = min([best, closed, *(item[0] for item in queue)])
        run.info |= {"nodes": nodes, "k_adaptable_value": best, "k_adaptable_bound": tree,
                     "k_adaptable_gap": relative_gap(best, tree)}  # fmt: skip
        if x_best is None:
            return run.finish(restricted(run, Status.INFEASIBLE if stop == Status.FEASIBLE else stop))
        held = [problem.uncertainty.nominal] + ([run.worst.xi] if run.worst and run.worst.xi is not None else [])
        run.raise_bound(scenario_bound(problem, held, run.deadline))
        return run.finish(stop, policies=plans)

    def _alike(self, problem: TwoStageProblem, run: Tracker) -> tuple[float, Array | None, Array | None]:
        """Return (value, K plans, x) of the static plan, K times; infinite where none was found."""
        program, x, y = static_program(problem)
        answer = program.solve(run.deadline.at_most(STATIC_SHARE * run.deadline.limit))
        if answer.point is None:
            return math.inf, None, None
        plans = np.repeat(answer.point[y][None], self.k, axis=0)
        _, value = _worst_of_plans(problem, answer.point[x], plans[:1], run)
        if value == math.inf:
            return math.inf, None, None
        run.evaluate(answer.point[x], known=value)
        return value, plans, answer.point[x]

    def _node(
        self, problem: TwoStageProblem, scenarios: list[Array], node: Assignment, run: Tracker
    ) -> tuple[Answer, Array, Array]:
        """Solve ``min theta`` where plan k serves the scenarios assigned to it; return (answer, x, (K, n_y) plans)."""
        program = Program(mip_gap=min(self.tol / 4, 1e-5))
        x = problem.first_stage_block(program)
        theta = program.add_variables(np.array([-math.inf]), math.inf, cost=1.0)
        columns = []
        for served in node:
            y = program.add_variables(problem.y.lower, problem.y.upper, integer=problem.y.integer)
            columns.append(y)
            for index in served:
                xi = scenarios[index]
                program.add_rows([(problem.T.at(xi), x), (problem.W.at(xi), y)], upper=problem.h.at(xi))
                cost = [(problem.c.at(xi)[None], x), (problem.d.at(xi)[None], y), (-np.ones((1, 1)), theta)]
                program.add_rows(cost, upper=-float(problem.c0.at(xi)[0]))
        answer = program.solve(run.deadline)
        if answer.point is None:
            return answer, np.zeros(0), np.zeros(0)
        plans = np.stack([answer.point[y] for y in columns])
        for k, served in enumerate(node):
            if not served:  # a plan that serves nobody yet is arbitrary: let it be the first one
                plans[k] = plans[0]
        return answer, answer.point[x], plans


def _children(node: Assignment, index: int) -> list[Assignment]:
    """Give the new scenario to each plan in turn; of plans that serve nobody, to the first only (they are alike)."""
    first_empty = next((k for k, served in enumerate(node) if not served), len(node) - 1)
    return [
        tuple((*served, index) if k == chosen else served for k, served in enumerate(node))
        for chosen in range(first_empty + 1)
    ]


def _worst_of_plans(problem: TwoStageProblem, x: Array, plans: Array, run: Tracker) -> tuple[Array | None, float]:
    """Return (xi, value) of ``max_xi min_k`` over the plans; infinite where the adversary breaks all of them."""
    if isinstance(problem.uncertainty, Discrete):
        costs = [min(_cost(problem, x, y, xi) for y in plans) for xi in problem.uncertainty.points]
        return problem.uncertainty.points[int(np.argmax(costs))], float(np.max(costs))
    tops = [_ceiling(problem, x, y) for y in plans]

    def oracle(xi: Array, _enough: float) -> tuple[float, Array | None, Status]:
        costs = [_cost(problem, x, y, xi) for y in plans]
        best = int(np.argmin(costs))
        feasible = math.isfinite(costs[best])
        return costs[best], plans[best] if feasible else None, Status.OPTIMAL if feasible else Status.INFEASIBLE

    probes = [problem.uncertainty.nominal]
    worst = worst_of_plans(problem, x, oracle, ceiling=max(tops), tol=1e-7, deadline=run.deadline, probes=probes)
    return worst.xi, worst.upper if worst.status == Status.OPTIMAL else math.inf


def _ceiling(problem: TwoStageProblem, x: Array, y: Array) -> float:
    constant, slopes = problem.cost_form(x, y)
    box = problem.uncertainty
    return constant + float(np.maximum(slopes * box.lower, slopes * box.upper).sum())


def _cost(problem: TwoStageProblem, x: Array, y: Array, xi: Array) -> float:
    """Return the cost of a plan at ``xi``; infinite where it exceeds a row by half of ``ROW_TOLERANCE``."""
    row0, row1 = problem.row_form(x, y)
    if (row0 + row1 @ xi > ROW_TOLERANCE / 2 * (1 + np.abs(problem.h.constant))).any():
        return math.inf
    constant, slopes = problem.cost_form(x, y)
    return constant + float(slopes @ xi)
