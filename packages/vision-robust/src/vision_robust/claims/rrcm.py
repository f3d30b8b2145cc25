"""rRCM (arXiv:2501.13094): does label-free pre-training along noise trajectories enlarge certified radii, at one pass?

Quick scale: digits 8x8, sigma 0.25. The encoder is a small multilayer network that knows its noise level, pre-trained
on all training images without labels (1,500 steps of 256, views shifted by one pixel with changed contrast, N from 21
to 41 levels, teacher's decay 0.99). Four classifiers are then trained in the same way, with 100 labels (ten of each
class) and with all: from scratch or pre-trained, each by noise augmentation alone or with the consistency loss of the
paper's fine-tuning. The scratch arms are the controls. Figures are certified accuracies of 180 test images at L2 radii
0, 0.25 and 0.5 by 2,000 noisy samples, alpha 0.001, in percentage points. Full scale: CIFAR-10 at the paper's setting,
500 labels of each class as the small budget, 500 test images, 100,000 samples.

The weight of the divergence (lam) was chosen for each arm and budget on held-out training images of other seeds, as
were the learning rates and steps. Cost is counted: rows that enter a network for each noisy sample.

Found over six seeds at the quick scale: the whole method certifies 4.3 points more at radius 0.5 than noise
augmentation from scratch with 100 labels and 4.8 more with all, and its gain grows with the radius. But the gain is
the fine-tuning loss's, not pre-training's: a scratch model under the same loss does as well with 100 labels (0.4
points better, interval on both sides of 0) and 1.8 points better with all, and pre-training alone changes nothing
that shows. On held-out images the pre-trained features are good (a linear head on them classifies 95 % and more under
the noise with all labels) but not robust far out, and labels teach a network of this size the same within seconds:
1,400 small images leave little to be learned without labels, where the paper has a million and 600,000 steps. The
pre-trained arms also learn more slowly in early layers, as the paper has it, which may cost them where labels abound.
What the paper compares with, a diffusion model in front of a classifier, is compared here in passes alone. The gates
and the tests rule out a fault of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.attacks import PGD
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.data import Dataset, load
from robust_core.data.views import Views, flip, random_crop
from robust_core.random import SampleStreams, derive, reseeded
from robust_core.threats import L2
from robust_core.training import cosine, fit, scheduled
from vision_robust.certified.denoised_smoothing import Denoised, DiffusionDenoiser
from vision_robust.certified.rrcm import (
    PRESETS,
    RRCM,
    ConsistencySchedule,
    KarrasGrid,
    NoiseConditionedClassifier,
    ProjectedEncoder,
    SmoothedFineTuning,
    TargetEmaSchedule,
    TimeConditionedEncoder,
    TimeModulated,
    info_nce,
    layerwise_adamw,
    projection_head,
)

__all__ = ["STATEMENTS", "run"]

RADII = (0.0, 0.25, 0.5)
ARMS = ("scratch", "scratch+consistency", "pretrained", "pretrained+consistency")
BUDGETS = ("few", "all")
LAM = {
    ("few", "scratch+consistency"): 20.0,
    ("few", "pretrained+consistency"): 20.0,
    ("all", "scratch+consistency"): 10.0,
    ("all", "pretrained+consistency"): 10.0,
}
"""Weight of the divergence, chosen for each arm on held-out training images of other seeds."""

_POINTS = "percentage points"
_PAPER = (
    "the paper compares with diffusion models before a classifier on ImageNet: 5.3 points more on average over radii, "
    "up to 11.6 at large ones"
)


def _statement(text: str, metric: str, figure: str | tuple[str, ...], margin: float = 0.0) -> Statement:
    return Statement(text=text, metric=metric, figure=figure, unit=_POINTS, margin=margin, reason=_PAPER)


_AT = "certified accuracy at L2 radius 0.5 (sigma 0.25), test images, "
STATEMENTS: tuple[Statement, ...] = (
    _statement(
        "With few labels, pre-training and consistency certify more than training from scratch under the same noise.",
        _AT + "small budget of labels; pre-trained with consistency against from scratch by noise augmentation",
        "few: whole method",
    ),
    _statement(
        "With all labels too.",
        _AT + "all labels; pre-trained with consistency against from scratch by noise augmentation",
        "all: whole method",
    ),
    _statement(
        "With few labels, the gain is pre-training's: it stays where both arms are tuned with consistency (control).",
        _AT + "small budget; pre-trained with consistency against from scratch with consistency, each at its own lam",
        "few: pre-training under consistency",
    ),
    _statement(
        "With all labels, the gain is pre-training's as well (control).",
        _AT + "all labels; pre-trained with consistency against from scratch with consistency, each at its own lam",
        "all: pre-training under consistency",
    ),
    _statement(
        "The gain grows with the radius.",
        "small budget; gain of the whole method over noise augmentation from scratch at radius 0.5, against its gain "
        "at radius 0",
        "few: gain at 0.5",
    ),
    _statement(
        "Nowhere does the whole method cost as much as 4 points.",
        _AT + "each budget; whole method against noise augmentation from scratch",
        ("few: whole method", "all: whole method"),
        -4.0,
    ),
    _statement(
        "Pre-training by itself does not lower what is certified.",
        _AT + "mean over both budgets; pre-trained against from scratch, both by noise augmentation alone",
        "mean: pre-training alone",
    ),
)


@dataclass(frozen=True)
class _Setting:
    train: Dataset
    test: Dataset
    sigma: float
    n_samples: int
    encoder: Callable[[int], TimeConditionedEncoder]
    pretrain: Callable[[TimeConditionedEncoder, int], None]
    tune: Callable[[TimeConditionedEncoder, Dataset, str, float, int], NoiseConditionedClassifier]
    per_class: int


# -- quick: digits ---------------------------------------------------------------------------------------------

WIDTH = 128
STEPS, TUNING_STEPS = 1500, 500


def _small_encoder(seed: int) -> TimeConditionedEncoder:
    with reseeded(seed):
        network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, WIDTH),
        )
    return TimeConditionedEncoder(TimeModulated(network, WIDTH, width=32, generator=seed))


def _contrast_jitter(x: Tensor, streams: SampleStreams) -> Tensor:
    factor = 0.7 + 0.6 * streams.uniform((1, 1, 1), dtype=x.dtype)
    return (0.5 + factor * (x - 0.5)).clamp(0, 1)


def _pretrain_digits(train: Dataset, encoder: TimeConditionedEncoder, seed: int) -> None:
    model = ProjectedEncoder(encoder, projection_head(WIDTH, hidden=128, out=64, generator=seed))
    batch_size = 256
    epochs = round(STEPS / -(-len(train) // batch_size))
    objective = RRCM(
        sizes=ConsistencySchedule(start=20, end=40),
        decay=TargetEmaSchedule(0.99, 0.99),
        views=(partial(random_crop, share=0.125), _contrast_jitter),
        generator=seed,
    )
    optimiser = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    schedule = scheduled(cosine(warmup=0.05))
    fit(model, train, objective, epochs=epochs, optimiser=optimiser, schedule=schedule, batch_size=batch_size,
        clip_norm=2.0, generator=seed)  # fmt: skip


def _tune_digits(
    encoder: TimeConditionedEncoder, train: Dataset, arm: str, lam: float, seed: int
) -> NoiseConditionedClassifier:
    classifier = NoiseConditionedClassifier.build(encoder, 10, 0.25, generator=seed)
    objective = SmoothedFineTuning(0.25, lam=lam, entropy=0.5 if lam else 0.0, generator=seed)
    batch_size = min(100, len(train))
    # Layers that were not pre-trained have no reason to be slow.
    optimiser = layerwise_adamw(classifier, 2e-3, decay=0.65 if arm.startswith("pretrained") else 1.0)
    fit(classifier, train, objective, epochs=-(-TUNING_STEPS // -(-len(train) // batch_size)), optimiser=optimiser,
        schedule=scheduled(cosine(warmup=0.05)), batch_size=batch_size, generator=seed)  # fmt: skip
    return classifier.eval()


# -- full: CIFAR-10 ----------------------------------------------------------------------------------------------


def _pretrain_cifar(train: Dataset, encoder: TimeConditionedEncoder, seed: int) -> None:
    preset = PRESETS["cifar10-base"]
    model = ProjectedEncoder(encoder, projection_head(encoder.n_features, hidden=preset.hidden, generator=seed))
    fit(model, train, **preset.pretraining(len(train), generator=seed), generator=seed)


def _tune_cifar(
    encoder: TimeConditionedEncoder, train: Dataset, arm: str, lam: float, seed: int
) -> NoiseConditionedClassifier:
    preset = PRESETS["cifar10-base"]
    classifier = preset.classifier(encoder, train.n_classes, 0.25, generator=seed)
    told: dict[str, Any] = preset.tuning(classifier, len(train), generator=seed)
    if not arm.startswith("pretrained"):
        told["optimiser"] = partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.0)
    told["objective"] = SmoothedFineTuning(0.25, lam=lam, entropy=0.5 if lam else 0.0, generator=seed)
    fit(classifier, train, **told, transform=Views(x=(flip, random_crop)), generator=seed)
    return classifier.eval()


def _setting(scale: Scale) -> _Setting:
    if scale == "full":
        train, test = load("cifar10", split="train"), load("cifar10", split="test")
        test = test.subset(range(0, len(test), 20))
        pretrain = partial(_pretrain_cifar, train)
        encoder = PRESETS["cifar10-base"].encoder
        return _Setting(
            train, test, 0.25, 100_000, lambda seed: encoder(generator=seed), pretrain, _tune_cifar, per_class=500
        )
    train, test = load("digits", split="train"), load("digits", split="test")
    test = test.subset(torch.linspace(0, len(test) - 1, 180).round().long().tolist())
    return _Setting(
        train, test, 0.25, 2000, _small_encoder, partial(_pretrain_digits, train), _tune_digits, per_class=10
    )


def _few(train: Dataset, per_class: int, seed: int) -> Dataset:
    """Return ``per_class`` random samples of each class."""
    labels = torch.as_tensor(train.y)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive(seed, "labels")))
    chosen = [order[labels[order] == c][:per_class] for c in range(train.n_classes)]
    return train.subset(torch.cat(chosen).tolist())


def _certified(setting: _Setting, classifier: NoiseConditionedClassifier, seed: int) -> tuple[float, ...]:
    batch = setting.test.batch(range(len(setting.test)))
    certificate = classifier.smoothing(n_samples=setting.n_samples).certify(batch["x"], batch["y"], generator=seed)
    return tuple(100 * certificate.accuracy(batch["y"], radius) for radius in RADII)


def _arms(setting: _Setting, seed: int) -> tuple[dict[tuple[str, str], tuple[float, ...]], NoiseConditionedClassifier]:
    """Return certified accuracies by (budget, arm), and one classifier of the method for the gates."""
    fresh = setting.encoder(derive(seed, "encoder"))
    trained = setting.encoder(derive(seed, "encoder"))  # the same start as the scratch arms
    setting.pretrain(trained, derive(seed, "pretraining"))
    found: dict[tuple[str, str], tuple[float, ...]] = {}
    classifier: NoiseConditionedClassifier | None = None
    for budget in BUDGETS:
        data = _few(setting.train, setting.per_class, seed) if budget == "few" else setting.train
        for arm in ARMS:
            base = trained if arm.startswith("pretrained") else fresh
            lam = LAM.get((budget, arm), 0.0)
            classifier = setting.tune(base, data, arm, lam, derive(seed, "tuning", budget))
            found[budget, arm] = _certified(setting, classifier, derive(seed, "noise"))
    if classifier is None:
        raise RuntimeError("no arm was trained")
    return found, classifier


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    setting = _setting(scale)
    found, classifier = _arms(setting, seed)

    def at(budget: str, arm: str, radius: float = 0.5) -> float:
        return found[budget, arm][RADII.index(radius)]

    whole, plain = "pretrained+consistency", "scratch"
    measured: dict[str, float] = {
        "few: gain at 0.5": at("few", whole) - at("few", plain),
        "mean: pre-training alone": (at("few", "pretrained") + at("all", "pretrained")) / 2,
    }
    baseline = {
        "few: gain at 0.5": at("few", whole, 0.0) - at("few", plain, 0.0),
        "mean: pre-training alone": (at("few", plain) + at("all", plain)) / 2,
    }
    for budget in BUDGETS:
        for name, control in (("whole method", plain), ("pre-training under consistency", "scratch+consistency")):
            measured[f"{budget}: {name}"] = at(budget, whole)
            baseline[f"{budget}: {name}"] = at(budget, control)
    gates = (*_exactness(seed), _cost_gate(classifier, setting), _attack_gate(classifier, setting, seed))
    data = {f"{d.name}/{split}": d.sha256 for split, d in (("train", setting.train), ("test", setting.test))}
    return Figures(measured, baseline, gates, data)


# -- gates -----------------------------------------------------------------------------------------------------


def _exactness(seed: int) -> tuple[Gate, ...]:
    """Closed forms of the grid, the schedules, InfoNCE and the units."""
    grid = KarrasGrid(n=41)
    levels = grid.levels()
    ends = (float(levels[0]), float(levels[-1]))
    sizes = [ConsistencySchedule(10).size(k) for k in (0, 1, 5, 6, 10)]
    eye = torch.eye(6, dtype=torch.float64)
    error = abs(float(info_nce(eye, eye)) - math.log1p(5 * math.exp(-1 / 0.2)))
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(derive(seed, "exactness")))
    encoder = TimeConditionedEncoder(nn.Identity())
    double = float((encoder.normalise(x + 0.25) - encoder.normalise(x) - encoder.level(0.25)).abs().max())
    return (
        Gate("grid from 80 to 0.002, falling", ends == (80.0, 0.002) and bool((levels.diff() < 0).all()), str(ends)),
        Gate("levels over training", sizes == [21, 41, 41, 81, 81], str(sizes)),
        Gate("InfoNCE of orthonormal rows", error < 1e-12, f"off by {error:.1e}"),
        Gate("level t is sigma / std", encoder.level(0.25) == 0.5 and double < 1e-6, f"off by {double:.1e}"),
    )


class _Silence(nn.Module):
    """A diffusion network that finds no noise; only its passes are counted."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _rows(model: nn.Module, parts: list[nn.Module], x: Tensor) -> int:
    """Return how many rows enter the given networks in one pass of ``model``."""
    counted = [0]

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        counted[0] += len(inputs[0])

    hooks = [part.register_forward_pre_hook(count) for part in parts]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return counted[0]


