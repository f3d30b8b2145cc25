"""Two policies that plan the second stage in advance: one plan for all of the set (static), or for its nominal point.

The static plan is the first thing to try: one MILP, by the dual of the adversary's linear program, row by row. Its x is
then evaluated with full recourse, so the figure printed is what that x truly guarantees, not what the fixed plan does.
Neither policy proves anything on the optimum; the bound beside them is that of a program with two scenarios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optim_robust.solver import Status
from optim_robust.two_stage.adversary import plan_ceiling, static_program
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import TwoStageSolution
from optim_robust.two_stage.tracking import OnStep, Tracker, scenario_bound, scenario_program
from optim_robust.uncertainty import Discrete

__all__ = ["Nominal", "StaticRobust"]


@dataclass(frozen=True)
class StaticRobust:
    """One second-stage plan for every xi (k-adaptability with K = 1)."""

    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the x of the best static plan, and its true worst case; ``info["static_value"]`` is the plan's own.

        Raises:
            RobustError: the uncertainty set is neither a polyhedron nor a list.
        """
        run = Tracker(problem, "static", time_limit=time_limit, on_step=on_step, tol=self.tol)
        program, x, y = static_program(problem)
        answer = program.solve(run.deadline)
        if answer.status == Status.UNBOUNDED:
            return run.finish(Status.UNBOUNDED)
        if answer.point is None:
            return run.finish(restricted(run, answer.status))
        run.info["static_value"] = answer.value
        worst = run.evaluate(answer.point[x], known=plan_ceiling(problem, answer.point[x], answer.point[y]))
        run.scenarios = [problem.uncertainty.nominal] + ([] if worst.xi is None else [worst.xi])
        run.raise_bound(scenario_bound(problem, run.scenarios, run.deadline))
        stop = Status.FEASIBLE if answer.status == Status.OPTIMAL else answer.status
        return run.finish(stop, policies=answer.point[y][None])


def restricted(run: Tracker, status: Status) -> Status:
    """Return INFEASIBLE only if the problem itself is: a scenario that no (x, y) survives."""
    if status != Status.INFEASIBLE:
        return status
    problem = run.problem
    points = problem.uncertainty.points[:20] if isinstance(problem.uncertainty, Discrete) else []
    run.raise_bound(scenario_bound(problem, [problem.uncertainty.nominal, *points], run.deadline))
    if run.lower == np.inf:
        return Status.INFEASIBLE
    run.info["note"] = "no fixed plan serves the whole set; with full recourse the problem may be feasible (try ccg)"
    return Status.NO_SOLUTION


@dataclass(frozen=True)
class Nominal:
    """The x of a planner who believes in the nominal point; what ignoring uncertainty costs."""

    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the x that is best at the nominal point, and its true worst case."""
        run = Tracker(problem, "nominal", time_limit=time_limit, on_step=on_step, tol=self.tol)
        run.scenarios = [problem.uncertainty.nominal]
        program, x, _ = scenario_program(problem, run.scenarios)
        answer = program.solve(run.deadline)
        if answer.status in (Status.INFEASIBLE, Status.UNBOUNDED):
            inside = problem.uncertainty.contains(run.scenarios[0])
            if answer.status == Status.INFEASIBLE and inside:
                run.raise_bound(np.inf)
                return run.finish(Status.INFEASIBLE)
            run.info["note"] = f"the nominal problem is {answer.status}"
            return run.finish(Status.NO_SOLUTION)
        if answer.point is None:
            return run.finish(answer.status)
        run.info["nominal_value"] = answer.value
        if problem.uncertainty.contains(run.scenarios[0]):
            run.raise_bound(answer.bound)
        run.evaluate(answer.point[x])
        return run.finish(Status.FEASIBLE if answer.status == Status.OPTIMAL else answer.status)
