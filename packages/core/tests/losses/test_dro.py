import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from robust_core.losses.dro import (
    KLDROLoss,
    chi_square_value,
    chi_square_weights,
    cvar_value,
    cvar_weights,
    effective_sample_size,
    kl_ball_temperature,
    kl_ball_value,
    kl_dro_value,
    kl_dro_weights,
    kl_to_uniform,
    log_moving_mean,
)

seeds = st.integers(0, 10**6)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=40)
@given(seeds, st.floats(0.01, 100), st.floats(1.01, 10), st.integers(1, 30))
def test_value_lies_between_mean_and_maximum_and_falls_with_temperature(seed, temperature, factor, n):
    losses = draw(n, seed=seed, scale=3.0)
    value = kl_dro_value(losses, temperature)
    assert losses.mean() - 1e-9 <= value <= losses.max() + 1e-9
    assert kl_dro_value(losses, temperature * factor) <= value + 1e-9
    torch.testing.assert_close(kl_dro_value(losses + 5, temperature), value + 5)
    assert 0 <= kl_to_uniform(losses, temperature) <= math.log(n) + 1e-12


def test_weights_are_the_gradient_and_beat_every_other_distribution():
    losses = draw(8, seed=1).requires_grad_(True)
    for temperature in (0.1, 1.0, 10.0):
        weights = kl_dro_weights(losses, temperature)
        (gradient,) = torch.autograd.grad(kl_dro_value(losses, temperature), losses)
        torch.testing.assert_close(weights, gradient)

        w = draw(1000, 8, seed=2, scale=2.0).softmax(1)
        penalised = (w * losses).sum(1) - temperature * (w * (8 * w).log()).sum(1)
        assert float(penalised.max().detach()) <= float(kl_dro_value(losses, temperature).detach()) + 1e-9


@pytest.mark.quick
def test_limits_and_huge_losses():
    losses = torch.tensor([1e4, 0.0, -1e4, 1e4])
    assert bool(torch.isfinite(kl_dro_value(losses, 0.01)))
    torch.testing.assert_close(kl_dro_weights(losses, 0.01), torch.tensor([0.5, 0.0, 0.0, 0.5]))
    torch.testing.assert_close(kl_dro_weights(losses, 1e9), torch.full((4,), 0.25), rtol=1e-3, atol=0)
    assert float(kl_to_uniform(losses, 0.01)) == pytest.approx(math.log(2))
    assert float(effective_sample_size(kl_dro_weights(losses, 0.01))) == pytest.approx(2.0)


def test_rows_masks_and_temperatures_agree_with_row_by_row():
    losses = draw(6, 9, seed=3)
    mask = draw(6, 9, seed=4) > -0.5
    mask[:, 0] = True
    temperature = draw(6, seed=5).exp()
    for function in (kl_dro_value, kl_to_uniform):
        whole = function(losses, temperature, mask=mask)
        for row in range(6):
            alone = function(losses[row][mask[row]], float(temperature[row]))
            torch.testing.assert_close(whole[row], alone)
    weights = kl_dro_weights(losses, temperature, mask=mask)
    assert bool((weights[~mask] == 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    best = kl_ball_temperature(losses, 0.3, low=0.01, high=100.0, mask=mask)
    torch.testing.assert_close(kl_to_uniform(losses, best, mask=mask), torch.full((6,), 0.3, dtype=torch.float64))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seeds, st.floats(0.0, 2.5))
def test_the_ball_temperature_is_optimal(seed, rho):
    losses = draw(7, seed=seed)
    low, high = 0.05, 5.0
    best = kl_ball_temperature(losses, rho, low=low, high=high)
    at = float(best)
    if low < at < high:
        assert float(kl_to_uniform(losses, at)) == pytest.approx(rho, abs=1e-7)
    grid = torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64)
    values = kl_dro_value(losses.expand(200, 7), grid) + grid * rho
    assert float(kl_dro_value(losses, at)) + at * rho <= float(values.min()) + 1e-9
    free = grid.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((kl_dro_value(losses.expand(200, 7), free) + free * rho).sum(), free)
    torch.testing.assert_close(slope, rho - kl_to_uniform(losses.expand(200, 7), grid), rtol=1e-8, atol=1e-8)