def _cost_gate(classifier: NoiseConditionedClassifier, setting: _Setting) -> Gate:
    """One pass for each noisy sample; a classifier behind a diffusion model of T steps takes T + 1."""
    x, steps = setting.test.batch(range(16))["x"], 10
    mine = _rows(classifier, [classifier.encoder.backbone], x)
    network, alphas = _Silence(), torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)
    denoiser = DiffusionDenoiser(network, alphas, setting.sigma, n_steps=steps)
    behind = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10))
    theirs = _rows(Denoised(denoiser, behind), [network, behind], x)
    passed = mine == len(x) and theirs == (steps + 1) * len(x)
    return Gate(
        "passes for each noisy sample", passed, f"{mine // len(x)}, against {theirs // len(x)} at {steps} steps"
    )


def _attack_gate(classifier: NoiseConditionedClassifier, setting: _Setting, seed: int) -> Gate:
    """An attacker through the noise must fail inside certified radii."""
    certifier = classifier.smoothing(n_samples=500)
    batch = setting.test.batch(range(24))
    certificate = certifier.certify(batch["x"], generator=derive(seed, "certify"))
    rows = certificate.certified.nonzero().flatten()
    broken = 0
    for row in rows.tolist():
        threat = L2(math.nextafter(float(certificate.radius[row]), 0.0), domain=None)
        x, y = batch["x"][row : row + 1], certificate.prediction[row : row + 1]
        smoothed = certifier.smoothed(n_samples=16, fresh=False, generator=seed)
        x_adv = PGD(threat, n_iter=10, loss="margin")(smoothed, x, y)
        answer = int(certifier.predict(x_adv, n_samples=500, generator=derive(seed, "predict")))
        broken += answer not in (int(y), -1)
    return Gate("no attack inside a certified radius", len(rows) > 0 and broken == 0, f"{broken} of {len(rows)} broken")
