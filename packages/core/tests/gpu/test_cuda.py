"""The same code on a CUDA device: the verdicts of the CPU, results that do not depend on the batch, mixed precision."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.attacks import APGD, FAB, PGD, AutoAttack, Square
from robust_core.certificates import Crown, IntervalBounds, Smoothing
from robust_core.data.corruptions import corrupt
from robust_core.evaluation import Adversarial as AdversarialPart
from robust_core.evaluation import Calibration, Clean, Corruptions, evaluate
from robust_core.random import SampleStreams
from robust_core.testing.conformance import left_as_found
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf
from robust_core.training import Adversarial, FastPGD, Standard, fit

pytestmark = pytest.mark.gpu
THREATS = {"Linf": Linf(0.1), "L2": L2(0.8), "L1": L1(4.0)}


@pytest.fixture
def model() -> nn.Module:
    return digits_cnn("adversarial").cuda()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = digits()
    return x[:96].cuda(), y[:96].cuda()


def test_streams_are_those_of_the_cpu() -> None:
    index = torch.arange(50)
    here, there = SampleStreams(3, index, "a"), SampleStreams(3, index.cuda(), "a")
    assert torch.equal(here.words((7,)), there.words((7,)).cpu())
    assert torch.equal(here.uniform((7,)), there.uniform((7,)).cpu())


@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS.keys())
@pytest.mark.parametrize("kind", [PGD, APGD, FAB, Square], ids=lambda k: k.__name__)
def test_attacks_stay_inside_and_agree_with_the_cpu(kind, threat, model, batch) -> None:
    x, y = batch
    attack = kind(threat, n_queries=200) if kind is Square else kind(threat, n_iter=20)
    with left_as_found(model):
        result = attack.run(model, x, y)
    assert result.x_adv.is_cuda
    assert bool(threat.contains(result.x_adv, x).all())
    there = attack.run(copy.deepcopy(model).cpu(), x.cpu(), y.cpu())
    assert int((result.success.cpu() != there.success).sum()) <= 3  # borderline samples may fall either way


def test_autoattack_does_not_depend_on_the_batch(model, batch) -> None:
    x, y = batch
    whole = AutoAttack(Linf(0.12), version="fast", batch_size=128).run(model, x, y)
    parts = AutoAttack(Linf(0.12), version="fast", batch_size=32).run(model, x, y)
    assert int((whole.success != parts.success).sum()) <= 1


def test_mismatched_devices_are_refused(model, batch) -> None:
    x, y = batch
    with pytest.raises(ValueError, match="move one of them"):
        PGD(Linf(0.1))(model, x.cpu(), y.cpu())


def test_certificates_agree_with_the_cpu(model, batch) -> None:
    x, y = batch
    cpu = copy.deepcopy(model).cpu()
    for certifier in (IntervalBounds, Crown):
        here, there = certifier(model, Linf(0.02)).certify(x, y), certifier(cpu, Linf(0.02)).certify(x.cpu(), y.cpu())
        assert torch.equal(here.certified.cpu(), there.certified)
    voted = Smoothing(model, 0.25, n_samples=2000).certify(x, y)
    again = Smoothing(model, 0.25, n_samples=2000, batch_size=512).certify(x, y)
    there = Smoothing(cpu, 0.25, n_samples=2000).certify(x.cpu(), y.cpu())
    assert torch.equal(voted.radius, again.radius)
    both = voted.certified.cpu() & there.certified
    assert bool(((voted.radius.cpu() - there.radius)[both].abs() < 0.1).all())  # other noise, same function


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_training_in_mixed_precision_resumes(precision: str, tmp_path: Path) -> None:
    x, y = digits()
    objective = Adversarial(FastPGD(Linf(0.1), n_iter=2))
    net = digits_cnn().cuda()
    fit(net, (x, y), objective, epochs=2, batch_size=64, precision=precision, checkpoint=tmp_path, channels_last=True)
    state = fit(
        net, (x, y), objective, epochs=2, batch_size=64, precision=precision, checkpoint=tmp_path, channels_last=True
    )
    assert state.step == 2 * -(-len(x) // 64)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_compiled_training_runs() -> None:
    x, y = digits()
    net = digits_cnn().cuda()
    fit(net, (x[:128], y[:128]), Standard(), epochs=1, batch_size=64, compile=True)
    assert (net.eval()(x.cuda()).argmax(1).cpu() == y).double().mean() > 0.5


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "glass_blur", "fog", "snow", "jpeg_compression", "elastic_transform"]
)
def test_corruptions_are_those_of_the_cpu(name: str) -> None:
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = torch.arange(6)
    here = corrupt(x, name, 3, index=index, generator=0, profile="cifar")
    there = corrupt(x.cuda(), name, 3, index=index.cuda(), generator=0, profile="cifar").cpu()
    assert (here - there).abs().mean() < 0.01


def test_evaluation_moves_everything_and_back(model) -> None:
    x, y = digits()
    net = copy.deepcopy(model).cpu()
    parts = [
        Clean(),
        Calibration(),
        AdversarialPart(Linf(0.1), version="fast"),
        Corruptions(profile="small", severities=(3,)),
    ]
    report = evaluate(net, (x[:64], y[:64]), parts, device="cuda")
    assert next(net.parameters()).device.type == "cpu"
    assert "NVIDIA" in report.document["device"]
