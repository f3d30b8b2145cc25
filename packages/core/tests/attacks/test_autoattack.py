"""AutoAttack: not weaker than a plain port of the published attacks, honest about defences, and resumable."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.autoattack import AutoAttack, plan
from robust_core.attacks.pgd import PGD
from robust_core.attacks.square import Square
from robust_core.errors import CheckpointError
from robust_core.losses.margin import cross_entropy, misclassified, targeted_dlr
from robust_core.models import predict_logits
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf

LINF = Linf(0.1)


@pytest.fixture(scope="module")
def net():
    return digits_cnn("plain")


@pytest.fixture(scope="module")
def hardened():
    return digits_cnn("adversarial")


@pytest.fixture(scope="module")
def data():
    x, y = digits()
    return x[:64], y[:64]


def plain_apgd(model, x, y, loss, eps, norm, seed, n_iter=100):
    """Algorithm 1 as written: the whole batch, to the end. Returns (B,) broken."""
    axes = tuple(range(1, x.ndim))
    generator = torch.Generator().manual_seed(seed)

    def length(d):
        return d.pow(2).sum(axes, keepdim=True).sqrt().clamp(min=1e-12)

    def project(z):
        if norm == "Linf":
            return torch.clamp(x + (z - x).clamp(-eps, eps), 0, 1)
        return torch.clamp(x + (z - x) * (eps / length(z - x)).clamp(max=1), 0, 1)

    def evaluate(z):
        z = z.detach().requires_grad_(True)
        logits = model(z)
        value = loss(logits)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0], misclassified(logits, y)

    noise = torch.randn(x.shape, generator=generator)
    if norm == "Linf":
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
    scale = noise.abs().amax(axes, keepdim=True) if norm == "Linf" else length(noise)
    point = old = project(x + eps * noise / scale)
    value, gradient, broken = evaluate(point)
    best, best_value, best_gradient = point, value, gradient
    step = torch.full((len(x), *[1] * (x.ndim - 1)), 2 * eps)
    k, since, ups, last = int(0.22 * n_iter), 0, torch.zeros(len(x)), value
    checked, reduced = value, torch.ones(len(x), dtype=torch.bool)
    for i in range(n_iter):
        a = 1.0 if i == 0 else 0.75
        direction = gradient.sign() if norm == "Linf" else gradient / length(gradient)
        ahead = project(point + step * direction)
        point, old = project(point + a * (ahead - point) + (1 - a) * (point - old)), point
        value, gradient, wrong = evaluate(point)
        broken |= wrong
        ups, last = ups + (value > last), value
        better = (value > best_value).reshape(step.shape)
        best, best_gradient = torch.where(better, point, best), torch.where(better, gradient, best_gradient)
        best_value = torch.maximum(value, best_value)
        since += 1
        if since == k:
            cut = (ups <= 0.75 * k) | (~reduced & (checked >= best_value))
            wide = cut.reshape(step.shape)
            step = torch.where(wide, step / 2, step)
            point, gradient = torch.where(wide, best, point), torch.where(wide, best_gradient, gradient)
            reduced, checked, ups, since = cut, best_value, torch.zeros(len(x)), 0
            k = max(k - int(0.03 * n_iter), int(0.06 * n_iter))
    return broken


def plain_ensemble(model, x, y, eps, norm, seed, n_targets=3):
    """APGD-CE, then targeted APGD; returns (B,) broken."""
    clean = model(x).detach()
    broken = misclassified(clean, y)
    broken |= plain_apgd(model, x, y, lambda z: cross_entropy(z, y), eps, norm, seed)
    order = clean.sort(dim=1, descending=True).indices
    for place in range(1, n_targets + 1):
        left = (~broken).nonzero().squeeze(1)
        if not len(left):
            break
        target = order[left, place]
        part = plain_apgd(
            model, x[left], y[left], lambda z, t=target, r=left: targeted_dlr(z, y[r], t), eps, norm, seed
        )
        broken[left[part]] = True
    return broken


@pytest.mark.parametrize(("kind", "threat"), [("plain", Linf(0.08)), ("adversarial", Linf(0.15)), ("plain", L2(0.7))])
def test_not_weaker_than_a_plain_port_of_the_published_attacks(kind, threat, net, hardened, data):
    x, y = data[0][:48], data[1][:48]
    model = net if kind == "plain" else hardened
    attack = AutoAttack(threat, attacks=(APGD(threat), TargetedAPGD(threat, n_targets=3)))
    ours, port = 0, 0
    for seed in range(3):
        result = attack.run(model, x, y, generator=seed)
        expected = plain_ensemble(model, x, y, threat.eps, threat.name, seed)
        ours, port = ours + int(result.success.sum()), port + int(expected.sum())
        assert result.backwards < 0.9 * len(x) * 101 * 4
    assert 0.1 < ours / (3 * len(x)) < 0.98
    assert ours >= port - 0.002 * 3 * len(x)


@pytest.mark.parametrize("threat", [Linf(0.3), L2(3.0), L1(9.0)], ids=str)
def test_standard_set_on_an_undefended_network(threat, net, data):
    x, y = data
    x, y = x[:24], y[:24]
    result = AutoAttack(threat).run(net, x, y)
    assert result.success.all()
    assert threat.contains(result.x_adv, x).all()
    assert misclassified(predict_logits(net, result.x_adv), y).all()
    clean = misclassified(predict_logits(net, x), y)
    assert [name == "clean" for name in result.found_by] == clean.tolist()
    assert (result.distance[clean] == 0).all()
    assert [entry.name for entry in result.log][:1] == ["clean"]
    assert result.log[-1].robust_accuracy == result.robust_accuracy == 0
    assert result.forwards == sum(entry.forwards for entry in result.log)
    assert result.forwards < 120 * len(x), "broken samples leave at once"


def test_every_version_names_its_attacks():
    def names(version, **kwargs):
        return [attack.name for attack in AutoAttack(Linf(0.1), version=version).stages(**kwargs)]

    assert names("standard") == ["apgd-ce", "apgd-t", "fab", "square"]
    assert names("fast") == ["apgd-ce", "apgd-t"]
    assert names("rand") == names("standard", stochastic=True) == ["apgd-ce", "apgd-dlr"]
    assert sorted(names("plus")) == sorted(["apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "fab"])
    assert all(attack.n_draws == 20 for attack in AutoAttack(Linf(0.1), version="rand").stages())
    ce = next(a for a in AutoAttack(L1(12)).stages() if isinstance(a, APGD))
    targeted = next(a for a in AutoAttack(L1(12)).stages() if isinstance(a, TargetedAPGD))
    assert (ce.n_restarts, ce.large_eps, targeted.n_targets, targeted.large_eps) == (5, True, 5, True)


def few(threat=LINF, n_iter=12):
    attacks = (APGD(threat, n_iter=n_iter), TargetedAPGD(threat, n_iter=n_iter, n_targets=2), Square(threat, n_iter=30))
    return AutoAttack(threat, attacks=attacks)


@pytest.mark.quick
def test_result_ignores_batch_size_and_order(net, data):
    x, y = data
    whole = few().run(net, x, y, generator=2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    small = tuple(replace(attack, batch_size=16) for attack in few().attacks)
    again = replace(few(), attacks=small, batch_size=16).run(net, x[order], y[order], index=order, generator=2)
    assert torch.equal(again.x_adv, whole.x_adv[order])
    assert [whole.found_by[i] for i in order.tolist()] == list(again.found_by)


def test_failed_samples_return_the_point_of_highest_margin(hardened, data):
    x, y = data
    result = few(Linf(0.05)).run(hardened, x, y)
    left = ~result.success
    assert left.any()
    clean = predict_logits(hardened, x)
    before = clean.scatter(1, y[:, None], -torch.inf).amax(1) - clean.gather(1, y[:, None]).squeeze(1)
    assert (result.loss >= before).all()
    assert (result.loss > before)[left].float().mean() > 0.9


class InterruptedRunError(Exception):
    pass


@pytest.mark.quick
def test_interrupted_run_goes_on_to_the_same_end(net, data, tmp_path):
    x, y = data
    whole = few().run(net, x, y, generator=4)
    path = tmp_path / "state.safetensors"

    def stop(entry):
        if entry.name == "apgd-t":
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        few().run(net, x, y, generator=4, state_path=path, on_attack=stop)
    seen = []
    rest = few().run(net, x, y, generator=4, state_path=path, on_attack=lambda entry: seen.append(entry.name))
    assert seen == ["apgd-t", "square"]
    assert torch.equal(rest.x_adv, whole.x_adv)
    assert rest.found_by == whole.found_by
    assert [entry.name for entry in rest.log] == [entry.name for entry in whole.log]
    assert few().run(net, x, y, generator=4, state_path=path).found_by == whole.found_by


def test_state_of_another_run_is_refused(net, hardened, data, tmp_path):
    x, y = data
    path = tmp_path / "state.safetensors"
    small = AutoAttack(Linf(0.1), attacks=(PGD(Linf(0.1), n_iter=2),))
    small.run(net, x, y, state_path=path)
    other = AutoAttack(Linf(0.2), attacks=(PGD(Linf(0.2), n_iter=2),))
    for run in (
        lambda: small.run(hardened, x, y, state_path=path),
        lambda: small.run(net, 1 - x, y, state_path=path),
        lambda: small.run(net, x, y, generator=1, state_path=path),
        lambda: other.run(net, x, y, state_path=path),
    ):
        with pytest.raises(CheckpointError, match="written with another"):
            run()


class Quantised(nn.Module):
    """A defence without useful gradients, that says so."""

    differentiable = False

    def __init__(self, net, smooth=True):
        super().__init__()
        self.net = net
        if not smooth:
            self.surrogate = None

    def forward(self, x):
        return self.net((x * 8).round() / 8)

    def surrogate(self):
        return self.net


class Random(nn.Module):
    """Noise at test time, declared or not."""

    def __init__(self, net, declared):
        super().__init__()
        self.net = net
        if declared:
            self.stochastic = True

    def forward(self, x):
        return self.net(x + 0.2 * torch.randn_like(x))


class Optimises(Quantised):
    """A defence that declares an inner loop at test time."""

    differentiable = True
    optimises_at_test_time = True


def test_declarations_choose_the_strategy(net, data):
    x, y = data
    bpda = few().run(Quantised(net), x, y)
    assert bpda.strategy == "bpda"
    assert "BPDA" in bpda.notes[0]
    assert bpda.log[1].broken > 0
    queries = few().run(Quantised(net, smooth=False), x, y)
    assert queries.strategy == "black-box"
    assert [bool(entry.skipped) for entry in queries.log] == [False, True, True, False]
    transfer = few().run(Optimises(net), x, y)
    assert transfer.strategy == "transfer"
    assert transfer.log[1].broken > 0
    assert plan(net).name == "gradients"


@pytest.mark.parametrize("declared", [True, False])
def test_random_models_are_averaged_and_re_evaluated(declared, net, data):
    x, y = data
    x, y = x[:24], y[:24]
    attack = AutoAttack(Linf(0.1), n_draws=3, attacks=(APGD(Linf(0.1), n_iter=8),))
    rng = torch.get_rng_state()
    result = attack.run(Random(net, declared), x, y)
    assert torch.equal(rng, torch.get_rng_state())
    assert result.strategy == "eot"
    assert len(result.reevaluated) == 10
    mean, sd = result.reevaluated_mean_sd
    assert 0 <= mean <= 1
    assert sd > 0
    assert bool(result.notes) != declared
    assert AutoAttack(Linf(0.1)).stages(stochastic=True)[0].n_draws == 20
    assert attack.run(Random(net, declared), x, y).found_by == result.found_by


def test_model_without_gradient_is_attacked_by_queries(net, data):
    x, y = data
    threat = Linf(0.25)
    result = few(threat).run(lambda image: net(image).detach(), x, y)
    assert [entry.skipped for entry in result.log] == ["", "no gradient", "no gradient", ""]
    assert result.log[-1].broken > 0
    assert any("was skipped" in note for note in result.notes)


def test_few_classes_are_noted():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 1, 3, 3, generator=generator)
    for n_classes in (2, 3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, n_classes))
        y = model(x).argmax(1)
        threat = Linf(1e-3)
        result = AutoAttack(threat, version="fast").run(model, x, y)
        assert any("targeted DLR needs 4 classes" in note for note in result.notes)
        assert any("upper bound" in note for note in result.notes)


def test_settings_are_checked(net):
    with pytest.raises(ValueError, match="version='quick'"):
        AutoAttack(Linf(0.1), version="quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has the threat"):
        AutoAttack(Linf(0.1), attacks=(PGD(Linf(0.2)),))
