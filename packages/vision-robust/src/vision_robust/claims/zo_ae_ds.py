"""ZO-AE-DS (arXiv:2203.14195): is a classifier that only answers queries made certifiably robust, and by what?

Quick scale: Fashion-MNIST (d = 784; 1,500 training images, 200 test images), a small network f, trained on clean data
and only asked from then on. DnCNN of 5 layers and 8 channels, auto-encoder to 24 numbers trained on clean images (no
queries), sigma = 0.25, 8 epochs of Adam with a cosine schedule, batches of 32. Query for query alike: 49 for each image
and step by random directions (48 and the point itself), 48 by central coordinates of the 24 numbers, and one for each
image's own answer: 589,500 and 577,500 in all. Full scale: CIFAR-10 with the paper's networks, code of 192 numbers and
epochs; 384 queries by central coordinates, so 383 random directions beside the point itself. The learning rate of 3e-3
was chosen on held-out training data of another seed, where it served every arm better than the paper's 1e-3 (digits).

Certified accuracy counts test images whose own label is certified at L2 radius 0.25 by randomised smoothing (alpha
0.001, at most 1,000 samples for each image, 10,000 at full scale). All figures are of the test split, in percentage
points. Baselines: f itself smoothed; the same model trained by gradients (which need the model to be open). On the
digits (8 x 8, code of 16, sigma 0.35, 32 queries) a statement asks for 30 points.

Found over three seeds at the quick scale: queries cost no more than 5 points against gradients, which holds. Every arm
is above none in every seed, by 2 points at least, and coordinates beat pixels in two of three seeds, yet by too little
for any of the larger margins: smoothing f itself certifies 67 to 71 %, the same model trained by gradients 71 to 76 %,
so that 4 to 8.5 points are all there is to gain here. On the digits the gain is 4 to 16 points, not 30: f is already
hard to disturb there (a first form of this claim asked for 5 points among the gates, and one of three seeds, 58.0
against 54.0, failed it; an effect is no matter of exactness and is left to the statements). Estimates, counts and
frozen parts are exact by the gates, so the likely cause is how little there is to gain, and not the estimates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robust_core.certificates import Smoothing
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.data import Dataset, load
from robust_core.models import fingerprint, predict_logits
from robust_core.random import derive
from robust_core.training import Standard, cosine, fit, scheduled
from robust_core.zeroth_order import coordinate_gradient
from vision_robust.certified.zo_ae_ds import (
    AutoencodedDenoised,
    Autoencoder,
    BlackBox,
    Denoised,
    DenoisingMSE,
    DnCNN,
    FrontStability,
    QueryStability,
    conv_autoencoder,
    paper_autoencoder,
)
from vision_robust.models import SmallCNN, resnet18_32

__all__ = ["STATEMENTS", "run"]

RADIUS = 0.25

_POINTS = "percentage points"
_SCALE = "at this scale networks, data and numbers of queries are not the paper's (CIFAR-10)"
_METRIC = "certified accuracy at L2 radius 0.25 on the test split, sigma 0.25"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Coordinate-wise estimates behind an auto-encoder beat random directions in pixel space by 5 points.",
        metric=f"{_METRIC}: ZO-AE-DS (coordinates) against ZO-DS (random directions), at as many queries",
        figure="coordinates_against_pixels",
        unit=_POINTS,
        margin=5.0,
        reason=f"{_SCALE}: 54.87 against 19.16 with 192 queries",
    ),
    Statement(
        text="Behind the auto-encoder, coordinates are no worse than random directions.",
        metric=f"{_METRIC}: ZO-AE-DS (coordinates) against ZO-AE-DS (random directions), at as many queries",
        figure="coordinates_against_directions",
        unit=_POINTS,
        margin=0.0,
        reason=f"{_SCALE}: 54.87 against 45.69 with 192 queries",
    ),
    Statement(
        text="For random directions the auto-encoder is worth its loss of detail.",
        metric=f"{_METRIC}: ZO-AE-DS (random directions) against ZO-DS (random directions), at as many queries",
        figure="directions_against_pixels",
        unit=_POINTS,
        margin=0.0,
        reason=f"{_SCALE}: 45.69 against 19.16 with 192 queries",
    ),
    Statement(
        text="Every defence by queries is above smoothing the classifier itself.",
        metric=f"{_METRIC}: the least of the three against f smoothed without a denoiser",
        figure="least_against_undefended",
        unit=_POINTS,
        margin=0.0,
        reason=_SCALE,
    ),
    Statement(
        text="Queries cost at most 5 points against gradients.",
        metric=f"{_METRIC}: ZO-AE-DS (coordinates) against the same model trained by gradients (FO-AE-DS)",
        figure="coordinates_against_gradients",
        unit=_POINTS,
        margin=-5.0,
        reason=f"{_SCALE}: 54.87 against 59.12",
    ),
    Statement(
        text="On 8 x 8 digits any defence by queries gains 30 points over none.",
        metric="certified accuracy at L2 radius 0.25 on the test split, sigma 0.35: the lesser of ZO-DS (random "
        "directions) and ZO-AE-DS (coordinates) against f smoothed without a denoiser",
        figure="digits_against_undefended",
        unit=_POINTS,
        margin=30.0,
        reason="the paper has no such small images",
    ),
)


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale."""

    data: str
    n_train: int | None
    n_test: int
    sigma: float
    latent: int
    directions: int
    epochs: int
    batch_size: int
    n_samples: int
    classifier_epochs: int
    autoencoder_epochs: int
    depth: int
    width: int
    momentum: float


