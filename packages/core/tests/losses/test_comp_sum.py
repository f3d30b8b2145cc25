import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from robust_core.losses.comp_sum import (
    CompSumLoss,
    GeneralizedCrossEntropy,
    MAELoss,
    RhoMarginCompSumLoss,
    SumExponentialLoss,
    comp_sum,
    outer,
    rho_margin_comp_sum,
)

TAUS = (0.0, 0.5, 0.999, 1.0, 1.0 + 1e-7, 1.3, 1.7, 2.0, 3.0)


def draw(rows=64, classes=5, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=dtype) * scale
    return logits, torch.randint(classes, (rows,), generator=generator)


def slow_comp_sum(row, label, tau):
    """The definition, one sum of exponentials at a time."""
    u = math.fsum(math.exp(row[k] - row[label]) for k in range(len(row)) if k != label)
    if tau == 1:
        return math.log1p(u)
    return math.expm1((1 - tau) * math.log1p(u)) / (1 - tau)


@pytest.mark.quick
@pytest.mark.parametrize("tau", TAUS)
def test_equals_the_definition(tau):
    logits, y = draw()
    slow = torch.tensor(
        [slow_comp_sum(z, k, tau) for z, k in zip(logits.tolist(), y.tolist(), strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(comp_sum(logits, y, tau), slow, rtol=1e-9, atol=1e-12)


@pytest.mark.quick
def test_named_members_of_the_family():
    logits, y = draw(dtype=torch.float32)
    p = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    cases = {
        CompSumLoss(1.0): F.cross_entropy(logits, y),
        MAELoss(): (1 - p).mean(),
        GeneralizedCrossEntropy(0.7): ((1 - p**0.7) / 0.7).mean(),
        CompSumLoss(1.7): ((1 - p**0.7) / 0.7).mean(),
        GeneralizedCrossEntropy(1.0): (1 - p).mean(),
    }
    for loss, expected in cases.items():
        torch.testing.assert_close(loss(logits, y), expected, rtol=1e-5, atol=1e-6)
    near = draw(scale=1.0, dtype=torch.float32)
    p = near[0].softmax(1).gather(1, near[1][:, None]).squeeze(1)
    torch.testing.assert_close(SumExponentialLoss("none")(*near), 1 / p - 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-7, 3e-9, 0.9e-9, 1e-12])
def test_continuous_at_tau_one_in_value_and_gradient(step, dtype):
    logits, y = draw(scale=10.0, dtype=dtype)
    results = []
    for tau in (1 - step, 1.0, 1 + step):
        z = logits.clone().requires_grad_(True)
        value = comp_sum(z, y, tau)
        results.append((value.detach(), torch.autograd.grad(value.sum(), z)[0]))
    s = results[1][0].max()
    for value, gradient in (results[0], results[2]):
        # |Phi_tau - s| <= |1 - tau| s^2 exp(|1 - tau| s) / 2, and its derivative |1 - tau| s exp(...)
        slack = step * float(s) * math.exp(step * float(s)) + 8 * torch.finfo(dtype).eps
        assert float((value - results[1][0]).abs().max()) <= slack * max(1.0, float(s))
        assert float((gradient - results[1][1]).abs().max()) <= slack * 2


def test_exact_far_from_the_origin_near_tau_one():
    # A two-term series used up to |1 - tau| = 1e-4 would give 1.5e4 here.
    s = torch.tensor([1e4], dtype=torch.float64)
    assert float(outer(s, 1 - 0.9e-4)) == pytest.approx(math.expm1(0.9) / 0.9e-4, rel=1e-9)


@pytest.mark.parametrize("tau", TAUS)
def test_gradcheck(tau):
    logits, y = draw(6, 4, 1.5)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: comp_sum(z, y, tau), logits)
    assert torch.autograd.gradcheck(lambda z: comp_sum(z, y, tau, label_smoothing=0.2), logits)
    if tau in (0.5, 1.0, 1.7):
        assert torch.autograd.gradgradcheck(lambda z: comp_sum(z, y, tau), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0, 5.0])
def test_extreme_logits_give_finite_losses_and_gradients(tau, dtype):
    size = 1e4
    z = torch.tensor([[size, -size, 0], [-size, size, 0], [-size, -size, -size], [0, 0, 0]], dtype=dtype)
    z.requires_grad_(True)
    losses = comp_sum(z, torch.zeros(4, dtype=torch.int64), tau)
    losses.sum().backward()
    assert z.grad is not None
    assert bool(torch.isfinite(losses).all())
    wide = torch.isfinite(z.grad) if dtype not in (torch.float16,) else ~z.grad.isnan()
    assert bool(wide.all())  # float16 logits cannot hold the gradient of e^60; they get inf, never NaN
    assert losses[0] == 0
    assert losses[1] >= losses[3]


