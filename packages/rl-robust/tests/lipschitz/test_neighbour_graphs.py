"""Graphs of nearest neighbours: the optimum of all pairs from few of them, for more points than pairs would allow."""

import pytest
import torch
from torch import Tensor

from rl_robust.lipschitz import fit_lipschitz_policy, lipschitz_values
from rl_robust.lipschitz.graph import MAX_POINTS, pair_ratio


def noisy(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    clean = torch.stack([2 * (4 * x[:, 0]).sin(), 2 * (3 * x[:, 1]).cos()], 1)[:, :m]
    return x, clean + 0.1 * torch.randn(n, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2])
def test_few_neighbours_give_the_optimum_of_all_pairs(m: int) -> None:
    x, u = noisy(120 if m == 1 else 60, m, seed=m)
    whole = lipschitz_values(x, u, 2.0)
    grown = lipschitz_values(x, u, 2.0, neighbours=3)
    assert grown.gap <= 1e-5
    assert pair_ratio(grown.x, grown.v) <= 2.0
    torch.testing.assert_close(grown.v, whole.v, atol=2e-4, rtol=0)


def test_more_points_than_all_pairs_allow_keep_every_pair() -> None:
    n = MAX_POINTS + 100
    x = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
    u = (x > 0.5).double()  # a step, which the bound turns into a ramp of slope 2
    with pytest.raises(ValueError, match="neighbours"):
        lipschitz_values(x, u, 2.0)
    policy = fit_lipschitz_policy(x, u, lipschitz=2.0, solver="graph", neighbours=2)
    assert policy.lipschitz_bound() == 2.0
    middle = torch.tensor([[0.0], [0.5], [1.0]]).double()
    torch.testing.assert_close(policy(middle), torch.tensor([[0.0], [0.5], [1.0]]).double(), atol=2e-3, rtol=0)


def test_slopes_are_found_in_blocks() -> None:
    x, u = noisy(50, 2, seed=3)
    rows, cols = torch.triu_indices(50, 50, 1)
    slopes = (u[rows] - u[cols]).norm(dim=1) / (x[rows] - x[cols]).norm(dim=1)
    assert pair_ratio(x, u) == pytest.approx(float(slopes.max()), rel=1e-12)
    assert pair_ratio(x[:1], u[:1]) == 0.0
