# pyright: reportArgumentType=false
"""Projections onto the simplex and onto mixtures of little entropy, against slow references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from robust_core.attacks.tokens import project_entropy, project_simplex

vectors = arrays("float64", st.integers(1, 9), elements=st.floats(-5, 5, width=32))


def _draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _by_sorting(u):
    """Duchi et al. 2008, figure 1."""
    ordered = sorted(u.tolist(), reverse=True)
    total, theta = 0.0, 0.0
    for number, value in enumerate(ordered, 1):
        total += value
        if value - (total - 1) / number > 0:
            theta = (total - 1) / number
    return torch.tensor([max(value - theta, 0.0) for value in u.tolist()], dtype=torch.float64)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=60)
@given(vectors)
def test_projection_is_the_nearest_point_of_the_simplex(values):
    u = torch.from_numpy(values.copy())
    point = project_simplex(u)
    assert torch.allclose(point, _by_sorting(u), atol=1e-12)
    assert (point >= 0).all()
    assert abs(float(point.sum()) - 1) < 1e-12
    assert torch.allclose(project_simplex(point), point, atol=1e-12)
    padded = torch.cat([torch.full((2,), 9.0, dtype=u.dtype), u])
    valid = torch.arange(len(padded)) >= 2
    assert torch.allclose(project_simplex(padded, valid)[2:], point, atol=1e-12)
    assert not project_simplex(padded, valid)[:2].any()


def test_projection_solves_the_quadratic_program():
    for seed in range(3):
        u = _draw(6, seed=seed).numpy()
        solved = minimize(
            lambda v, u=u: ((v - u) ** 2).sum(),
            [1 / 6] * 6,
            jac=lambda v, u=u: 2 * (v - u),
            bounds=[(0, None)] * 6,
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
            options={"ftol": 1e-14},
        )
        assert torch.allclose(project_simplex(torch.from_numpy(u)), torch.from_numpy(solved.x), atol=1e-6)


def test_projection_of_many_rows_of_a_large_vocabulary():
    u = 1 / 50_000 + 0.01 * _draw(3, 50_000, dtype=torch.float32).sign()  # as after the first step of Adam
    u[2, 50:] -= 1  # the largest stand together
    point = project_simplex(u)
    assert torch.allclose(point.sum(1), torch.ones(3), atol=1e-5)
    assert torch.allclose(point, torch.stack([_by_sorting(row.double()) for row in u]).float(), atol=1e-7)
    assert not project_simplex(u, torch.zeros_like(u, dtype=torch.bool)).any()
    tail = torch.arange(50_000) >= 49_990
    assert torch.allclose(
        project_simplex(u, tail)[:, tail], torch.stack([_by_sorting(r) for r in u[:, tail].double()]).float()
    )
    assert project_simplex(u.bfloat16()).dtype == torch.bfloat16


@settings(deadline=None, derandomize=True, max_examples=60)
@given(vectors, st.floats(0, 1))
def test_entropy_is_bounded_and_moves_away_from_the_centre(values, gini):
    u = project_simplex(torch.from_numpy(values.copy()))
    point = project_entropy(u, gini)
    assert (point >= 0).all()
    assert abs(float(point.sum()) - 1) < 1e-9
    face = u > 0
    centre = face.double() / face.sum()
    index, before = (1 - float((p**2).sum()) for p in (point, u))
    if float((u - centre).abs().max()) < 1e-9:
        assert torch.allclose(point, u)  # the centre of a face
    elif before <= gini:
        assert torch.equal(point, u)
    elif torch.equal(point > 0, face):  # nothing became negative: on the sphere, on the same ray
        assert index == pytest.approx(gini, abs=1e-9)
        away, moved = u - centre, point - centre
        assert torch.cosine_similarity(away, moved, dim=0) == pytest.approx(1, abs=1e-9)
    else:
        ties = float((point[point > 0] - point.max()).abs().max()) < 1e-9
        assert index <= gini + 1e-9 or ties
