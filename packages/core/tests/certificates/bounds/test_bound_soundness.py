"""Nobody gets under a bound: random points, corners and gradient attacks, in the dtype in which users run models."""

import math

import pytest
import torch
from torch import nn

from robust_core.certificates.bounds import Crown, IntervalBounds
from robust_core.certificates.result import Status
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.testing.networks import KINDS, planted_network, random_network
from robust_core.threats import L1, L2, Linf

THREATS = (Linf(0.05), L2(0.1), L1(0.2))
METHODS = ("crown", "crown-ibp", "alpha-crown")


def margin(model, x, y):
    logits = predict_logits(model, x)
    true = logits.gather(1, y[:, None]).squeeze(1)
    return true.double() - logits.scatter(1, y[:, None], -math.inf).amax(1).double()


def least_margin_found(model, threat, x, y, seed, steps=12):
    """Random points of the ball, its corners, and gradient descent on the margin: (B,)."""
    generator = stream(seed, 0, "points")
    noise = torch.randn((8, *x.shape), generator=generator, dtype=torch.float64).to(x.dtype)
    worst = torch.full((len(x),), math.inf, dtype=torch.float64)
    starts = [threat.project(x + n.sign() * threat.eps, x) for n in noise[:4]]
    starts += [threat.project(x + n * threat.eps, x) for n in noise[4:]]
    for start in starts:
        worst = torch.minimum(worst, margin(model, start, y))
    point = starts[0]
    for i in range(steps):
        leaf = point.detach().clone().requires_grad_(True)
        logits = model(leaf)
        true = logits.gather(1, y[:, None]).squeeze(1)
        gap = true - logits.scatter(1, y[:, None], -math.inf).amax(1)
        (gradient,) = torch.autograd.grad(gap.sum(), leaf)
        step = 2 * threat.eps / (i + 1)
        point = threat.project((leaf - step * threat.steepest(gradient)).detach(), x)
        worst = torch.minimum(worst, margin(model, point, y))
    return worst


def certifiers(model, threat, i):
    yield IntervalBounds(model, threat)
    yield Crown(model, threat, METHODS[i % 3], n_iter=3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_gets_below_a_bound(kind):
    for i in range(34):  # 204 networks over all kinds
        model, x = random_network(i, kind, scale=0.7 + 0.2 * (i % 4))
        if i % 2:
            model, x = model.double(), x.double()
        y = predict_logits(model, x).argmax(1)
        tested = tuple(certifiers(model, THREATS[i % 3], i))
        for power in (0.1, 1.0, 3.0):
            threat = THREATS[i % 3].with_eps(THREATS[i % 3].eps * power)
            found = least_margin_found(model, threat, x, y, i, steps=5)
            for certifier in tested:
                certifier.threat = threat  # the graph is the same
                result = certifier.certify(x)
                assert (result.details["margin"] <= found).all(), (certifier.name, kind, i, threat)
                assert not (result.certified & (found <= 0)).any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_linear_bounds_are_never_looser_than_intervals(kind):
    model, x = random_network(5, kind)
    for threat in THREATS:
        y = predict_logits(model, x).argmax(1)
        interval = IntervalBounds(model, threat).margins(x, y)
        for method in METHODS:
            assert (Crown(model, threat, method, n_iter=3).margins(x, y) >= interval - 1e-5).all()
        wide = IntervalBounds(model, threat).margins(x, y, eps=2 * threat.eps)
        assert (wide <= interval + 1e-5).all()


def test_exhaustive_grid_in_two_dimensions():
    for seed in range(6):
        generator = stream(seed, 0, "grid")
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.rand((3, 2), generator=generator)
        y = predict_logits(model, x).argmax(1)
        for threat in (Linf(0.1), L2(0.1), L1(0.1)):
            axis = torch.linspace(-0.1, 0.1, 81)
            offsets = torch.cartesian_prod(axis, axis)
            for row in range(3):
                centre = x[row : row + 1].expand(len(offsets), 2)
                grid = threat.project(centre + offsets, centre)
                true = margin(model, grid, y[row].expand(len(grid))).min()
                for certifier in certifiers(model, threat, 2):
                    assert certifier.certify(x[row : row + 1]).details["margin"][0] <= true


def test_planted_counter_examples_are_never_certified():
    for seed in range(30):
        model, x, corner = planted_network(seed, eps=0.1)
        threat = Linf(0.1)
        assert bool(threat.contains(corner, x))
        prediction = predict_logits(model, x).argmax(1)
        assert bool((predict_logits(model, corner).argmax(1) != prediction).all())
        for certifier in (IntervalBounds(model, threat), Crown(model, threat), Crown(model, threat, "alpha-crown")):
            assert not bool(certifier.certify(x).certified.any())


def walk(model, threat, x, y, towards):
    """Step by step through neighbouring floats at the very edge of the ball; return whether a prediction flips."""
    point = threat.project(towards, x)
    for _ in range(6):
        if bool((predict_logits(model, point).argmax(1) != y).any()):
            return True
        point = threat.project(torch.nextafter(point, towards), x)
    return False


def test_rounding_attack_at_the_certified_radius():
    """Affine and nearly affine networks, whose bounds are tight: rounding is all that is left to break them."""
    tested = 0
    for seed in range(26):
        generator = stream(seed, 0, "rounding")
        d = 20 + 8 * (seed % 3)
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Linear(d, 12), nn.Linear(12, 2)) if seed % 2 else nn.Linear(d, 2)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 10.0 ** (seed % 4))
        x = 0.3 + 0.4 * torch.rand((4, d), generator=generator)
        certifier = Crown(model, Linf(0.05))
        result = certifier.radius(x, max_eps=0.3, steps=40)
        for row in range(4):
            radius = float(result.radius[row])
            if not bool(result.certified[row]):
                continue
            tested += 1
            here, y = x[row : row + 1], result.prediction[row : row + 1]
            leaf = here.clone().requires_grad_(True)
            logits = model(leaf)
            (gradient,) = torch.autograd.grad(logits[0, y[0]] - logits[0, 1 - y[0]], leaf)
            towards = here - gradient.sign()
            assert not walk(model, Linf(radius), here, y, towards)
            batch = here.repeat(5, 1)  # another batch size takes another kernel, with another order of summation
            worst = Linf(radius).project(batch - gradient.sign(), batch)
            assert bool((model(worst).argmax(1) == y).all())
            assert bool((model(worst[:1]).argmax(1) == y).all())
            if radius == 0.3:
                continue
            # the bound is tight: a slightly larger ball does hold a counter-example
            beyond = Linf(radius * 1.02 + 1e-4).project(batch - gradient.sign(), batch)
            assert bool((model(beyond).argmax(1) != y).all())
    assert tested >= 100


