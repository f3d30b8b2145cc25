"""Column-and-constraint generation (Zeng and Zhao 2013) with mixed-integer recourse, and the extensive form.

The main problem holds one copy of the second stage for each scenario met so far: a relaxation, whose dual bound is a
lower bound on the optimum. The true worst case of its x (:mod:`.evaluate`) is an upper bound, and the scenario where it
is attained joins the main problem. It ends when the bounds meet; a scenario that comes back means that they differ by
the tolerances of the evaluation only, which the status then tells (FEASIBLE, with the gap that is left).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from optim_robust.solver import Status
from optim_robust.two_stage.adversary import static_program
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import TwoStageSolution
from optim_robust.two_stage.tracking import OnStep, Tracker, add_scenario, scenario_program
from optim_robust.uncertainty import Discrete
from robust_core.checks import check_number

__all__ = ["ExactCCG", "ScenarioEnumeration"]


@dataclass(frozen=True)
class ExactCCG:
    """Solve to a proven gap by column-and-constraint generation.

    Attributes:
        tol: relative gap between bound and worst case at which the problem counts as solved.
    """

    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the best x found, its true worst case, and the bound.

        Args:
            problem: what to solve.
            time_limit: seconds.
            on_step: called with every change of bound or incumbent.
        """
        check_number("tol", self.tol, low=0.0)
        run = Tracker(problem, "ccg", time_limit=time_limit, on_step=on_step, tol=self.tol)
        program, x, theta = scenario_program(problem, [], mip_gap=min(self.tol / 4, 1e-5))
        xi = problem.uncertainty.nominal
        if not problem.uncertainty.contains(xi):
            xi = problem.uncertainty.worst(np.zeros(problem.dim))
        while not any(np.abs(xi - known).max() <= 1e-9 for known in run.scenarios):
            run.scenarios.append(xi)
            add_scenario(problem, program, x, theta, xi)
            answer = program.solve(run.deadline, on_bound=run.tell)
            run.confirm(answer.bound)
            if answer.status == Status.UNBOUNDED:
                return _unbounded(run)
            if answer.point is None:
                return run.finish(answer.status)
            worst = run.evaluate(answer.point[x])
            if run.gap <= self.tol:
                break
            if run.deadline.passed or worst.xi is None or worst.status == Status.ERROR:
                return run.finish(Status.TIME_LIMIT if run.deadline.passed else worst.status)
            xi = worst.xi
        return run.finish(Status.FEASIBLE)


def _unbounded(run: Tracker) -> TwoStageSolution:
    """Tell a problem without a bound from one whose scenarios so far give none: ask for a static plan."""
    program, x, _ = static_program(run.problem)
    answer = program.solve(run.deadline)
    if answer.status == Status.UNBOUNDED:
        run.lower = -math.inf
        return run.finish(Status.UNBOUNDED)
    if answer.point is not None:
        run.evaluate(answer.point[x])
    run.info["note"] = "no finite lower bound was found: the main problem is unbounded for the scenarios met"
    return run.finish(Status.FEASIBLE if answer.point is not None else Status.ERROR)


@dataclass(frozen=True)
class ScenarioEnumeration:
    """One program with all scenarios, or all vertices, of the set (the extensive form).

    Exact for lists of scenarios, and for vertices where the cost is convex in xi (continuous recourse, certain d and
    W). Elsewhere vertices give a lower bound and an x whose true worst case is found as always: the gap says how good.

    Attributes:
        limit: greatest number of scenarios.
        tol: relative gap.
    """

    limit: int = 4096
    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return the x of the extensive form.

        Raises:
            RobustError: more than ``limit`` scenarios.
        """
        run = Tracker(problem, "enumeration", time_limit=time_limit, on_step=on_step, tol=self.tol)
        exact = isinstance(problem.uncertainty, Discrete) or problem.convex_in_xi
        run.info["exact"] = exact
        run.scenarios = list(problem.uncertainty.vertices(limit=self.limit))
        program, x, _ = scenario_program(problem, run.scenarios, mip_gap=min(self.tol / 4, 1e-5))
        answer = program.solve(run.deadline, on_bound=run.tell)
        if answer.status == Status.UNBOUNDED:
            return _unbounded(run) if not exact else run.finish(Status.UNBOUNDED)
        run.confirm(answer.bound)
        if answer.point is None:
            return run.finish(answer.status)
        run.evaluate(answer.point[x])
        return run.finish(Status.FEASIBLE if answer.status == Status.OPTIMAL else answer.status)