def test_beyond_the_exponent_limit_losses_keep_order_and_gradient():
    loss = SumExponentialLoss("none")
    z = torch.tensor([[-70.0, 0.0], [-80.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    values = loss(z, torch.tensor([0, 0, 0]))
    (gradient,) = torch.autograd.grad(values.sum(), z)
    assert values[1].item() > values[0].item() > 1e26
    assert bool((gradient[:, 0] < 0).all())
    assert int(loss.limited) == 2
    # the tangent continues the exponential: no jump at the limit
    around = outer(torch.tensor([60 - 1e-4, 60 + 1e-4]), 0.0)
    assert float(around[1] / around[0]) == pytest.approx(1.0, abs=1e-3)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(0, 3), st.floats(0.01, 3), st.integers(0, 10**6))
def test_decreases_with_tau_and_ignores_common_shifts(tau, more, seed):
    logits, y = draw(16, 4, 4.0, seed)
    losses = comp_sum(logits, y, tau)
    assert bool((comp_sum(logits, y, tau + more) <= losses * (1 + 1e-12)).all())
    torch.testing.assert_close(comp_sum(logits + 17.0, y, tau), losses, rtol=1e-9, atol=1e-11)


def test_soft_targets_and_smoothing_are_expectations():
    logits, y = draw(32, 5)
    onehot = F.one_hot(y, 5).double()
    each = torch.stack([comp_sum(logits, torch.full_like(y, k), 1.4) for k in range(5)], 1)
    torch.testing.assert_close(comp_sum(logits, onehot, 1.4), comp_sum(logits, y, 1.4))
    soft = draw(32, 5, 1.0, 9)[0].softmax(1)
    torch.testing.assert_close(comp_sum(logits, soft, 1.4), (each * soft).sum(1))
    torch.testing.assert_close(
        CompSumLoss(1.0, label_smoothing=0.1)(logits, y), F.cross_entropy(logits, y, label_smoothing=0.1)
    )


def test_rho_margin_equals_the_definition_and_bounds_the_error():
    logits, y = draw(200, 4, 1.0)
    for tau in (0.0, 1.0, 2.5):
        for rho in (0.3, 1.0, 2.0):
            slow = []
            for z, k in zip(logits.tolist(), y.tolist(), strict=True):
                u = sum(min(max(0.0, 1 - (z[k] - z[j]) / rho), 1.0) for j in range(4) if j != k)
                slow.append(math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau))
            losses = rho_margin_comp_sum(logits, y, tau, rho=rho)
            torch.testing.assert_close(losses, torch.tensor(slow, dtype=torch.float64))
            assert bool((losses >= (logits.argmax(1) != y) * float(outer(torch.tensor(math.log(2)), tau)) - 1e-6).all())
    z = logits[:8].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: rho_margin_comp_sum(v, y[:8], 1.0, rho=0.7), z)
    assert RhoMarginCompSumLoss(1.0, 0.7)(logits, y) == rho_margin_comp_sum(logits, y, 1.0, rho=0.7).mean()


def test_reductions_and_state():
    logits, y = draw()
    none = CompSumLoss(1.5, "none")(logits, y)
    assert CompSumLoss(1.5, "sum")(logits, y) == none.sum()
    assert CompSumLoss(1.5)(logits, y) == none.mean()
    assert CompSumLoss(1.5).state_dict() == {}  # drop-in: no new keys in anyone's checkpoints
    assert "tau=1.7" in repr(GeneralizedCrossEntropy())


@pytest.mark.quick
def test_bad_arguments_are_named():
    logits, y = draw(4, 3, dtype=torch.float32)
    for make, word in (
        (lambda: CompSumLoss(-0.1), "tau"),
        (lambda: CompSumLoss(math.nan), "tau"),
        (lambda: CompSumLoss(reduction="avg"), "reduction"),  # pyright: ignore[reportArgumentType]
        (lambda: CompSumLoss(label_smoothing=1.5), "label_smoothing"),
        (lambda: GeneralizedCrossEntropy(0.0), "q"),
        (lambda: GeneralizedCrossEntropy(1.1), "q"),
        (lambda: RhoMarginCompSumLoss(rho=0.0), "rho"),
        (lambda: comp_sum(logits, y + 3, 1.0), "labels"),
        (lambda: comp_sum(logits, y - 3, 1.0), "labels"),
        (lambda: comp_sum(logits, y[:2], 1.0), "target"),
        (lambda: comp_sum(logits[:, :1], y, 1.0), "logits"),
        (lambda: comp_sum(logits[:0], y[:0], 1.0), "logits"),
        (lambda: comp_sum(logits * torch.nan, y, 1.0), "NaN"),
        (lambda: comp_sum(logits / 0.0, y, 1.0), "infinite"),
        (lambda: comp_sum(logits, logits, 1.0), "probabilities"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
    for make, word in (
        (lambda: comp_sum(logits, y.int(), 1.0), "int64"),
        (lambda: comp_sum(logits.long(), y, 1.0), "floating"),
        (lambda: rho_margin_comp_sum(logits, logits.softmax(1), 1.0), "labels"),
        (lambda: CompSumLoss("1"), "tau"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match=word):
            make()