def inject(tensor, value, generator):
    flat = tensor.data.view(-1)
    flat[int(torch.randint(len(flat), (), generator=generator))] = value


def test_nan_and_infinity_are_never_certified():
    injections = 0
    for i, kind in enumerate((*KINDS, *KINDS)):
        for value in (math.nan, math.inf, -math.inf):
            model, x = random_network(i, kind)
            tensors = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
            target = tensors[-1 - (i + injections) % len(tensors)]
            if isinstance(target, nn.Parameter):
                target.requires_grad_(False)
            # all of the tensor, so that nothing downstream can be spared
            target.data.fill_(value)
            for certifier in (IntervalBounds(model, Linf(1e-6)), Crown(model, Linf(1e-6))):
                injections += 1
                result = certifier.certify(x)
                logits = predict_logits(model, x)
                broken = ~torch.isfinite(logits).all(1)
                assert not bool((result.certified & broken).any()), (kind, value)
    assert injections >= 60
    for value in (math.nan, math.inf):
        model, x = random_network(0, "mlp")
        x[0, 0] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            Crown(model, Linf(0.1)).certify(x)


def test_weights_from_micro_to_mega_in_float32():
    for seed in range(12):
        model, x = random_network(seed, "mlp")
        generator = stream(seed, 0, "weights")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10 ** (12 * torch.rand(parameter.shape, generator=generator) - 6))
        threat = Linf(1e-3)
        y = predict_logits(model, x).argmax(1)
        exact = margin(random_copy_in_float64(model), x.double(), y)
        for certifier in certifiers(model, threat, seed):
            proven = certifier.certify(x).details["margin"]
            assert (proven <= margin(model, x, y)).all()
            assert (proven <= exact).all()
            assert (proven <= least_margin_found(model, threat, x, y, seed, steps=3)).all()


def random_copy_in_float64(model):
    import copy

    return copy.deepcopy(model).double()


def test_error_status_is_not_unknown():
    model, x = random_network(0, "mlp")
    model[4].bias.data.fill_(math.nan)
    result = Crown(model, Linf(0.01)).certify(x)
    assert result.status.tolist() == [Status.ERROR] * len(x)
