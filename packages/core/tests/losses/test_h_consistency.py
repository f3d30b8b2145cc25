import math
from itertools import permutations, product

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robust_core.losses.comp_sum import comp_sum, outer, rho_margin_comp_sum
from robust_core.losses.h_consistency import (
    adversarial_constant,
    bounded_optimum,
    comp_sum_bound,
    comp_sum_transform,
    conditional_optimum,
    minimizability_gap_bounded,
)

TAUS = (0.0, 0.4, 0.9999, 1.0, 1.0001, 1.3, 1.7, 1.98, 2.0, 3.0)


@mp.workdps(60)
def plain_transform(beta, tau, n):
    """The four published lines as they stand, in 60 digits."""
    beta, tau = mp.mpf(beta), mp.mpf(tau)
    if tau >= 2:
        return float(beta / ((tau - 1) * n ** (tau - 1)))
    if tau == 1:
        return float(sum((1 + b) * mp.log(1 + b) if b > -1 else 0 for b in (beta, -beta)) / 2)
    mean = (((1 + beta) ** (1 / (2 - tau)) + (1 - beta) ** (1 / (2 - tau))) / 2) ** (2 - tau)
    if tau < 1:
        return float(2 ** (1 - tau) / (1 - tau) * (1 - mean))
    return float((mean - 1) / ((tau - 1) * n ** (tau - 1)))


@pytest.mark.quick
@pytest.mark.parametrize("tau", TAUS)
def test_transform_equals_the_published_lines(tau):
    for beta, n in product((0.0, 1e-6, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-9, 1 - 2.0**-53, 1.0), (2, 5, 100)):
        expected = plain_transform(beta, tau, n)
        assert float(comp_sum_transform(beta, tau, n)) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_transform_is_smooth_in_tau_and_finite_everywhere():
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    for n in (2, 1000):
        for tau in (1.0, 2.0):
            here = comp_sum_transform(beta, tau, n)
            for step in (1e-3, 1e-6, 1e-8, 1e-12):
                for near in (tau - step, tau + step):
                    value = comp_sum_transform(beta, near, n)
                    assert bool(torch.isfinite(value).all())
                    assert float((value - here).abs().max()) < 20 * step + 1e-7


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.floats(0, 3.5), st.integers(2, 50))
def test_transform_increases_and_is_convex(tau, n):
    value = comp_sum_transform(torch.linspace(0, 1, 201, dtype=torch.float64), tau, n)
    slope = value.diff()
    assert value[0] == 0
    assert bool((slope >= -1e-12).all())
    assert bool((slope.diff() >= -1e-10).all())


@pytest.mark.quick
@pytest.mark.parametrize("tau", TAUS)
def test_the_bound_holds_on_random_distributions_and_scores(tau):
    """T(0-1 excess) <= comp-sum excess; 1e5 draws over the class counts and sharpness of p and z."""
    generator = torch.Generator().manual_seed(7)
    for n in (2, 3, 5, 10):
        rows = 25_000
        p = (torch.randn(rows, n, generator=generator, dtype=torch.float64) * 3 * torch.rand(rows, 1)).softmax(1)
        z = torch.randn(rows, n, generator=generator, dtype=torch.float64) * 4 * torch.rand(rows, 1) ** 2
        wrong = p.amax(1) - p.gather(1, z.argmax(1)[:, None]).squeeze(1)
        expected = (p * outer(-z.log_softmax(1), tau)).sum(1)
        excess = expected - conditional_optimum(p, tau)
        assert float(excess.min()) > -1e-9
        assert bool((comp_sum_transform(wrong, tau, n) <= excess + 1e-7).all())
        assert bool((wrong <= comp_sum_bound(excess.clamp(min=0) + 1e-7, tau, n)).all())


