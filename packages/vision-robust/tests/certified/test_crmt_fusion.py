"""Orthonormal class directions: exact, differentiable everywhere, and the same in float64 up to one rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.random import stream
from vision_robust.certified.crmt import OrthogonalFusion, orthonormal_rows

SMALL = settings(deadline=None, derandomize=True, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=stream(seed, 0, "crmt tests"), dtype=dtype)


@pytest.mark.quick
@given(st.integers(1, 8), st.integers(0, 8), st.booleans(), st.integers(0, 1000))
@SMALL
def test_rows_are_orthonormal_and_those_of_the_inverse_root(k, more, centre, seed):
    p = k + more + centre
    z = normal(k, p, seed=seed, dtype=torch.float64)
    w = orthonormal_rows(z, centre)
    torch.testing.assert_close(w @ w.T, torch.eye(k, dtype=torch.float64), atol=1e-9, rtol=0)
    z = z - z.mean(1, keepdim=True) if centre else z
    values, vectors = torch.linalg.eigh(z @ z.T)
    root = vectors @ torch.diag(values.clamp(min=1e-300).rsqrt()) @ vectors.T
    if values[0] > 1e-4:
        torch.testing.assert_close(w, root @ z, atol=1e-6, rtol=0)
    if centre:
        assert w.mean(1).abs().max() < 1e-9


def test_the_gradient_of_orthogonal_rows_is_right_and_stays_finite_where_singular_values_coincide():
    z = normal(3, 5, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(orthonormal_rows, (z,))
    assert torch.autograd.gradcheck(lambda v: orthonormal_rows(v, True), (z,))
    equal = torch.eye(3, 5, dtype=torch.float64).requires_grad_(True)  # the gradient of an SVD divides by 0 here
    assert torch.autograd.gradcheck(orthonormal_rows, (equal,))
    flat = torch.ones(3, 5).requires_grad_(True)
    (gradient,) = torch.autograd.grad((orthonormal_rows(flat) * normal(3, 5)).sum(), flat)
    assert gradient.isfinite().all()
    torch.testing.assert_close(orthonormal_rows(flat) @ orthonormal_rows(flat).T, torch.eye(3), atol=1e-5, rtol=0)


def test_a_float64_copy_has_the_same_directions_up_to_one_rounding():
    fusion = OrthogonalFusion((7, 7), 5)
    wide = copy.deepcopy(fusion).double()
    gap = (fusion.direction(0).double() - wide.direction(0)).abs()
    assert (gap <= 2.0**-24 * wide.direction(0).abs()).all()
