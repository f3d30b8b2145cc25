"""Gradient estimates from function values: closed forms, moments, and exact counts of queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust_core.testing.conformance import refuses
from robust_core.zeroth_order import (
    coordinate_gradient,
    coordinate_queries,
    random_gradient,
    random_queries,
    surrogate_loss,
)


class _Quadratic:
    """``1/2 z' A_r z + b_r' z``, another one for each sample; counts the points and the calls."""

    def __init__(self, n: int, d: int, seed: int = 0, *, linear: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(n, d, d, generator=generator, dtype=torch.float64)
        self.a = torch.zeros_like(a) if linear else a + a.mT
        self.b = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.points, self.calls = 0, 0

    def __call__(self, points: Tensor, rows: Tensor) -> Tensor:
        self.points, self.calls = self.points + len(points), self.calls + 1
        p = points.flatten(1).double()
        return 0.5 * torch.einsum("mi,mij,mj->m", p, self.a[rows], p) + (p * self.b[rows]).sum(1)

    def gradient(self, z: Tensor) -> Tensor:
        return (torch.einsum("nij,nj->ni", self.a, z.flatten(1)) + self.b).reshape(z.shape)


def _points(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(n=st.integers(1, 5), d=st.integers(1, 9), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_central_coordinates_are_exact_on_quadratics(n: int, d: int, size: int, seed: int) -> None:
    loss, z = _Quadratic(n, d, seed), _points(n, d, seed)
    found = coordinate_gradient(loss, z, spread=0.005, batch_size=size)
    assert torch.allclose(found.gradient, loss.gradient(z), atol=1e-8)
    assert found.queries == loss.points == n * 2 * d == n * coordinate_queries(d)
    exact = loss(z, torch.arange(n))
    curvature = torch.diagonal(loss.a, dim1=1, dim2=2).mean(1) * 0.005**2 / 2
    assert torch.allclose(found.value, exact + curvature, atol=1e-9)


def test_one_sided_coordinates_are_exact_on_linear_functions() -> None:
    loss, z = _Quadratic(3, 7, linear=True), _points(3, 7)
    found = coordinate_gradient(loss, z, spread=0.01, central=False)
    assert torch.allclose(found.gradient, loss.gradient(z), atol=1e-9)
    assert found.queries == loss.points == 3 * 8 == 3 * coordinate_queries(7, central=False)
    curved = _Quadratic(3, 7)
    error = coordinate_gradient(curved, z, spread=0.01, central=False).gradient - curved.gradient(z)
    assert torch.allclose(error, 0.005 * torch.diagonal(curved.a, dim1=1, dim2=2), atol=1e-9)


def test_random_directions_are_unbiased_with_the_variance_of_the_theory() -> None:
    n, d, q = 20_000, 12, 4
    one = _Quadratic(1, d, linear=True)
    truth = one.b[0]

    def loss(points: Tensor, rows: Tensor) -> Tensor:
        return points @ truth

    z = _points(1, d).expand(n, -1)
    found = random_gradient(loss, z, n_directions=q, spread=0.005, generator=3).gradient
    error = found.std(0) / n**0.5
    assert bool(((found.mean(0) - truth).abs() < 4 * error).all())
    relative = float((found - truth).square().sum(1).mean() / truth.square().sum())
    assert abs(relative - (d - 1) / q) < 0.1 * (d - 1) / q


@pytest.mark.quick
def test_random_directions_belong_to_samples() -> None:
    loss, z = _Quadratic(6, 10), _points(6, 10).reshape(6, 2, 5)
    index = torch.tensor([7, 1, 30, 2, 9, 4])
    whole = random_gradient(loss, z, n_directions=5, spread=0.1, index=index, generator=1)
    assert whole.queries == loss.points == 6 * 6 == 6 * random_queries(5)
    assert torch.allclose(whole.value, loss(z, torch.arange(6)))
    for size in (1, 3, 7, 100):
        again = random_gradient(loss, z, n_directions=5, spread=0.1, index=index, generator=1, batch_size=size)
        assert torch.allclose(again.gradient, whole.gradient, rtol=1e-12)
    alone = random_gradient(
        lambda points, rows: loss(points, rows + 2), z[2:3], n_directions=5, spread=0.1, index=index[2:3], generator=1
    )
    assert torch.allclose(alone.gradient[0], whole.gradient[2], rtol=1e-12)
    other = random_gradient(loss, z, n_directions=5, spread=0.1, index=index, generator=2)
    assert not torch.allclose(other.gradient, whole.gradient)


def test_as_many_orthogonal_directions_would_be_the_gradient() -> None:
    """In one dimension every unit vector is a sign: the estimate is a one-sided difference."""
    loss, z = _Quadratic(4, 1), _points(4, 1)
    found = random_gradient(loss, z, n_directions=64, spread=1e-6).gradient
    assert torch.allclose(found, loss.gradient(z), atol=1e-4)


def test_the_surrogate_has_the_value_of_the_loss_and_the_chained_gradient() -> None:
    loss = _Quadratic(3, 4)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    x = _points(3, 6)
    z = x @ weight.T
    estimate = coordinate_gradient(loss, z, spread=0.01)
    total = surrogate_loss(z, estimate)
    assert torch.allclose(total, estimate.value.mean())
    total.backward()
    assert weight.grad is not None
    expected = torch.einsum("ni,nj->ij", loss.gradient(z.detach()), x) / 3
    assert torch.allclose(weight.grad, expected, atol=1e-8)


def test_bad_arguments_are_refused() -> None:
    loss, z = _Quadratic(2, 3), _points(2, 3)
    refuses(lambda: random_gradient(loss, z, n_directions=0, spread=0.1), "no directions")
    refuses(lambda: random_gradient(loss, z, n_directions=1, spread=0.0), "no distance")
    refuses(lambda: coordinate_gradient(loss, z, spread=-1.0), "a negative distance")
    refuses(lambda: coordinate_gradient(loss, z.long(), spread=0.1), "integers")
    refuses(lambda: coordinate_gradient(lambda p, r: p, z, spread=0.1), "a loss that is no vector")
