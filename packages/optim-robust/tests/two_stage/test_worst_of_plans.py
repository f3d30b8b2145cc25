"""The adversary's tree: its interval holds whenever it is stopped, and plans that keep off their rows close it soon."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optim_robust.solver import Deadline, SmallMaximum, Status
from optim_robust.two_stage import (
    AffineMatrix,
    AffineVector,
    CapitalBudgeting,
    KAdaptability,
    Stage,
    StaticRobust,
    TwoStageProblem,
    WorstCase,
)
from optim_robust.two_stage.evaluate import evaluate_points, evaluate_pool
from optim_robust.two_stage.multiple_choice import multiple_choice_knapsack
from optim_robust.uncertainty import Box


class Looks(Deadline):
    """Passes after it has been looked at so many times: an interruption at a known place."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def passed(self):
        self.looks -= 1
        return self.looks < 0


def stores(seed, shortage=9.0):
    """Stock two stores now and order lots once demand and the hauler's capacity are known: two rows that xi breaks."""
    rng = np.random.default_rng(seed)
    need, haul = rng.uniform(0.5, 2.0, (2, 2)), rng.uniform(0.2, 1.0, 2)
    return TwoStageProblem(
        x=Stage.of(2, upper=2), y=Stage.of(3, upper=[3, 3, 6]), uncertainty=Box([-1.0, -1.0], [1.0, 1.0]),
        c=AffineVector([2.0, 3.0], dim=2), d=AffineVector([3.0, 4.0, shortage], rng.uniform(-1, 1, (3, 2))),
        technology=AffineMatrix([[-1.0, -1.0], [0.0, 0.0]]),
        recourse=AffineMatrix([[-1.0, -1.0, -1.0], [1.0, 1.0, 0.0]]),
        rhs=AffineVector([-4.0, 4.0], np.stack([-need[0], haul])), row_names=["demand", "haul"],
    )  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("problem", "every"), [(CapitalBudgeting.random(5, generator=2), 1), (stores(1), 5)])
def test_wherever_it_is_stopped_the_interval_holds_the_worst_case(problem, every):
    x = np.zeros(problem.x.size)
    whole = evaluate_pool(problem, x, deadline=Deadline())
    assert whole.certified
    proven = []
    for looks in range(0, 150, every):
        part = evaluate_pool(problem, x, deadline=Looks(looks))
        slack = 1e-6 * abs(whole.value)
        assert part.value <= whole.value + slack
        assert part.upper >= whole.value - slack
        assert part.certified == (part.upper - part.value <= slack)
        proven.append(part.upper)
    assert proven[0] == math.inf  # nothing asked: there might be no recourse
    assert whole.upper < min(u for u in proven if u > whole.upper + 1e-6) < math.inf  # and stopped in between


@pytest.mark.parametrize("seed", range(6))
def test_no_point_of_a_fine_grid_is_worse_than_the_bound(seed):
    problem = stores(seed)
    axis = np.linspace(-1, 1, 41)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for x in ([0.0, 0.0], [2.0, 1.0]):
        whole = problem.evaluate(np.array(x))
        seen = evaluate_points(problem, np.array(x), grid, deadline=Deadline())
        assert whole.certified
        assert seen.value <= whole.upper + 1e-6
        assert whole.value <= seen.value + 0.5  # the grid comes near


def test_instances_of_the_papers_larger_sizes_are_settled():
    for n, seed in ((20, 1), (30, 2), (40, 0)):
        problem = CapitalBudgeting.random(n, generator=seed)
        x = problem.sample_first_stage(1, generator=seed)[0]
        worst = problem.evaluate(x)
        assert worst.certified
        tried = problem.sample_uncertainty(200, generator=seed)
        assert max(problem.first_stage_cost(x, xi) + problem.recourse(x, xi).value for xi in tried) <= worst.upper


