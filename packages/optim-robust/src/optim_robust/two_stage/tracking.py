"""What every method keeps while it runs: the deadline, the bound, the incumbent, the history, and who listens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optim_robust.solver import FEASIBILITY, Deadline, Program, Status
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import Step, TwoStageSolution, WorstCase, relative_gap

__all__ = ["OnStep", "Tracker", "scenario_bound", "scenario_program"]

Array = NDArray[np.float64]
OnStep = Callable[[Step], None]


def scenario_program(
    problem: TwoStageProblem, scenarios: list[Array] | Array, *, mip_gap: float = 1e-6
) -> tuple[Program, NDArray[np.int32], NDArray[np.int32]]:
    """Build ``min_{x, y_k} max_k cost of (x, y_k) at xi_k``, a relaxation; return it with the columns of x, theta."""
    program = Program(mip_gap=mip_gap)
    x = problem.first_stage_block(program)
    theta = program.add_variables(np.array([-math.inf]), math.inf, cost=1.0)
    for xi in scenarios:
        add_scenario(problem, program, x, theta, xi)
    return program, x, theta


def add_scenario(
    problem: TwoStageProblem, program: Program, x: NDArray[np.int32], theta: NDArray[np.int32], xi: Array
) -> NDArray[np.int32]:
    """Add ``theta >= cost of (x, y) at xi`` with a new copy of y; return its columns."""
    y = problem.scenario_block(program, x, xi)
    cost = [(problem.c.at(xi)[None], x), (problem.d.at(xi)[None], y), (-np.ones((1, 1)), theta)]
    program.add_rows(cost, upper=-float(problem.c0.at(xi)[0]))
    return y


def scenario_bound(problem: TwoStageProblem, scenarios: list[Array], deadline: Deadline) -> float:
    """Return a lower bound on the optimum from scenarios of the set: +inf proves the problem infeasible."""
    held = [xi for xi in scenarios if problem.uncertainty.contains(xi, tol=1e-6)]
    return scenario_program(problem, held)[0].solve(deadline).bound if held else -math.inf


class Tracker:
    """Deadline, bound, incumbent and history of one run.

    Args:
        problem: what is solved.
        method: its name, for the solution.
        time_limit: seconds; the last evaluation may take a tenth more.
        on_step: called whenever the bound or the incumbent changes.
        tol: relative gap at which a run counts as optimal.
    """

    def __init__(
        self,
        problem: TwoStageProblem,
        method: str,
        *,
        time_limit: float | None,
        on_step: OnStep | None,
        tol: float = 1e-4,
    ) -> None:
        self.problem, self.method, self.tol = problem, method, tol
        self.deadline, self.on_step = Deadline(time_limit), on_step
        self.lower, self.x, self.worst = -math.inf, None, None
        self.scenarios: list[Array] = []
        self.history: list[Step] = []
        self.info: dict[str, Any] = {}
        self._told: list[Step] = []

    @property
    def value(self) -> float:
        """What the incumbent guarantees; infinite without one."""
        return math.inf if self.worst is None else self.worst.upper

    @property
    def gap(self) -> float:
        """Relative gap."""
        return relative_gap(self.value, self.lower)

    def raise_bound(self, bound: float) -> None:
        """Record a proven lower bound."""
        if bound > self.lower:
            self.lower = bound
            self._log()

    def tell(self, bound: float, _incumbent: float = math.nan) -> None:
        """Show a bound of a solve that goes on; it is kept once the solve has ended and confirmed it."""
        known = self._told[-1].lower_bound if self._told else self.lower
        if math.isfinite(bound) and bound > known + 1e-4 * abs(bound):
            self._told.append(Step(self.deadline.elapsed, bound, self.value))
            if self.on_step is not None:
                self.on_step(self._told[-1])

    def confirm(self, bound: float) -> None:
        """End the solve whose bounds were told: ``bound`` is the proven one."""
        self.history += [step for step in self._told if step.lower_bound <= bound]
        self._told = []
        last = self.history[-1].lower_bound if self.history else -math.inf
        self.lower = max(self.lower, min(last, bound))
        self.raise_bound(bound)

    def evaluate(self, x: Array, *, known: float = math.inf) -> WorstCase:
        """Find the true worst case of ``x``, at most ``known``; keep it if it guarantees more than the incumbent."""
        x = np.where(self.problem.x.integer, np.round(x), x)
        if not self.problem.first_stage_violation(x) <= FEASIBILITY:
            return WorstCase(math.nan, math.inf, None, False, Status.ERROR)
        left = max(self.deadline.left, 0.5 + 0.05 * min(self.deadline.limit, 1e6))
        worst = self.problem.evaluate(x, time_limit=left)
        if known < worst.upper:  # plans that were prepared serve the whole set, whether or not the time sufficed
            worst = replace(worst, upper=max(known, worst.value))
        better = self.worst is None or (worst.upper, worst.value) < (self.worst.upper, self.worst.value)
        if better:
            self.x, self.worst = x, worst
            self._log()
        return worst

    def _log(self) -> None:
        step = Step(self.deadline.elapsed, self.lower, self.value)
        self.history.append(step)
        if self.on_step is not None:
            self.on_step(step)

    def finish(self, status: Status, *, policies: Array | None = None) -> TwoStageSolution:
        """Return the solution; ``OPTIMAL`` if the gap is closed, whatever the reason to stop."""
        lost = status in (Status.INFEASIBLE, Status.UNBOUNDED)
        if self.gap <= self.tol:
            status = Status.OPTIMAL
        elif status in (Status.OPTIMAL, Status.FEASIBLE) and self.x is None:
            status = Status.ERROR  # the solver's point is no first stage once its integers are whole
        elif status == Status.FEASIBLE and self.worst is not None and self.worst.value == math.inf:
            status = Status.NO_SOLUTION
            self.info["note"] = "x leaves no feasible recourse at the scenario shown as its worst case"
        worst = self.worst
        dim = self.problem.dim
        return TwoStageSolution(
            x=None if lost else self.x,
            worst_case=math.inf if worst is None else worst.value,
            lower_bound=self.lower,
            scenarios=np.stack(self.scenarios) if self.scenarios else np.zeros((0, dim)),
            history=tuple(self.history),
            status=status,
            seconds=self.deadline.elapsed,
            method=self.method,
            upper=self.value,
            certified=worst is not None and worst.certified,
            policies=policies,
            info=self.info,
        )
