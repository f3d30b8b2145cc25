"""Rules in closed cases, against slow references by the definition, and against what is proved of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim_robust.byzantine import AGGREGATORS, ARC, NNM, Bucketing, Clipping, Compose, Krum, Median, TrimmedMean
from optim_robust.byzantine.geometry import pairwise
from optim_robust.byzantine.preaggregators import adaptive_clipping, bucketing, clipping, nearest_neighbor_mixing
from optim_robust.byzantine.rules import (
    caf,
    centered_clipping,
    comparative_elimination,
    filter_l2,
    geometric_median,
    krum,
    krum_scores,
    mean,
    multi_krum,
    nearest_neighbor_average,
    smoothed_weiszfeld,
)
from optim_robust.byzantine.subsets import bulyan, least_diameter, least_eigenvalue, minimum_diameter_average, smea
from optim_robust.byzantine.theory import KAPPA_RULES, kappa, kappa_lower_bound, kappa_of_mixing, measured_kappa

quick = settings(deadline=None, derandomize=True, max_examples=25)


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attacked(n: int, f: int, d: int, seed: int) -> Tensor:
    """Draw senders of whom f are anywhere from near to far; sometimes on a grid, with ties and equal rows."""
    x = draw(n, d, seed)
    if f:
        x[:f] += (10.0 ** (seed % 5 - 1)) * draw(1, d, seed + 1)
    x = x.mul(2).round() if seed % 3 == 0 else x
    return x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


# -- distances -------------------------------------------------------------------------------------------------


@quick
@given(n=st.integers(4, 12), seed=st.integers(0, 99))
def test_krum_by_hand(n: int, seed: int) -> None:
    f = (n - 1) // 2
    x = draw(n, 6, seed)
    squared = [[float((a - b).square().sum()) for b in x] for a in x]
    for neighbours, count in (("allouah", n - f - 1), ("blanchard", n - f - 2)):
        scores = [sum(sorted(squared[i][:i] + squared[i][i + 1 :])[:count]) for i in range(n)]
        assert torch.allclose(krum_scores(pairwise(x), f, neighbours=neighbours), torch.tensor(scores).double())
    scores = krum_scores(pairwise(x), f)
    assert torch.equal(krum(x, f), x[int(scores.argmin())])
    best = scores.argsort(stable=True)
    assert torch.allclose(multi_krum(x, f), x[best[: n - f]].mean(0))
    assert torch.allclose(multi_krum(x, f, 2), x[best[:2]].mean(0))


@quick
@given(n=st.integers(3, 14), share=st.floats(0, 1), pivot=st.integers(0, 2), seed=st.integers(0, 99))
@pytest.mark.quick
def test_nearest_neighbours_by_hand(n: int, share: float, pivot: int, seed: int) -> None:
    f = int(share * ((n - 1) // 2))
    x = draw(n, 5, seed)
    order = (x - x[pivot]).norm(dim=1).argsort()
    assert torch.allclose(nearest_neighbor_average(x, f, pivot), x[order[: n - f]].mean(0))
    assert torch.allclose(nearest_neighbor_average(x, f, x[pivot]), x[order[: n - f]].mean(0))
    mixed = nearest_neighbor_mixing(x, f)
    assert torch.allclose(mixed[pivot], x[order[: n - f]].mean(0))
    assert torch.allclose(nearest_neighbor_mixing(torch.ones_like(x), f), torch.ones_like(x))  # rows sum to 1


def test_geometric_median_in_closed_cases() -> None:
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [100.0, 100.0]]).double()
    assert torch.allclose(geometric_median(corners), torch.tensor([0.5, 0.5]).double(), atol=1e-6)  # its diagonals meet
    kite = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0], [1.0, -1.0]]).double()
    assert torch.allclose(geometric_median(kite), torch.tensor([1.0, 0.0]).double(), atol=1e-6)
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.05], [2.0, 0.0]]).double()  # an angle above 120 degrees
    assert torch.equal(geometric_median(triangle), triangle[1])
    line = torch.tensor([[0.0], [1.0], [5.0], [9.0], [100.0]])
    assert geometric_median(line).item() == 5.0
    doubled = torch.tensor([[0.0, 1.0]] * 3 + [[5.0, 5.0], [9.0, -3.0]])
    assert torch.equal(geometric_median(doubled), doubled[0])  # a majority in one place
    assert torch.equal(geometric_median(doubled[:1]), doubled[0])


@quick
@given(n=st.integers(3, 12), seed=st.integers(0, 99))
def test_geometric_median_is_a_minimum(n: int, seed: int) -> None:
    x = draw(n, 4, seed)
    found = geometric_median(x)

    def total(point: Tensor) -> float:
        return float((x - point).norm(dim=1).sum())

    for direction in draw(20, 4, seed + 1):
        assert total(found) <= total(found + 1e-3 * direction) + 1e-9


def test_smoothing_moves_the_geometric_median_to_the_mean() -> None:
    x = draw(9, 5)
    assert torch.allclose(geometric_median(x, nu=1e6), mean(x), atol=1e-9)


def test_three_steps_from_the_origin_are_not_the_geometric_median() -> None:
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [100.0, 100.0]]).double()
    assert smoothed_weiszfeld(corners)[0].item() == pytest.approx(0.372, abs=5e-4)
    many = smoothed_weiszfeld(corners, nu=1e-9, n_iter=500, start=corners.median(0).values + 0.1)
    assert torch.allclose(many, geometric_median(corners), atol=1e-5)


def test_centred_clipping_by_hand() -> None:
    x, v = draw(7, 5) * 4, draw(1, 5, 9)[0]
    expected = v.clone()
    for _ in range(3):
        away = x - expected
        expected = expected + (away * (2.0 / away.norm(dim=1)).clamp(max=1.0)[:, None]).mean(0)
    assert torch.allclose(centered_clipping(x, v, tau=2.0, n_iter=3), expected)
    assert torch.allclose(centered_clipping(x, tau=1e9), mean(x))
    x[3] = 1e30
    moved = centered_clipping(x, v, tau=2.0) - v
    assert float(moved.norm()) <= 2.0 + 1e-9  # nobody moves it by more than tau


def test_elimination_takes_the_shortest() -> None:
    x = torch.tensor([[3.0], [-1.0], [2.0], [50.0]])
    assert comparative_elimination(x, 1).item() == pytest.approx(4 / 3)


def caf_by_definition(x: Tensor, f: int) -> Tensor:
    """CAF with the d x d covariance."""
    weights, best, least = torch.ones(len(x), dtype=torch.float64), x.mean(0), math.inf
    while float(weights.sum()) > len(x) - 2 * f:
        centre = (weights[:, None] * x).sum(0) / weights.sum()
        away = x - centre
        values, vectors = torch.linalg.eigh((weights[:, None] * away).T @ away / weights.sum())
        if float(values[-1]) < least:
            best, least = centre, float(values[-1])
        deviation = (away @ vectors[:, -1]).square()
        weights = weights * (1 - deviation / deviation[weights > 0].max()).clamp(min=0)
    return best


@quick
@given(n=st.integers(5, 12), seed=st.integers(0, 99))
def test_caf_is_that_of_the_covariance(n: int, seed: int) -> None:
    f = (n - 1) // 3
    x = draw(n, 4, seed)
    x[:f] += 8.0
    assert torch.allclose(caf(x, f), caf_by_definition(x, f), atol=1e-7)


def test_a_filter_stops_when_no_direction_varies_more_than_it_may() -> None:
    calm = draw(12, 400, 1)
    assert torch.allclose(filter_l2(calm, 3), mean(calm))  # nothing looks forged: nobody loses weight
    assert torch.allclose(filter_l2(calm, 3, sigma=50.0), mean(calm))
    x = torch.cat([calm[:9], draw(3, 400, 2) * 0.1 + 40.0])
    for sigma in (None, 2.0 * 400**0.5 / 3):
        found = filter_l2(x, 3, sigma=sigma)
        assert float((found - calm[:9].mean(0)).norm()) < 0.25 * float((mean(x) - calm[:9].mean(0)).norm())
    assert torch.allclose(filter_l2(x, 3, sigma=1e-9), caf(x, 3))  # nothing is allowed: the least eigenvalue is left
    one = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]]).double()
    # mean 201.2 varies by 159,602: more than 20 times 1.25, the variance of 0 .. 3; 1000 loses all, the others 6 %
    weights = [1 - ((v - 201.2) / (1000 - 201.2)) ** 2 for v in (0.0, 1.0, 2.0, 3.0)]
    expected = sum(w * v for w, v in zip(weights, (0.0, 1.0, 2.0, 3.0), strict=True)) / sum(weights)
    assert filter_l2(one, 1).item() == pytest.approx(expected)


def test_a_known_spread_bounds_the_filter() -> None:
    """(s + sqrt(expansion) sigma)^2 f / (n - 2 f) where sigma is s, the honest spread, and f is small."""
    n, f = 30, 2
    for seed in range(5):  # whoever the honest are
        x = attacked(n, f, 3, 3 * seed + 1)
        for rows in itertools.combinations(range(n), n - f):
            part = x[list(rows)]
            spread = float(torch.linalg.eigvalsh(torch.cov(part.T, correction=0))[-1])
            error = float((filter_l2(x, f, sigma=spread**0.5) - part.mean(0)).square().sum())
            assert error <= (1 + 20**0.5) ** 2 * spread * f / (n - 2 * f)


# -- subsets ---------------------------------------------------------------------------------------------------


@quick
@given(n=st.integers(3, 9), share=st.floats(0, 1), seed=st.integers(0, 99), grid=st.booleans())
def test_subset_rules_are_exhaustive_search(n: int, share: float, seed: int, grid: bool) -> None:
    f = int(share * ((n - 1) // 2))
    x = draw(n, 3, seed)
    x = x.round() if grid else x
    squared = pairwise(x)

    def diameter(rows: tuple[int, ...]) -> float:
        return max(float(squared[i, j]) for i in rows for j in rows)

    def spread(rows: tuple[int, ...]) -> float:
        return math.fsum(float(squared[i, j]) for i in rows for j in rows)

    subsets = list(itertools.combinations(range(n), n - f))
    found = tuple(least_diameter(squared, f))
    assert diameter(found) == min(map(diameter, subsets))
    if not grid:
        assert found == min(subsets, key=lambda rows: (diameter(rows), spread(rows), rows))
    assert torch.allclose(minimum_diameter_average(x, f), x[list(found)].mean(0))

    def top(rows: tuple[int, ...]) -> float:
        centred = x[list(rows)] - x[list(rows)].mean(0)
        return float(torch.linalg.eigvalsh(centred.T @ centred)[-1])

    chosen = least_eigenvalue(squared, f)
    assert top(tuple(chosen)) == pytest.approx(min(map(top, subsets)), abs=1e-9)
    assert torch.allclose(smea(x, f), x[chosen].mean(0))


def test_minimum_diameter_on_a_line_is_the_shortest_window_and_scales() -> None:
    x = draw(30, 1, 3)
    ordered = x.flatten().sort().values
    widths = ordered[22:] - ordered[:8]
    window = ordered[int(widths.argmin()) :][:23]
    assert minimum_diameter_average(x, 7).item() == pytest.approx(float(window.mean()))
    crowd = torch.cat([draw(16, 4, 1), draw(15, 4, 2) + 50])
    assert torch.allclose(minimum_diameter_average(crowd, 15), crowd[:16].mean(0))


def test_bulyan_by_hand() -> None:
    n, f = 11, 2
    x = draw(n, 4, 5)
    left, chosen = list(range(n)), []
    for _ in range(n - 2 * f):
        sums = []
        for i in left:
            away = sorted(float((x[i] - x[j]).square().sum()) for j in left if j != i)
            sums.append(sum(away[: max(1, len(left) - f - 2)]))
        chosen.append(left.pop(sums.index(min(sums))))
    rows = x[chosen]
    middle = rows.median(0).values
    expected = torch.stack([
        torch.stack(sorted(column, key=lambda v, m=m: abs(float(v - m)))[: n - 4 * f]).mean()
        for column, m in zip(rows.T, middle, strict=True)
    ])  # fmt: skip
    assert torch.allclose(bulyan(x, f), expected)


# -- before a rule ---------------------------------------------------------------------------------------------


def test_buckets_hold_everyone_once_and_repeat() -> None:
    x = torch.arange(7.0).reshape(7, 1)
    made = bucketing(x, 3, generator=4)
    assert made.shape == (3, 1)
    assert float(3 * made[0] + 3 * made[1] + made[2]) == pytest.approx(21.0)
    assert torch.equal(made, bucketing(x, 3, generator=4))
    assert not torch.equal(made, bucketing(x, 3, generator=5))
    assert torch.equal(bucketing(x, 1, generator=0).sort(0).values, x)
    draws = Bucketing(2, generator=1)
    assert not torch.equal(draws(x), draws(x))  # new groups in each call


def test_clipping_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0], [0.0, 0.0], [6.0, 8.0]])
    assert torch.allclose(clipping(x, 5.0).norm(dim=1), torch.tensor([5.0, 0.5, 5.0, 0.0, 5.0]))
    assert torch.equal(clipping(x, 5.0)[1], x[1])
    # n = 5, f = 1: floor(2 * 1 * 4 / 5) = 1 row is clipped, to the next norm, 10
    assert torch.allclose(adaptive_clipping(x, 1).norm(dim=1), torch.tensor([5.0, 0.5, 10.0, 0.0, 10.0]))
    assert torch.equal(adaptive_clipping(x, 0), x)


def test_compositions_keep_one_f() -> None:
    x = attacked(12, 3, 40, 7)
    whole = Compose(Clipping(1e9), ARC(3), NNM(3), TrimmedMean(3))
    assert torch.allclose(whole(x), TrimmedMean(3)(nearest_neighbor_mixing(adaptive_clipping(x, 3), 3)))
    assert Compose(NNM(3), Krum(3)).kappa(12) == kappa_of_mixing(12, 3, kappa("krum", 12, 3))
    assert Compose(Bucketing(2), Krum(3)).kappa(12) is None
    assert Compose(Bucketing(2), Median(2)).breakdown(12) == 2
    with pytest.raises(ValueError, match="one f counts"):
        Compose(NNM(2), Krum(3))
    with pytest.raises(ValueError, match="takes f <= 2"):
        Compose(Bucketing(2), Median(3))(x)
    with pytest.raises(ValueError, match="at the end"):
        Compose(NNM(2))
    with pytest.raises(TypeError, match="no pre-aggregator"):
        Compose(Krum(3), Krum(3))


# -- what is proved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KAPPA_RULES if name != "mean"])
@pytest.mark.parametrize("n", [5, 7, 9, 10])
def test_no_input_breaks_the_constant(name: str, n: int) -> None:
    """All subsets of size n - f, on random and on discrete inputs, near and far attackers."""
    for f in range(1, (n + 1) // 2):
        rule, limit = AGGREGATORS[name](f), kappa(name, n, f)
        if limit == math.inf:
            assert name in ("caf", "filter-l2")
            assert rule.kappa(n) is None
            continue
        mixed = Compose(NNM(f), rule)
        assert limit >= kappa_lower_bound(n, f)
        for seed in range(6):
            x = attacked(n, f, 1 + seed % 3, 100 * n + seed)
            assert measured_kappa(x, rule(x), f) <= limit
            after = mixed.kappa(n)
            assert after is not None
            assert measured_kappa(x, mixed(x), f) <= after


def test_the_papers_krum_has_no_constant() -> None:
    """n = 7, f = 3 with n - f - 2 neighbours: three liars far away, close to each other, are chosen."""
    x = torch.tensor([[0.0], [1.0], [2.1], [3.3], [1e4], [1e4 + 1e-3], [1e4 + 2e-3]], dtype=torch.float64)
    chosen = x[int(krum_scores(pairwise(x), 3, neighbours="blanchard").argmin())]
    assert measured_kappa(x, chosen, 3) > 1e4
    assert measured_kappa(x, krum(x, 3), 3) <= kappa("krum", 7, 3)
    with pytest.raises(ValueError, match="f <= 2"):
        krum(x, 3, neighbours="blanchard")


def test_the_mean_has_no_constant() -> None:
    assert kappa("mean", 9, 1) == math.inf
    assert kappa("mean", 9, 0) == 0.0
    x = torch.zeros(5, 1)
    x[0] = 1e6
    assert measured_kappa(x, mean(x), 1) == math.inf


@pytest.mark.parametrize("far", [1e3, 1e6, 1e12])
def test_far_rows_cost_the_geometric_median_no_digits(far: float) -> None:
    """It depends on their direction only; squared distances would hold nothing else than theirs."""
    near, directions = draw(7, 6, 1), draw(2, 6, 2)
    x = torch.cat([near, far * directions])
    found = geometric_median(x)
    units = x - found
    pull = (units / units.norm(dim=1, keepdim=True)).sum(0)
    assert float(pull.norm()) < 1e-6
    assert torch.allclose(geometric_median(x.float()).double(), found, atol=1e-5)
