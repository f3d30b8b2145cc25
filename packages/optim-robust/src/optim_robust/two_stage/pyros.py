"""PyROS beside our methods, for continuous models: the same model, the same set, its x evaluated as ours are.

PyROS (Isenberg et al. 2021, in Pyomo) restricts the second stage to polynomial decision rules of xi; the cost that its
x truly guarantees with free recourse is at most the one that it reports. HiGHS serves as its local and global solver,
which suffices for linear models.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from optim_robust.solver import Status
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.pyomo_model import PyomoProblem
from optim_robust.two_stage.solution import TwoStageSolution
from optim_robust.two_stage.tracking import OnStep, Tracker, scenario_bound
from optim_robust.uncertainty import Box, Budget, Discrete, Polyhedron, UncertaintySet
from robust_core.errors import RobustError

__all__ = ["PyROS", "to_pyros"]


def to_pyros(known: UncertaintySet) -> Any:
    """Return the same set for ``pyomo.contrib.pyros``.

    Raises:
        TypeError: a set that PyROS has no like for.
    """
    from pyomo.contrib import pyros

    if isinstance(known, Box):
        return pyros.BoxSet(bounds=list(zip(known.lower.tolist(), known.upper.tolist(), strict=True)))
    if isinstance(known, Budget) and (known.deviation >= 0).all():
        return pyros.CardinalitySet(known.origin.tolist(), known.deviation.tolist(), known.gamma)
    if isinstance(known, Polyhedron):
        return pyros.PolyhedralSet(known.matrix.toarray().tolist(), known.bound.tolist())
    if isinstance(known, Discrete):
        return pyros.DiscreteScenarioSet([tuple(p) for p in known.points.tolist()])
    raise TypeError(f"uncertainty is a {type(known).__name__}; PyROS is offered box, budget, polyhedral, discrete sets")


@dataclass(frozen=True)
class PyROS:
    """Solve with PyROS.

    Attributes:
        order: of the decision rules: 0 static, 1 affine, 2 quadratic.
        tol: relative gap, for the status.
    """

    order: int = 1
    tol: float = 1e-4

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return PyROS's x and its true worst case; ``info["pyros_value"]`` is the cost that PyROS reports.

        Raises:
            TypeError: a problem that was not read from a Pyomo model.
            RobustError: integer variables, which PyROS does not take.
        """
        if not isinstance(problem, PyomoProblem):
            raise TypeError("PyROS needs a problem that was read from a Pyomo model (read_pyomo)")
        if problem.x.integer.any() or problem.y.integer.any():
            raise RobustError("PyROS takes continuous variables only; this model has integer ones")
        import pyomo.environ as pyo
        from pyomo.contrib import pyros

        run = Tracker(problem, f"pyros({self.order})", time_limit=time_limit, on_step=on_step, tol=self.tol)
        model = problem.model.clone()
        parts = [[model.find_component(v) for v in group] for group in (problem.x_vars, problem.y_vars, problem.params)]
        quiet = logging.getLogger("optim_robust.pyros")
        quiet.setLevel(logging.CRITICAL)
        solver = pyo.SolverFactory("appsi_highs")
        answer = pyo.SolverFactory("pyros").solve(
            model, *parts, to_pyros(problem.uncertainty), solver, solver,
            objective_focus=pyros.ObjectiveType.worst_case, solve_master_globally=True, decision_rule_order=self.order,
            nominal_uncertain_param_vals=problem.uncertainty.nominal.tolist(), time_limit=time_limit,
            progress_logger=quiet, load_solution=True,
        )  # fmt: skip
        reason = str(answer.pyros_termination_condition.name)
        run.info |= {"termination": reason, "iterations": answer.iterations}
        if reason not in ("robust_optimal", "robust_feasible"):
            stop = {"time_out": Status.TIME_LIMIT, "robust_infeasible": Status.NO_SOLUTION}.get(reason, Status.ERROR)
            return run.finish(stop)
        value = answer.final_objective_value
        run.info["pyros_value"] = math.nan if value is None else problem.sense * float(value)
        worst = run.evaluate(np.array([float(v.value) for v in parts[0]]))
        run.scenarios = [problem.uncertainty.nominal] + ([] if worst.xi is None else [worst.xi])
        run.raise_bound(scenario_bound(problem, run.scenarios, run.deadline))
        return run.finish(Status.FEASIBLE)
