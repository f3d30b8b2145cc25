"""Users' Pyomo models: what is affine is read exactly, what is not is refused by name, the model is left as found."""

import numpy as np
import pyomo.environ as pyo
import pytest

from optim_robust.solver import Status
from optim_robust.two_stage import ExactCCG, PyROS, RobustKnapsack, StaticRobust, load_problem, read_pyomo, to_pyros
from optim_robust.two_stage.pyomo_model import PyomoProblem
from optim_robust.uncertainty import Box, Budget, Discrete, Polyhedron
from robust_core.errors import RobustError


def build(domain=pyo.NonNegativeReals, sense=pyo.minimize):
    model = pyo.ConcreteModel("capacity")
    model.i = pyo.RangeSet(3)
    model.capacity = pyo.Var(model.i, domain=domain, bounds=(0, 100))
    model.shortage = pyo.Var(model.i, domain=pyo.NonNegativeReals)
    model.demand = pyo.Param(model.i, mutable=True, initialize=7.0)
    model.price = pyo.Param(mutable=True, initialize=3.0)
    model.meet = pyo.Constraint(model.i, rule=lambda m, i: m.capacity[i] + m.shortage[i] >= m.demand[i])
    model.land = pyo.Constraint(expr=sum(model.capacity[i] for i in model.i) <= 90)
    sign = 1 if sense == pyo.minimize else -1
    cost = sum(model.capacity[i] + model.price * model.shortage[i] for i in model.i)
    model.cost = pyo.Objective(expr=sign * cost, sense=sense)
    return model


def read(model, uncertain=None, uncertainty=None):
    return read_pyomo(
        model, first_stage=[model.capacity], second_stage=[model.shortage], uncertain=uncertain or [model.demand],
        uncertainty=uncertainty or Budget([8.0] * 3, 1.5, origin=[10.0] * 3),
    )  # fmt: skip


@pytest.mark.quick
def test_the_published_capacity_model_is_solved_and_written_back():
    model = build()
    problem = read(model)
    assert problem.name == "capacity"
    assert problem.A.shape == (1, 3)  # land: certain, first stage only
    assert [model.demand[i].value for i in model.i] == [7.0] * 3
    found = ExactCCG().solve(problem)
    assert (found.status, found.worst_case) == (Status.OPTIMAL, pytest.approx(54.0))
    problem.load(found)
    assert sum(pyo.value(model.capacity[i]) for i in model.i) == pytest.approx(54.0)
    maximised = ExactCCG().solve(read(build(sense=pyo.maximize)))
    assert maximised.worst_case == pytest.approx(54.0)
    assert read(build(sense=pyo.maximize)).sense == -1


def test_pyros_agrees_and_takes_our_sets():
    problem = read(build())
    for order in (0, 1):
        found = PyROS(order).solve(problem, time_limit=60)
        assert found.info["pyros_value"] == pytest.approx(54.0, abs=1e-3)
        assert found.worst_case == pytest.approx(54.0, abs=1e-3)
    with pytest.raises(RobustError, match="integer"):
        PyROS().solve(read(build(domain=pyo.Integers)))
    with pytest.raises(TypeError, match="read_pyomo"):
        PyROS().solve(RobustKnapsack.random(3))
    corners = Polyhedron([[1.0, 0], [-1, 0], [0, 1], [0, -1]], [1.0, 0, 1, 0])
    for known in (Box([0.0, 0], [1.0, 1]), corners, Discrete([[0.0, 0], [1, 1]])):
        assert to_pyros(known).dim == 2
    with pytest.raises(TypeError, match="Budget"):
        to_pyros(Budget([-1.0], 1))


def test_uncertain_costs_coefficients_and_several_parameters_are_read():
    model = build()
    model.rate = pyo.Param(mutable=True, initialize=1.0)
    model.output = pyo.Constraint(expr=model.rate * model.capacity[1] + model.shortage[1] >= 5 + 2 * model.rate)
    model.range = pyo.Constraint(expr=(1, model.capacity[2], 60))
    model.same = pyo.Constraint(expr=model.capacity[3] == 4)
    problem = read(model, [model.price, model.rate, model.demand], Box([1, 0.5, 8, 9, 10], [4, 2.0, 12, 13, 14]))
    xi = np.array([2.0, 0.7, 9.0, 10.0, 11.0])
    x, y = np.array([6.0, 9.0, 4.0]), np.array([3.0, 1.0, 7.0])
    constant, slopes = problem.cost_form(x, y)
    assert constant + slopes @ xi == pytest.approx(19 + 2.0 * 11)
    row0, row1 = problem.row_form(x, y)
    rows = dict(zip(problem.row_names, row0 + row1 @ xi, strict=True))
    assert rows["output"] == pytest.approx(5 + 2 * 0.7 - (0.7 * 6 + 3))
    assert rows["meet[2]"] == pytest.approx(10 - 10)
    assert problem.A.shape[0] == 5  # land, both sides of range, both of same
    assert problem.first_stage_violation(x) == pytest.approx(0.0)


