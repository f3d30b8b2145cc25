"""Branch and price for the two-stage robust knapsack (Arslan and Detienne 2022), by cutting planes on its dual side.

Only costs are uncertain and x is linked by ``y <= x`` with x binary, so the inner min-max may be exchanged over the
convex hull of the recourse, and the problem equals

    min  sum (f - p)_i x_i + gamma lambda + sum mu_i - sum_l a_l f'y_l,
    sum a = 1,   x_i >= sum_l a_l y_li,   lambda + mu_i >= dev_i sum_l a_l (y_li - r_li).

The linear relaxation of a node is solved on the dual side, whose variables have a meaning: xi (of the uncertainty set)
and prices rho_i >= 0 for the use of item i. A column is a cut

    omega <= -f'y_l + rho'y_l + sum_i dev_i xi_i (y_li - r_li),

the most violated one is a multiple-choice knapsack (gains ``f - rho - dev xi`` and ``f - rho``), and the true minimum
over all of them makes every iterate a Lagrangian lower bound. x is read from the rows' duals; the tree branches on the
most fractional one, best bound first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optim_robust.solver import Program, SolverError, Status
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.multiple_choice import multiple_choice_knapsack
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import TwoStageSolution
from optim_robust.two_stage.tracking import OnStep, Tracker

__all__ = ["BranchAndPrice"]

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]


@dataclass(frozen=True)
class BranchAndPrice:
    """The published exact method for :class:`.knapsack.RobustKnapsack`.

    Attributes:
        tol: relative gap at which the instance counts as solved.
        max_nodes: of the tree; 1 gives the root bound alone.
    """

    tol: float = 1e-4
    max_nodes: int = 1_000_000

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the best x, its true worst case, and the bound of the tree.

        Raises:
            TypeError: a problem that is not a RobustKnapsack.
        """
        if not isinstance(problem, RobustKnapsack):
            raise TypeError(f"branch and price is for RobustKnapsack; {type(problem).__name__}: use ExactCCG")
        run = Tracker(problem, "branch-and-price", time_limit=time_limit, on_step=on_step, tol=self.tol)
        master, tie = _Master(problem), itertools.count()
        queue: list[tuple[float, int, Bounds]] = [(-math.inf, next(tie), (np.zeros(problem.n), np.ones(problem.n)))]
        tried: set[bytes] = set()
        nodes, closed = 0, math.inf
        while queue and nodes < self.max_nodes and not run.deadline.passed:
            bound, _, box = heapq.heappop(queue)
            if self._prune(bound, run.value):
                closed = min(closed, bound)
                break  # best bound first: the others are no better
            nodes += 1
            found, x, finished = master.bound(box, run)
            bound = max(bound, found)
            rounded = np.clip(np.round(x), *box)
            if rounded.tobytes() not in tried:
                tried.add(rounded.tobytes())
                run.evaluate(rounded)
            if self._prune(bound, run.value):
                closed = min(closed, bound)
            elif not finished or (box[0] == box[1]).all():
                heapq.heappush(queue, (bound, next(tie), box))
                if finished:
                    raise SolverError("the bound of a fixed x does not meet its worst case; please report the instance")
            else:
                for child in _branch(x, box):
                    heapq.heappush(queue, (bound, next(tie), child))
            run.raise_bound(min([closed, run.value, *(item[0] for item in queue[:1])]))
        run.raise_bound(min([closed, run.value, *(item[0] for item in queue)]))
        run.info |= {"nodes": nodes, "columns": master.n_cuts}
        run.scenarios = [xi for xi in (run.worst.xi if run.worst else None,) if xi is not None]
        return run.finish(Status.TIME_LIMIT if run.deadline.passed else Status.FEASIBLE)

    def _prune(self, bound: float, value: float) -> bool:
        return math.isfinite(value) and value - bound <= self.tol * max(1e-9, abs(value)) * 0.999


