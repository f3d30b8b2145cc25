from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_core.attacks.fab import FAB
from robust_core.attacks.hyperplane import nearest_on_hyperplane
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf, PartialL2

THREATS = (Linf, L2, L1)


def _linear(n_classes: int = 2, d: int = 20):
    draw = torch.Generator().manual_seed(n_classes)
    model = nn.Linear(d, n_classes).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(n_classes, d, generator=draw, dtype=torch.float64))
        model.bias.zero_()
    x = 0.4 + 0.2 * torch.rand(30, d, generator=draw, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def _distances(model, x, y, threat):
    """Exact distances to the nearest other class of a linear model, without a box."""
    w = model.weight.detach()
    logits = model(x).detach()
    per_class = []
    for c in range(len(w)):
        gap = logits.gather(1, y[:, None]).squeeze(1) - logits[:, c]
        per_class.append(torch.where(y == c, torch.inf, gap / threat.dual_norm(w[c] - w[y]).clamp(min=1e-12)))
    return torch.stack(per_class).amin(0)


def _network():
    draw = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 6, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    x = torch.rand(24, 1, 6, 8, generator=draw)
    return model, x, model(x).argmax(1)


@pytest.mark.quick
@pytest.mark.parametrize("kind", THREATS)
@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("n_targets", [9, None])
def test_finds_the_exact_distance_of_a_linear_model(kind, n_classes, n_targets):
    model, x, y = _linear(n_classes)
    threat = kind(50.0, domain=None)
    exact = _distances(model, x, y, threat)
    result = FAB(threat, n_iter=30, n_targets=n_targets, minimise=True).run(model, x, y)
    assert result.success.all()
    assert ((result.distance - exact) / exact).abs().max() < 1e-3


@pytest.mark.parametrize("kind", THREATS)
def test_succeeds_exactly_inside_the_distance(kind):
    model, x, y = _linear(4)
    exact = _distances(model, x, y, kind(1.0))
    threat = kind(float(exact.median()))
    result = FAB(threat, n_iter=30).run(model, x, y)
    clear = (exact / threat.eps - 1).abs() > 0.01
    assert torch.equal(result.success[clear], (exact < threat.eps)[clear])


@pytest.mark.parametrize("kind", THREATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stays_inside_and_moves_what_it_cannot_break(kind, dtype):
    model, x, y = _network()
    model, x = model.to(dtype), x.to(dtype)
    threat = kind({"Linf": 0.01, "L2": 0.05, "L1": 0.2}[kind.name])
    result = FAB(threat, n_iter=6, n_targets=2, n_restarts=2).run(model, x, y)
    assert result.x_adv.dtype == dtype
    assert threat.contains(result.x_adv, x).all()
    assert (result.distance[~result.success] > 0).all()


def test_batch_size_and_order_do_not_matter():
    model, x, y = _network()
    attack = FAB(L2(0.3), n_iter=8, n_targets=3, n_restarts=2)
    whole = attack(model, x, y, generator=3)
    for batch_size in (1, 7):
        assert torch.equal(replace(attack, batch_size=batch_size)(model, x, y, generator=3), whole)
    order = torch.arange(len(x) - 1, -1, -1)
    turned = attack(model, x[order], y[order], index=order, generator=3)
    assert torch.equal(turned[order], whole)


def test_minimising_only_shortens():
    model, x, y = _network()
    first = FAB(L2(2.0), n_iter=15, n_targets=4).run(model, x, y)
    least = FAB(L2(2.0), n_iter=15, n_targets=4, minimise=True).run(model, x, y)
    assert torch.equal(first.success, least.success)
    assert (least.distance <= first.distance + 1e-9)[first.success].all()
    assert least.distance.sum() < 0.95 * first.distance.sum()


def _two_pass_distances(model, x, y, threat, n_iter, n_targets):
    """The published loop: one pass for the gradient, another to see whether the new point is misclassified."""
    least = torch.full((len(x),), torch.inf, dtype=torch.float64)
    targets = model(x).detach().scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    clean = x.flatten(1)
    for target in targets[:, :n_targets].T:
        point = x.clone()
        for _ in range(n_iter):
            probe = point.clone().requires_grad_(True)
            logits = model(probe)
            ahead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
            w = torch.autograd.grad(ahead.sum(), probe)[0].flatten(1)
            at = point.flatten(1)
            b = (w * at).sum(1) - ahead.detach()
            own, other = (nearest_on_hyperplane(start, w, b, threat.domain, threat.name) for start in (at, clean))
            lengths = [threat.norm(step).clamp(min=1e-8) for step in (own, other)]
            mixture = (lengths[0] / (lengths[0] + lengths[1])).clamp(max=0.1)[:, None]
            point = threat.clamp((1 - mixture) * (at + 1.05 * own) + mixture * (clean + 1.05 * other)).reshape(x.shape)
            broken = model(point).argmax(1) != y
            distance = threat.distance(point, x)
            least = torch.where(broken & (distance < least), distance, least)
            point = torch.where(broken.reshape(-1, 1, 1, 1), x + 0.9 * (point - x), point)
    return least


@pytest.mark.parametrize("kind", THREATS)
def test_one_pass_per_iteration_is_as_strong_as_two(kind):
    x, y = (part[:60] for part in digits())
    model = digits_cnn()
    x, y = x[model(x).argmax(1) == y], y[model(x).argmax(1) == y]
    published = _two_pass_distances(model, x, y, kind(1e3), n_iter=30, n_targets=3)
    result = FAB(kind(1e3), n_iter=30, n_targets=3, minimise=True).run(model, x, y)
    assert result.success.all()
    assert result.distance.mean() <= 1.005 * published.mean()
    assert result.distance.median() <= 1.005 * published.median()


def test_counts_every_pass():
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return -x.flatten(1)[:, :2] * 1e-3 + torch.tensor([1.0, 0.0])

    x, y = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64)
    result = FAB(Linf(0.01), n_iter=7).run(Counting(), x, y)
    assert not result.success.any()
    assert result.forwards == sum(seen) == 16 * (1 + 7 + 1)
    assert result.backwards == 16 * 7


@pytest.mark.parametrize("bad", [{"n_iter": 0}, {"n_targets": 0}, {"eta": 0.5}, {"beta": 1.0}, {"alpha_max": 2}])
def test_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FAB(Linf(0.1), **bad)


def test_a_partial_threat_is_met_at_the_distance_within_its_stretch():
    model, x, y = _linear()
    w = model.weight.detach()
    logits = model(x).detach()
    exact = (logits[:, 0] - logits[:, 1]).abs() / (w[0] - w[1])[5:12].norm()
    for factor, wanted in ((1.02, True), (0.98, False)):
        for row in range(4):
            threat = PartialL2(factor * float(exact[row]), None, 5, 12)
            result = FAB(threat, n_iter=10).run(model, x[row : row + 1], y[row : row + 1])
            assert bool(result.success.all()) == wanted
            assert threat.contains(result.x_adv, x[row : row + 1]).all()
