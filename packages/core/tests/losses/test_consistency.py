"""Consistency of noisy copies against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.losses import noise_consistency


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.integers(0, 1000))
def test_it_is_the_mean_divergence_from_the_mean_and_its_entropy(m: int, n: int, c: int, seed: int) -> None:
    logits = 4 * torch.randn(m, n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    divergence, entropy = noise_consistency(logits)
    p = logits.softmax(2)
    for row in range(n):
        mean = p[:, row].mean(0)
        slow = sum(float((mean * (mean / p[i, row]).log()).sum()) for i in range(m)) / m
        assert divergence[row].item() == pytest.approx(slow, abs=1e-12)
        assert entropy[row].item() == pytest.approx(-float((mean * mean.log()).sum()), abs=1e-12)


@pytest.mark.quick
def test_equal_copies_diverge_by_nothing_and_even_odds_have_the_largest_entropy() -> None:
    divergence, entropy = noise_consistency(torch.zeros(3, 2, 4))
    torch.testing.assert_close(divergence, torch.zeros(2))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(4)))
    steep = torch.tensor([[[500.0, 0.0]], [[500.0, 0.0]]], requires_grad=True)
    total = sum(value.sum() for value in noise_consistency(steep))
    assert isinstance(total, torch.Tensor)
    assert torch.isfinite(torch.autograd.grad(total, steep)[0]).all()


@pytest.mark.parametrize("shape", [(4, 3), (0, 4, 3), (2, 2, 4, 3)])
def test_other_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits has shape"):
        noise_consistency(torch.zeros(shape))