def _branch(x: Array, box: Bounds) -> list[Bounds]:
    free = box[0] < box[1]
    i = int(np.argmin(np.where(free, np.abs(x - 0.5), np.inf)))
    children = []
    for value in (1.0, 0.0):
        low, up = box[0].copy(), box[1].copy()
        low[i] = up[i] = value
        children.append((low, up))
    return children


class _Master:
    """``max omega - sum s_i`` over xi, rho, s_i >= rho_i - (f - p)_i, s_i >= 0, and the cuts: one persistent LP.

    A node fixes x_i = 1 by letting s_i go below 0 (the row then holds with equality), and x_i = 0 by a free surcharge
    on rho_i that prices the item out of every recourse.
    """

    def __init__(self, problem: RobustKnapsack) -> None:
        n = problem.n
        self.problem, self.margin = problem, problem.outsourcing - problem.profit
        self.load = np.stack([problem.weight, problem.weight + problem.repair], axis=1)
        self.program = program = Program()
        top = np.maximum(problem.outsourcing, 0.0)
        self.omega = program.add_variables(np.array([-math.inf]), 0.0, cost=-1.0)
        self.xi = program.add_variables(np.zeros(n), 1.0)
        self.rho = program.add_variables(np.zeros(n), np.maximum(top, self.margin))
        self.extra = program.add_variables(np.zeros(n), 0.0)
        self.s = program.add_variables(np.zeros(n), math.inf, cost=1.0)
        self.top, self.n_cuts, eye = top, 0, np.eye(n)
        program.add_rows([(eye, self.s), (-eye, self.rho)], lower=-self.margin)
        program.add_rows([(np.ones((1, n)), self.xi)], upper=problem.gamma)
        self._cut(np.zeros(n), np.zeros(n))

    def _cut(self, y: Array, r: Array) -> None:
        p = self.problem
        self.n_cuts += 1
        self.program.add_rows(
            [(np.ones((1, 1)), self.omega), (-y[None], self.rho), (-y[None], self.extra),
             (-(p.degradation * (y - r))[None], self.xi)],
            upper=-float(p.outsourcing @ y),
        )  # fmt: skip

    def bound(self, box: Bounds, run: Tracker) -> tuple[float, Array, bool]:
        """Return (lower bound of the node, x of its relaxation, whether pricing ended)."""
        low, up = box
        p, best, x = self.problem, -math.inf, (low + up) / 2
        self.program.set_bounds(self.s, np.where(low == 1, -math.inf, 0.0), math.inf)
        self.program.set_bounds(self.extra, 0.0, np.where(up == 0, self.top, 0.0))
        while not run.deadline.passed:
            answer = self.program.solve(run.deadline)
            if answer.status != Status.OPTIMAL or answer.point is None:
                if answer.status == Status.TIME_LIMIT:
                    break
                raise SolverError(f"the relaxation of a node ended with status {answer.status}")
            price = answer.point[self.rho] + answer.point[self.extra]
            xi, omega = answer.point[self.xi], float(answer.point[self.omega][0])
            gains = np.stack([p.outsourcing - price - p.degradation * xi, p.outsourcing - price], axis=1)
            value, option = multiple_choice_knapsack(self.load, gains, p.capacity)
            true = -value
            best = max(best, -answer.value - (omega - true))
            x = np.clip(np.abs(self.program.row_duals()[: p.n]), low, up)
            x = np.where(low == up, low, x)
            if omega - true <= 1e-7 * max(1.0, abs(omega)):
                return best, x, True
            if best >= run.value - self._slack(run):
                return best, x, True  # the node cannot hold anything better
            self._cut((option > 0).astype(np.float64), (option == 2).astype(np.float64))
        return best, x, False

    def _slack(self, run: Tracker) -> float:
        return run.tol * max(1e-9, abs(run.value)) * 0.999 if math.isfinite(run.value) else 0.0
