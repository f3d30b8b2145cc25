import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core.losses.comp_sum import comp_sum, outer, rho_margin_comp_sum
from robust_core.losses.smooth_adversarial import (
    SmoothAdvCompSumLoss,
    margin_drift,
    smooth_adversarial_comp_sum,
    worst_drift,
)
from robust_core.random import SampleStreams, derive
from robust_core.threats import L1, L2, Linf
from robust_core.training.inner import FastPGD


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_network(seed=0, *, norm=False):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), middle, nn.ReLU(), nn.Linear(16, 4))


def batch(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.rand(n, 1, 3, 4, generator=generator),
        "y": torch.randint(4, (n,), generator=generator),
        "index": torch.arange(50, 50 + n),
    }


@pytest.mark.quick
def test_drift_equals_the_double_loop_and_ignores_common_shifts():
    z, reference = draw(7, 4), draw(7, 4, seed=1)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for row, value in enumerate(margin_drift(z, reference, y).tolist()):
        k = int(y[row])
        now, before = (t[row].tolist() for t in (z, reference))
        gaps = [(now[k] - now[j]) - (before[k] - before[j]) for j in range(4) if j != k]
        assert value == pytest.approx(math.sqrt(math.fsum(g * g for g in gaps)), rel=1e-9)
    torch.testing.assert_close(margin_drift(z + draw(7, 1, seed=2), reference, y), margin_drift(z, reference, y))


def test_gradients_are_right_and_finite_at_rest():
    z, reference = draw(5, 3).requires_grad_(True), draw(5, 3, seed=1).requires_grad_(True)
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss(a, b):
        return smooth_adversarial_comp_sum(a, b, y, tau=1.3, rho=0.8, nu=0.4)[0]

    assert torch.autograd.gradcheck(loss, (z, reference))
    (gradient,) = torch.autograd.grad(margin_drift(z, z.detach().clone(), y).sum(), z)
    assert bool((gradient == 0).all())


def test_the_first_term_is_the_sum_of_exponentials_over_rho():
    z = draw(6, 5)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    for tau in (0.0, 1.0, 1.6):
        losses, parts = smooth_adversarial_comp_sum(z, z, y, tau=tau, rho=0.4, nu=0.0)
        u = torch.stack(
            [sum(torch.exp((r[j] - r[k]) / 0.4) for j in range(5) if j != k) for r, k in zip(z, y, strict=True)]
        )
        torch.testing.assert_close(losses, outer(torch.log1p(u), tau))
        torch.testing.assert_close(parts["base"], comp_sum(z / 0.4, y, tau))


def test_rho_is_a_scale_of_the_logits():
    z, moved, y = draw(6, 4), draw(6, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    both = smooth_adversarial_comp_sum(z, moved, y, tau=1.4, rho=0.3, nu=0.7)[0]
    one = smooth_adversarial_comp_sum(z / 0.3, moved / 0.3, y, tau=1.4, rho=1.0, nu=0.21)[0]
    torch.testing.assert_close(both, one)


def linear_drift(weight, y, eps):
    """The exact maximum over an L2 ball: eps times the spectral norm of the margins' map."""
    rows = torch.stack([weight[y] - weight[j] for j in range(len(weight)) if j != y])
    return eps * torch.linalg.matrix_norm(rows, 2)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.3, 2.0), st.sampled_from([0.0, 0.7, 1.0, 1.8, 2.5]), st.floats(0.01, 2.0))
def test_upper_bound_on_a_linear_model_where_both_maxima_are_exact(seed, rho, tau, eps):
    """Two classes (dual norm, exact) and four (spectral norm above, sampled points below)."""
    for n in (2, 4):
        weight, x = draw(n, 6, seed=seed), draw(6, seed=seed + 1)
        y, label = 1, torch.tensor([1])
        z = (weight @ x)[None]
        nu = math.sqrt(n - 1) / rho
        smooth = comp_sum(z / rho, label, tau) + nu * linear_drift(weight, y, eps)
        if n == 2:
            worst = z.clone()
            worst[0, 0] += eps * (weight[0] - weight[1]).norm()  # the dual norm of L2
            tilde = rho_margin_comp_sum(worst, label, tau, rho=rho)
        else:
            steps = draw(500, 6, seed=seed + 2)
            steps = torch.cat([steps, weight - weight[y]])
            steps = eps * steps / steps.norm(dim=1, keepdim=True).clamp(min=1e-12)
            points = (x + steps) @ weight.T
            tilde = rho_margin_comp_sum(points, label.expand(len(points)), tau, rho=rho).max()
        assert bool((smooth >= tilde - 1e-9).all())


