"""ZO-AE-DS: training in front of a black box, by queries alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.attacks import ArrayModel
from robust_core.certificates import Smoothing
from robust_core.data import load
from robust_core.models import fingerprint, predict_logits
from robust_core.testing.conformance import refuses
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2
from robust_core.training import fit
from vision_robust.certified.zo_ae_ds import (
    AutoencodedDenoised,
    BlackBox,
    Denoised,
    DenoisingMSE,
    DnCNN,
    FrontStability,
    QueryBudgetExceeded,
    QueryStability,
    ReconstructionAttack,
    conv_autoencoder,
    paper_autoencoder,
)
from vision_robust.claims import zo_ae_ds as claim

SIGMA = 0.35


def _denoiser() -> DnCNN:
    denoiser = DnCNN(1, depth=3, width=8, momentum=0.1, generator=1)
    with torch.no_grad():  # off the identity, so that its layers have gradients
        last = denoiser.get_submodule("net.5").get_parameter("weight")
        last.copy_(0.1 * torch.randn(last.shape, generator=torch.Generator().manual_seed(2)))
    return denoiser


def _whole(latent: int = 6, *, classifier: nn.Module | None = None) -> AutoencodedDenoised:
    autoencoder = conv_autoencoder((1, 8, 8), latent, width=4, generator=3)
    return AutoencodedDenoised(_denoiser(), autoencoder, classifier or BlackBox(digits_cnn(), scores="logits"))


def _batch(n: int = 16, **more: object) -> dict[str, object]:
    x, y = digits()
    return {"x": x[:n], "y": y[:n], "index": torch.arange(n), "step": 0, "seed": 0, **more}


def _gradients(model: nn.Module, objective: FrontStability, batch: dict[str, object]) -> tuple[Tensor, list[Tensor]]:
    objective.setup(model, 1000, 10)
    parameters = list(objective.trainable(model))
    loss = objective(model.train(), batch)
    return loss.total.detach(), list(torch.autograd.grad(loss.total, parameters))


@pytest.mark.quick
def test_queries_give_the_gradient_that_an_open_model_has() -> None:
    """Central coordinates through a smooth network: J' g equals back-propagation, parameter by parameter."""
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    whole = _whole(classifier=smooth).double()
    batch = _batch()
    batch["x"] = digits()[0][:16].double()
    value, exact = _gradients(copy.deepcopy(whole), FrontStability(SIGMA), batch)
    found, estimated = _gradients(copy.deepcopy(whole), QueryStability(SIGMA, spread=1e-4), batch)
    assert torch.allclose(found, value, atol=1e-6)
    for a, b in zip(exact, estimated, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 1e-4 * float(a.abs().max()))


def test_random_directions_give_it_on_average() -> None:
    whole, x = _whole(classifier=digits_cnn()), digits()[0][:16]
    labels = predict_logits(whole.classifier, x).argmax(1)
    objective = QueryStability(SIGMA, estimator="random", n_directions=16, spread=1e-3)
    z = whole.front(objective.noisy(_batch(), x, 5)).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(whole.back(z), labels, reduction="sum"), z)
    draws = [objective.estimate(whole, z, labels, torch.arange(16), seed).gradient for seed in range(60)]
    assert float(F.cosine_similarity(torch.stack(draws).mean(0).flatten(), slope.flatten(), dim=0)) > 0.97
    repeated = objective.estimate(whole, z, labels, torch.arange(16), 0).gradient
    assert torch.equal(repeated, draws[0])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({"estimator": "random", "n_directions": 5}, 6),
        ({"estimator": "coordinates"}, 12),
        ({"estimator": "coordinates", "central": False}, 7),
    ],
)
def test_every_query_is_counted(settings: dict[str, object], each: int) -> None:
    whole, batch = _whole(), _batch()
    box = whole.classifier
    assert isinstance(box, BlackBox)
    objective = QueryStability(SIGMA, **settings)  # pyright: ignore[reportArgumentType]
    objective.setup(whole, 1000, 10)
    first = objective(whole.train(), batch)
    assert box.queries == objective.queries == 16 * (each + 1) == int(first.parts["queries"])
    objective(whole, {**batch, "step": 1})  # the images' own answers are known by now
    assert box.queries == objective.queries == 16 * (2 * each + 1)
    objective(whole, {**batch, "index": torch.arange(8, 24), "step": 2})
    assert box.queries == 16 * (3 * each + 1) + 8


def test_queries_leave_no_trace_on_the_frozen_part() -> None:
    torch_state = torch.get_rng_state()
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    torch.set_rng_state(torch_state)
    whole = _whole(classifier=BlackBox(network, scores="logits"))
    before = fingerprint(whole.classifier), fingerprint(whole.decoder)
    statistics = whole.denoiser.get_submodule("net.3").get_buffer("running_mean").clone()
    objective = QueryStability(SIGMA)
    objective(whole.train(), _batch()).total.backward()
    assert (fingerprint(whole.classifier), fingerprint(whole.decoder)) == before
    assert all(p.grad is None for part in (whole.classifier, whole.decoder) for p in part.parameters())
    assert all(p.grad is not None for p in objective.trainable(whole))
    once = whole.denoiser.get_submodule("net.3").get_buffer("running_mean")
    assert not torch.equal(once, statistics)  # the noisy batch went through the batch norm of the denoiser, once
    assert int(whole.denoiser.get_submodule("net.3").get_buffer("num_batches_tracked")) == 1