def test_the_ball_value_is_the_primal_optimum():
    for seed in range(4):
        losses = draw(5, seed=seed)
        for rho in (0.05, 0.4):
            found = minimize(
                lambda w, losses=losses: -float(w @ losses.numpy()),
                [0.2] * 5,
                bounds=[(1e-12, 1)] * 5,
                constraints=[
                    {"type": "eq", "fun": lambda w: w.sum() - 1},
                    {
                        "type": "ineq",
                        "fun": lambda w, rho=rho: rho - float((w * torch.tensor(5 * w).log().numpy()).sum()),
                    },
                ],
                method="SLSQP",
                options={"ftol": 1e-13, "maxiter": 500},
            )
            assert float(kl_ball_value(losses, rho)) == pytest.approx(-found.fun, abs=1e-6)
    assert float(kl_ball_value(losses, 10.0)) == pytest.approx(float(losses.max()), abs=1e-4)
    assert float(kl_ball_value(losses, 0.0)) == pytest.approx(float(losses.mean()), abs=1e-4)


def test_normal_losses_follow_the_gaussian_rule():
    losses = draw(20_000, seed=6, scale=0.7)
    for rho in (0.05, 0.4):
        best = float(kl_ball_temperature(losses, rho, low=1e-3, high=1e3))
        assert best == pytest.approx(0.7 / math.sqrt(2 * rho), rel=0.05)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seeds, st.floats(0.02, 1.0), st.integers(1, 12))
def test_cvar_is_the_linear_programme(seed, tail, n):
    losses = draw(n, seed=seed)
    cap = 1 / max(tail * n, 1.0)
    found = linprog(-losses.numpy(), A_eq=[[1.0] * n], b_eq=[1.0], bounds=[(0, cap)] * n)
    assert float(cvar_value(losses, tail)) == pytest.approx(-found.fun, abs=1e-8)
    weights = cvar_weights(losses, tail)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(cvar_value(losses, 1.0)) == pytest.approx(float(losses.mean()))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seeds, st.floats(0.01, 6.0))
def test_chi_square_is_the_constrained_optimum(seed, rho):
    losses = draw(6, seed=seed)
    weights = chi_square_weights(losses, rho)
    spent = float((6 * weights - 1).square().mean())
    assert spent <= rho * (1 + 1e-6) + 1e-9
    assert float(weights.sum()) == pytest.approx(1.0)
    others = draw(3000, 6, seed=seed + 1, scale=2.0).softmax(1)
    inside = (6 * others - 1).square().mean(1) <= rho
    if bool(inside.any()):
        assert float((others[inside] * losses).sum(1).max()) <= float(chi_square_value(losses, rho)) + 1e-9
    if rho < 0.02:
        std = float(losses.std(correction=0))
        assert float(chi_square_value(losses, rho)) == pytest.approx(
            float(losses.mean()) + math.sqrt(rho) * std, rel=1e-4
        )


def test_chi_square_on_equal_losses_and_both_ends():
    torch.testing.assert_close(chi_square_weights(torch.ones(4), 1.0), torch.full((4,), 0.25))
    losses = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert float(chi_square_value(losses, 0.0)) == pytest.approx(2.0, abs=1e-5)
    assert float(chi_square_value(losses, 3.0)) == pytest.approx(5.0, abs=1e-4)


def test_loss_with_full_batches_is_the_compositional_gradient():
    for temperature in (0.05, 1.0, 1e6):
        losses = draw(16, seed=7).requires_grad_(True)
        loss = KLDROLoss(temperature, ema=1.0)
        total = loss(losses)
        (ours,) = torch.autograd.grad(total, losses)
        expected = kl_dro_value(losses, temperature)
        (theirs,) = torch.autograd.grad(expected, losses)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours, torch.full_like(ours, 1 / 16), rtol=1e-4, atol=0)


