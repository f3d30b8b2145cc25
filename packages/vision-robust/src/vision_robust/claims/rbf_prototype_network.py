"""Robust prototype-based networks (arXiv:2412.15499): does training for the certificate pay, and how loose is it?

Quick scale: digits 8x8; full scale: Fashion-MNIST (10,000 training and 2,000 test images). 20 components, two concepts
for each class, prototypes from U(0.45, 0.55), sigma from 2 (full: 7.6), Adam 5e-3, batches of 128. Networks differ in
their loss: the margin of scores (0.3), or the hinge of the certified radius (kappa 0.6; full: 1.58). Certified accuracy
counts test samples that are right and certified at a radius in L2, in percentage points; the "published" bound is the
paper's formula, the tight one is ours. The paper's comparison is made after 60 epochs, and again after 240, since an
advantage that is one of speed should not be taken for one of robustness; and once more from our own start (k-means++
prototypes, sigma by the rule, reasoning from labels; 60 epochs).

Found over ten seeds at the quick scale: the robust loss does what the paper says at 60 epochs (10 points at 0.2, more
than 15 at 0.3, by the published bound), at a clean price that varies between seeds. It is training that has not ended:
from random reasoning some classes are hardly learned by then, whatever the loss. After 240 epochs the margin loss is
ahead by 11 points, and by the tight bound it is ahead already at 60: much of what the robust loss buys is slack of the
bound. Starting the reasoning from labels is worth more than either loss (22 points by the tight bound); from there the
robust loss costs no accuracy and is ahead in each of the ten seeds. That counts as inconclusive, since one margin
network, spoilt for the published bound by a single small sigma, is 48 points behind and makes the interval wide. The
statements on that start were added, with margins chosen on held-out training data, after the first run of the others
and before any of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robust_core.attacks import PGD
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.data import Dataset, load
from robust_core.random import derive
from robust_core.threats import L2
from robust_core.training import fit
from vision_robust.explain.rbf_prototype_network import (
    CBC,
    CBCCertifier,
    CBCMarginLoss,
    RBFClassifier,
    RobustCBCLoss,
    closed_radius,
    crossing_factor,
    squared_radius,
)

__all__ = ["STATEMENTS", "run"]

RADII = (0.05, 0.1, 0.2, 0.3, 0.5)
_POINTS = "percentage points"
_SCALE = "at this scale networks and data are not the paper's (MNIST, kappa 1.58)"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Training for the certificate raises certified accuracy.",
        metric="certified accuracy by the published bound at L2 0.2, robust loss, against the margin loss, 60 epochs",
        figure="robust_loss_0.2",
        unit=_POINTS,
        margin=5.0,
        reason=_SCALE,
    ),
    Statement(
        text="It does so at larger radii too.",
        metric="the same at L2 0.3",
        figure="robust_loss_0.3",
        unit=_POINTS,
        margin=0.0,
        reason=_SCALE,
    ),
    Statement(
        text="It costs at most 7 points of clean accuracy.",
        metric="clean accuracy, robust loss, against the margin loss, 60 epochs",
        figure="robust_loss_clean",
        unit=_POINTS,
        margin=-7.0,
        reason=_SCALE,
    ),
    Statement(
        text="The advantage outlasts training to the end.",
        metric="certified accuracy by the published bound at L2 0.2, robust loss, against the margin loss, 240 epochs",
        figure="robust_loss_0.2_long",
        unit=_POINTS,
        margin=0.0,
        reason="the paper trains for 40 epochs of a data set 40 times as large",
    ),
    Statement(
        text="The advantage is one of the networks, not of the bound that they were trained for.",
        metric="certified accuracy by the tight bound at L2 0.2, robust loss, against the margin loss, 60 epochs",
        figure="robust_loss_0.2_tight",
        unit=_POINTS,
        margin=0.0,
        reason="the tight bound is ours",
    ),
    Statement(
        text="The tight certificate raises certified accuracy by 15 points or more (ours).",
        metric="certified accuracy by the tight bound at L2 0.2, against the published bound, margin loss, 60 epochs",
        figure="tight_0.2",
        unit=_POINTS,
        margin=15.0,
        reason="the tight bound is ours",
    ),
    Statement(
        text="It does so for the network that was trained for the published bound too (ours).",
        metric="the same for the robust loss",
        figure="tight_0.2_of_robust_loss",
        unit=_POINTS,
        margin=15.0,
        reason="the tight bound is ours",
    ),
    Statement(
        text="The walls of the domain are worth another point (ours).",
        metric="certified accuracy by the tight bound at L2 0.3 for inputs in [0, 1], against all inputs, margin loss, "
        "60 epochs",
        figure="domain_0.3",
        unit=_POINTS,
        margin=1.0,
        reason="the bound is ours",
    ),
    Statement(
        text="Started from labelled data, training for the certificate raises certified accuracy.",
        metric="certified accuracy by the published bound at L2 0.2, robust loss, against the margin loss, both from "
        "our start, 60 epochs",
        figure="robust_loss_0.2_from_labels",
        unit=_POINTS,
        margin=0.0,
        reason="the start is ours",
    ),
    Statement(
        text="Then it costs no clean accuracy.",
        metric="clean accuracy, robust loss, against the margin loss, both from our start, 60 epochs",
        figure="robust_loss_clean_from_labels",
        unit=_POINTS,
        margin=-1.0,
        reason="the start is ours",
    ),
    Statement(
        text="Starting the reasoning from labels raises certified accuracy by 15 points or more (ours).",
        metric="certified accuracy by the tight bound at L2 0.2, robust loss, our start, against the same without "
        "labels (control: the same prototypes and sigma, random reasoning), 60 epochs",
        figure="labels_0.2",
        unit=_POINTS,
        margin=15.0,
        reason="the start is ours",
    ),
)


@dataclass(frozen=True)
class _Setting:
    train: Dataset
    test: Dataset
    sigma: float
    kappa: float
    epochs: tuple[int, int]


def _setting(scale: Scale) -> _Setting:
    if scale == "quick":
        return _Setting(load("digits", split="train"), load("digits", split="test"), 2.0, 0.6, (60, 240))
    train, test = load("fashion_mnist", split="train"), load("fashion_mnist", split="test")
    return _Setting(train.subset(range(10_000)), test.subset(range(2_000)), 7.6, 1.58, (60, 240))


def _train(setting: _Setting, loss: str, epochs: int, seed: int, *, start: str = "published") -> CBC:
    objective = CBCMarginLoss(0.3) if loss == "margin" else RobustCBCLoss(setting.kappa)
    shape = tuple(setting.train.batch(range(1))["x"].shape[1:])
    model = CBC(setting.train.n_classes, shape, 20, concepts_per_class=2, sigma=setting.sigma, generator=seed)
    if start != "published":
        batch = setting.train.batch(range(len(setting.train)))
        model.initialise(batch["x"], batch["y"] if start == "labels" else None, generator=seed)
    fit(model, setting.train, objective, epochs=epochs, batch_size=128, generator=seed,
        optimiser=partial(torch.optim.Adam, lr=5e-3))  # fmt: skip
    return model.eval().requires_grad_(False)


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    setting = _setting(scale)
    batch = setting.test.batch(range(len(setting.test)))
    x, y = batch["x"], batch["y"]
    short, long = setting.epochs
    models = {
        "margin": _train(setting, "margin", short, seed),
        "robust": _train(setting, "robust", short, seed),
        "margin, long": _train(setting, "margin", long, seed),
        "robust, long": _train(setting, "robust", long, seed),
        "margin, labels": _train(setting, "margin", short, seed, start="labels"),
        "robust, labels": _train(setting, "robust", short, seed, start="labels"),
        "robust, no labels": _train(setting, "robust", short, seed, start="inputs"),
    }

    def certified(name: str, method: str, radius: float, *, walls: bool = False) -> float:
        chosen = CBCCertifier(models[name], method, domain=(0.0, 1.0) if walls else None)  # pyright: ignore
        return 100 * chosen.certify(x, y).accuracy(y, radius)

    def published(radius: float, *names: str) -> tuple[float, ...]:
        return tuple(certified(name, "published", radius) for name in names)

    def tight(radius: float, *names: str) -> tuple[float, ...]:
        return tuple(certified(name, "tight", radius) for name in names)

    def clean(*names: str) -> tuple[float, ...]:
        return tuple(100 * float((models[name](x).argmax(1) == y).double().mean()) for name in names)

    pairs = {
        "robust_loss_0.2": published(0.2, "robust", "margin"),
        "robust_loss_0.3": published(0.3, "robust", "margin"),
        "robust_loss_clean": clean("robust", "margin"),
        "robust_loss_0.2_long": published(0.2, "robust, long", "margin, long"),
        "robust_loss_0.2_tight": tight(0.2, "robust", "margin"),
        "tight_0.2": (*tight(0.2, "margin"), *published(0.2, "margin")),
        "tight_0.2_of_robust_loss": (*tight(0.2, "robust"), *published(0.2, "robust")),
        "domain_0.3": (certified("margin", "tight", 0.3, walls=True), *tight(0.3, "margin")),
        "robust_loss_0.2_from_labels": published(0.2, "robust, labels", "margin, labels"),
        "robust_loss_clean_from_labels": clean("robust, labels", "margin, labels"),
        "labels_0.2": tight(0.2, "robust, labels", "robust, no labels"),
    }
    gates = (*_formulas(), _order(models["margin"], x), _random_models(seed), *(
        _attacked(f"no PGD-200 inside a certified radius: {name}", models[name], x, y, seed)
        for name in ("margin", "robust", "robust, labels")
    ))  # fmt: skip
    return Figures(
        {name: measured for name, (measured, _) in pairs.items()},
        {name: baseline for name, (_, baseline) in pairs.items()},
        gates,
        {f"{d.name}/{split}": d.sha256 for split, d in (("train", setting.train), ("test", setting.test))},
    )


def _formulas() -> tuple[Gate, ...]:
    """The closed forms, by hand."""
    one, nine = (torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.9))
    rbf = float(crossing_factor(nine, torch.zeros_like(one), one).log())
    squared = float(squared_radius(torch.ones(1).double(), torch.full((1,), 2.0).double()))
    return (
        Gate("half sigma log(p_i / p_j) of an RBF network", abs(rbf - 1.0986122887) < 1e-9, f"{rbf:.9f}"),
        Gate("closed form of squared distances", abs(squared - (5**0.5 - 2)) < 1e-12, f"{squared:.9f}"),
    )


def _order(model: CBC, x: Tensor) -> Gate:
    """The tight bound is never below the formula, and the domain only adds."""
    tight = CBCCertifier(model).certify(x)
    formula = closed_radius(model, x, tight.prediction)
    walls = CBCCertifier(model, domain=(0.0, 1.0)).certify(x)
    # The formula is in float32, and the tight bound pays for the rounding of the model that runs.
    lost = float((formula - tight.radius).max())
    good = lost < 2e-3 and bool((walls.radius >= tight.radius * (1 - 1e-9)).all())
    return Gate("published <= tight <= tight in the domain", good, f"formula above tight by {lost:.1e} at most")


def _attacked(name: str, model: CBC, x: Tensor, y: Tensor, seed: int) -> Gate:
    """Attack, at each radius, all that is certified there by the tight bound within the domain."""
    certificate = CBCCertifier(model, domain=(0.0, 1.0)).certify(x, y)
    broken = attacked = 0
    for radius in RADII:
        rows = (certificate.certified & (certificate.radius >= radius)).nonzero().flatten()
        if len(rows):
            attack = PGD(L2(radius), n_iter=200, loss="margin")
            broken += int(attack.run(model, x[rows], y[rows], index=rows, generator=seed).success.sum())
            attacked += len(rows)
    return Gate(name, attacked > 0 and broken == 0, f"{broken} of {attacked} broken")


def _random_models(seed: int) -> Gate:
    """Twenty random models for each seed, each input attacked at its own radius, in the dtype of the model."""
    generator = torch.Generator().manual_seed(derive(seed, "random models"))
    broken = attacked = 0
    for number in range(20):
        kind, distance = (RBFClassifier, CBC)[number % 2], ("euclidean", "squared", "tangent")[number % 3]
        model = kind(3, (5,), 6, distance=distance, subspace_dim=2, generator=derive(seed, number)).eval()
        with torch.no_grad():
            model.components.points.copy_(torch.rand(6, 5, generator=generator))
            model.components.scale.copy_(0.1 + torch.rand(6, generator=generator))
            model.reasoning.logits.mul_(4).add_(torch.randn(model.reasoning.logits.shape, generator=generator))
        x = torch.rand(3, 5, generator=generator)
        certificate = CBCCertifier(model).certify(x)
        for row in certificate.certified.nonzero().flatten().tolist():
            attack = PGD(L2(float(certificate.radius[row]), None), n_iter=40, loss="margin", n_restarts=2)
            found = attack.run(model, x[row : row + 1], certificate.prediction[row : row + 1])
            broken, attacked = broken + int(found.success.sum()), attacked + 1
    return Gate("no attack on random models", attacked > 0 and broken == 0, f"{broken} of {attacked} broken")
