"""The methods against brute force, published optima, each other, and every way to end."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

from optim_robust.solver import Deadline, Status
from optim_robust.two_stage import (
    AffineMatrix,
    AffineVector,
    BranchAndPrice,
    CapitalBudgeting,
    ExactCCG,
    KAdaptability,
    Nominal,
    RobustKnapsack,
    ScenarioEnumeration,
    Stage,
    StaticRobust,
    TwoStageProblem,
    relative_gap,
)
from optim_robust.two_stage.adversary import ROW_TOLERANCE
from optim_robust.two_stage.evaluate import evaluate_boxes, evaluate_points
from optim_robust.uncertainty import Box, Budget, Discrete, Polyhedron

DATA = Path(__file__).parents[1] / "data" / "robust_knapsack"


def slow_worst_case(problem, x):
    """F(x) by brute force: for each set of plans that the adversary breaks, and the rows that it breaks, one LP."""
    plans = [np.array(y, dtype=float) for y in itertools.product((0, 1), repeat=problem.y.size)]
    box = problem.uncertainty
    matrix, bound = box.constraints()
    limit = ROW_TOLERANCE * (1 + np.abs(problem.h.constant))
    fixed, cuts, options = [], [], []
    for y in plans:
        row0, row1 = problem.row_form(x, y)
        certain = np.abs(row1).sum(1) == 0
        if (row0[certain] > limit[certain]).any():
            continue
        constant, slopes = problem.cost_form(x, y)
        cut = (np.append(-slopes, 1.0), constant)
        breakable = np.flatnonzero(~certain)
        if len(breakable) == 0:
            fixed.append(cut)
            continue
        ways = [(np.append(-row1[r], 0.0), row0[r] - limit[r]) for r in breakable]
        options.append([cut, *ways])
    best = -math.inf
    for cuts in itertools.product(*options):
        rows = [*fixed, *cuts, *zip(np.pad(matrix.toarray(), ((0, 0), (0, 1))), bound, strict=True)]
        table, rhs = np.array([r for r, _ in rows]), np.array([b for _, b in rows])
        limits = [*zip(box.lower, box.upper, strict=True), (-1e6, 1e6)]
        answer = linprog(np.append(np.zeros(box.dim), -1.0), A_ub=table, b_ub=rhs, bounds=limits)
        best = max(best, -answer.fun) if answer.status == 0 else best
    return best


def slow_optimum(problem):
    points = (np.array(x, dtype=float) for x in itertools.product((0, 1), repeat=problem.x.size))
    return min(slow_worst_case(problem, x) for x in points if (problem.A @ x <= problem.b + 1e-9).all())


@pytest.mark.quick
def test_knapsacks_of_three_items_agree_with_brute_force():
    for seed in (1, 2):
        problem = RobustKnapsack.random(3, dev=0.5, generator=seed)  # a budget of one item and a half
        truth = slow_optimum(problem)
        for method in (BranchAndPrice(), ExactCCG()):
            found = method.solve(problem)
            assert found.status == Status.OPTIMAL
            assert found.certified
            assert found.worst_case == pytest.approx(truth, rel=2e-4)
            assert found.lower_bound <= truth + 1e-6 * abs(truth)
            assert slow_worst_case(problem, found.x) == pytest.approx(found.worst_case, rel=1e-6)


def test_capital_budgets_of_three_projects_agree_with_brute_force():
    for seed in (0, 3):
        problem = CapitalBudgeting.random(3, n_factors=2, generator=seed)
        for x in problem.sample_first_stage(2, generator=seed):
            assert problem.evaluate(x).value == pytest.approx(slow_worst_case(problem, x), abs=1e-5)
        found = ExactCCG().solve(problem)
        assert found.status == Status.OPTIMAL
        assert found.worst_case == pytest.approx(slow_optimum(problem), abs=2e-4)


def test_capital_budgets_with_loans_agree_with_a_grid():
    """Costs change by at most their slopes between points of a grid."""
    problem = CapitalBudgeting.random(2, n_factors=2, loans=True, generator=3)
    step = 0.05
    axis = np.arange(-1, 1 + step / 2, step)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    cost, gain = (v * (1 + grid @ e.T / 2) for v, e in ((problem.cost, problem.phi), (problem.revenue, problem.psi)))
    late = np.array(list(itertools.product((0.0, 1.0), repeat=2)))

    def on_grid(x):
        left = problem.budget + x[2] - cost @ x[:2]
        need = np.maximum(0, cost @ late.T - left[:, None])
        second = 0.12 * 1.2 * need - 0.8 * gain @ late.T
        second[:, (late + x[:2] > 1).any(1)] = np.inf
        return (0.12 * x[2] - gain @ x[:2] + second.min(1)).max()

    slope = (
        np.abs(problem.psi * problem.revenue[:, None] / 2).sum()
        + 0.144 * np.abs(problem.phi * problem.cost[:, None] / 2).sum()
    )
    best = math.inf
    for first in itertools.product((0.0, 1.0), repeat=2):
        need = max(0.0, 1.5 * problem.cost @ np.array(first) - problem.budget)
        for loan in np.linspace(need, problem.max_loan, 25):
            x = np.array([*first, loan])
            best = min(best, on_grid(x))
            if loan in (need, problem.max_loan):
                worst = problem.evaluate(x)
                assert worst.certified
                assert on_grid(x) - 1e-5 <= worst.value <= on_grid(x) + slope * step
    for method in (ExactCCG(), StaticRobust(), Nominal(), KAdaptability(2)):
        found = method.solve(problem, time_limit=2 if isinstance(method, KAdaptability) else 20)
        if isinstance(method, ExactCCG):
            assert found.status == Status.OPTIMAL
            assert found.worst_case <= best + slope * step
        assert found.worst_case >= best - 0.144 * problem.max_loan / 24 - 1e-4
        assert found.lower_bound <= best + slope * step


def random_problem(seed):
    """Two binaries in each stage, everything uncertain: costs, both matrices, right-hand sides."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.integers(-3, 4, shape).astype(float)

    corner = Polyhedron([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], [1.0, 0.5, 0.5])
    return TwoStageProblem(
        x=Stage.of(2), y=Stage.of(2), uncertainty=[Box([-1, -1], [1, 1]), Budget([1.0, 1.0], 1.5), corner][seed % 3],
        c=AffineVector(draw(2), draw(2, 2) / 2), d=AffineVector(draw(2), draw(2, 2) / 2),
        constant=AffineVector([1.0], [[0.3, -0.2]]), technology=AffineMatrix(draw(2, 2), {0: draw(2, 2) / 2}),
        recourse=AffineMatrix(draw(2, 2), {1: draw(2, 2) / 2}),
        rhs=AffineVector(rng.integers(0, 4, 2).astype(float), draw(2, 2) / 2),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_problems_with_everything_uncertain_agree_with_brute_force(seed):
    problem = random_problem(seed)
    truth = {x: slow_worst_case(problem, np.array(x)) for x in itertools.product((0.0, 1.0), repeat=2)}
    for x, value in truth.items():
        worst = problem.evaluate(x)
        assert worst.certified
        if value > 1e5:  # no plan is left: the reference's ceiling
            assert worst.value == math.inf
            assert problem.recourse(np.array(x), worst.xi).value == math.inf
        else:
            assert worst.value == pytest.approx(value, abs=2e-3)  # the row tolerance moves the edge
    best = min(truth.values())
    found = ExactCCG().solve(problem)
    if best > 1e5:
        assert found.status == Status.INFEASIBLE
    else:
        assert found.worst_case == pytest.approx(best, abs=3e-3)
        assert found.lower_bound <= best + 1e-6


def test_worst_cases_bound_every_sample_and_are_attained():
    loans = CapitalBudgeting.random(5, loans=True, generator=5)
    shares = {name: getattr(loans, name) for name in ("cost", "revenue", "phi", "psi", "budget")}
    binding = CapitalBudgeting(**shares, max_loan=0.3 * loans.budget, loan_cost=0.05)
    budgets = (CapitalBudgeting.random(7, generator=5), loans, binding)
    for problem in (RobustKnapsack.random(12, generator=5), *budgets):
        x = problem.sample_first_stage(1, generator=1)[0]
        worst = problem.evaluate(x)
        costs = [
            problem.first_stage_cost(x, xi) + problem.recourse(x, xi).value
            for xi in problem.sample_uncertainty(300, generator=2)
        ]
        assert worst.certified
        assert max(costs) <= worst.upper + 1e-6 * abs(worst.upper)
        assert problem.uncertainty.contains(worst.xi)
        at = problem.first_stage_cost(x, worst.xi) + problem.recourse(x, worst.xi).value
        assert at == pytest.approx(worst.value)


@pytest.mark.parametrize(
    ("name", "profit"),
    [("RKP_UN_n20_R1000_H100_h40_dev0.2_d0.5", 6362.0), ("RKP_UN_n20_R1000_H100_h40_dev0.15_d0.5", 6166.0),
     ("RKP_UN_n20_R1000_H100_h40_dev0.1_d0.5", 7804.67)],
)  # fmt: skip
def test_branch_and_price_meets_published_optima(name, profit):
    found = BranchAndPrice().solve(RobustKnapsack.from_file(DATA / name), time_limit=60)
    assert found.status == Status.OPTIMAL
    assert -found.worst_case == pytest.approx(profit, abs=0.01)


def test_one_plan_is_the_static_plan_and_more_plans_are_no_worse():
    for problem in (RobustKnapsack.random(4, generator=3), CapitalBudgeting.random(4, n_factors=2, generator=1)):
        static = StaticRobust().solve(problem)
        one, two = (KAdaptability(k).solve(problem, time_limit=30) for k in (1, 2))
        assert one.info["k_adaptable_value"] == pytest.approx(static.info["static_value"], rel=1e-3)
        assert two.info["k_adaptable_value"] <= one.info["k_adaptable_value"] + 1e-3
        exact = ExactCCG().solve(problem)
        for found in (static, one, two, Nominal().solve(problem)):
            assert found.worst_case >= exact.lower_bound - 1e-6
            assert found.lower_bound <= exact.worst_case + 1e-6
        assert two.worst_case <= two.info["k_adaptable_value"] + 1e-6
        assert two.policies.shape == (2, problem.y.size)


def test_bounds_only_rise_and_incumbents_only_fall():
    steps = []
    found = ExactCCG().solve(RobustKnapsack.random(7, generator=11), on_step=steps.append)
    assert set(found.history) <= set(steps)
    assert found.history[-1].worst_case == found.upper
    assert all(a.lower_bound <= b.lower_bound for a, b in itertools.pairwise(found.history))
    assert all(a.worst_case >= b.worst_case for a, b in itertools.pairwise(found.history))
    assert all(s.lower_bound <= found.worst_case + 1e-6 for s in steps)
    assert found.gap == relative_gap(found.upper, found.lower_bound) <= 1e-4


# --- general problems: continuous recourse, uncertain constraints, and every way to end -------------------------------


def capacity(uncertainty, *, integer=False, shortage=math.inf, cost=1.0):
    """Build capacity for two customers; what is missing is bought at 3, up to ``shortage``."""
    eye = np.eye(2)
    return TwoStageProblem(
        x=Stage.of(2, lower=0.0, upper=50.0, integer=False), y=Stage.of(2, upper=shortage, integer=integer),
        uncertainty=uncertainty, c=AffineVector([cost, cost], dim=2), d=AffineVector([3.0, 3.0], dim=2),
        technology=AffineMatrix(-eye), recourse=AffineMatrix(-eye), rhs=AffineVector([0.0, 0.0], -eye),
        row_names=["north", "south"],
    )  # fmt: skip


def test_continuous_recourse_is_solved_by_every_method():
    problem = capacity(Budget([8.0, 8.0], 1.0, origin=[10.0, 10.0]))
    scenarios = capacity(Discrete(problem.uncertainty.vertices()))
    x = np.array([12.0, 11.0])
    truth = max(23 + 3 * np.maximum(v - x, 0).sum() for v in problem.uncertainty.vertices())
    for one in (problem, scenarios):
        assert one.evaluate(x).value == pytest.approx(truth)
        found = [m.solve(one) for m in (ExactCCG(), ScenarioEnumeration())]
        assert [f.status for f in found] == [Status.OPTIMAL] * 2
        assert found[0].worst_case == pytest.approx(found[1].worst_case, rel=2e-4)
        assert StaticRobust().solve(one).worst_case >= found[0].lower_bound - 1e-6
    assert evaluate_boxes(problem, x, deadline=Deadline(), tol=1e-4).value == pytest.approx(truth, rel=1e-3)


def test_boxes_bound_mixed_recourse_from_both_sides():
    problem = capacity(Box([10.0, 10.0], [18.0, 14.0]), integer=[True, False], shortage=20.0)
    x = np.array([11.5, 10.0])
    worst = problem.evaluate(x, tol=1e-3)
    grid = np.stack(np.meshgrid(np.linspace(10, 18, 9), np.linspace(10, 14, 9)), -1).reshape(-1, 2)
    seen = evaluate_points(problem, x, grid, deadline=Deadline())
    assert seen.value <= worst.upper + 1e-6
    assert worst.value <= 21.5 + 3 * math.ceil(6.5) + 3 * 4 + 1e-6 <= worst.upper + 1e-3 * worst.upper


@pytest.mark.parametrize("method", [ExactCCG(), ScenarioEnumeration(), StaticRobust(), Nominal(), KAdaptability(2)])
def test_infeasible_and_unbounded_problems_are_said_to_be_so(method):
    uncertainty = Box([60.0, 60.0], [70.0, 70.0])
    found = method.solve(capacity(uncertainty, shortage=5.0))
    assert (found.status, found.x, found.lower_bound) == (Status.INFEASIBLE, None, math.inf)
    free = capacity(Box([1.0, 1.0], [2.0, 2.0]), cost=-1.0)
    free.x.upper[:] = math.inf
    found = method.solve(free)
    assert found.x is None
    assert found.status == (Status.NO_SOLUTION if method == Nominal() else Status.UNBOUNDED)
    assert found.lower_bound == -math.inf


def test_a_problem_that_only_full_recourse_solves_is_not_called_infeasible():
    # y must equal xi: no fixed plan does, the recourse does
    problem = TwoStageProblem(
        x=Stage.of(1), y=Stage.of(1, lower=-5.0, upper=5.0, integer=False), uncertainty=Box([-1.0], [1.0]),
        c=AffineVector([1.0], dim=1), d=AffineVector([1.0], dim=1), technology=AffineMatrix(np.zeros((2, 1))),
        recourse=AffineMatrix([[1.0], [-1.0]]), rhs=AffineVector([0.0, 0.0], [[1.0], [-1.0]]),
    )  # fmt: skip
    assert ExactCCG().solve(problem).worst_case == pytest.approx(1.0)
    static = StaticRobust().solve(problem)
    assert static.status == Status.NO_SOLUTION
    assert "full recourse" in static.info["note"]


def test_a_nominal_plan_without_recourse_at_some_scenario_is_shown_with_its_witness():
    problem = capacity(Box([10.0, 10.0], [18.0, 18.0]), shortage=3.0)
    found = Nominal().solve(problem)
    assert found.worst_case == math.inf
    assert found.status == Status.NO_SOLUTION
    worst = problem.evaluate(found.x)
    assert problem.recourse(found.x, worst.xi).value == math.inf
    assert ExactCCG().solve(problem).worst_case == pytest.approx(2 * 18)


@pytest.mark.parametrize("method", [BranchAndPrice(), ExactCCG(), KAdaptability(3)])
def test_time_limits_leave_an_incumbent_and_a_bound(method):
    problem = RobustKnapsack.from_file(DATA / "RKP_SC_n20_R1000_H100_h40_dev0.2_d0.1")
    found = method.solve(problem, time_limit=1.0)
    assert found.status == Status.TIME_LIMIT
    assert found.seconds < 1.0 * 1.1 + 1.5
    if found.x is not None:
        assert found.lower_bound <= -3952.15 + 0.01
        assert found.worst_case >= -3952.15 - 0.01
        assert found.gap > 0
    early = method.solve(problem, time_limit=1e-6)
    assert (early.status, early.x) == (Status.TIME_LIMIT, None)
    assert math.isinf(early.gap)


def test_parts_that_do_not_fit_are_named():
    eye = np.eye(2)
    good = {
        "x": Stage.of(2), "y": Stage.of(2), "uncertainty": Box([0.0], [1.0]), "c": AffineVector([1.0, 1.0], dim=1),
        "d": AffineVector([1.0, 1.0], dim=1), "technology": AffineMatrix(eye), "recourse": AffineMatrix(eye),
        "rhs": AffineVector([1.0, 1.0], dim=1),
    }  # fmt: skip
    TwoStageProblem(**good)
    wrong = {
        "c": AffineVector([1.0], dim=1), "technology": AffineMatrix(np.eye(3)), "row_names": ["a"],
        "d": AffineVector([1.0, 1.0], np.ones((2, 3))), "recourse": AffineMatrix(eye, {4: eye}),
        "static": (np.ones((1, 5)), [1.0]),
    }  # fmt: skip
    for part, value in wrong.items():
        with pytest.raises(ValueError, match=part):
            TwoStageProblem(**(good | {part: value}))
    with pytest.raises(ValueError, match="NaN"):
        AffineVector([np.nan])
    with pytest.raises(ValueError, match="finite"):
        AffineMatrix(sparse.csr_matrix([[np.inf]]))
    with pytest.raises(ValueError, match="lower bound"):
        Stage.of(1, lower=2.0)
    with pytest.raises(TypeError, match="ExactCCG"):
        BranchAndPrice().solve(TwoStageProblem(**good))