def test_the_tracked_mean_is_the_naive_recursion_started_at_the_first_batch():
    loss, u = KLDROLoss(0.7, ema=0.3), None
    for step in range(6):
        losses = draw(8, seed=step)
        batch = (losses / 0.7).exp().mean()
        u = batch if u is None else 0.7 * u + 0.3 * batch
        total = loss(losses)
        torch.testing.assert_close(loss.log_u, u.log())
        torch.testing.assert_close(loss.weights, (losses / 0.7).exp() / u)
        assert total == pytest.approx(0.7 * float(u.log()), rel=1e-6)
    twin = KLDROLoss(0.7, ema=0.3)
    twin.load_state_dict(loss.state_dict())
    losses = draw(8, seed=99)
    before = loss.log_u.clone()
    loss.eval()
    assert loss(losses) == pytest.approx(0.7 * float(before), rel=1e-6)
    assert torch.equal(loss.log_u, before)
    loss.train()
    assert torch.equal(loss(losses), twin(losses))


def test_moving_means_of_exponentials_survive_any_exponent():
    state, new = torch.tensor([2.0, 1e4, -1e4]), torch.tensor([1.0, -1e4, 1e4])
    for share in (0.1, 0.8, 1.0):
        moved = log_moving_mean(state, new, share)
        assert bool(torch.isfinite(moved).all())
        expected = math.log((1 - share) * math.exp(2) + share * math.exp(1))
        assert float(moved[0]) == pytest.approx(expected, rel=1e-6)
        assert float(moved[2]) == pytest.approx(1e4, abs=3)
    assert torch.equal(log_moving_mean(state, new, 1.0), new)


def test_clipping_is_counted_and_batches_normalise():
    loss = KLDROLoss(0.1, clip=2.0)
    loss(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert float(loss.weights.max()) == 2.0
    assert int(loss.clipped) == 1
    alone = KLDROLoss(0.1, normalize="batch")
    for shift in (0.0, 100.0, -3e4):
        alone(torch.tensor([0.0, 0.1, 0.3]) + shift)
        assert float(alone.weights.mean()) == pytest.approx(1.0, rel=1e-3)
    assert 1.0 <= float(alone.effective_sample_size) <= 3.0
    extreme = KLDROLoss(1.0)
    assert bool(torch.isfinite(extreme(torch.tensor([1e4, -1e4]))))


@pytest.mark.quick
def test_bad_arguments_are_named():
    losses = torch.zeros(3)
    for call, word in (
        (lambda: kl_dro_value(losses, 0.0), "temperature"),
        (lambda: kl_dro_value(losses, torch.ones(3)), "temperature"),
        (lambda: kl_dro_value(torch.zeros(2, 3), torch.tensor([1.0, -1.0])), "temperature"),
        (lambda: kl_dro_value(losses.long(), 1.0), "losses"),
        (lambda: kl_dro_value(losses * torch.nan, 1.0), "NaN"),
        (lambda: kl_dro_value(losses[:0], 1.0), "losses"),
        (lambda: kl_dro_value(losses, 1.0, mask=torch.zeros(3, dtype=torch.bool)), "without any"),
        (lambda: kl_dro_value(losses, 1.0, mask=torch.zeros(2, dtype=torch.bool)), "mask"),
        (lambda: kl_ball_temperature(losses, -1.0, low=0.1, high=1.0), "rho"),
        (lambda: kl_ball_temperature(losses, 1.0, low=1.0, high=0.1), "high"),
        (lambda: cvar_weights(losses, 0.0), "tail"),
        (lambda: chi_square_weights(losses, -1.0), "rho"),
        (lambda: KLDROLoss(0.0), "temperature"),
        (lambda: KLDROLoss(1.0, ema=0.0), "ema"),
        (lambda: KLDROLoss(1.0, clip=0.5), "clip"),
        (lambda: KLDROLoss(1.0, normalize="none"), "normalize"),
        (lambda: KLDROLoss(1.0)(torch.zeros(2, 2)), "losses"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
