"""Uncertainty sets: membership, samples, vertices and worst points agree with each other and with linear programs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optim_robust.uncertainty import Box, Budget, Discrete, Ellipsoid, Polyhedron, from_pyros
from robust_core.errors import RobustError

SETS = {
    "box": Box([-1.0, 0.0, 2.0], [1.0, 0.0, 5.0]),
    "budget": Budget([2.0, -3.0, 0.5], 1.5, origin=[1.0, 1.0, 1.0]),
    "polyhedron": Polyhedron([[1.0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], [2.0, 0, 0, 1, 1]),
    "discrete": Discrete([[0.0, 1, 2], [3, 1, 0], [1, 1, 1]]),
    "ellipsoid": Ellipsoid([1.0, 2, 3], [[1.0, 0, 0], [0.5, 2, 0], [0, 0, 0.1]]),
}


@pytest.mark.parametrize("kind", SETS)
def test_samples_lie_inside_and_belong_to_their_index(kind):
    known = SETS[kind]
    points = known.sample(40, generator=3)
    assert all(known.contains(p, tol=1e-9) for p in points)
    np.testing.assert_array_equal(points[:5], known.sample(5, generator=3))
    assert known.contains(known.nominal)
    assert not known.contains(known.upper + 1.0)


@pytest.mark.parametrize("kind", SETS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(direction=st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_worst_is_no_better_than_any_sample_and_lies_inside(kind, direction):
    known = SETS[kind]
    point = known.worst(direction)
    assert known.contains(point, tol=1e-6)
    assert (known.sample(3) @ np.array(direction)).max() <= point @ np.array(direction) + 1e-7


@pytest.mark.parametrize("kind", ["box", "budget", "polyhedron"])
def test_vertices_give_every_linear_maximum(kind):
    known = SETS[kind]
    corners = known.vertices()
    assert all(known.contains(v) for v in corners)
    matrix, bound = known.constraints()
    for direction in np.random.default_rng(0).standard_normal((20, 3)):
        limits = list(zip(known.lower, known.upper, strict=True))
        answer = linprog(-direction, A_ub=matrix if matrix.shape[0] else None, b_ub=bound if len(bound) else None,
                         bounds=limits)  # fmt: skip
        assert (corners @ direction).max() == pytest.approx(-answer.fun, abs=1e-8)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(n=st.integers(1, 5), quarters=st.integers(0, 24))
def test_vertices_of_a_budget_are_its_extreme_points(n, quarters):
    gamma = quarters / 4
    known = Budget(np.ones(n), gamma)
    corners = known.vertices()
    assert len(np.unique(corners.round(12), axis=0)) == len(corners)
    if gamma == int(gamma):
        whole = [z for z in itertools.product((0, 1), repeat=n) if sum(z) <= gamma]
        assert len(corners) == len(whole)


def test_an_ellipsoids_box_contains_it_and_exact_methods_are_refused():
    known = SETS["ellipsoid"]
    outer = known.enclosing_box()
    assert all(outer.contains(p) for p in known.sample(100))
    with pytest.raises(RobustError, match="enclosing_box"):
        known.constraints()


def test_sets_of_pyros_are_read():
    from pyomo.contrib import pyros

    found = from_pyros(pyros.CardinalitySet([10.0, 10], [8.0, 4], 1.5))
    assert found.contains([18, 12])
    assert not found.contains([18, 13])
    assert from_pyros(pyros.BoxSet([(0, 1), (2, 3)])).upper.tolist() == [1, 3]
    assert len(from_pyros(pyros.DiscreteScenarioSet([(1, 2), (3, 4)])).vertices()) == 2
    assert from_pyros(pyros.PolyhedralSet([[1, 0], [-1, 0], [0, 1], [0, -1]], [1, 0, 1, 0])).contains([1, 1])
    with pytest.raises(TypeError, match="FactorModelSet"):
        from_pyros(pyros.FactorModelSet([0, 0], 1, [[1], [1]], 0.5))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Box([0.0, 1], [1.0, 0]), "empty"),
        (lambda: Box([0.0], [np.inf]), "bounded"),
        (lambda: Budget([1.0], -1), "gamma"),
        (lambda: Polyhedron([[1.0]], [1.0]), "unbounded"),
        (lambda: Polyhedron([[1.0], [-1.0]], [0.0, -1.0]), "empty"),
        (lambda: Discrete(np.zeros((0, 2))), "scenarios"),
        (lambda: Ellipsoid([0.0, 0], np.zeros((2, 2))), "full rank"),
    ],
)
def test_sets_that_are_none_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_too_many_vertices_are_refused_before_they_are_made():
    with pytest.raises(RobustError, match="vertices"):
        Box(np.zeros(40), np.ones(40)).vertices()
    with pytest.raises(RobustError, match="vertices"):
        Budget(np.ones(60), 20.5).vertices()