def _nonlinear(m):
    m.square = pyo.Constraint(expr=m.capacity[1] ** 2 <= 4)


def _quadratic_in_xi(m):
    m.bent = pyo.Constraint(expr=m.demand[1] * m.demand[2] * m.shortage[1] <= 4)


def _square_of_one(m):
    m.curve = pyo.Constraint(expr=m.demand[1] ** 2 <= 1000 * m.capacity[1] + 1000)


def _bent_cost(m):
    m.cost.set_value(m.cost.expr + m.demand[1] ** 2)


def _stranger(m):
    m.other = pyo.Var()
    m.with_other = pyo.Constraint(expr=m.other <= 4)


def _two_goals(m):
    m.second = pyo.Objective(expr=m.capacity[1])


def _moving_bound(m):
    m.shortage[1].setub(m.demand[1])


def _sos(m):
    m.special = pyo.SOSConstraint(var=m.capacity, sos=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_nonlinear, "square is not linear"), (_quadratic_in_xi, "bent is not affine"),
        (_square_of_one, "curve is not affine"), (_bent_cost, "objective is not affine"),
        (_stranger, "with_other holds other"), (_two_goals, "2 active objectives"),
        (_moving_bound, "variable bounds"), (_sos, "special is a SOSConstraint"),
    ],
)  # fmt: skip
def test_what_is_not_affine_is_refused_by_name(change, match):
    model = build()
    change(model)
    with pytest.raises(ValueError, match=match):
        read(model)
    assert model.demand[1].value == 7.0


def test_wrong_components_are_named():
    model = build()
    model.fixed = pyo.Param(initialize=1.0)
    with pytest.raises(TypeError, match="fixed"):
        read(model, [model.fixed], Box([0.0], [1.0]))
    with pytest.raises(TypeError, match="capacity"):
        read(model, [model.capacity])
    with pytest.raises(ValueError, match="3 uncertain parameters"):
        read(model, uncertainty=Box([0.0], [1.0]))
    with pytest.raises(ValueError, match="twice"):
        read_pyomo(model, first_stage=[model.capacity], second_stage=[model.capacity, model.shortage],
                   uncertain=[model.demand], uncertainty=Box([0.0] * 3, [1.0] * 3))  # fmt: skip


def test_a_solution_without_x_is_not_loaded():
    model = build()
    model.never = pyo.Constraint(expr=model.capacity[1] >= 200)
    problem = read(model)
    found = StaticRobust().solve(problem)
    assert found.status == Status.INFEASIBLE
    with pytest.raises(ValueError, match="infeasible"):
        problem.load(found)


def test_python_files_are_loaded_by_function_and_explained(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(
        "import pyomo.environ as pyo\n"
        "from optim_robust.two_stage import read_pyomo\n"
        "from optim_robust.uncertainty import Box\n"
        "def build():\n"
        "    m = pyo.ConcreteModel()\n"
        "    m.x, m.y = pyo.Var(domain=pyo.Binary), pyo.Var(domain=pyo.Binary)\n"
        "    m.p = pyo.Param(mutable=True)\n"
        "    m.c = pyo.Constraint(expr=m.x + m.y >= 1)\n"
        "    m.o = pyo.Objective(expr=m.x + m.p * m.y)\n"
        "    return read_pyomo(m, first_stage=[m.x], second_stage=[m.y], uncertain=[m.p], uncertainty=Box([0], [2]))\n"
        "other = 3\n"
        "def wrong():\n    return 3\n"
    )
    problem = load_problem(f"{file}:build")
    assert isinstance(problem, PyomoProblem)
    assert ExactCCG().solve(problem).worst_case == pytest.approx(1.0)
    for name, match in (("other", "no function"), ("wrong", "returned a int")):
        with pytest.raises(ValueError, match=match):
            load_problem(f"{file}:{name}")
    with pytest.raises(ValueError, match=":build"):
        load_problem(str(file))
