"""Denoised smoothing: the composition, its training, and diffusion models as denoisers."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from robust_core.attacks.adaptive import BPDA
from robust_core.attacks.autoattack import plan
from robust_core.certificates import Smoothing
from robust_core.data import load
from robust_core.models import predict_logits
from robust_core.testing.conformance import refuses
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.training import Stage, fit
from vision_robust.certified.denoised_smoothing import (
    Denoised,
    DenoisingMSE,
    DiffusionDenoiser,
    DnCNN,
    Stability,
    noise_time,
)

SIGMA = 0.35
ALPHAS = torch.linspace(0.9999, 0.98, 200, dtype=torch.float64).cumprod(0)


def _denoiser(depth: int = 3, width: int = 8) -> DnCNN:
    return DnCNN(1, depth=depth, width=width, momentum=0.1, generator=1)


@pytest.mark.quick
@pytest.mark.parametrize("mode", [True, False])
def test_an_untrained_denoiser_changes_nothing(mode: bool) -> None:
    x, _ = digits()
    noisy = x[:32] + 0.3 * torch.randn(x[:32].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DnCNN(1, depth=17, width=8).train(mode)(noisy), noisy)
    model = Denoised(_denoiser(), digits_cnn())
    assert torch.equal(model(noisy), digits_cnn()(noisy))


def test_the_classifier_is_frozen_and_stays_in_eval_mode() -> None:
    model = Denoised(_denoiser(), digits_cnn()).train()
    assert model.denoiser.training
    assert not any(m.training for m in model.classifier.modules())
    assert not any(p.requires_grad for p in model.classifier.parameters())
    before = copy.deepcopy(model.classifier.state_dict())
    data = load("digits", split="train").subset(range(128))
    fit(model, data, Stability(SIGMA), epochs=1, batch_size=64)
    assert all(torch.equal(v, before[k]) for k, v in model.classifier.state_dict().items())
    assert float(model.denoiser.get_submodule("net.5").get_parameter("weight").detach().abs().max()) > 0


def test_training_in_two_stages_raises_certified_accuracy() -> None:
    data, (x, y) = load("digits", split="train"), digits()
    x, y = x[:100], y[:100]
    model = Denoised(_denoiser(), digits_cnn())
    rate = partial(torch.optim.Adam, lr=3e-3)
    before = Smoothing(model, SIGMA, n_samples=300).certify(x, y).accuracy(y, 0.25)
    fit(model, data, [Stage(DenoisingMSE(SIGMA), rate, 3), Stage(Stability(SIGMA), rate, 3)], batch_size=64)
    after = Smoothing(model.eval(), SIGMA, n_samples=300).certify(x, y).accuracy(y, 0.25)
    assert after > before + 0.1


def test_stability_asks_the_classifier_and_not_the_labels() -> None:
    x, y = digits()
    batch = {"x": x[:32], "y": y[:32], "index": torch.arange(32), "step": 0, "seed": 0}
    model = Denoised(_denoiser(), digits_cnn())
    answers = predict_logits(model.classifier, x[:32]).argmax(1)
    wrong = {**batch, "y": (y[:32] + 1) % 10}
    assert torch.equal(Stability(SIGMA)(model, batch).total, Stability(SIGMA)(model, wrong).total)
    told = Stability(SIGMA, target="labels")(model, {**batch, "y": answers}).total
    assert torch.equal(Stability(SIGMA)(model, batch).total, told)


def test_denoising_mse_without_noise_is_reconstruction() -> None:
    x, _ = digits()
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    loss = DenoisingMSE(0.0)(network, {"x": x[:16], "y": torch.zeros(16)})
    assert torch.allclose(loss.total, (network(x[:16]) - x[:16]).square().mean())
    refuses(lambda: DenoisingMSE(0.1)(nn.Conv2d(1, 2, 3), {"x": x[:16]}), "a network that changes the shape")


@pytest.mark.quick
def test_what_the_parts_declare_the_whole_declares() -> None:
    assert Denoised(_denoiser(), digits_cnn()).differentiable
    sealed = digits_cnn()
    sealed.differentiable = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    model = Denoised(_denoiser(), sealed)
    assert not model.differentiable
    assert model.surrogate() is None
    assert plan(model).name == "black-box"
    sealed.surrogate = lambda: digits_cnn()  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert plan(model).name == "bpda"
    assert isinstance(plan(model).white_box, BPDA)


# -- diffusion models ------------------------------------------------------------------------------------------


class _Knowing(nn.Module):
    """The exact noise predictor of a distribution that is one image."""

    def __init__(self, image: Tensor, form: str = "epsilon", kind: str = "tensor") -> None:
        super().__init__()
        self.register_buffer("image", 2 * image - 1)
        self.form, self.kind, self.asked = form, kind, []

    def forward(self, point: Tensor, t: Tensor) -> object:
        assert t.dtype == torch.int64
        assert t.shape == (len(point),)
        self.asked.append(int(t[0]))
        a = ALPHAS[int(t[0])].to(point.dtype)
        image = self.get_buffer("image").expand_as(point)
        noise = (point - a.sqrt() * image) / (1 - a).sqrt()
        out = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * image, "sample": image}[self.form]
        if self.kind == "variance":
            return torch.cat([out, torch.full_like(out, 7.0)], 1)
        return {"tensor": out, "tuple": (out,), "sample": SimpleNamespace(sample=out)}[self.kind]


@pytest.mark.parametrize("form", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("kind", "n_steps"), [("tensor", 1), ("sample", 4), ("tuple", 1000), ("variance", 1)])
def test_a_perfect_predictor_recovers_the_image(form: str, kind: str, n_steps: int) -> None:
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = _Knowing(image, form, kind).double()
    denoiser = DiffusionDenoiser(network, ALPHAS, 0.25, n_steps=n_steps, prediction=form)
    noisy = image + 0.25 * torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(denoiser(noisy), image.expand(5, -1, -1, -1), atol=1e-9)
    start = noise_time(ALPHAS, 0.5)
    assert network.asked[0] == start
    assert len(network.asked) == min(n_steps, start + 1)
    assert network.asked == sorted(network.asked, reverse=True)


def test_the_time_is_the_first_with_as_much_noise() -> None:
    level = ((1 - ALPHAS) / ALPHAS).sqrt()
    for t in (0, 17, 199):
        assert noise_time(ALPHAS, float(level[t])) == t
        assert noise_time(ALPHAS, float(level[t]) * 0.9999) == t
    refuses(lambda: noise_time(ALPHAS, 2 * float(level[-1])), "noise beyond the schedule")
    refuses(lambda: noise_time(ALPHAS.flip(0), 0.1), "a schedule that grows")


def test_the_noise_is_removed_where_it_was_put() -> None:
    """With sigma on the schedule, a predictor that returns the noise gives the image back: scales fit together."""
    t = 120
    sigma = float(((1 - ALPHAS[t]) / ALPHAS[t]).sqrt()) / 2
    image = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoiser = DiffusionDenoiser(lambda point, time: noise, ALPHAS, sigma)
    assert denoiser.times == (t,)
    assert torch.allclose(denoiser(image + sigma * noise), image, atol=1e-12)


def test_a_pipeline_is_taken_apart() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = _Knowing(image, "v_prediction", "sample")
    config = SimpleNamespace(prediction_type="v_prediction")
    pipeline = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(alphas_cumprod=ALPHAS.float(), config=config))
    denoiser = DiffusionDenoiser.from_pipeline(pipeline, 0.25)
    certificate = Smoothing(Denoised(denoiser, digits_cnn()), 0.25, n_samples=100).certify(image)
    answer = digits_cnn()(image).argmax(1)
    assert bool(certificate.certified.all())
    assert torch.equal(certificate.prediction, answer)
    refuses(lambda: DiffusionDenoiser.from_pipeline(object(), 0.25), "an object that is no pipeline")


def test_bad_arguments_are_refused() -> None:
    x, y = digits()
    refuses(lambda: Denoised(3, digits_cnn()), "a denoiser that is no function")  # pyright: ignore
    refuses(lambda: DnCNN(1, depth=1), "too few layers")
    refuses(lambda: Stability(-1.0), "negative noise")
    refuses(lambda: Stability(0.1, target="teacher"), "an unknown target")
    refuses(lambda: Stability(0.1)(digits_cnn(), {"x": x[:4], "y": y[:4]}), "a model without a denoiser")
    refuses(lambda: DiffusionDenoiser(lambda a, t: a[:, :, :2], ALPHAS, 0.2)(x[:4]), "a network that changes shapes")