@pytest.mark.parametrize("tau", [t for t in TAUS if t <= 2])
def test_attained_for_two_classes_with_tied_scores(tau):
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    p = torch.stack([(1 + beta) / 2, (1 - beta) / 2], 1)
    tied = (p * outer(torch.full_like(p, math.log(2)), tau)).sum(1)
    excess = tied - conditional_optimum(p, tau)
    torch.testing.assert_close(comp_sum_transform(beta, tau, 2), excess, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tau", TAUS)
def test_bound_inverts_the_transform_and_rounds_up(tau):
    beta = torch.linspace(0, 1, 51, dtype=torch.float64)
    for n in (2, 7):
        excess = comp_sum_transform(beta, tau, n)
        back = comp_sum_bound(excess, tau, n)
        assert bool((back >= beta - 1e-7).all())
        torch.testing.assert_close(comp_sum_transform(back, tau, n), excess, rtol=1e-9, atol=1e-12)
        assert bool((comp_sum_bound(excess, tau, n, closed_form=True) >= beta * (1 - 1e-9) - 1e-6).all())
        assert float(comp_sum_bound(1e9, tau, n)) == 1.0
        assert float(comp_sum_bound(1e9, tau, n, closed_form=True)) == 1.0


@pytest.mark.parametrize("tau", TAUS)
def test_no_scores_beat_the_conditional_optimum(tau):
    generator = torch.Generator().manual_seed(1)
    for n in (2, 4):
        p = torch.randn(n, generator=generator, dtype=torch.float64).mul(2).softmax(0)
        z = torch.randn(10_000, n, generator=generator, dtype=torch.float64) * 5
        losses = (p * outer(-z.log_softmax(1), tau)).sum(1)
        optimum = float(conditional_optimum(p, tau))
        assert float(losses.min()) >= optimum - 1e-10
        best = p.log() / (2 - tau) if tau < 2 else torch.where(p == p.max(), 0.0, -1e3)
        assert float((p * outer(-best.log_softmax(0), tau)).sum()) == pytest.approx(optimum, rel=1e-7, abs=1e-9)


def test_conditional_optimum_agrees_with_a_numerical_search():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for tau in (0.0, 0.5, 1.0, 1.5):
        found = minimize(
            lambda z, tau=tau: float((p * outer(-torch.tensor(z).log_softmax(0), tau)).sum()),
            [0.0, 0.0, 0.0],
            tol=1e-12,
        )
        assert float(conditional_optimum(p, tau)) == pytest.approx(found.fun, abs=1e-8)


def test_deterministic_and_bounded_cases():
    onehot = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    for tau in TAUS:
        assert float(conditional_optimum(onehot, tau)) == pytest.approx(0.0, abs=1e-12)
        # the best bounded scores put the label at +bound, all others at -bound
        z = torch.tensor([[1.5, -1.5, -1.5]], dtype=torch.float64)
        expected = float(comp_sum(z, torch.tensor([0]), tau))
        assert float(bounded_optimum(tau, 3, 1.5)) == pytest.approx(expected, rel=1e-9)
        others = torch.rand(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3 - 1.5
        assert float(comp_sum(others, torch.zeros(1000, dtype=torch.int64), tau).min()) >= expected


def test_minimizability_gap_bounds_a_constant_hypothesis_set():
    """Two inputs with different labels, and hypotheses that score both alike: the gap can be searched."""
    bound = 2.0
    grid = torch.linspace(-bound, bound, 401, dtype=torch.float64)
    z = torch.stack([grid, -grid], 1)
    zero, one = torch.zeros(401, dtype=torch.int64), torch.ones(401, dtype=torch.int64)
    risks = {tau: (comp_sum(z, zero, tau) + comp_sum(z, one, tau)) / 2 for tau in (0.0, 0.5, 1.0, 1.5, 2.0)}
    least = float(risks[0.0].min())
    gaps = []
    for tau, risk in risks.items():
        true = float(risk.min() - bounded_optimum(tau, 2, bound))
        gaps.append(float(minimizability_gap_bounded(tau, 2, bound, sum_exponential=least)))
        assert true <= gaps[-1] + 1e-9
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_adversarial_constant_on_an_enumerated_toy(tau):
    """Three labels, balls of three points; the best hypothesis orders the labels with gaps rho on the whole ball."""
    assert adversarial_constant(tau) == pytest.approx(
        {0.0: 1.0, 1.0: 1 / math.log(2), 2.0: 2.0}.get(tau, adversarial_constant(tau))
    )
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(400, 3, generator=generator, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    ladders = torch.tensor([[float(rank) for rank in order] for order in permutations(range(3))], dtype=torch.float64)
    best = torch.full((400,), torch.inf, dtype=torch.float64)
    for ladder in ladders:
        pays = torch.stack([rho_margin_comp_sum(ladder[None], torch.tensor([k]), tau)[0] for k in range(3)])
        best = torch.minimum(best, (p * pays).sum(1))
    scores = torch.randn(400, 3, 3, generator=generator, dtype=torch.float64) * 1.5  # (x, point of the ball, label)
    scores[:200] = scores[:200, :1]  # constant on the ball
    surrogate, error = [], []
    for k in range(3):
        y = torch.full((1200,), k)
        each = rho_margin_comp_sum(scores.reshape(-1, 3), y, tau).reshape(400, 3)
        surrogate.append(each.amax(1))
        others = scores.clone()
        others[..., k] = -torch.inf
        error.append((others.amax(-1) >= scores[..., k]).any(1).double())
    surrogate, error = (p * torch.stack(surrogate, 1)).sum(1), (p * torch.stack(error, 1)).sum(1)
    excess = error - (1 - p.amax(1))
    assert bool((excess <= adversarial_constant(tau) * (surrogate - best) + 1e-9).all())
    # attained: certain of the second of two labels, when the first is certain
    tight = rho_margin_comp_sum(torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0]), tau)
    assert float(tight) * adversarial_constant(tau) == pytest.approx(1.0)


@pytest.mark.quick
def test_bad_arguments_are_named():
    for call, word in (
        (lambda: comp_sum_transform(1.1, 1.0, 3), "beta"),
        (lambda: comp_sum_transform(math.nan, 1.0, 3), "beta"),
        (lambda: comp_sum_transform(0.1, -1.0, 3), "tau"),
        (lambda: comp_sum_transform(0.1, 1.0, 1), "n_classes"),
        (lambda: comp_sum_bound(-1.0, 1.0, 3), "excess"),
        (lambda: conditional_optimum(torch.tensor([0.5, 0.6]), 1.0), "p has"),
        (lambda: conditional_optimum(torch.tensor([-0.5, 1.5]), 1.0), "p must"),
        (lambda: bounded_optimum(1.0, 3, -1.0), "bound"),
        (lambda: minimizability_gap_bounded(1.0, 3, 1.0, sum_exponential=0.0), "sum_exponential"),
        (lambda: adversarial_constant(-1.0), "tau"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