@pytest.mark.parametrize("problem", [CapitalBudgeting.random(7, generator=5), stores(2), stores(5)])
def test_a_spare_plan_is_cheap_enough_and_no_nearer_to_its_rows_than_the_best(problem):
    rng = np.random.default_rng(0)
    x, rows = np.zeros(problem.x.size), problem.uncertain_rows
    nearer = []
    for xi in rng.uniform(-0.9, 0.9, (12, problem.dim)):
        best = problem.recourse(x, xi)
        total = problem.first_stage_cost(x, xi) + best.value
        assert problem.spare_recourse(x, xi, total - 0.01 * abs(total)) is None
        cost, plan = problem.spare_recourse(x, xi, total + 0.4 * abs(total))
        constant, slopes = problem.cost_form(x, plan)
        assert constant + slopes @ xi == pytest.approx(cost)
        assert total - 1e-6 <= cost <= total + 0.4 * abs(total) + 1e-6
        assert problem.violation(x, plan, xi) <= 1e-6

        def room(y, xi=xi):
            row0, row1 = problem.row_form(x, y)
            return -((row0 + row1 @ xi) / (1 + np.abs(problem.h.constant)))[rows].max()

        assert room(plan) >= min(1.0, room(best.y)) * 0.9 - 1e-9  # found to a tenth, where a program finds it
        nearer.append(room(plan) > room(best.y) + 1e-3)
    assert any(nearer)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 7), st.integers(1, 2), st.integers(0, 10**6), st.sampled_from([0.1, 0.35, 0.6, 0.85, 0.97, 1.1]))
def test_enough_gain_is_reached_by_the_lightest_choice(n, options, seed, share):
    rng = np.random.default_rng(seed)
    weights, gains = rng.uniform(0, 10, (n, options)), rng.uniform(-4, 10, (n, options))
    capacity = float(rng.uniform(0, 25))
    w, g = (np.concatenate([np.zeros((n, 1)), v], axis=1) for v in (weights, gains))
    rows = np.arange(n)
    ways = [(w[rows, list(p)].sum(), g[rows, list(p)].sum()) for p in itertools.product(range(options + 1), repeat=n)]
    best = max(gain for weight, gain in ways if weight <= capacity)
    enough = share * best
    value, chosen = multiple_choice_knapsack(weights, gains, capacity, enough=enough)
    assert g[rows, chosen].sum() == pytest.approx(value, abs=1e-9)
    if enough > best:
        assert value == pytest.approx(best, abs=1e-9)
    else:
        assert value >= enough
        assert w[rows, chosen].sum() == pytest.approx(min(a for a, b in ways if b >= enough), abs=1e-6)


@pytest.mark.parametrize("enough", [math.inf, 30.0])
def test_gains_in_proportion_to_weights_do_not_fill_the_memory(enough):
    rng = np.random.default_rng(4)
    weights = rng.uniform(1, 10, (50, 1))
    capacity = 0.4 * float(weights.sum())
    value, chosen = multiple_choice_knapsack(weights, 0.3 * weights, capacity, enough=enough)
    taken = float(weights[chosen > 0, 0].sum())
    assert taken <= capacity + 1e-6
    assert value == pytest.approx(0.3 * taken)
    assert value >= min(0.3 * capacity, enough) - 2e-7 * capacity


@settings(deadline=None, derandomize=True, max_examples=80)
@given(n=st.integers(1, 5), m=st.integers(0, 8), seed=st.integers(0, 10**6), open_top=st.booleans())
def test_a_small_maximum_is_that_of_another_solver_and_never_below_it(n, m, seed, open_top):
    rng = np.random.default_rng(seed)
    rows, upper = rng.normal(size=(m, n)), rng.normal(size=m) + 0.5
    low, high = -rng.uniform(0, 2, n), rng.uniform(0, 2, n)
    high[-1] = math.inf if open_top else high[-1]
    status, point, bound = SmallMaximum().solve(rows, upper, low, high)
    cost = np.append(np.zeros(n - 1), -1.0)
    truth = linprog(cost, A_ub=rows if m else None, b_ub=upper if m else None, bounds=list(zip(low, high, strict=True)))
    expected = {0: Status.OPTIMAL, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED}[truth.status]
    assert status == expected
    if status == Status.OPTIMAL:
        assert -truth.fun - 1e-9 <= bound <= -truth.fun + 1e-6
        assert point[-1] == pytest.approx(-truth.fun, abs=1e-6)
    else:
        assert point is None
        assert bound == (-math.inf if status == Status.INFEASIBLE else math.inf)


@pytest.mark.parametrize("method", [StaticRobust(), KAdaptability(2)])
def test_plans_prepared_for_the_whole_set_are_a_guarantee_where_time_does_not_suffice_for_more(method, monkeypatch):
    problem = stores(1)
    whole = method.solve(problem)
    nothing = WorstCase(-math.inf, math.inf, None, False, Status.TIME_LIMIT)
    monkeypatch.setattr(problem, "evaluate", lambda x, **_: nothing)
    part = method.solve(problem)
    assert whole.worst_case - 1e-6 <= part.upper < math.inf
    assert not part.certified
    assert part.upper >= TwoStageProblem.evaluate(problem, part.x).value - 1e-6