QUICK = Setting("fashion_mnist", 1_500, 200, 0.25, 24, 48, 8, 32, 1_000, 15, 20, 5, 8, 0.1)
FULL = Setting("cifar10", None, 500, 0.25, 192, 383, 200, 256, 10_000, 60, 600, 17, 64, 0.95)
DIGITS = Setting("digits", None, 200, 0.35, 16, 31, 10, 64, 1_000, 30, 40, 5, 8, 0.1)


@dataclass(frozen=True)
class _Parts:
    train: Dataset
    x: Tensor
    y: Tensor
    classifier: nn.Module
    autoencoder: Autoencoder


def _evenly(data: Dataset, n: int | None) -> Dataset:
    if n is None or n >= len(data):
        return data
    return data.subset(torch.linspace(0, len(data) - 1, n).round().long().tolist())


def _parts(setting: Setting, seed: int) -> _Parts:
    """Train the classifier and the auto-encoder on clean data."""
    train = load(setting.data, split="train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive(seed, "split")))
    train = train.subset(order[: setting.n_train].tolist())
    test = _evenly(load(setting.data, split="test"), setting.n_test)
    batch = test.batch(range(len(test)))
    channels, height, width = batch["x"].shape[1:]
    if setting.data == "cifar10":
        classifier, autoencoder = resnet18_32(10, generator=seed), paper_autoencoder("cifar10", generator=seed)
    else:
        classifier = SmallCNN(10, (channels, height, width), width=8, generator=seed)
        autoencoder = conv_autoencoder((channels, height, width), setting.latent, width=8, generator=seed)
    _fit(classifier, train, Standard(), setting.classifier_epochs, 3e-3, setting, seed)
    _fit(autoencoder, train, DenoisingMSE(0.0), setting.autoencoder_epochs, 3e-3, setting, seed)
    return _Parts(train, batch["x"], batch["y"], classifier.eval(), autoencoder.eval())


def _fit(
    model: nn.Module, data: Dataset, objective: nn.Module, epochs: int, rate: float, setting: Setting, seed: int
) -> None:
    fit(
        model,
        data,
        objective,
        epochs=epochs,
        optimiser=partial(torch.optim.Adam, lr=rate),
        batch_size=setting.batch_size,
        schedule=scheduled(cosine()),
        generator=seed,
    )


@dataclass(frozen=True)
class _Arm:
    """A defence after training, with what it cost.

    Attributes:
        certified: share of the test images certified at :data:`RADIUS`.
        queries: made in training, by the black box's own count and by the objective's.
    """

    certified: float
    queries: tuple[int, int]


def _defend(parts: _Parts, setting: Setting, seed: int, *, estimator: str, encoded: bool) -> _Arm:
    """Train in front of the classifier, closed (queries) or open (``estimator="gradients"``), and certify."""
    channels = parts.x.shape[1]
    denoiser = DnCNN(
        channels,
        depth=setting.depth,
        width=setting.width,
        momentum=setting.momentum,
        generator=derive(seed, "denoiser"),
    )
    closed = estimator != "gradients"
    box = BlackBox(parts.classifier, scores="logits") if closed else parts.classifier
    twin = Autoencoder(*_copies(parts.autoencoder))
    model = AutoencodedDenoised(denoiser, twin, box) if encoded else Denoised(denoiser, box)
    if closed:
        objective = QueryStability(
            setting.sigma, estimator=estimator, n_directions=setting.directions, batch_size=4096, generator=seed
        )
    else:
        objective = FrontStability(setting.sigma, generator=seed)
    _fit(model, parts.train, objective, setting.epochs, 3e-3, setting, seed)
    queries = (
        (box.queries, objective.queries)
        if isinstance(objective, QueryStability) and isinstance(box, BlackBox)
        else (0, 0)
    )
    return _Arm(_certified(model.eval(), parts, setting, seed), queries)


def _copies(autoencoder: Autoencoder) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(autoencoder.encoder), copy.deepcopy(autoencoder.decoder)


def _certified(model: nn.Module, parts: _Parts, setting: Setting, seed: int) -> float:
    smoothing = Smoothing(model, setting.sigma, n_samples=setting.n_samples)
    certificate = smoothing.certify(parts.x, parts.y, radius=RADIUS, generator=seed)
    return certificate.accuracy(parts.y, RADIUS)


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    setting = FULL if scale == "full" else QUICK
    parts = _parts(setting, seed)
    before = fingerprint(parts.classifier)
    undefended = _certified(parts.classifier, parts, setting, seed)
    defend = partial(_defend, parts, setting, seed)
    pixels = defend(estimator="random", encoded=False)
    directions = defend(estimator="random", encoded=True)
    coordinates = defend(estimator="coordinates", encoded=True)
    gradients = defend(estimator="gradients", encoded=True)
    digits, digits_undefended = _digits(seed)
    measured = {
        "coordinates_against_pixels": coordinates.certified,
        "coordinates_against_directions": coordinates.certified,
        "directions_against_pixels": directions.certified,
        "least_against_undefended": min(arm.certified for arm in (pixels, directions, coordinates)),
        "coordinates_against_gradients": coordinates.certified,
        "digits_against_undefended": digits,
    }
    baseline = {
        "coordinates_against_pixels": pixels.certified,
        "coordinates_against_directions": directions.certified,
        "directions_against_pixels": pixels.certified,
        "least_against_undefended": undefended,
        "coordinates_against_gradients": gradients.certified,
        "digits_against_undefended": digits_undefended,
    }
    gates = (
        _queries_gate(parts, setting, (pixels, directions), coordinates),
        Gate("the classifier stayed as it was", fingerprint(parts.classifier) == before),
        _ceiling_gate(parts),
        _identity_gate(parts),
        _exact_gate(seed),
    )
    hashes = {f"{setting.data}/train": parts.train.sha256, f"{setting.data}/test": load(setting.data, "test").sha256}
    return Figures(
        {name: 100 * value for name, value in measured.items()},
        {name: 100 * value for name, value in baseline.items()},
        gates,
        hashes,
    )


# -- gates -----------------------------------------------------------------------------------------------------


def _queries_gate(parts: _Parts, setting: Setting, random: tuple[_Arm, ...], coordinates: _Arm) -> Gate:
    n = len(parts.train)
    latent = parts.autoencoder.encoder(parts.x[:1]).numel()
    expected = [n * (1 + setting.epochs * (setting.directions + 1))] * len(random)
    expected.append(n * (1 + setting.epochs * 2 * latent))
    found = [arm.queries for arm in (*random, coordinates)]
    alike = all(pair == (count, count) for pair, count in zip(found, expected, strict=True))
    return Gate("every query is counted", alike, f"{found} where {expected} are due")


def _ceiling_gate(parts: _Parts) -> Gate:
    """The black box works, and is not lost behind the auto-encoder (which bounds what any denoiser reaches)."""
    with torch.no_grad():
        behind = parts.autoencoder(parts.x)
    plain, ceiling = (
        float((predict_logits(parts.classifier, x).argmax(1) == parts.y).double().mean()) for x in (parts.x, behind)
    )
    detail = f"clean accuracy {plain:.3f}, behind the auto-encoder {ceiling:.3f}"
    return Gate("the classifier works behind the auto-encoder", plain > 0.7 and ceiling > 0.5, detail)


def _identity_gate(parts: _Parts) -> Gate:
    denoiser = DnCNN(parts.x.shape[1], depth=5, width=8)
    same = all(torch.equal(denoiser.train(mode)(parts.x), parts.x) for mode in (True, False))
    return Gate("an untrained denoiser is the identity", same)


def _exact_gate(seed: int) -> Gate:
    """Central coordinates on random quadratics against the closed form."""
    generator = torch.Generator().manual_seed(derive(seed, "quadratic"))
    a = torch.randn(20, 9, 9, generator=generator, dtype=torch.float64)
    z = torch.randn(20, 9, generator=generator, dtype=torch.float64)

    def loss(points: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("mi,mij,mj->m", points, a[rows], points)

    found = coordinate_gradient(loss, z, spread=0.005).gradient
    error = float((found - torch.einsum("nij,nj->ni", a + a.mT, z)).abs().max())
    return Gate("central coordinates are exact on quadratics", error < 1e-6, f"{error:.1e}")


def _digits(seed: int) -> tuple[float, float]:
    """Return (lesser of two defences by queries, none) on the digits."""
    parts = _parts(DIGITS, seed)
    undefended = _certified(parts.classifier, parts, DIGITS, seed)
    pixels = _defend(parts, DIGITS, seed, estimator="random", encoded=False).certified
    code = _defend(parts, DIGITS, seed, estimator="coordinates", encoded=True).certified
    return min(pixels, code), undefended
