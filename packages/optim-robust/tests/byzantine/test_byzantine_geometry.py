"""Distances that an attacker cannot make wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim_robust.byzantine.geometry import combine, distances_to, nearest, pairwise

quick = settings(deadline=None, derandomize=True, max_examples=25)


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def direct(x: Tensor) -> Tensor:
    rows = x.double()
    return (rows[:, None] - rows[None]).square().sum(2)


def close(found: Tensor, exact: Tensor, tolerance: float) -> bool:
    return bool(((found - exact).abs() <= tolerance * exact).all())


@quick
@given(n=st.integers(1, 12), d=st.integers(1, 9000), seed=st.integers(0, 99))
@pytest.mark.quick
def test_distances_are_those_of_differences(n: int, d: int, seed: int) -> None:
    x = draw(n, d, seed)
    assert close(pairwise(x), direct(x), 1e-4)
    assert close(pairwise(x.double()), direct(x), 1e-12)
    assert close(distances_to(x, x[0]), direct(x)[0], 1e-5)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_near_vectors_far_from_the_origin(offset: float) -> None:
    """Models near convergence: an uncentred Gram matrix has no digit left."""
    x = (draw(8, 5000) * 0.1 + offset * torch.ones(5000)).contiguous()
    assert close(pairwise(x), direct(x), 1e-3)
    naive = x.square().sum(1)[:, None] + x.square().sum(1)[None] - 2 * x @ x.T
    assert not close(naive.double().fill_diagonal_(0), direct(x), 0.5)


@pytest.mark.parametrize("far", [1e4, 1e8, 1e15])
def test_a_far_sender_does_not_blur_the_others(far: float) -> None:
    """Centring on the mean would: the attacker moves it. So would centring on the attacker's own row."""
    x = draw(9, 4000)
    x[0] += far
    x[5] -= 3 * far
    assert close(pairwise(x), direct(x), 1e-4)


def test_clusters_within_clusters() -> None:
    base, x = draw(3, 3000) * 1e6, torch.empty(12, 3000)
    for row in range(12):
        x[row] = base[row % 3] + draw(1, 3000, row)[0] * (1.0 if row < 6 else 30.0)
    assert close(pairwise(x), direct(x), 1e-3)


def test_equal_rows_are_at_distance_zero_exactly() -> None:
    x = draw(6, 7001)
    x[[1, 3, 4]] = x[5].clone()
    found = pairwise(x)
    assert bool((found[[1, 3, 4]][:, [1, 3, 4, 5]] == 0).all())
    assert torch.equal(found, found.T)
    assert bool((found.diagonal() == 0).all())


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_squares_beyond_the_range_of_float32(scale: float) -> None:
    x = draw(5, 300) * scale
    assert close(pairwise(x), direct(x), 1e-6)
    assert close(distances_to(x, x[1]), direct(x)[1], 1e-6)


def test_what_is_beyond_float64_is_refused() -> None:
    x = draw(4, 10).double()
    x[2] *= 1e200
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        pairwise(x)
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        distances_to(x, x[0])


def test_half_precision_and_strides() -> None:
    x = draw(5, 6000)
    for dtype in (torch.float16, torch.bfloat16):
        assert close(pairwise(x.to(dtype)), direct(x.to(dtype)), 1e-4)
        mixed = combine(torch.full((5,), 0.2, dtype=torch.float64), x.to(dtype))
        assert mixed.dtype == dtype
        assert torch.allclose(mixed.float(), x.to(dtype).float().mean(0), atol=1e-2)
    turned = draw(6000, 5).T
    assert close(pairwise(turned), direct(turned), 1e-4)
    assert close(pairwise(x[:, ::3]), direct(x[:, ::3]), 1e-4)


def test_ties_go_to_the_lower_index() -> None:
    mask = nearest(torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), 2)
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False]]