def test_what_is_trained_can_be_chosen() -> None:
    whole = _whole(classifier=digits_cnn())

    def names(objective: FrontStability) -> set[str]:
        objective.setup(whole, 10, 10)
        chosen = {id(p) for p in objective.trainable(whole) if p.requires_grad}
        return {name.partition(".")[0] for name, p in whole.named_parameters() if id(p) in chosen}

    assert names(QueryStability(SIGMA)) == {"denoiser", "encoder"}
    assert names(QueryStability(SIGMA, trains="denoiser")) == {"denoiser"}
    assert names(FrontStability(SIGMA, trains="all")) == {"denoiser", "encoder", "decoder"}
    refuses(lambda: QueryStability(SIGMA, trains="all"), "a decoder trained by queries")


def test_a_black_box_becomes_certifiable() -> None:
    """Undefended digits are all but lost under this noise; a few epochs of queries bring them back."""
    data, (x, y) = load("digits", split="train"), digits()
    x, y = x[:100], y[:100]
    box = BlackBox(ArrayModel(_array_function()), scores="probabilities")
    autoencoder = conv_autoencoder((1, 8, 8), 16, width=8, generator=1)
    adam = partial(torch.optim.Adam, lr=3e-3)
    fit(autoencoder, data, DenoisingMSE(0.0), epochs=10, batch_size=64, optimiser=adam)
    whole = AutoencodedDenoised(DnCNN(1, depth=3, width=8, momentum=0.1, generator=1), autoencoder, box)
    fit(whole, data, QueryStability(SIGMA), epochs=4, batch_size=64, optimiser=adam)
    before = Smoothing(box, SIGMA, n_samples=300).certify(x, y).accuracy(y, 0.25)
    after = Smoothing(whole.eval(), SIGMA, n_samples=300).certify(x, y).accuracy(y, 0.25)
    assert after > before + 0.15


def _array_function():
    network = digits_cnn()

    def answer(array):
        with torch.no_grad():
            return network(torch.from_numpy(array)).softmax(1).numpy()

    return answer


def test_a_spent_budget_is_resumed_from_the_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    data = load("digits", split="train").subset(range(64))

    def run(folder: str, budget: int | None) -> tuple[str, int]:
        whole = _whole(classifier=BlackBox(digits_cnn(), scores="logits", max_queries=budget))
        objective = QueryStability(SIGMA, estimator="random", n_directions=3, generator=4)
        fit(whole, data, objective, epochs=2, batch_size=16, checkpoint=tmp_path / folder)
        assert isinstance(whole.classifier, BlackBox)
        assert whole.classifier.queries == objective.queries
        return fingerprint(whole), objective.queries

    whole, spent = run("whole", None)
    assert spent == 64 + 2 * 64 * 4
    with pytest.raises(QueryBudgetExceeded, match="64 queries are needed, 16 of") as failure:
        run("cut", 64 + 5 * 64 + 16)
    assert failure.value.spent == 64 + 5 * 64
    with pytest.raises(QueryBudgetExceeded, match="40 of"):  # what the checkpoint says is spent counts
        run("cut", 64 + 5 * 64 + 40)
    assert run("cut", spent) == (whole, spent)


def _rebuild(x: Tensor) -> Tensor:
    """Measure 24 combinations of the pixels and take the least image that explains them."""
    measure = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return (x.flatten(1) @ measure.T @ torch.linalg.pinv(measure).T).reshape(x.shape)


def test_reconstructions_are_made_stable_by_the_same_queries() -> None:
    """The second application: a black box that returns images; its answers to noisy images come near those to clean."""
    x, data = digits()[0][:200], load("digits", split="train")
    box = BlackBox(_rebuild, scores="values")
    whole = Denoised(DnCNN(1, depth=3, width=8, momentum=0.1, generator=1), box)
    objective = QueryStability(SIGMA, task="reconstruction", estimator="random", n_directions=32)

    def error() -> float:
        noisy = x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return float((whole.eval()(noisy) - box(x)).square().mean())

    before, asked = error(), box.queries
    fit(whole, data, objective, epochs=4, batch_size=64, optimiser=partial(torch.optim.Adam, lr=3e-3))
    assert box.queries - asked == objective.queries == 4 * len(data) * 34  # q + 1, and the clean image itself
    assert error() < 0.6 * before


