"""From the user's module to operators: what is supported, what is refused by name, and what is left as found."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_core.attacks import PGD
from robust_core.certificates import Crown, IntervalBounds, LipschitzCertifier, Status
from robust_core.certificates.bounds import trace
from robust_core.errors import CertificationError, UnsupportedLayerError
from robust_core.models import Normalize, fingerprint, predict_logits
from robust_core.random import stream
from robust_core.testing.networks import KINDS, random_network
from robust_core.threats import L2, Linf


class BasicBlock(nn.Module):
    """As torchvision writes it: in-place ReLU, in-place sum, optional down-sampling."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def quiet(build, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args).eval()


@pytest.mark.quick
def test_a_residual_network_as_people_write_it():
    model = quiet(lambda: nn.Sequential(Normalize([0.5, 0.4, 0.4], [0.2, 0.2, 0.3]), ResNet()))
    x = torch.rand((2, 3, 24, 24), generator=stream(0, 0, "images"))
    torch.testing.assert_close(trace(model, x).evaluate(x), model(x), rtol=1e-4, atol=1e-5)
    y = predict_logits(model, x).argmax(1)
    interval, crown = IntervalBounds(model, Linf(1e-3)), Crown(model, Linf(1e-3), "crown-ibp")
    certificate = crown.certify(x)
    assert (certificate.details["margin"] >= interval.certify(x).details["margin"]).all()
    for i in range(6):
        noise = torch.randn(x.shape, generator=stream(i, 0, "noise")).sign() * 1e-3
        logits = predict_logits(model, Linf(1e-3).project(x + noise, x))
        margin = logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True)
        assert (certificate.details["margin"] <= margin.squeeze(1)).all()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Linear(4 * 16, 8)
        self.last = nn.Linear(16, 3)
        self.shift = nn.Parameter(torch.ones(1, 8))
        self.register_buffer("gain", torch.tensor([2.0]))

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.1)
        h = F.max_pool2d(F.pad(h, (1, 1, 1, 1)), kernel_size=2)
        h = h.view(x.size(0), -1)
        h = self.second(h) * self.gain + self.shift
        h = torch.cat([torch.relu(h), 1 - h / 2.0], dim=1)
        return -self.last(F.dropout(h, training=self.training)).squeeze(0)


class Looping(Functional):
    """Python control flow on shapes, which defeats fx and not export."""

    def forward(self, x):
        for _ in range(x.shape[1]):
            x = x * 1.0
        return super().forward(x)


@pytest.mark.parametrize("build", [Functional, Looping])
def test_functional_code(build):
    model = quiet(build)
    x = torch.rand((4, 1, 8, 8), generator=stream(0, 0, "images"))
    y = predict_logits(model, x).argmax(1)
    torch.testing.assert_close(trace(model, x).evaluate(x), model(x), rtol=1e-5, atol=1e-6)
    crown = Crown(model, Linf(0.02)).certify(x)
    for i in range(8):
        noise = torch.randn(x.shape, generator=stream(i, 0, "noise")).sign()
        logits = predict_logits(model, Linf(0.02).project(x + noise, x))
        margin = logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True)
        assert (crown.details["margin"] <= margin.squeeze(1)).all()


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class TanhLinear(nn.Linear):
    """A subclass with a forward of its own must not be taken for its parent."""

    def forward(self, input):
        return torch.tanh(super().forward(input))


def test_unsupported_things_are_named():
    x = torch.rand(2, 4)
    for layer, name in (
        (nn.GELU(), r"layer '1\.0' \(GELU\)"),
        (nn.Softmax(1), "Softmax"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.LeakyReLU(-0.2), "negative_slope"),
        (Swish(), r"mul\(\) in .*multiplies values that both depend on the input"),
        (nn.BatchNorm1d(4, track_running_stats=False), "statistics of the batch"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer), nn.Linear(4, 2)).eval()
        with pytest.raises(UnsupportedLayerError, match=name):
            Crown(model, Linf(0.1)).certify(x)

    class Custom(nn.Module):
        def forward(self, x):
            return torch.softmax(x, dim=1)

    with pytest.raises(UnsupportedLayerError, match=r"softmax\(\) in '1'"):
        trace(nn.Sequential(nn.Linear(4, 2), Custom()), x)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedLayerError, match="Branching cannot be traced"):
        trace(Branching(), x)
    hooked = nn.Sequential(nn.Linear(4, 2))
    hooked[0].register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(UnsupportedLayerError, match="forward hooks"):
        trace(hooked, x)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        Crown(lambda x: x, Linf(0.1))


