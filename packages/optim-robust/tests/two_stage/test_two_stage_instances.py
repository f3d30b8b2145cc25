"""Knapsack and capital budgeting: files, generators, and oracles that equal the MILP of the general form."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optim_robust.two_stage import CapitalBudgeting, RobustKnapsack, TwoStageProblem, load_problem, save_json
from optim_robust.two_stage.multiple_choice import multiple_choice_knapsack
from robust_core.errors import DataMissingError, MalformedFileError

DATA = Path(__file__).parents[1] / "data" / "robust_knapsack"
FILES = sorted(DATA.glob("RKP_*"))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(0, 6), seed=st.integers(0, 10**6), integer=st.booleans(), price=st.sampled_from([0, 0.3, 1, 4]))
def test_multiple_choice_knapsack_equals_brute_force(n, seed, integer, price):
    rng = np.random.default_rng(seed)
    weights, gains = rng.uniform(0, 10, (n, 2)), rng.uniform(-4, 10, (n, 2))
    if integer:
        weights, gains = weights.round(), gains.round()
    capacity = float(rng.uniform(0, 25))
    loan = float(rng.uniform(0, 15)) if price else 0.0
    value, chosen = multiple_choice_knapsack(weights, gains, capacity, loan=loan, price=price)
    w, g = (np.concatenate([np.zeros((n, 1)), v], axis=1) for v in (weights, gains))
    rows = np.arange(n)

    def paid(options):
        return g[rows, options].sum() - price * max(0.0, w[rows, options].sum() - capacity)

    ways = [list(p) for p in itertools.product(range(3), repeat=n) if w[rows, list(p)].sum() <= capacity + loan]
    assert value == pytest.approx(max(map(paid, ways)), abs=1e-9)
    assert paid(chosen) == pytest.approx(value, abs=1e-9)
    assert w[rows, chosen].sum() <= capacity + loan + 1e-7


@pytest.mark.quick
@pytest.mark.parametrize("family", [RobustKnapsack, CapitalBudgeting])
def test_recourse_equals_the_general_milp(family):
    for seed in range(12):
        problem = family.random(4 + seed % 6, generator=seed)
        x = problem.sample_first_stage(1, generator=seed)[0]
        xi = problem.sample_uncertainty(1, generator=seed)[0]
        fast, slow = problem.recourse(x, xi), TwoStageProblem.recourse(problem, x, xi)
        assert fast.value == pytest.approx(slow.value, rel=1e-7, abs=1e-7)
        assert problem.violation(x, fast.y, xi) <= 1e-9
        constant, slopes = problem.cost_form(x, fast.y)
        assert constant + slopes @ xi == pytest.approx(problem.first_stage_cost(x, xi) + fast.value)


def test_nothing_accepted_costs_nothing():
    worst = RobustKnapsack.random(8).evaluate(np.zeros(8))
    assert (worst.value, worst.upper, worst.certified) == (0.0, 0.0, True)


def test_published_files_are_read_and_written_unchanged(tmp_path):
    assert len(FILES) == 4
    for file in FILES:
        problem = RobustKnapsack.from_file(file)
        assert problem.n == 20
        problem.to_file(tmp_path / "copy")
        copy = load_problem(str(tmp_path / "copy"))
        for field in ("profit", "degradation", "repair", "weight", "outsourcing"):
            np.testing.assert_array_equal(getattr(copy, field), getattr(problem, field))
        assert (copy.capacity, copy.gamma) == (problem.capacity, problem.gamma)
    first = RobustKnapsack.from_file(DATA / "RKP_UN_n20_R1000_H100_h40_dev0.15_d0.5")
    assert first.gamma == 3
    assert first.sense == -1


def test_capital_budgets_survive_files_and_json(tmp_path):
    problem = CapitalBudgeting.random(5, generator=2)
    problem.to_file(tmp_path / "CB_n5", seed=2)
    save_json(problem, tmp_path / "cb.json")
    for words in ("CB_n5", "cb.json"):
        copy = load_problem(str(tmp_path / words))
        for field in ("cost", "revenue", "phi", "psi"):
            np.testing.assert_array_equal(getattr(copy, field), getattr(problem, field))
        assert copy.budget == problem.budget
    save_json(RobustKnapsack.random(4), tmp_path / "kp.json")
    assert load_problem(str(tmp_path / "kp.json")).n == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1"),
        ("2 10", "line 1"),
        ("2 10 1\n 1 1 1 1 1\n", "announces 2 items"),
        ("1 10 1\n 1 1 1 1\n", "line 2: five"),
        ("1 10 1\n 1 1 x 1 1\n", "line 2"),
        ("1 10 1\n 1 1 nan 1 1\n", "line 2: NaN"),
        ("1 10 1\n 1 -1 1 1 1\n", "degradation"),
        ("1 -10 1\n 1 1 1 1 1\n", "capacity"),
        ("1.5 10 1\n 1 1 1 1 1\n", "items"),
        ("1 1 4 5 0\n1\n1\n1 0 0\n1 0 0 0\n", "line 4"),
        ("1 1 4 5 0\n-1\n1\n1 0 0 0\n1 0 0 0\n", "negative"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, text, match):
    file = tmp_path / "instance"
    file.write_text(text)
    with pytest.raises(MalformedFileError, match=match):
        load_problem(str(file))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "Expecting"), ('{"kind": "x"}', "kind"), ('{"kind": "knapsack", "profit": [1]}', "missing keys"),
     ("[1]", "kind"), ('{"kind": "capital-budgeting", "cost": [1], "revenue": [1], "phi": [1], "psi": [[1]], '
                       '"budget": 1}', "shape")],
)  # fmt: skip
def test_malformed_json_is_named(tmp_path, text, match):
    file = tmp_path / "instance.json"
    file.write_text(text)
    with pytest.raises(MalformedFileError, match=match):
        load_problem(str(file))


def test_a_loan_is_read_where_it_is_asked_for(tmp_path):
    """The published files name a max_loan, and their published results are without loans."""
    problem = CapitalBudgeting.random(5, loans=True, generator=2)
    problem.to_file(tmp_path / "CB_n5", seed=2)
    save_json(problem, tmp_path / "cb.json")
    bare = load_problem(str(tmp_path / "CB_n5"))
    assert (bare.max_loan, bare.x.size, bare.name) == (0.0, 5, "CB_n5")
    for words in ("CB_n5:loans", "cb.json"):
        copy = load_problem(str(tmp_path / words))
        assert (copy.max_loan, copy.loan_cost, copy.late_factor) == (problem.max_loan, 0.12, 1.2)
        assert copy.x.names == (*(f"early{i}" for i in range(5)), "early_loan")
        assert (copy.T.constant != problem.T.constant).nnz == 0
    assert problem.max_loan == pytest.approx(1.5 * problem.cost.sum() - problem.budget)
    CapitalBudgeting.random(3).to_file(tmp_path / "CB_n3")
    RobustKnapsack.random(3).to_file(tmp_path / "RKP_n3")
    for words, match in (("CB_n3:loans", "max_loan=0"), ("RKP_n3:loans", "capital budgets")):
        with pytest.raises(MalformedFileError, match=match):
            load_problem(str(tmp_path / words))
    with pytest.raises(ValueError, match="late_factor"):
        CapitalBudgeting(cost=[1], revenue=[1], phi=[[1]], psi=[[1]], budget=1, max_loan=1, late_factor=0.9)


def cheapest_answer(problem, x, xi):
    """The second stage by all sets of late projects, each with the loan that it needs."""
    n = problem.n
    cost, gain = problem.cost * (1 + problem.phi @ xi / 2), problem.revenue * (1 + problem.psi @ xi / 2)
    left, best = problem.budget + x[n] - cost @ x[:n], np.inf
    for late in itertools.product((0.0, 1.0), repeat=n):
        y = np.array(late)
        need = max(0.0, cost @ y - left)
        if (y + x[:n] <= 1).all() and need <= problem.max_loan:
            price = problem.loan_cost * problem.late_factor * need
            best = min(best, price - problem.kappa * gain @ y)
    return best


@pytest.mark.quick
def test_with_loans_the_recourse_is_that_of_all_sets_of_late_projects():
    for seed in range(8):
        problem = CapitalBudgeting.random(4, loans=True, generator=seed)
        if seed % 2:  # a loan that binds
            problem = CapitalBudgeting(
                cost=problem.cost, revenue=problem.revenue, phi=problem.phi, psi=problem.psi, budget=problem.budget,
                max_loan=0.2 * problem.budget, loan_cost=0.05,
            )  # fmt: skip
        x = problem.sample_first_stage(1, generator=seed)[0]
        xi = problem.sample_uncertainty(1, generator=seed)[0]
        found, general = problem.recourse(x, xi), TwoStageProblem.recourse(problem, x, xi)
        assert found.value == pytest.approx(cheapest_answer(problem, x, xi), abs=1e-9)
        assert found.value == pytest.approx(general.value, abs=1e-6)
        assert problem.violation(x, found.y, xi) <= 1e-7
        costs, _ = problem.plan_forms(x, found.y)
        here = problem.first_stage_cost(x, xi) + found.value
        assert max(constant + slopes @ xi for constant, slopes in costs) == pytest.approx(here, abs=1e-7)


def test_early_loans_of_samples_pay_for_the_projects_in_every_scenario():
    problem = CapitalBudgeting.random(6, loans=True, generator=4)
    points = problem.sample_first_stage(12, generator=1)
    corners = problem.uncertainty.vertices()
    for x in points:
        assert problem.first_stage_violation(x) <= 1e-9
        worst = max(problem.cost * (1 + problem.phi @ xi / 2) @ x[:6] for xi in corners)
        assert worst <= problem.budget + x[6] + 1e-9
    assert (points[:, 6] == 0).any()
    assert (points[:, 6] > 0.1).any()
    poor = problem.check_first_stage(np.append(np.ones(6), problem.max_loan))  # everything, on credit
    with pytest.raises(ValueError, match="rows"):
        problem.check_first_stage(poor - np.append(np.zeros(6), 0.01))


def test_files_that_are_not_there_and_binary_files(tmp_path):
    with pytest.raises(DataMissingError):
        load_problem(str(tmp_path / "none"))
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    with pytest.raises(MalformedFileError, match="text"):
        load_problem(str(tmp_path / "bytes"))


def test_the_generator_draws_what_the_paper_describes():
    one = RobustKnapsack.random(500, correlation="SC", delta=0.5, h=40, dev=0.1, generator=1)
    np.testing.assert_allclose(one.profit, one.weight + 100)
    np.testing.assert_allclose(one.repair, one.degradation / 2 + one.weight / 10)
    ratio = one.degradation / one.profit
    assert (ratio >= 0.25).all()
    assert (ratio <= 0.75).all()
    assert one.capacity == pytest.approx(40 / 101 * one.weight.sum())
    assert one.gamma == pytest.approx(50)
    assert {RobustKnapsack.random(4, generator=s).name.split("_")[1] for s in range(40)} == {"UN", "WC", "ASC", "SC"}
    points = one.sample_uncertainty(20, scheme="mixed")
    assert all(one.uncertainty.contains(p) for p in points)
    assert sum(bool(((p < 1e-12) | (p > 1 - 1e-12)).all()) for p in points) == 10


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_the_static_row_of_capital_budgeting_is_exactly_affordability(seed):
    problem = CapitalBudgeting.random(6, generator=seed)
    np.testing.assert_allclose(problem.A.toarray()[0], 1.5 * problem.cost)
    corners = problem.uncertainty.vertices()
    for x in np.random.default_rng(seed).integers(0, 2, (10, 6)).astype(float):
        always = all(problem.recourse(x, xi).value < np.inf for xi in corners)
        assert always == bool((problem.A @ x <= problem.b).all())
    assert all((problem.A @ x <= problem.b).all() for x in problem.sample_first_stage(5, generator=seed))


@pytest.mark.parametrize("field", ["profit", "weight", "outsourcing"])
def test_vectors_that_do_not_fit_are_named(field):
    one = RobustKnapsack.random(3)
    names = ("profit", "degradation", "repair", "weight", "outsourcing")
    given = {name: getattr(one, name) for name in names} | {"capacity": 1.0, "gamma": 1.0}
    with pytest.raises(ValueError, match=field if field != "profit" else "degradation"):
        RobustKnapsack(**(given | {field: given[field][:2]}))
    with pytest.raises(ValueError, match=field):
        RobustKnapsack(**(given | {field: given[field] * np.nan}))
    with pytest.raises(ValueError, match="x has shape"):
        one.evaluate([0.0, 1.0])
    with pytest.raises(ValueError, match="bounds, integrality"):
        one.evaluate([0.5, 0.0, 0.0])
