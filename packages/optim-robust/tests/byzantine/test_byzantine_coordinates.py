"""Coordinate-wise rules against sorting, by the definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim_robust.byzantine.coordinates import (
    mean_around_median,
    median,
    nearest_to_median,
    phocas,
    sorting_network,
    trimmed_mean,
)

quick = settings(deadline=None, derandomize=True, max_examples=25)


def draw(n: int, d: int, seed: int, *, ties: bool = False) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.mul(2).round() if ties else x


@pytest.mark.parametrize("n", range(1, 11))
def test_the_network_sorts_every_zero_one_input(n: int) -> None:
    """The 0-1 principle: a network that sorts all 0-1 inputs sorts everything."""
    pairs = sorting_network(n, tuple(range(n)))
    for bits in itertools.product((0, 1), repeat=n):
        row = list(bits)
        for i, j in pairs:
            row[i], row[j] = min(row[i], row[j]), max(row[i], row[j])
        assert row == sorted(bits)


def test_the_median_needs_fewer_comparisons() -> None:
    assert len(sorting_network(30, (14, 15))) < len(sorting_network(30, tuple(range(30)))) == 178


@quick
@given(n=st.integers(1, 40), d=st.integers(1, 700), seed=st.integers(0, 99), ties=st.booleans())
@pytest.mark.quick
def test_median_is_numpys(n: int, d: int, seed: int, ties: bool) -> None:
    x = draw(n, d, seed, ties=ties)
    assert torch.equal(median(x), torch.from_numpy(np.median(x.numpy(), axis=0)))


@quick
@given(n=st.integers(1, 33), share=st.floats(0, 1), seed=st.integers(0, 99), ties=st.booleans())
def test_trimmed_mean_is_the_mean_of_the_sorted_middle(n: int, share: float, seed: int, ties: bool) -> None:
    f = int(share * ((n - 1) // 2))
    x = draw(n, 300, seed, ties=ties)
    assert torch.allclose(trimmed_mean(x, f), x.sort(0).values[f : n - f].mean(0), rtol=1e-13, atol=1e-13)


def nearest_by_hand(x: Tensor, centre: Tensor, keep: int) -> Tensor:
    """The mean of the ``keep`` values nearest to the centre, smaller values first where two are equally near."""
    result = []
    for column, middle in zip(x.T.tolist(), centre.tolist(), strict=True):
        best = sorted(column, key=lambda value: (abs(value - middle), value))[:keep]
        result.append(sum(best) / keep)
    return torch.tensor(result, dtype=torch.float64)


@quick
@given(n=st.integers(1, 15), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_means_around_a_centre_by_hand(n: int, share: float, seed: int) -> None:
    f = int(share * ((n - 1) // 2))
    x = draw(n, 20, seed)
    assert torch.allclose(mean_around_median(x, f), nearest_by_hand(x, median(x), n - f), rtol=1e-12)
    assert torch.allclose(phocas(x, f), nearest_by_hand(x, trimmed_mean(x, f), n - f), rtol=1e-12, atol=1e-12)
    for keep in range(1, n + 1):
        assert torch.allclose(nearest_to_median(x, keep), nearest_by_hand(x, median(x), keep), rtol=1e-12)


def test_without_faults_all_are_the_mean() -> None:
    x = draw(9, 500, 1)
    for result in (trimmed_mean(x, 0), mean_around_median(x, 0), phocas(x, 0)):
        assert torch.allclose(result, x.mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_chunks_and_dtypes_change_nothing(dtype: torch.dtype) -> None:
    x = draw(21, 20_001, 2).to(dtype)
    exact = x.double().sort(0).values
    assert torch.equal(median(x), exact[10].to(dtype))
    found = trimmed_mean(x, 5)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact[5:16].mean(0), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_largest_finite_numbers_do_not_overflow() -> None:
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top], [top], [top], [-top], [1.0]])
    assert median(x).item() == top
    assert torch.isfinite(trimmed_mean(x, 1)).all()
    assert torch.isfinite(mean_around_median(x, 1)).all()
    assert median(x[:2]).item() == top