def test_subclasses_are_traced_into_and_lying_graphs_refused():
    model = quiet(lambda: nn.Sequential(TanhLinear(4, 4), nn.Linear(4, 3)))
    x = torch.rand(2, 4)
    torch.testing.assert_close(trace(model, x).evaluate(x), model(x))

    class Reused(nn.Module):
        def forward(self, x):
            kept = x - 0.5
            rectified = F.relu(kept, inplace=True)
            return rectified + kept  # the relu changed kept

    with pytest.raises(CertificationError, match="in-place"):
        trace(Reused(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_found(kind):
    model, x = random_network(1, kind)
    model.train()
    next(iter(model.children())).eval()
    before, modes = fingerprint(model), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    threat = Linf(0.01)
    for certifier in (IntervalBounds(model, threat), Crown(model, threat, "alpha-crown", n_iter=2)):
        certifier.certify(x, attack=PGD(threat, n_iter=3))
        certifier.radius(x, max_eps=0.1, steps=2)
    assert fingerprint(model) == before
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_witnesses_are_replayed():
    model, x = random_network(4, "mlp")
    threat = Linf(0.5)
    result = Crown(model, threat).certify(x, attack=PGD(threat, n_iter=20))
    broken = result.status == Status.FALSIFIED
    assert broken.any()
    witness = result.details["witness"]
    assert threat.contains(witness, x).all()
    assert (predict_logits(model, witness).argmax(1) != result.prediction)[broken].all()
    with pytest.raises(ValueError, match="attack is for"):
        Crown(model, threat).certify(x, attack=PGD(Linf(0.1)))


def test_bounds_follow_training_and_gradients_reach_every_weight():
    model, x = random_network(1, "residual", n_samples=8)
    y = torch.arange(8) % 3
    crown = Crown(model, L2(0.02), "crown-ibp")
    for loss_of in (crown.loss, IntervalBounds(model, Linf(0.01)).loss):
        for parameter in model.parameters():
            parameter.grad = None
        loss = loss_of(x, y)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    interval = IntervalBounds(model, Linf(0.01))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = interval.loss(x, y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fresh = IntervalBounds(copy.deepcopy(model), Linf(0.01)).loss(x, y)
    assert fresh.item() == pytest.approx(interval.loss(x, y).item(), rel=1e-6)
    mixed = [crown.mixed_loss(x, y, kappa=k).item() for k in (0.0, 1.0)]
    assert mixed[1] <= mixed[0] + 1e-6


def test_certificates_follow_a_changed_model():
    model, x = random_network(1, "mlp")
    crown = Crown(model, Linf(0.01))
    first = crown.certify(x)
    model[4].weight.data.mul_(3.0)  # through .data, which no version counter sees
    second = crown.certify(x)
    assert first.about.fingerprint != second.about.fingerprint
    assert not torch.allclose(first.details["margin"], second.details["margin"])


def test_bad_input():
    model, x = random_network(0, "mlp")
    crown = Crown(model, Linf(0.1))
    for bad, error in ((x.half(), "half precision"), (x + 1, "outside the domain"), (x[0], "batch")):
        with pytest.raises(ValueError, match=error):
            crown.certify(bad)
    with pytest.raises(ValueError, match="half precision"):
        Crown(copy.deepcopy(model).half(), Linf(0.1)).certify(x)
    with pytest.raises(ValueError, match="labels"):
        crown.certify(x, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="method="):
        Crown(model, Linf(0.1), "magic")
    with pytest.raises(TypeError, match="threat"):
        Crown(model, 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least two logits"):
        Crown(nn.Linear(5, 1), Linf(0.1)).certify(x)
    with pytest.raises(ValueError, match="kappa"):
        crown.mixed_loss(x, torch.zeros(4, dtype=torch.int64), kappa=2.0)


def _mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


class Tempered(nn.Module):
    """A function that depends on what is neither a parameter nor a saved buffer."""

    def __init__(self):
        super().__init__()
        self.net = _mlp()
        self.temperature = 1e-3
        self.register_buffer("mask", torch.full((6,), 1e-3), persistent=False)
        self.plain = torch.ones(6)

    def forward(self, x):
        return self.net(x * self.mask * self.temperature * self.plain) + torch.tensor([1.0, 0.0, 0.0])


def _hotter(model):
    model.temperature = 1e5


def _louder(model):
    model.mask.mul_(1e8)


def _plainer(model):
    model.plain = model.plain * 1e8


@pytest.mark.quick
@pytest.mark.parametrize("change", [_hotter, _louder, _plainer])
def test_a_certifier_follows_every_change_of_the_model(change):
    x = torch.rand(4, 6, generator=stream(0, 0, "stale"))
    model = Tempered().eval()
    kept = Crown(model, Linf(0.3))
    assert bool(kept.certify(x).certified.all())
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before
    found, fresh = kept.certify(x), Crown(model, Linf(0.3)).certify(x)
    assert torch.equal(found.status, fresh.status)
    assert torch.equal(found.details["margin"], fresh.details["margin"])


@pytest.mark.quick
def test_a_hook_added_after_the_first_certificate_is_refused():
    x, model = torch.rand(4, 6, generator=stream(0, 0, "hook")), _mlp()
    certifiers = Crown(model, Linf(0.01)), LipschitzCertifier(model, "L2")
    for certifier in certifiers:
        certifier.certify(x)
    model[0].register_forward_hook(lambda module, given, out: 100 * out)
    for certifier in certifiers:
        with pytest.raises(UnsupportedLayerError, match="hooks"):
            certifier.certify(x)


class ByDtype(nn.Module):
    """Another function in float64 than in the dtype in which it is used."""

    def __init__(self):
        super().__init__()
        self.net = _mlp()

    def forward(self, x):
        logits = self.net(x)
        return logits if x.dtype == torch.float64 else logits * logits


class ByBatch(ByDtype):
    """Another function for batches of at least eight."""

    def forward(self, x):
        logits = self.net(x)
        return logits if len(x) < 8 else 3 * logits.flip(1)


@pytest.mark.parametrize("kind", [ByDtype, ByBatch])
def test_a_model_that_is_not_one_function_is_refused(kind):
    x = torch.rand(4, 6, generator=stream(0, 0, "dtype"))
    for certifier in (IntervalBounds(kind().eval(), Linf(0.01)), LipschitzCertifier(kind().eval(), "L2")):
        with pytest.raises((CertificationError, UnsupportedLayerError)):
            certifier.certify(x)


class Overwrites(nn.Module):
    """On positive values the in-place operation changes nothing, so that a look at examples does not reveal it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x):
        first, second = x - self.shift, x - self.shift
        positive = F.relu(first, inplace=True)
        margin = 0.1 - (first + positive) + (second + F.relu(second))
        return torch.cat([margin, margin * 0.0], 1)


@pytest.mark.quick
def test_a_value_that_is_read_after_it_was_overwritten_is_refused():
    x = torch.full((2, 1), 0.5)
    with pytest.raises(UnsupportedLayerError, match="in-place"):
        Crown(Overwrites(), Linf(2.0, domain=None)).certify(x)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _mlp()
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x):
        self.drift.add_(1e-12)
        return self.net(x)


def test_a_model_that_changes_its_own_buffers_or_had_its_forward_replaced_is_refused():
    x = torch.rand(4, 6, generator=stream(0, 0, "state"))
    with pytest.raises(CertificationError):
        Crown(Counts().eval(), Linf(0.01)).certify(x)
    model = _mlp()
    model[0].forward = lambda x: -F.linear(x, model[0].weight)
    with pytest.raises(UnsupportedLayerError, match="replaced"):
        Crown(model, Linf(0.01)).certify(x)


def test_plain_float32_tensors_in_the_forward_pass_take_part_in_bounds():
    x = torch.rand(4, 6, generator=stream(0, 0, "plain"))
    for norm in (Linf(0.01), L2(0.01)):
        assert bool(Crown(Tempered().eval(), norm).certify(x).certified.all())