def test_ascent_reaches_the_exact_maximum_of_a_linear_model():
    weight = draw(3, 8, dtype=torch.float32)
    model = nn.Linear(8, 3, bias=False)
    model.weight.data.copy_(weight)
    x, y = draw(20, 8, seed=1, dtype=torch.float32), torch.arange(20) % 3
    x_adv = worst_drift(model, x, y, attack=FastPGD(L2(0.5, None), n_iter=200, step_size=5.0))
    reached = margin_drift(model(x_adv), model(x), y).detach()
    exact = torch.stack([linear_drift(weight, k, 0.5) for k in y.tolist()])
    assert bool((reached <= exact * (1 + 1e-5)).all())
    assert float((reached / exact).min()) > 0.99
    two = nn.Linear(8, 2, bias=False)
    two.weight.data.copy_(weight[:2])
    x_adv = worst_drift(two, x, y % 2, attack=FastPGD(Linf(0.1, None)))
    exact = 0.1 * (two.weight[0] - two.weight[1]).detach().abs().sum()
    assert float((margin_drift(two(x_adv), two(x), y % 2).detach() / exact).min()) > 0.999


@pytest.mark.quick
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0)])
def test_points_stay_inside_and_the_model_is_left_alone(threat):
    model, data = small_network(norm=True), batch()
    model.train()
    state = copy.deepcopy(model.state_dict())
    x_adv = worst_drift(model, data["x"], data["y"], attack=FastPGD(threat))
    assert bool(threat.contains(x_adv, data["x"]).all())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        clean, start = model(data["x"]), threat.random_start(data["x"], SampleStreams(0, data["index"], "test"))
        before = margin_drift(model(start), clean, data["y"])
        after = margin_drift(model(x_adv), clean, data["y"])
    assert float(after.mean()) > 1.5 * float(before.mean())


def test_objective_is_the_mean_of_the_functional_form_and_draws_new_starts():
    model, data, attack = small_network(), batch(), FastPGD(Linf(0.1))
    objective = SmoothAdvCompSumLoss(attack, tau=1.2, rho=0.9, nu=0.4, generator=3)
    for step in range(2):
        loss = objective(model, data)
        x_adv = worst_drift(
            model, data["x"], data["y"], attack=attack, index=data["index"], generator=derive(3, 0, step)
        )
        expected, parts = smooth_adversarial_comp_sum(
            model(data["x"]), model(x_adv), data["y"], tau=1.2, rho=0.9, nu=0.4
        )
        torch.testing.assert_close(loss.total, expected.mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.parts["drift"], parts["drift"].detach().mean(), rtol=1e-5, atol=1e-6)


def test_a_sample_is_perturbed_alike_in_any_company():
    model, data = small_network(norm=True), batch()
    settings = {"attack": FastPGD(Linf(0.1)), "generator": 5}
    whole = worst_drift(model, data["x"], data["y"], index=data["index"], **settings)
    alone = worst_drift(model, data["x"][3:4], data["y"][3:4], index=data["index"][3:4], **settings)
    torch.testing.assert_close(whole[3:4], alone)
    other = worst_drift(model, data["x"], data["y"], index=data["index"], attack=settings["attack"], generator=6)
    assert not torch.equal(whole, other)


def test_batch_normalisation_sees_both_halves_at_once():
    model, data = small_network(norm=True), batch()
    model.train()
    SmoothAdvCompSumLoss(FastPGD(Linf(0.1)))(model, data)
    assert int(model[2].num_batches_tracked) == 1


def test_warm_up_and_upper_bound():
    objective = SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), nu=0.6, rho=5.0)
    shares = []
    for epoch in range(9):
        objective.on_epoch(epoch, 9)
        shares.append(float(objective.nu_share))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1])
    assert objective.is_upper_bound(10)
    assert not objective.is_upper_bound(11)
    model, data = small_network(), batch()
    objective.on_epoch(0, 9)
    early = objective(model, data)
    expected = early.parts["base"] + 0.2 * early.parts["drift"]
    torch.testing.assert_close(early.total.detach(), expected)
    without = SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), warmup=0.0)
    without.on_epoch(0, 9)
    assert float(without.nu_share) == 1.0


def test_training_lowers_the_drift():
    model, data = small_network(), batch(64)
    objective = SmoothAdvCompSumLoss(FastPGD(Linf(0.1), n_iter=3), nu=1.0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    drifts = []
    for _ in range(30):
        loss = objective(model, data)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        drifts.append(float(loss.parts["drift"]))
    assert drifts[-1] < 0.5 * drifts[0]


@pytest.mark.quick
def test_bad_arguments_are_named():
    data, model = batch(), small_network()
    for call, word in (
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), tau=-1.0), "tau"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), rho=0.0), "rho"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), nu=-0.1), "nu"),
        (lambda: FastPGD(Linf(0.1), n_iter=0), "n_iter"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)), warmup=1.5), "warmup"),
        (lambda: smooth_adversarial_comp_sum(torch.zeros(2, 3), torch.zeros(2, 2), data["y"][:2]), "logits_adv"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)))(model, {**data, "y": data["y"] + 9}), "labels|y needs"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)))(model, {**data, "x": data["x"] + 3}), "domain"),
        (lambda: SmoothAdvCompSumLoss(FastPGD(Linf(0.1)))(model, {**data, "x": data["x"] * torch.nan}), "NaN"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
