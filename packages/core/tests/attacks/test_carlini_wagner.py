from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_core.attacks.carlini_wagner import CarliniWagner
from robust_core.testing.tiny import linear_binary
from robust_core.threats import L2, Linf


def _problem(dtype=torch.float64):
    model = linear_binary(20).to(dtype)
    x = 0.4 + 0.2 * torch.rand(24, 20, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return model, x, model(x).argmax(1)


@pytest.mark.quick
@pytest.mark.parametrize("domain", [None, (0.0, 1.0), (-3.0, 4.0)])
def test_finds_the_distance_of_a_linear_model(domain):
    model, x, y = _problem()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    exact = (model(x)[:, 1] - model(x)[:, 0]).detach().abs() / w.norm()
    result = CarliniWagner(L2(10.0, domain=domain), n_iter=120).run(model, x, y)
    assert result.success.all()
    assert (result.distance >= exact * (1 - 1e-9)).all()
    assert ((result.distance - exact) / exact).max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("minimise", [True, False])
def test_stays_inside_in_every_dtype(dtype, minimise):
    model, x, y = _problem(dtype)
    threat = L2(0.2)
    result = CarliniWagner(threat, n_iter=12, n_searches=3, minimise=minimise).run(model, x, y)
    assert result.x_adv.dtype == dtype
    assert threat.contains(result.x_adv, x).all()
    assert (result.distance[~result.success] > 0).all()


def test_batch_size_and_order_do_not_matter():
    model, x, y = _problem(torch.float32)
    attack = CarliniWagner(L2(0.5), n_iter=15, n_searches=3)
    whole = attack(model, x, y)
    for batch_size in (1, 7):
        assert torch.equal(replace(attack, batch_size=batch_size)(model, x, y), whole)
    assert torch.equal(attack(model, x.flip(0), y.flip(0)).flip(0), whole)


def test_stopping_early_succeeds_where_minimising_does():
    model, x, y = _problem(torch.float32)
    attack = CarliniWagner(L2(0.4), n_iter=80, n_searches=5)
    least, first = attack.run(model, x, y), replace(attack, minimise=False).run(model, x, y)
    assert torch.equal(least.success, first.success)
    assert 0 < least.success.sum() < len(x)
    assert (least.distance <= first.distance + 1e-6)[least.success].all()
    assert first.forwards < least.forwards


def test_confidence_buys_a_margin():
    model, x, y = _problem()
    sure = CarliniWagner(L2(10.0, domain=None), n_iter=60, n_searches=5, confidence=1.0, minimise=False, initial_c=1e2)
    assert sure.run(model, x, y).success.all()


def test_counts_every_pass():
    seen = []

    class Flat(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x[:, :2] * 1e-6 + torch.tensor([1.0, 0.0], dtype=x.dtype)

    x, y = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3, dtype=torch.int64)
    result = CarliniWagner(L2(0.1), n_iter=4, n_searches=2, minimise=False).run(Flat(), x, y)
    assert result.forwards == sum(seen) == 16 * (1 + 2 * 4 + 1)
    assert result.backwards == 16 * 8
    assert not result.success.any()


def test_refuses_other_norms():
    with pytest.raises(ValueError, match="L2"):
        CarliniWagner(Linf(0.1))