def test_reconstructions_are_attacked_with_gradients_and_without() -> None:
    """On a linear map the worst point is known: the largest singular vector of it, as far as the ball reaches."""
    x = digits()[0][:12].double()
    attack = ReconstructionAttack(L2(0.5, domain=None), n_directions=48)
    closed = BlackBox(_rebuild, scores="values")

    class Open(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _rebuild(x)

    most = 0.5**2 / 64  # a projection lengthens nothing
    for model, share in ((Open(), 0.98), (closed, 0.9)):
        moved = attack(model, x, generator=3)
        with torch.no_grad():
            error = (model(moved).flatten(1) - model(x).flatten(1)).square().mean(1)
        assert bool((error <= most * (1 + 1e-9)).all())
        assert float(error.min()) > share * most
        assert bool(attack.threat.contains(moved, x).all())
    assert torch.equal(attack(closed, x, generator=3), attack(closed, x, generator=3))
    refuses(lambda: attack(closed, x + torch.nan), "NaN")


def test_the_gradient_of_reconstruction_is_that_of_the_squared_error() -> None:
    """A quadratic of the denoised image: central coordinates are exact at any distance."""
    rebuild = nn.Sequential(nn.Flatten(), nn.Linear(64, 30))
    batch = {**_batch(), "x": digits()[0][:16].double(), "y": torch.full((16,), -7)}  # labels are not looked at
    whole = Denoised(_denoiser(), rebuild).double()
    value, exact = _gradients(copy.deepcopy(whole), FrontStability(SIGMA, task="reconstruction"), batch)
    found, estimated = _gradients(copy.deepcopy(whole), QueryStability(SIGMA, task="reconstruction"), batch)
    assert torch.allclose(found, value, rtol=1e-3)
    for a, b in zip(exact, estimated, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shape", "code"),
    [("cifar10", (3, 32, 32), (192, 1, 1)), ("mnist", (1, 28, 28), (12, 4, 4)), ("stl10", (3, 96, 96), (144, 2, 2))],
)
def test_the_papers_auto_encoders_have_the_papers_codes(
    name: str, shape: tuple[int, ...], code: tuple[int, ...]
) -> None:
    autoencoder = paper_autoencoder(name)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert autoencoder.encoder(x).shape == (2, *code)
    assert autoencoder(x).shape == x.shape


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 47), (2, 4, 5)])
def test_auto_encoders_of_any_size_return_images(shape: tuple[int, int, int]) -> None:
    autoencoder = conv_autoencoder(shape, 10, width=4)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert autoencoder.encoder(x).shape == (2, 10)
    out = autoencoder(x).detach()
    assert out.shape == x.shape
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


def test_the_papers_setting_takes_two_steps() -> None:
    """CIFAR-10's shapes, DnCNN of 17 layers, 192 numbers, coordinates: every component at its real size."""
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    box = BlackBox(network, scores="logits")
    whole = AutoencodedDenoised(DnCNN(3), paper_autoencoder("cifar10"), box)
    objective = QueryStability()
    data = (x, torch.zeros(4, dtype=torch.int64))
    fit(whole, data, objective, epochs=1, batch_size=2, n_classes=10)
    assert objective.queries == box.queries == 4 * (2 * 192 + 1)


def test_bad_arguments_are_refused() -> None:
    wide = Denoised(nn.Conv2d(3, 3, 1), BlackBox(lambda x: x.flatten(1)[:, :10], scores="logits"))
    batch = {"x": torch.rand(2, 3, 40, 40), "y": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="auto-encoder"):
        QueryStability()(wide, batch)
    labels = BlackBox(lambda x: x.flatten(1).argmax(1) % 10, scores="labels", n_classes=10)
    with pytest.raises(ValueError, match="labels alone"):
        QueryStability().setup(Denoised(nn.Identity(), labels), 4, 10)
    with pytest.raises(ValueError, match="labels alone"):
        QueryStability()(Denoised(nn.Identity(), labels), _batch())
    refuses(lambda: QueryStability(n_directions=0), "no directions")
    refuses(lambda: QueryStability(spread=0.0), "no distance")
    refuses(lambda: QueryStability(estimator="first-order"), "an unknown estimator")
    refuses(lambda: QueryStability(task="reconstruction", target="labels"), "labels of reconstructions")
    refuses(lambda: AutoencodedDenoised(nn.Identity(), nn.Identity(), digits_cnn()), "no auto-encoder")  # pyright: ignore
    refuses(lambda: conv_autoencoder((1, 2, 2), 4), "images that are too small")
    refuses(lambda: paper_autoencoder("imagenet"), "an unknown auto-encoder")


def test_the_claim_has_a_figure_for_each_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(claim.DIGITS, n_train=48, n_test=6, n_samples=20, directions=3, latent=2, epochs=1, depth=2, width=2)
    tiny = replace(tiny, classifier_epochs=1, autoencoder_epochs=1)
    monkeypatch.setattr(claim, "QUICK", tiny)
    monkeypatch.setattr(claim, "DIGITS", tiny)
    figures = claim.run(0, "quick")
    named = {statement.figure for statement in claim.STATEMENTS}
    assert named == set(figures.measured) == set(figures.baseline)
    exact = {gate.name: gate.passed for gate in figures.gates}
    assert exact["every query is counted"]
    assert exact["the classifier stayed as it was"]
    assert exact["an untrained denoiser is the identity"]
    assert exact["central coordinates are exact on quadratics"]
