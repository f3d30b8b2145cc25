"""FGSM, PGD and Auto-PGD: exact where the truth is known, and the same whatever the batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.pgd import FGSM, PGD
from robust_core.errors import NotDifferentiableError
from robust_core.losses.margin import misclassified
from robust_core.models import predict_logits
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf
from robust_core.training import FastPGD

THREATS = [Linf(0.1), L2(0.8), L1(3.0)]


def attacks(threat, n_iter=12):
    yield FGSM(threat)
    yield PGD(threat, n_iter=n_iter, n_restarts=2)
    yield PGD(threat, n_iter=n_iter, momentum=0.9, loss="dlr")
    yield APGD(threat, n_iter=n_iter)
    yield APGD(threat, n_iter=n_iter, loss="margin", n_restarts=2)
    yield TargetedAPGD(threat, n_iter=n_iter, n_targets=3)
    if isinstance(threat, L1):
        yield APGD(threat, n_iter=n_iter, large_eps=True)


ALL = [attack for threat in THREATS for attack in attacks(threat)]
IDS = [f"{a.threat.name}-{a.name}-{i}" for i, a in enumerate(ALL)]


@pytest.fixture(scope="module")
def net():
    return digits_cnn("plain")


@pytest.fixture(scope="module")
def data():
    x, y = digits()
    return x[:70], y[:70]


@pytest.mark.parametrize("attack", ALL, ids=IDS)
def test_result_ignores_batch_size_order_and_company(attack, net, data):
    x, y = data
    index = torch.arange(100, 100 + len(x))
    whole = attack.run(net, x, y, index=index, generator=5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    small = replace(attack, batch_size=16).run(net, x[order], y[order], index=index[order], generator=5)
    assert torch.equal(small.x_adv, whole.x_adv[order])
    assert torch.equal(small.success, whole.success[order])
    alone = attack.run(net, x[9:10], y[9:10], index=index[9:10], generator=5)
    assert torch.equal(alone.x_adv, whole.x_adv[9:10])


@pytest.mark.parametrize("attack", ALL, ids=IDS)
def test_result_tells_the_truth_and_leaves_the_model_alone(attack, net, data):
    x, y = data
    net.train()
    net[0].eval()
    rng = torch.get_rng_state()
    result = attack.run(net, x, y)
    assert (net.training, net[0].training, net[1].training) == (True, False, True)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    net.eval()
    assert attack.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.success, misclassified(predict_logits(net, result.x_adv), y))
    assert torch.equal(result.distance, attack.threat.distance(result.x_adv, x))
    assert [bool(name) for name in result.found_by] == result.success.tolist()
    assert result.backwards > 0
    assert result.success.float().mean() > 0.2


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.3), L1(1.5)], ids=str)
def test_points_stay_inside_in_every_dtype(threat, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 2, 3, 3, generator=generator).to(dtype)
    x[:40] = x[:40].round()
    y = torch.randint(5, (200,), generator=generator)
    linear = nn.Linear(18, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(5, 18, generator=generator))
        linear.bias.zero_()
    model = nn.Sequential(nn.Flatten(), linear).to(dtype)
    for attack in attacks(threat, n_iter=6):
        result = attack.run(model, x, y)
        assert result.x_adv.dtype == dtype
        assert threat.contains(result.x_adv, x).all()


def linear_case(threat_kind, seed=0, n=120, d=12):
    """Two classes, a box that never binds, and every sample's exact distance to the boundary."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=generator, dtype=torch.float64) * 0.1 + 0.45
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    linear = nn.Linear(d, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros(d, dtype=torch.float64), w]))
        linear.bias.copy_(torch.stack([torch.zeros((), dtype=torch.float64), -(x @ w).median()]))
    score = linear(x).detach()
    y = score.argmax(1)
    distance = (score[:, 1] - score[:, 0]).abs() / threat_kind(1.0).dual_norm(w[None])
    return linear, x, y, distance


@pytest.mark.quick
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_linear_models_break_exactly_beyond_their_distance(kind):
    model, x, y, distance = linear_case(kind)
    eps = float(distance.median())
    clear = (distance / eps - 1).abs() > 0.01
    threat = kind(eps)
    for attack in (PGD(threat, n_iter=200, step_size=eps / 20), APGD(threat), TargetedAPGD(threat)):
        broken = attack.run(model, x, y).success
        assert torch.equal(broken[clear], (distance < eps)[clear]), attack
    if kind is not L1:  # one step reaches the corner, or the pole, of the ball
        assert torch.equal(FGSM(threat).run(model, x, y).success[clear], (distance < eps)[clear])


def test_success_grows_with_eps(net, data):
    x, y = data
    for kind, grid in ((Linf, (0.0, 0.03, 0.08, 0.2)), (L2, (0.0, 0.3, 0.8, 2.0)), (L1, (0.0, 1.0, 3.0, 9.0))):
        rates = [float(APGD(kind(eps), n_iter=20).run(net, x, y).success.float().mean()) for eps in grid]
        assert rates == sorted(rates)
        assert rates[-1] > 0.9
        clean = misclassified(predict_logits(net, x), y).float().mean()
        assert rates[0] == clean


