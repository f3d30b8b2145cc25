"""Propagation tightness (arXiv 2306.10426): what initialisation, training, radius, width and SABR do to it.

Quick scale: digits 8x8, networks of four hidden layers of 64 units (256 where "wide" is said) with batch normalisation
and IBP initialisation, Adam at 2e-3, batches of 64, 25 epochs, the radius growing over the first 8; radii 0.05 and 0.1.
Full scale: CIFAR-10 at 2/255 and 8/255, CNN7 (twice as wide), the paper's schedule. Tightness is local tightness of
the margins over test inputs, whose boxes are cut with [0, 1]; verified accuracy is that of rigorous interval bounds.
Random networks and embeddings do not depend on the scale. Statements and margins were fixed before the first run on
these seeds; epochs and learning rate come from a pilot on held-out training data of another seed.

Found over ten seeds at the quick scale: the laws of initialisation and embedding hold to about a percent, training
raises tightness from 0.02 (standard) to 0.71 and 0.83, and SABR gives up 0.18 of it for 0.7 points of clean accuracy.
Two statements stay open. Against a standard network of another kind (three hidden layers instead of four, no batch
normalisation) the rise is 8.8 to 11.5 times, ten in the mean: that network has a layer less through which bounds
multiply. And four times the width certifies 1.5 points more at the small radius, in eight runs of ten, but not clearly
more at the large one (0.9 points, six runs of ten).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.attacks import PGD
from robust_core.certificates import IntervalBounds
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.data import Dataset, load
from robust_core.models import Normalize
from robust_core.random import derive
from robust_core.threats import Linf
from robust_core.training import Objective, Standard, fit, piecewise, scheduled
from vision_robust.certified.fast_certified_training import FastCertified, SmoothedEps, ibp_init_
from vision_robust.certified.ibp_tightness import (
    TightnessReport,
    embedding_growth,
    expected_init_tightness,
    is_propagation_invariant,
    linear_tightness,
    linear_widths,
    local_tightness,
    local_widths,
    tightness_report,
    true_tightness,
)
from vision_robust.certified.sabr import SABR
from vision_robust.models import cnn7, mlp

__all__ = ["STATEMENTS", "run"]

_POINTS = "percentage points"
_SCALE = "the paper's figures are for CNNs on MNIST and CIFAR-10"
_OWN = "a formula of the paper, checked here on networks of our own"
_LAW = ("law_10", "law_30_50", "law_20_20_20")

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Tightness rises from standard training to interval training, and further with its radius, in every run.",
        metric="1 where standard < small radius < large radius in mean local tightness, else 0; against 1",
        figure="order_holds",
        unit="runs",
        margin=0.0,
        reason=_SCALE,
    ),
    Statement(
        text="Interval training raises tightness at least tenfold over standard training.",
        metric="log10 of mean local tightness at the small radius, against standard training of the same initial "
        "network, and of a network without batch normalisation and with torch's initialisation",
        figure=("decades_over_standard", "decades_over_plain"),
        unit="decades",
        margin=1.0,
        reason=_SCALE,
    ),
    Statement(
        text="Interval training raises tightness at least tenfold over that at initialisation.",
        metric="log10 of mean local tightness at the small radius, against the same network before training",
        figure="decades_over_initial",
        unit="decades",
        margin=1.0,
        reason=_SCALE,
    ),
    Statement(
        text="A larger training radius gives a tighter network.",
        metric="mean local tightness at the large radius, against the small one",
        figure="tightness_large",
        unit="tightness",
        margin=0.05,
        reason=_SCALE,
    ),
    Statement(
        text="At initialisation, exact over interval width is the product of rho(d) over hidden widths, within 3 %.",
        metric="|ratio of the means over 200 random networks of 64 inputs and 10 outputs / prod rho(d) - 1|, for "
        "hidden widths (10), (30, 50) and (20, 20, 20), against 0.03",
        figure=_LAW,
        unit="relative error",
        margin=0.0,
        higher_is_better=False,
        reason=_OWN,
    ),
    Statement(
        text="ReLUs raise it by sqrt(2) for each hidden layer, since about half of the units are off.",
        metric="|ratio with ReLU states at a test input / ratio without - sqrt(2)| over 200 networks of one hidden "
        "layer of 100 units, against 0.05",
        figure="relu_factor_error",
        unit="ratio",
        margin=0.0,
        higher_is_better=False,
        reason=_OWN,
    ),
    Statement(
        text="In a random embedding of 100 features, interval bounds grow by about 2 / pi for each component.",
        metric="|slope of the growth over 1, 5, 10, 20, 30 components - 0.64|, against 0.03",
        figure="embedding_slope_error",
        unit="growth per component",
        margin=0.0,
        higher_is_better=False,
        reason=_OWN,
    ),
    Statement(
        text="The exact box grows much more slowly: 3.9 at 30 components.",
        metric="|exact growth at 30 components - 3.9|, against 0.1",
        figure="embedding_exact_error",
        unit="growth",
        margin=0.0,
        higher_is_better=False,
        reason=_OWN,
    ),
    Statement(
        text="SABR's small boxes give a less tight network than interval training at the same radius.",
        metric="mean local tightness of SABR at the small radius (ratio 0.4; 0.1 at full scale), against intervals",
        figure="tightness_sabr",
        unit="tightness",
        margin=0.0,
        higher_is_better=False,
        reason=_SCALE,
    ),
    Statement(
        text="SABR's network is more accurate on clean data.",
        metric="clean accuracy of SABR at the small radius, against interval training",
        figure="clean_sabr",
        unit=_POINTS,
        margin=0.0,
        reason=_SCALE,
    ),
    Statement(
        text="Wider networks reach a higher certified accuracy with the same training.",
        metric="accuracy verified by intervals, at the small and at the large radius, of the wide network against the "
        "other, both trained with intervals of that radius",
        figure=("verified_wide_small", "verified_wide_large"),
        unit=_POINTS,
        margin=0.0,
        reason=_SCALE,
    ),
)


@dataclass(frozen=True)
class _Setting:
    """Data, networks and training of one scale."""

    train: Dataset
    test: Dataset
    network: Callable[..., nn.Module]
    widths: tuple[int, int]
    small: float
    large: float
    ratio: float
    epochs: int
    ramp: tuple[int, int]
    options: dict[str, Any]

    def schedule(self, eps: float) -> SmoothedEps:
        start, length = self.ramp
        return SmoothedEps.of_epochs(eps, start=start, length=length, epochs=self.epochs)

    def intervals(self, eps: float) -> FastCertified:
        return FastCertified(Linf(eps), self.schedule(eps))


def _mlp(width: int, *, depth: int = 4, batchnorm: bool = True, generator: int) -> nn.Module:
    return mlp(10, (1, 8, 8), widths=(width,) * depth, batchnorm=batchnorm, generator=generator)


def _cnn(width: int, *, depth: int = 0, batchnorm: bool = True, generator: int) -> nn.Module:
    network = cnn7(10, (3, 32, 32), width=width, batchnorm=batchnorm, generator=generator)
    return nn.Sequential(Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), network)


def _setting(scale: Scale) -> _Setting:
    if scale == "quick":
        options = {"optimiser": partial(torch.optim.Adam, lr=2e-3), "batch_size": 64, "clip_norm": 10.0}
        train, test = load("digits", split="train"), load("digits", split="test")
        return _Setting(train, test, _mlp, (64, 256), 0.05, 0.1, 0.4, 25, (1, 8), options)
    from torchvision.transforms import v2

    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=2, padding_mode="edge")])
    options = {
        "optimiser": partial(torch.optim.Adam, lr=5e-4),
        "schedule": scheduled(piecewise((120 / 160, 140 / 160), factor=0.2)),
        "batch_size": 128,
        "clip_norm": 10.0,
        "transform": augment,
    }
    train, test = load("cifar10", split="train"), load("cifar10", split="test")
    return _Setting(train, test, _cnn, (64, 128), 2 / 255, 8 / 255, 0.1, 160, (2, 80), options)


def _train(setting: _Setting, model: nn.Module, objective: Objective, seed: int) -> nn.Module:
    if torch.cuda.is_available():
        model = model.cuda()
    fit(model, setting.train, objective, epochs=setting.epochs, generator=seed, **setting.options)
    return model.eval()


def _networks(setting: _Setting, seed: int) -> dict[str, nn.Module]:
    """Train every network; those of one width start from the same weights."""
    x = setting.train.batch(range(8))["x"]
    narrow, wide = (
        ibp_init_(setting.network(width, generator=seed), x, generator=derive(seed, "init")) for width in setting.widths
    )
    plain = setting.network(setting.widths[0], depth=3, batchnorm=False, generator=seed)
    small, large = setting.small, setting.large
    sabr = SABR(Linf(small), setting.ratio, setting.schedule(small), generator=seed)
    arms: dict[str, tuple[nn.Module, Objective]] = {
        "standard": (narrow, Standard()),
        "plain": (plain, Standard()),
        "small": (narrow, setting.intervals(small)),
        "large": (narrow, setting.intervals(large)),
        "sabr": (narrow, sabr),
        "wide_small": (wide, setting.intervals(small)),
        "wide_large": (wide, setting.intervals(large)),
    }
    trained = {name: _train(setting, copy.deepcopy(net), objective, seed) for name, (net, objective) in arms.items()}
    return {"initial": narrow.eval(), **trained}


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    setting = _setting(scale)
    networks = _networks(setting, seed)
    reports = {
        name: tightness_report(model, setting.test, Linf(setting.large if "large" in name else setting.small))
        for name, model in networks.items()
    }
    tightness = {name: report.mean for name, report in reports.items()}
    clean = {name: 100 * report.figures()["accuracy"] for name, report in reports.items()}
    verified = {name: 100 * report.figures()["verified_accuracy"] for name, report in reports.items()}
    decades = {name: math.log10(value) if value > 0 else math.nan for name, value in tightness.items()}
    over = {f"decades_over_{name}": name for name in ("standard", "plain", "initial")}
    ordered = tightness["standard"] < tightness["small"] < tightness["large"]
    measured = {
        "order_holds": float(ordered),
        **dict.fromkeys(over, decades["small"]),
        "tightness_large": tightness["large"],
        "tightness_sabr": tightness["sabr"],
        "clean_sabr": clean["sabr"],
        "verified_wide_small": verified["wide_small"],
        "verified_wide_large": verified["wide_large"],
        **_laws(seed, setting),
    }
    baseline = {
        "order_holds": 1.0,
        **{name: decades[other] for name, other in over.items()},
        "tightness_large": tightness["small"],
        "tightness_sabr": tightness["small"],
        "clean_sabr": clean["small"],
        "verified_wide_small": verified["small"],
        "verified_wide_large": verified["large"],
        **dict.fromkeys(_LAW, 0.03),
        "relu_factor_error": 0.05,
        "embedding_slope_error": 0.03,
        "embedding_exact_error": 0.1,
    }
    gates = (*_exactness(seed), *_soundness(setting, networks, reports))
    hashes = {f"{d.name}/{split}": d.sha256 for split, d in (("train", setting.train), ("test", setting.test))}
    return Figures(measured, baseline, gates, hashes)


def _laws(seed: int, setting: _Setting) -> dict[str, float]:
    """Return by how much random networks and embeddings miss their formulas."""
    generator = torch.Generator().manual_seed(derive(seed, "random networks"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ratio(weights: list[Tensor]) -> float:
        exact, loose = linear_widths(weights)
        return float(exact.mean() / loose.mean())

    found = {}
    for name, hidden in zip(_LAW, ([10], [30, 50], [20, 20, 20]), strict=True):
        weights = [normal(200, b, a) for a, b in pairwise([64, *hidden, 10])]
        found[name] = abs(ratio(weights) / expected_init_tightness(hidden) - 1)
    first, second = normal(200, 100, 64), normal(200, 10, 100)
    x = setting.test.batch(range(1))["x"].double().flatten()[:64]
    on = (first @ x >= 0).unsqueeze(2)
    found["relu_factor_error"] = abs(ratio([first * on, second]) / ratio([first, second]) - math.sqrt(2))
    sizes = torch.tensor([1.0, 5.0, 10.0, 20.0, 30.0], dtype=torch.float64)
    growth = torch.tensor([embedding_growth(100, int(k), n_draws=50, generator=seed) for k in sizes.tolist()])
    centred = sizes - sizes.mean()
    slope = float((centred * growth[:, 0].double()).sum() / centred.square().sum())
    found["embedding_slope_error"] = abs(slope - 0.64)
    found["embedding_exact_error"] = abs(float(growth[-1, 1]) - 3.9)
    return found


def _exactness(seed: int) -> tuple[Gate, ...]:
    """The definitions, on weights whose tightness is known."""
    generator = torch.Generator().manual_seed(derive(seed, "exactness"))
    positive = [torch.rand(7, 5, generator=generator), torch.rand(4, 7, generator=generator)]
    away = float((linear_tightness(positive) - 1).abs().max())
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    loose = float(linear_tightness([hadamard, hadamard]).max())
    invariant = is_propagation_invariant(positive[0], positive[1]), is_propagation_invariant(hadamard, hadamard)
    same = abs(embedding_growth(50, 1, generator=seed)[0] / embedding_growth(50, 1, generator=seed)[1] - 1)
    within = embedding_growth(50, 20, generator=seed)[1] <= math.sqrt(20)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.rand(4, 3, generator=generator)
    tiny = Linf(1e-6, domain=None)
    local, true = local_tightness(net, x, threat=tiny), true_tightness(net, x, threat=tiny)
    far = float((local - true).abs().nan_to_num().max())
    return (
        Gate("weights of one sign are exact", away < 1e-12 and invariant == (True, False), f"{away:.1e}"),
        Gate("mixed signs are not", loose == 0.5, f"{loose}"),
        Gate("embedding of rank 1 is exact, of rank k at most sqrt(k)", same < 1e-9 and within, f"{same:.1e}"),
        Gate("local is true tightness of tiny boxes", far < 1e-4, f"{far:.1e}"),
    )


def _soundness(
    setting: _Setting, networks: dict[str, nn.Module], reports: dict[str, TightnessReport]
) -> tuple[Gate, ...]:
    """No tightness above 1, the Jacobian in the numerator, no attack on verified inputs, and no collapsed network."""
    model = networks["small"]
    device = next(model.parameters()).device
    x, y = (setting.test.batch(range(64))[key].to(device) for key in ("x", "y"))
    point = x[:4].double().requires_grad_(True)
    first = copy.deepcopy(model).double()(point)[:, 0].sum()
    jacobian = torch.autograd.grad(first, point)[0].flatten(1).abs().sum(1) * setting.small
    exact = local_widths(model, x[:4], threat=Linf(setting.small, domain=None))[0][:, 0]
    error = float((jacobian / exact - 1).abs().max())
    highest = max(float(torch.from_numpy(report.tightness).nan_to_num().max()) for report in reports.values())
    threat = Linf(setting.small)
    certificate = IntervalBounds(model, threat).certify(x, y)
    rows = certificate.certified.nonzero().flatten()
    broken = 0
    if len(rows):
        broken = int(PGD(threat, n_iter=20).run(model, x[rows], certificate.prediction[rows]).success.sum())
    accuracies = {name: float(report.correct.mean()) for name, report in reports.items() if name != "initial"}
    worst = min(accuracies, key=lambda name: accuracies[name])
    return (
        Gate("tightness is at most 1", highest <= 1 + 1e-9, f"{highest:.12f}"),
        Gate("the exact width is that of the Jacobian", error < 1e-9, f"{error:.1e}"),
        Gate("no attack inside a verified box", len(rows) > 0 and broken == 0, f"{broken} of {len(rows)} broken"),
        Gate("no network collapsed", accuracies[worst] > 0.2, f"least accurate: {worst}, {accuracies[worst]:.3f}"),
    )
