"""The outcome matrix of the solver layer: each way to stop, with and without a point, for LP and MILP."""

import math

import numpy as np
import pytest

from optim_robust.solver import Deadline, Program, Status


def _knapsack(n, seed=0, *, parity=False):
    """A knapsack; with parity, an equality that no integer point satisfies but that takes long to refute."""
    rng = np.random.default_rng(seed)
    program = Program()
    v = program.add_variables(np.zeros(n), 1, integer=True, cost=-rng.integers(20, 100, n).astype(float))
    program.add_rows([(rng.integers(20, 100, (5, n)).astype(float), v)], upper=15.0 * n)
    if parity:
        program.add_rows([(2.0 * rng.integers(1000, 9000, (1, n)), v)], lower=40_001.0, upper=40_001.0)
    return program


@pytest.mark.quick
@pytest.mark.parametrize("integer", [False, True])
def test_optimal_infeasible_and_unbounded_are_told_apart(integer):
    program = Program()
    v = program.add_variables(np.zeros(2), 10.0, integer=integer, cost=[-1.0, -2.0])
    program.add_rows([(np.array([[2.0, 2.0]]), v)], upper=7.0)
    best = program.solve()
    assert best.status == Status.OPTIMAL
    assert best.value == best.bound == pytest.approx(-6.0 if integer else -7.0)
    free = program.add_variables([0.0], math.inf, integer=integer, cost=-1.0)
    unbounded = program.solve()
    assert (unbounded.status, unbounded.point, unbounded.bound) == (Status.UNBOUNDED, None, -math.inf)
    program.add_rows([(np.ones((1, 1)), free)], upper=3.0)
    assert program.solve().value == pytest.approx(best.value - 3)
    program.add_rows([(np.ones((1, 1)), free)], lower=4.0)
    infeasible = program.solve()
    assert (infeasible.status, infeasible.point, infeasible.bound) == (Status.INFEASIBLE, None, math.inf)


def test_infeasible_and_unbounded_at_once_is_infeasible():
    program = Program()
    v = program.add_variables(np.full(2, -math.inf), math.inf, integer=[True, False], cost=[-1.0, -1.0])
    program.add_rows([(np.array([[1.0, 0.0]]), v)], lower=1.2, upper=1.8)
    assert program.solve().status == Status.INFEASIBLE


def test_a_time_limit_is_kept_and_what_is_held_is_a_solution_with_a_bound():
    program = _knapsack(120)
    clock = Deadline()
    answer = program.solve(Deadline(1.0))
    assert clock.elapsed < 2.1
    assert answer.status in (Status.TIME_LIMIT, Status.OPTIMAL)
    assert answer.point is not None
    assert program.violation(answer.point) <= 1e-7
    assert answer.bound <= answer.value
    again = program.solve(Deadline(1.0))  # the limit is of this solve, not of the object's life
    assert again.value <= answer.value + 1e-9 or again.status == Status.TIME_LIMIT


def test_a_time_limit_without_an_incumbent_holds_nothing():
    answer = _knapsack(60, parity=True).solve(Deadline(0.3))
    assert answer.point is None
    assert math.isnan(answer.value)
    assert answer.status in (Status.TIME_LIMIT, Status.INFEASIBLE)
    spent = Deadline(1e-9)
    assert _knapsack(5).solve(spent).status == Status.TIME_LIMIT


def test_bounds_are_reported_while_a_search_goes_on():
    seen: list[tuple[float, float]] = []
    answer = _knapsack(40).solve(Deadline(2.0), on_bound=lambda bound, value: seen.append((bound, value)))
    assert seen
    assert all(bound <= min(value, answer.bound) + 1e-6 for bound, value in seen)
    assert answer.bound <= answer.value


def test_points_are_checked_against_bounds_rows_and_integrality():
    program = Program()
    v = program.add_variables(np.zeros(2), 1.0, integer=True)
    program.add_rows([(np.ones((1, 2)), v)], upper=1.0)
    assert program.violation(np.array([1.0, 0.0])) == 0
    assert program.violation(np.full(2, 0.4)) == pytest.approx(0.4)
    assert program.violation(np.ones(2)) == pytest.approx(0.5)  # relative to 1 + |bound|
    assert program.violation(np.array([0.0, -1.0])) == pytest.approx(1.0)
    assert program.violation(np.array([np.nan, 0.0])) == math.inf


def test_integers_that_are_nearly_whole_are_made_whole_without_breaking_rows():
    program = Program()
    v = program.add_variables([0.0, 0.0], [1.0, 1e6], integer=[True, False], cost=[1e6, -1.0])
    program.add_rows([(np.array([[-1e6, 1.0]]), v)], upper=0.5)  # v1 <= 0.5 + 1e6 v0
    answer = program.solve()
    assert answer.point is not None
    assert answer.point[0] == round(answer.point[0])
    assert program.violation(answer.point) <= 1e-7
    nearly = program._polished(np.array([0.0, 1.3]), np.array([8e-7, 1.3]))
    assert nearly.tolist() == [0.0, pytest.approx(0.5)]
    assert program.upper[0] == 1.0  # bounds are as they were


def test_a_program_without_variables_and_wrong_limits():
    assert Program().solve().value == 0.0
    with pytest.raises(ValueError, match="time_limit"):
        Deadline(0.0)
    with pytest.raises(ValueError, match="time_limit"):
        Deadline(math.nan)