@pytest.mark.parametrize("attack", [a for t in THREATS for a in attacks(t.with_eps(0.0))], ids=IDS)
def test_radius_zero_moves_nothing(attack, net, data):
    x, y = data
    assert torch.equal(attack(net, x, y), x)


@pytest.mark.parametrize(("n_classes", "n"), list(itertools.product([2, 3, 4], [1, 9])))
def test_few_classes_and_single_samples(n_classes, n):
    generator = torch.Generator().manual_seed(n_classes)
    x = torch.rand(n, 6, generator=generator)
    linear = nn.Linear(6, n_classes)
    y = linear(x).argmax(1)
    for attack in (APGD(Linf(1.0), loss="dlr", n_iter=20), TargetedAPGD(Linf(1.0), n_iter=20)):
        result = attack.run(linear, x, y)
        assert result.x_adv.shape == x.shape
        if isinstance(attack, TargetedAPGD):
            text = " ".join(result.notes)
            assert f"{n_classes - 1} targets instead of 9" in text
            assert ("targeted DLR needs 4 classes" in text) == (n_classes < 4)


def test_planted_weakness_is_always_found(data):
    """One pixel decides: every attack must find it."""
    x, y = data

    class OnePixel(nn.Module):
        def forward(self, image):
            lean = (image[:, 0, 0, 0] - 0.04) * 100
            return torch.stack([-lean, lean], dim=1)

    y = torch.zeros_like(y)
    x = x.clone()
    x[:, 0, 0, 0] = 0.0
    for threat in (Linf(0.05), L2(0.05), L1(0.05)):
        for attack in attacks(threat, n_iter=20):
            if isinstance(attack, PGD) and isinstance(threat, L1) and attack.n_iter == 1:
                continue  # one step that moves several pixels cannot spend all on one
            assert attack.run(OnePixel(), x, y).success.all(), attack


def test_scaled_logits_hide_nothing(data):
    x, y = data
    net = digits_cnn("adversarial")

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image):
            return 1e4 * self.net(image)

    for attack in (PGD(Linf(0.2), n_iter=10), APGD(Linf(0.2), n_iter=10)):
        quiet, loud = attack.run(net, x, y), attack.run(Loud(), x, y)
        assert abs(float(quiet.success.float().mean() - loud.success.float().mean())) < 0.1
        assert loud.success.float().mean() > 0.3


def test_targeted_pgd_reaches_the_class_that_is_wanted(net, data):
    x, y = data
    wanted = (y + 1) % 10
    result = PGD(Linf(0.6), n_iter=40, targeted=True).run(net, x, wanted)
    assert result.success.float().mean() > 0.9
    assert torch.equal(result.success, predict_logits(net, result.x_adv).argmax(1) == wanted)


def test_last_iterate_costs_exactly_its_steps(net, data):
    x, y = data
    passes = []
    count = net.register_forward_pre_hook(lambda _module, _args: passes.append(1))
    FastPGD(Linf(0.1), n_iter=7)(net, x, y)
    count.remove()
    assert len(passes) == 7


def test_init_is_where_the_first_start_stands(net, data):
    x, y = data
    first = APGD(Linf(0.1)).run(net, x, y)
    again = APGD(Linf(0.1), n_iter=1).run(net, x, y, init=first.x_adv)
    assert again.success[first.success].all()


def test_draws_are_averaged_for_random_models(net, data):
    x, y = data

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image):
            return self.net(image + 0.3 * torch.randn_like(image))

    result = APGD(Linf(0.1), n_iter=10, n_draws=4).run(Noisy(), x, y, generator=1)
    again = APGD(Linf(0.1), n_iter=10, n_draws=4).run(Noisy(), x, y, generator=1)
    assert torch.equal(result.x_adv, again.x_adv)
    assert result.backwards >= 4 * len(x)


def test_bad_models_and_settings_are_named(net, data):
    x, y = data
    with pytest.raises(NotDifferentiableError, match="no gradient"):
        PGD(Linf(0.1))(lambda image: net(image).detach(), x, y)
    with pytest.raises(ValueError, match="classifier maps"):
        PGD(Linf(0.1))(lambda image: net(image)[:, :3], x, y)
    with pytest.raises(ValueError, match="large_eps"):
        APGD(L2(0.1), large_eps=True)
    with pytest.raises(ValueError, match="loss='dlx'"):
        APGD(L2(0.1), loss="dlx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FGSM makes one step"):
        FGSM(L2(0.1), n_iter=2)
    with pytest.raises(ValueError, match="outside the domain"):
        PGD(Linf(0.1))(net, x + 1e-4, y)


def test_phases_side_by_side_cost_fewer_passes_and_change_nothing(data):
    net = digits_cnn("adversarial")
    x, y = data[0][:6], data[1][:6]

    class OneByOne(TargetedAPGD):
        parallel_phases = False

    settings = {"threat": Linf(0.05), "n_iter": 20, "n_targets": 5}
    beside, apart = TargetedAPGD(**settings).run(net, x, y), OneByOne(**settings).run(net, x, y)
    assert not beside.success.all()
    assert torch.equal(beside.success, apart.success)
    assert torch.equal(beside.x_adv[beside.success], apart.x_adv[apart.success])
    torch.testing.assert_close(beside.loss, apart.loss)
    assert beside.backwards < 0.6 * apart.backwards
