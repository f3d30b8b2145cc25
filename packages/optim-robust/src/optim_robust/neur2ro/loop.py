"""The loop: planner and adversary take turns, both with the network inside, until neither has anything new to say."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optim_robust.neur2ro.adversary import ADVERSARIES, Adversary
from optim_robust.neur2ro.families import Family, family_of, fixed
from optim_robust.neur2ro.main_problem import MODES, Instance, MainProblem
from optim_robust.neur2ro.model import ValueModel
from optim_robust.neur2ro.train import fit_value_network
from optim_robust.relu import METHODS
from optim_robust.solver import Deadline, Status
from optim_robust.two_stage import Step, TwoStageProblem, TwoStageSolution, WorstCase
from optim_robust.two_stage.branch_and_price import BranchAndPrice
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.tracking import scenario_bound
from optim_robust.uncertainty import Discrete
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed, resolve_seed

__all__ = ["Neur2RO", "quick_network", "solve_neur2ro"]

_LOGGER = logging.getLogger(__name__)
Array = NDArray[np.float64]
INCUMBENTS = ("best", "last")
SHARE = 0.15
"""Of the time limit, the most that one solve of the planner may take; what it proves until then counts."""


class _Run:
    """What a run has seen: candidates with their true worst cases, the proven bound, the history."""

    def __init__(self, problem: TwoStageProblem, clock: Deadline, on_step: Callable[[Step], object] | None) -> None:
        self.problem, self.clock, self.on_step = problem, clock, on_step
        self.bound, self.longest = -math.inf, 0.0
        self.seen: dict[bytes, WorstCase] = {}
        self.candidates: list[tuple[Array, WorstCase]] = []
        self.history: list[Step] = []

    @property
    def for_planning(self) -> float:
        """Seconds left, less what the longest evaluation so far has taken."""
        return max(0.05, self.clock.left - 1.5 * self.longest)

    def evaluate(self, x: Array) -> WorstCase:
        """Return the true worst case of ``x``, computed once."""
        key = np.round(x, 9).tobytes()
        if key not in self.seen:
            share = max(0.3 * self.clock.left, min(self.clock.left, 1.5 * self.longest))
            self.seen[key] = self.problem.evaluate(x, time_limit=max(0.05, share))
            self.longest = max(self.longest, self.seen[key].seconds)
            self.candidates.append((x, self.seen[key]))
        return self.seen[key]

    def knows(self, x: Array) -> bool:
        """Return whether the worst case of ``x`` has been computed."""
        return np.round(x, 9).tobytes() in self.seen

    def best(self, incumbent: str) -> tuple[Array, WorstCase] | None:
        """Return the candidate to report, or None: the one that guarantees most."""
        if not self.candidates:
            return None
        if incumbent == "last":
            return self.candidates[-1]
        return min(self.candidates, key=lambda c: (c[1].upper, c[1].value))

    def record(self) -> None:
        """Add a step to the history."""
        found = self.best("best")
        step = Step(self.clock.elapsed, self.bound, math.inf if found is None else found[1].upper)
        self.history.append(step)
        if self.on_step is not None:
            self.on_step(step)


class Neur2RO:
    """Column-and-constraint generation with a network in place of the inner problem.

    The planner's dual bound certifies the answer whatever the network's quality (mode ``"argmax"``): the solution's
    ``gap`` lies between its exact worst case and that bound. No other policy is tried inside.

    Args:
        model: the network, from :func:`~.train.fit_value_network` or :meth:`ValueModel.load`.
        family: of the instances; found from the problem when None.
        mode: ``"argmax"`` (the paper's default) or ``"max"`` (minimise the greatest prediction; proves nothing).
        adversary: ``"milp"``, ``"gradient"`` or ``"sample"``; see :mod:`.adversary`.
        bounds: how the network's bounds are tightened: ``"interval"``, ``"crown"`` or ``"lp"``.
        verify: tell the planner what the first stages met so far truly cost, let their true worst cases join the
            scenarios when the network has nothing to add, and end when the planner comes back to one it knows. The
            paper's loop (False) trusts the network to the end.
        anchors: how many of the true worst cases met last are priced with a recourse of their own, whatever the network
            thinks of them (with ``verify``): a step from the paper towards exact generation of columns and constraints.
        incumbent: report the ``"best"`` first stage met, by its true worst case, or the ``"last"`` (the paper's).
        time_limit: seconds for one problem, evaluation included; the paper's is 3 hours.
        mip_gap: relative gap of both programs.
        max_scenarios: rounds of the loop.
        tol: relative difference of the two players' values at which the loop ends.
        root_bound: at the end, raise the lower bound with what is left of the time: by the root of branch and price for
            the knapsack, else by a relaxation over the scenarios found. No first stage is taken from there.
        generator: seed of the adversary's starting points.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """

    def __init__(
        self, model: ValueModel, *, family: Family | None = None, mode: str = "argmax", adversary: str = "milp",
        bounds: str = "lp", verify: bool = True, anchors: int = 6, incumbent: str = "best",
        time_limit: float = 10_800.0, mip_gap: float = 1e-3, max_scenarios: int = 20, tol: float = 1e-4,
        root_bound: bool = False, generator: Seed = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, ValueModel):
            raise TypeError(
                f"model is a {type(model).__name__}; a ValueModel is needed (fit_value_network, ValueModel.load)"
            )
        self.model, self.family = model, family
        self.mode = check_choice("mode", mode, MODES)
        self.adversary = check_choice("adversary", adversary, ADVERSARIES)
        self.bounds = check_choice("bounds", bounds, METHODS)
        self.verify = bool(verify)
        self.anchors = check_count("anchors", anchors, low=0)
        self.incumbent = check_choice("incumbent", incumbent, INCUMBENTS)
        self.time_limit = check_number("time_limit", float(time_limit), low=0.0, open_low=True)
        self.mip_gap = check_number("mip_gap", mip_gap, low=0.0)
        self.max_scenarios = check_count("max_scenarios", max_scenarios)
        self.tol = check_number("tol", tol, low=0.0)
        self.root_bound = bool(root_bound)
        self.seed = resolve_seed(generator)

    def instance(self, problem: TwoStageProblem) -> Instance:
        """Return the problem as the network sees it.

        Raises:
            ValueError: the network was trained for another family.
        """
        if not isinstance(problem, TwoStageProblem):
            raise TypeError(f"problem is a {type(problem).__name__}; a TwoStageProblem is needed")
        family = own = self.family if self.family is not None else family_of(problem)
        if own.name != self.model.family and self.model.family.startswith("fixed:"):
            family = fixed(problem)
        if family.name != self.model.family:
            raise ValueError(
                f"the network was trained for {self.model.family!r}; the problem is of {own.name!r}: train one with "
                "fit_value_network"
            )
        return Instance.of(problem, self.model, family.features(problem, self.model.label_scaling == "per_instance"))

    def solve(
        self,
        problem: TwoStageProblem,
        *,
        time_limit: float | None = None,
        on_step: Callable[[Step], object] | None = None,
    ) -> TwoStageSolution:
        """Solve one problem.

        Args:
            problem: of the network's family.
            time_limit: seconds, in place of the solver's own.
            on_step: called after each round with what is proven and what is held.

        Raises:
            ValueError: a problem of another family, or without the bounds that an embedding needs.
        """
        clock = Deadline(self.time_limit if time_limit is None else time_limit)
        run = _Run(problem, clock, on_step)
        instance = self.instance(problem)
        main = MainProblem(instance, mode=self.mode, bounds=self.bounds, mip_gap=self.mip_gap, deadline=clock)
        adversary = Adversary(
            instance, method=self.adversary, bounds=self.bounds, mip_gap=self.mip_gap, seed=self.seed,
            deadline=clock.at_most(0.2 * clock.limit),
        )  # fmt: skip
        status = self._rounds(run, main, adversary)
        if self.root_bound and run.candidates:
            run.bound = max(run.bound, _relaxed_bound(problem, np.array(main.scenarios), clock))
        info = {
            "rounds": len(run.history), "scenarios": len(main.scenarios),
            "mode": self.mode, "adversary": self.adversary,
            "binaries of the planner": main.n_binaries, "units of the planner": main.n_relu,
            "binaries of the adversary": adversary.n_binaries, "units of the adversary": adversary.n_relu,
        }  # fmt: skip
        return _solution(run, main, status, self.incumbent, info)

    def _rounds(self, run: _Run, main: MainProblem, adversary: Adversary) -> Status:
        """Run the loop; return why it ended."""
        clock, patience = run.clock, SHARE * run.clock.limit
        while len(main.scenarios) <= self.max_scenarios:
            answer, x = main.solve(clock.at_most(min(patience, run.for_planning)))
            if self.mode == "argmax" or not main.scenarios:
                run.bound = max(run.bound, answer.bound if math.isfinite(answer.bound) else -math.inf)
            if answer.status in (Status.INFEASIBLE, Status.UNBOUNDED, Status.ERROR):
                return answer.status
            if x is None:
                return Status.TIME_LIMIT
            again = run.knows(x)
            worst = run.evaluate(x)
            run.record()
            if clock.passed:
                return Status.TIME_LIMIT
            if worst.value == math.inf and worst.xi is not None:
                if any(np.abs(worst.xi - xi).max() < 1e-12 for xi in main.feasible_for):
                    return Status.ERROR  # a cut that does not cut: tolerances disagree
                main.require_recourse(worst.xi)
            elif again and answer.status != Status.OPTIMAL and main.visited:
                patience *= 2.0  # the solver came back with its starting point: it needs longer
            elif self._agreed(main, adversary, x, worst, again, clock):
                return Status.FEASIBLE
        return Status.FEASIBLE

    def _agreed(
        self, main: MainProblem, adversary: Adversary, x: Array, worst: WorstCase, again: bool, clock: Deadline
    ) -> bool:
        """Let the adversary answer; return whether the loop is over."""
        if self.verify:
            main.learn(x, worst.value)
            if worst.xi is not None:
                main.anchor(worst.xi, self.anchors)
        xi, value, _ = adversary.worst(x, clock.at_most(max(0.05, SHARE * clock.limit)))
        if self._done(main, x, xi, value):
            if not self.verify or worst.xi is None or (again and _known(main, worst.xi)):
                return True
            xi = worst.xi
        if not _known(main, xi):
            main.add_scenario(xi)
        return False

    def _done(self, main: MainProblem, x: Array, xi: Array, value: float) -> bool:
        """Return whether the adversary has found nothing that the planner does not know."""
        if not main.scenarios:
            return False
        eta = float(main.instance.predict(x, np.array(main.scenarios)).max())
        first = 0.0 if main.instance.features.total else main.instance.problem.first_stage_cost(x, xi)
        close = abs(value - eta) <= self.tol * max(1e-9, abs(value + first))
        return close or _known(main, xi)


def _relaxed_bound(problem: TwoStageProblem, scenarios: Array, clock: Deadline) -> float:
    """Return a lower bound on the optimum that owes nothing to the network."""
    if clock.passed:
        return -math.inf
    if isinstance(problem, RobustKnapsack):
        return BranchAndPrice(max_nodes=1).solve(problem, time_limit=clock.left).lower_bound
    return scenario_bound(problem, list(scenarios), clock) if len(scenarios) else -math.inf


def _known(main: MainProblem, xi: Array) -> bool:
    return bool(main.scenarios) and bool((np.abs(np.array(main.scenarios) - xi).sum(1) < 1e-3).any())


def _solution(run: _Run, main: MainProblem, status: Status, incumbent: str, info: dict[str, Any]) -> TwoStageSolution:
    problem, found = run.problem, run.best(incumbent)
    scenarios = np.array(main.scenarios) if main.scenarios else np.zeros((0, problem.dim))
    if found is None or not math.isfinite(found[1].value):
        kept = Status.FEASIBLE if status == Status.OPTIMAL else status
        return TwoStageSolution(
            None, math.inf, run.bound, scenarios, tuple(run.history), kept, run.clock.elapsed, "neur2ro", info=info
        )
    x, worst = found
    closed = worst.certified and worst.upper - run.bound <= 1e-6 * max(1.0, abs(worst.upper))
    if status in (Status.INFEASIBLE, Status.UNBOUNDED, Status.ERROR):
        status = Status.FEASIBLE  # a candidate is held all the same
    return TwoStageSolution(
        x, worst.value, min(run.bound, worst.upper), scenarios, tuple(run.history),
        Status.OPTIMAL if closed else status, run.clock.elapsed, "neur2ro", worst.upper, worst.certified, None, info,
    )  # fmt: skip


def quick_network(
    problem: TwoStageProblem, *, generator: Seed = None, **training: Any
) -> tuple[ValueModel, dict[str, float]]:
    """Train a small network for a problem: for its family at its size, or on the problem itself; a minute or two.

    Args:
        problem: knapsack, capital budgeting, or any problem with finite bounds of the first stage.
        generator: seed.
        **training: options of :func:`~.train.fit_value_network` in place of the ones used here.
    """
    family = family_of(problem)
    single = family.name.startswith("fixed:")
    chosen: dict[str, Any] = {
        "n_instances": 1 if single else 200, "n_first_stage": 40 if single else 6, "n_scenarios": 20,
        "sizes": (family.features(problem, True).size,), "label_scaling": "per_instance", "contrast": 0.8, "epochs": 40,
        "sampler": "mixed" if isinstance(problem.uncertainty, Discrete) else "aligned",
        "learning_rate": 5e-3, "embed": (32, 16), "post": (16, 8), "value": (8,),
    }  # fmt: skip
    return fit_value_network(family, generator=generator, **{**chosen, **training})


def solve_neur2ro(
    problem: TwoStageProblem,
    *,
    network: ValueModel | None = None,
    time_limit: float = 60.0,
    generator: Seed = None,
    training: Mapping[str, Any] | None = None,
    on_step: Callable[[Step], object] | None = None,
    **options: Any,
) -> TwoStageSolution:
    """Solve any two-stage problem; without a network, one is first trained on the problem itself.

    Args:
        problem: knapsack, capital budgeting, or any problem with finite bounds of both stages.
        network: a trained network; None trains one for this problem (or its family at this size), a minute or two that
            stand in ``info["training seconds"]`` and are not part of ``time_limit``.
        time_limit: seconds for the solve.
        generator: seed.
        training: options of :func:`quick_network`.
        on_step: called after each round.
        **options: of :class:`Neur2RO`.
    """
    seed = resolve_seed(generator)
    clock, trained = Deadline(), network is None
    if network is None:
        network, errors = quick_network(problem, generator=seed, **(training or {}))
        _LOGGER.info("trained in %.1f s: %s", clock.elapsed, errors)
    spent = clock.elapsed
    answer = Neur2RO(network, time_limit=time_limit, generator=seed, **options).solve(problem, on_step=on_step)
    if trained:
        answer.info["training seconds"] = spent
    return answer
