"""The loop: what it proves holds whatever the network, both programs say what they mean, statuses are honest."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from optim_robust.neur2ro.adversary import Adversary
from optim_robust.neur2ro.data import generate
from optim_robust.neur2ro.families import CAPITAL_BUDGETING, CAPITAL_BUDGETING_LOANS, KNAPSACK, fixed
from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.neur2ro.loop import Neur2RO, solve_neur2ro
from optim_robust.neur2ro.main_problem import Instance, MainProblem
from optim_robust.neur2ro.model import ValueModel
from optim_robust.neur2ro.train import untrained
from optim_robust.solver import Deadline, Status
from optim_robust.two_stage import AffineMatrix, AffineVector, ExactCCG, Stage, TwoStageProblem
from optim_robust.two_stage.capital_budgeting import CapitalBudgeting
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.uncertainty import Box

SMALL = {"embed": (8, 6), "post": (8, 4), "value": (6,)}


def _model(name: str = "knapsack", seed: int = 0) -> ValueModel:
    family = {"knapsack": KNAPSACK, "capital": CAPITAL_BUDGETING, "loans": CAPITAL_BUDGETING_LOANS}[name]
    data = generate(family, n_instances=4, n_first_stage=3, n_scenarios=4, sizes=(4, 5), per_instance=True)
    return untrained(data, family, label_scaling="per_instance", generator=seed, **SMALL)


def _optimum(problem: TwoStageProblem) -> float:
    """Try every first stage."""
    values = []
    for point in itertools.product((0.0, 1.0), repeat=problem.x.size):
        x = np.array(point)
        if problem.first_stage_violation(x) <= 1e-9:
            values.append(problem.evaluate(x).upper)
    return min(values)


def _shop(demand: float = 3.0) -> TwoStageProblem:
    """Order x units at 1, later at 3; the demand may be 0 or 2 more; both stages integer."""
    return TwoStageProblem(
        x=Stage.of(1, upper=6),
        y=Stage.of(1, upper=4),
        uncertainty=Box([0.0], [2.0]),
        c=AffineVector([1.0], dim=1),
        d=AffineVector([3.0], dim=1),
        technology=AffineMatrix([[-1.0]]),
        recourse=AffineMatrix([[-1.0]]),
        rhs=AffineVector([-demand], np.array([[-1.0]])),
        name="shop",
    )


@pytest.mark.quick
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounds_hold_whatever_the_network(seed: int, verify: bool) -> None:
    problem = RobustKnapsack.random(5, generator=seed)
    best = _optimum(problem)
    answer = Neur2RO(_model(seed=seed), time_limit=20, verify=verify).solve(problem)
    assert answer.x is not None
    assert answer.certified
    assert answer.lower_bound <= best + 1e-6 * abs(best)
    assert best <= answer.worst_case + 1e-6 * abs(best)
    assert answer.worst_case == pytest.approx(problem.evaluate(answer.x).value)
    bounds = [step.lower_bound for step in answer.history]
    assert bounds == sorted(bounds)
    assert all(problem.uncertainty.contains(xi) for xi in answer.scenarios)


def test_capital_budgeting_with_uncertain_constraints() -> None:
    problem = CapitalBudgeting.random(4, generator=3)
    best = _optimum(problem)
    answer = Neur2RO(_model("capital"), time_limit=30, adversary="gradient").solve(problem)
    assert answer.x is not None
    assert answer.lower_bound <= best + 1e-4 * abs(best)
    assert best <= answer.worst_case + 1e-3 * abs(best)


def test_capital_budgeting_with_loans() -> None:
    problem = CapitalBudgeting.random(4, loans=True, generator=3)
    exact = ExactCCG().solve(problem)
    answer = Neur2RO(_model("loans"), time_limit=30, adversary="gradient").solve(problem)
    assert answer.x is not None
    assert answer.certified
    assert answer.lower_bound <= exact.worst_case + 1e-6
    assert exact.lower_bound <= answer.worst_case + 1e-6
    with pytest.raises(ValueError, match="capital-budgeting-loans"):
        Neur2RO(_model("capital")).solve(problem)


def test_the_planner_decides_as_an_enumeration_does() -> None:
    problem = RobustKnapsack.random(5, generator=7)
    instance = Neur2RO(_model(seed=4)).instance(problem)
    main = MainProblem(instance, mip_gap=0.0)
    scenarios = problem.sample_uncertainty(3, scheme="mixed", generator=1)
    for xi in scenarios:
        main.add_scenario(xi)
    answer, _ = main.solve(Deadline(20))
    values = []
    for point in itertools.product((0.0, 1.0), repeat=5):
        x = np.array(point)
        xi = scenarios[int(instance.predict(x, scenarios).argmax())]  # what the network believes is worst
        values.append(problem.first_stage_cost(x, xi) + problem.recourse(x, xi).value)
    assert answer.value == pytest.approx(min(values), abs=1e-4)
    greatest = MainProblem(instance, mode="max", mip_gap=0.0)
    for xi in scenarios:
        greatest.add_scenario(xi)
    answer, _ = greatest.solve(Deadline(20))
    points = [np.array(p) for p in itertools.product((0.0, 1.0), repeat=5)]
    expected = min(instance.predict(x, scenarios).max() + problem.first_stage_cost(x, scenarios[0]) for x in points)
    assert answer.value == pytest.approx(expected, abs=1e-3)


def test_what_is_known_of_a_first_stage_is_not_judged_again_and_the_bound_stays_valid() -> None:
    problem = RobustKnapsack.random(5, generator=7)
    main = MainProblem(Neur2RO(_model(seed=4)).instance(problem), mip_gap=0.0)
    main.solve(Deadline(20))  # the nominal problem gives the floor
    main.add_scenario(problem.sample_uncertainty(1, generator=1)[0])
    best, seen = _optimum(problem), set()
    for _ in range(8):
        answer, x = main.solve(Deadline(20))
        assert x is not None
        assert answer.bound <= best + 1e-6 * abs(best)
        seen.add(tuple(x))
        main.learn(x, problem.evaluate(x).value)
    assert len(seen) >= 3
    _, x = main.solve(Deadline(20))
    for point, value in main.visited.values():  # each visited point now costs at least what it truly does
        program, columns = main.build()
        program.set_bounds(columns, point, point)
        assert program.solve().value >= value - 1e-5 * abs(value)


def test_anchored_scenarios_are_priced_and_the_oldest_goes() -> None:
    problem = RobustKnapsack.random(5, generator=7)
    main = MainProblem(Neur2RO(_model(seed=4)).instance(problem), mip_gap=0.0)
    first, second, third = problem.sample_uncertainty(3, scheme="mixed", generator=2)
    main.add_scenario(problem.uncertainty.nominal)
    for xi in (first, second, second, third):
        main.anchor(xi, 2)
    assert len(main.anchors) == 2
    answer, x = main.solve(Deadline(20))
    assert x is not None
    worst = [problem.first_stage_cost(x, xi) + problem.recourse(x, xi).value for xi in (second, third)]
    assert answer.value >= max(worst) - 1e-6 * abs(answer.value)
    assert answer.bound <= _optimum(problem) + 1e-6 * abs(answer.value)


def test_the_adversaries_agree_and_the_program_is_never_worse() -> None:
    problem = RobustKnapsack.random(5, generator=2)
    instance = Neur2RO(_model(seed=5)).instance(problem)
    x = np.array([1.0, 0, 1, 1, 0])
    found = {}
    for method in ("milp", "gradient", "sample"):
        xi, value, exact = Adversary(instance, method=method, n_samples=200, mip_gap=0.0).worst(x, Deadline(20))
        assert problem.uncertainty.contains(xi, tol=1e-6)
        assert value == pytest.approx(instance.predict(x, xi[None])[0], abs=1e-6)
        assert exact == (method == "milp")
        found[method] = value
    assert found["sample"] <= found["gradient"] + 1e-9 <= found["milp"] + 2e-9
    some = problem.sample_uncertainty(2000, scheme="mixed", generator=9)
    assert instance.predict(x, some).max() <= found["milp"] + 1e-6


def test_a_users_problem_with_wide_integers_is_learned_and_solved() -> None:
    quick = {"n_first_stage": 7, "n_scenarios": 5, "epochs": 3, "post": (4, 2), "value": (4,)}
    answer = solve_neur2ro(_shop(), time_limit=20, generator=1, training=quick)
    assert answer.x is not None
    assert answer.worst_case == pytest.approx(5.0)  # order 5 now: never buy later
    assert answer.lower_bound <= 5.0 + 1e-9
    assert answer.info["training seconds"] > 0


def test_statuses_are_honest() -> None:
    infeasible = _shop(demand=30.0)
    family = fixed(_shop())
    data = generate(family, n_instances=1, n_first_stage=10, n_scenarios=4, per_instance=True)
    model = untrained(data, family, label_scaling="per_instance", **SMALL)
    answer = Neur2RO(model, time_limit=10).solve(infeasible)
    assert (answer.x, answer.status) == (None, Status.INFEASIBLE)
    late = Neur2RO(_model(), time_limit=1e-3).solve(RobustKnapsack.random(30, generator=0))
    assert late.status == Status.TIME_LIMIT
    assert late.x is None or math.isfinite(late.worst_case)


def test_the_time_limit_is_kept_and_runs_repeat() -> None:
    problem = RobustKnapsack.random(6, generator=4)
    model = _model()
    runs = [Neur2RO(model, time_limit=20, generator=3).solve(problem) for _ in range(2)]
    assert np.array_equal(runs[0].scenarios, runs[1].scenarios)
    assert runs[0].x is not None
    assert np.array_equal(runs[0].x, runs[1].x)  # pyright: ignore[reportArgumentType]
    hard = RobustKnapsack.random(40, generator=4)
    assert Neur2RO(model, time_limit=2.0).solve(hard).seconds < 2.0 * 1.1 + 1.5


def test_decisions_are_cut_off_that_leave_no_recourse() -> None:
    problem = _shop()
    main = MainProblem(Instance.of(problem, *_fixed_model(problem)))
    main.require_recourse(np.array([2.0]))
    _, x = main.solve(Deadline(5))
    assert x is not None
    assert x[0] >= 1  # 4 can be bought later, 5 may be asked for


def _fixed_model(problem: TwoStageProblem) -> tuple[ValueModel, ItemFeatures]:
    family = fixed(problem)
    data = generate(family, n_instances=1, n_first_stage=10, n_scenarios=4, per_instance=True)
    return untrained(data, family, label_scaling="per_instance", **SMALL), family.features(problem, True)


def test_bad_arguments_are_refused() -> None:
    model = _model()
    with pytest.raises(TypeError, match="ValueModel"):
        Neur2RO(model.network)  # pyright: ignore[reportArgumentType]
    change: dict[str, Any]
    for change in ({"mode": "min"}, {"adversary": "odd"}, {"bounds": "odd"}, {"incumbent": "first"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Neur2RO(model, **change)
    with pytest.raises(ValueError, match="time_limit"):
        Neur2RO(model, time_limit=0)
    with pytest.raises(ValueError, match="trained for"):
        Neur2RO(model).solve(CapitalBudgeting.random(4))
    open_ended = _shop()
    open_ended.x.upper[0] = np.inf
    with pytest.raises(ValueError, match="no finite bounds"):
        fixed(open_ended)
    broken = _model()
    broken.network.value[0].weight.data.fill_(np.nan)  # pyright: ignore
    with pytest.raises(ValueError, match="NaN"):
        Neur2RO(broken).solve(RobustKnapsack.random(4))
