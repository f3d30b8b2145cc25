"""Dual randomized smoothing (arXiv:2404.09586): do two half images certify farther than the whole one?

Quick scale: Fashion-MNIST (10,000 training images, 120 evenly spaced test images) and digits 8x8 (150 evenly spaced
test images), small convolutional networks, plain smoothing at sigma = 0.5. Full scale: CIFAR-10, ResNet-18, every fifth
test image. Dual smoothing has sigma / sqrt(2) on each side, which gives nearly equal largest radii.

The budgets are equal where it counts: n samples on each side against 2 n of the whole image, ``alpha`` = 0.001 for the
joint claim (half of it for each side). All networks of one comparison are alike and start from the same full-image
network, pre-trained on clean data; each is then trained for the same epochs by the same objective. So the two sides
have, as in the paper, twice the parameters and the training time of the one. The average certified radius (ACR)
counts wrong and abstaining rows as 0. Learning rate, epochs and the weight of consistency (5; these networks do not
learn under the paper's 15) were chosen on held-out training data, by what plain smoothing certifies.

Found over four seeds at the quick scale: two halves certify less far than the whole, by about 0.07 of 0.89 on
Fashion-MNIST and 0.04 of 0.46 on digits, while what else is claimed holds. On held-out Fashion-MNIST of another seed
(1,000 samples a side) more than half of the loss is the price of equal budgets: with as many samples on *each* side as
the whole image has, and alpha on each, as published, the gap falls from 0.097 to 0.039. Half of the samples and half of
alpha lower the largest radius from 1.57 to 1.45 here, and from 1.99 to 1.89 at the paper's 100,000 a side, for the
images whose votes are unanimous. The rest is the networks' own: a half image under sigma / sqrt(2) is no easier to tell
than the whole under sigma where images hold little redundancy, as linear classifiers never gain from being split. At
radius 1.0 on Fashion-MNIST the two certify nearly the same share of images. Left open: high resolution.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor, nn

from robust_core.certificates import Certificate, Smoothing
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.data import Dataset, load
from robust_core.random import derive
from robust_core.training import GaussianNoise, NoiseConsistency, Standard, cosine, fit, piecewise, scheduled
from vision_robust.certified.dual_randomized_smoothing import (
    DualClassifier,
    DualSmoothing,
    EachSide,
    checkerboard_partition,
    dual_radius,
)
from vision_robust.models import SmallCNN, resnet18_32

__all__ = ["STATEMENTS", "run"]

_SCALE = "the published tables come from a combination of the two sides that claims more than holds"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Dual smoothing certifies at least as far as plain smoothing, on Fashion-MNIST.",
        metric="ACR of dual smoothing at sigma / sqrt(2) with n samples a side, against plain smoothing at sigma = 0.5 "
        "with 2 n samples; both trained with consistency",
        figure="acr_fashion",
        unit="radius",
        margin=0.0,
        reason=_SCALE,
        scales=("quick",),
    ),
    Statement(
        text="Dual smoothing certifies at least as far as plain smoothing, on the digits (8x8, little redundancy).",
        metric="ACR as above, on digits",
        figure="acr_digits",
        unit="radius",
        margin=0.0,
        reason=_SCALE,
        scales=("quick",),
    ),
    Statement(
        text="Dual smoothing certifies at least as far as plain smoothing, on CIFAR-10.",
        metric="ACR as above, on every fifth test image of CIFAR-10",
        figure="acr_cifar10",
        unit="radius",
        margin=0.0,
        paper=0.774,
        scales=("full",),
    ),
    Statement(
        text="It certifies at least as many images at a large radius, on Fashion-MNIST.",
        metric="certified accuracy at radius 1.0 (twice plain smoothing's sigma), against plain smoothing's",
        figure="large_fashion",
        unit="percentage points",
        margin=0.0,
        reason=_SCALE,
        scales=("quick",),
    ),
    Statement(
        text="Training with consistency certifies farther than training under noise alone.",
        metric="ACR of dual smoothing on digits, consistency against plain Gaussian noise",
        figure="acr_consistency",
        unit="radius",
        margin=0.0,
        reason="the paper has it on CIFAR-10 (0.774 against 0.607)",
        scales=("quick",),
    ),
    Statement(
        text="Both halves are needed: with a right side that is blind the certificates shrink.",
        metric="ACR of dual smoothing on digits, against the same with a right side that votes for the class in half "
        "of the cases, whatever the image (negative control: p_R = 1/2)",
        figure="acr_blind",
        unit="radius",
        margin=0.05,
        reason="a control of our own",
        scales=("quick",),
    ),
)


@dataclass(frozen=True)
class _Setting:
    """One comparison; ``n`` samples on each side of the dual classifier, twice as many for the whole image."""

    train: Dataset
    test: Dataset
    net: nn.Module
    epochs: tuple[int, int]  # on clean images, under noise
    batch_size: int
    n: int = 4000
    consistency: tuple[int, float, float] = (2, 5.0, 0.25)  # copies, weights of divergence and entropy
    sigma: float = 0.5
    lr: float = 3e-3
    milestones: tuple[float, ...] = ()  # of a piecewise schedule; half a cosine without


def _setting(name: str, seed: int) -> _Setting:
    train, test = load(name, split="train"), load(name, split="test")
    if name == "cifar10":
        net = resnet18_32(10, generator=derive(seed, "net"))
        test = test.subset(range(0, len(test), 5))
        return _Setting(train, test, net, (90, 40), 256, 100_000, (4, 15.0, 0.75), 0.5, 1e-3, (25 / 40, 35 / 40))
    size, n_test, epochs, batch_size = (8, 150, (5, 40), 64) if name == "digits" else (28, 120, (2, 5), 128)
    net = SmallCNN(10, (1, size, size), width=12, generator=derive(seed, "net"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive(seed, "subset")))
    chosen = torch.linspace(0, len(test) - 1, n_test).long().tolist()
    return _Setting(train.subset(order[:10_000].tolist()), test.subset(chosen), net, epochs, batch_size)


class _Comparison:
    """The networks of one data set and seed, and their certificates on its test images."""

    def __init__(self, setting: _Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        batch = setting.test.batch(range(len(setting.test)))
        self.x, self.y = batch["x"], batch["y"]
        self.start = self._fit(setting.net, Standard(), setting.epochs[0], "clean")

    def _fit(self, net: nn.Module, objective: nn.Module, epochs: int, name: str) -> nn.Module:
        setting = self.setting
        shape = piecewise(setting.milestones) if setting.milestones else cosine()
        fit(net, setting.train, objective, epochs=epochs, batch_size=setting.batch_size, schedule=scheduled(shape),
            optimiser=partial(torch.optim.Adam, lr=setting.lr), generator=derive(self.seed, name))  # fmt: skip
        return net.eval()

    def _objective(self, sigma: float, *, consistent: bool) -> nn.Module:
        copies, lam, entropy = self.setting.consistency
        return NoiseConsistency(sigma, copies, lam, entropy=entropy) if consistent else GaussianNoise(sigma)

    def plain(self) -> Certificate:
        """Certify whole images with twice the samples."""
        setting = self.setting
        objective = self._objective(setting.sigma, consistent=True)
        net = self._fit(copy.deepcopy(self.start), objective, setting.epochs[1], "noise")
        return Smoothing(net, setting.sigma, n0=200, n_samples=2 * setting.n).certify(self.x, generator=self.seed)

    def dual(self, *, consistent: bool = True) -> tuple[Certificate, float]:
        """Certify by halves; return the certificate and the noise on each side."""
        setting, sigma = self.setting, self.setting.sigma / math.sqrt(2.0)
        masks = checkerboard_partition(*self.x.shape[2:])
        dual = DualClassifier(copy.deepcopy(self.start), copy.deepcopy(self.start), masks, feed="maxpool")
        self._fit(dual, EachSide(self._objective(sigma, consistent=consistent)), setting.epochs[1], "noise")
        return DualSmoothing(dual, sigma, n_samples=setting.n).certify(self.x, generator=self.seed), sigma


def _blind(certificate: Certificate, sigma: float, y: Tensor) -> float:
    """Return the ACR with 1/2 in place of what the right side knows."""
    radius = dual_radius(certificate.details["p_left"], 0.5, sigma)
    return float(torch.where(certificate.details["label"] == y, radius, 0.0).mean())


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    data: dict[str, str] = {}
    for name in ("cifar10",) if scale == "full" else ("fashion_mnist", "digits"):
        setting = _setting(name, derive(seed, name))
        comparison = _Comparison(setting, derive(seed, name))
        y, short = comparison.y, name.split("_")[0]
        plain, (dual, sigma) = comparison.plain(), comparison.dual()
        measured[f"acr_{short}"], baseline[f"acr_{short}"] = dual.average_radius(y), plain.average_radius(y)
        if short == "fashion":
            large = 2 * setting.sigma
            measured["large_fashion"] = 100 * dual.accuracy(y, large)
            baseline["large_fashion"] = 100 * plain.accuracy(y, large)
        if short == "digits":
            noisy, _ = comparison.dual(consistent=False)
            measured["acr_consistency"], baseline["acr_consistency"] = dual.average_radius(y), noisy.average_radius(y)
            measured["acr_blind"], baseline["acr_blind"] = dual.average_radius(y), _blind(dual, sigma, y)
        data |= {f"{name}/{split}": d.sha256 for split, d in (("train", setting.train), ("test", setting.test))}
    return Figures(measured, baseline, (*_radius_gates(), _attack_gate(seed), _coverage_gate(seed)), data)


# -- exactness and soundness -------------------------------------------------------------------------------------


def _worst(a: float, b: float, radius: float) -> float:
    """Return the least sum of the winner's votes at a radius, over how an attacker shares it between the sides."""
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    return float((ndtr(a - radius * np.cos(angle)) + ndtr(b - radius * np.sin(angle))).min())


def _radius_gates() -> tuple[Gate, ...]:
    exact = [_worst(a, b, float(dual_radius(float(ndtr(a)), float(ndtr(b)), 1.0))) for a, b in ((1, 0), (1.5, -0.5))]
    squares, clipped = _worst(1.0, 0.0, 1.0), _worst(1.5, -0.5, 1.5 / math.sqrt(2.0))
    vector = float(dual_radius(0.99, 0.6, 0.18))
    return (
        Gate("worst case at R is a tie", max(abs(v - 1.0) for v in exact) < 1e-6, f"{exact}"),
        Gate("root of squares claims too much", squares < 0.86, f"the winner keeps {squares:.3f} of 2 votes"),
        Gate("clipped quantiles claim too much", clipped < 0.88, f"the winner keeps {clipped:.3f} of 2 votes"),
        Gate("closed form for (0.99, 0.6), sigma 0.18", abs(vector - 0.328342) < 1e-6, f"{vector:.6f}"),
    )


class _Line(nn.Module):
    """Logits (-z, z) of a linear function with weights of length 1: its vote under noise is Phi(z / sigma)."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight / weight.norm())
        self.bias = bias

    def forward(self, image: Tensor) -> Tensor:
        z = image.flatten(1) @ self.get_buffer("weight").flatten() + self.bias
        return torch.stack([-z, z], 1)


def _lines(seed: int, bias: tuple[float, float]) -> tuple[DualClassifier, Tensor]:
    masks = checkerboard_partition(2, 2)
    draw = torch.Generator().manual_seed(derive(seed, "lines"))
    nets = [_Line(torch.randn(2, 2, generator=draw).double() * m, b) for m, b in zip(masks, bias, strict=True)]
    return DualClassifier(nets[0], nets[1], masks), torch.zeros(1, 1, 2, 2, dtype=torch.float64)


def _attack_gate(seed: int) -> Gate:
    """Linear sides are moved in their worst directions, to just inside and just outside of the radius."""
    flips = []
    for bias in ((1.0, 0.0), (1.5, -0.5), (0.6, 0.6)):
        dual, x = _lines(seed, bias)
        radius = float(dual_radius(float(ndtr(bias[0])), float(ndtr(bias[1])), 1.0))
        weights = [side.classifier[1].get_buffer("weight") for side in dual.sides]
        direction = torch.stack([-w for w in weights]).sum(0) / math.sqrt(2.0)
        for scale in (0.999, 1.001):
            votes = [torch.special.ndtr(side(x + scale * radius * direction)[:, 1]) for side in dual.sides]
            flips.append(bool(torch.stack(votes).sum() < 1))
    return Gate("linear sides flip just outside the radius, not inside", flips == [False, True] * 3, f"{flips}")


def _coverage_gate(seed: int) -> Gate:
    """Claims about votes that are known: no more than a share alpha of the radii may be too large."""
    bias, alpha, n = (0.9, -0.3), 0.1, 500
    dual, x = _lines(seed, bias)
    rows = x.expand(n, -1, -1, -1).contiguous()
    found = DualSmoothing(dual, 1.0, n_samples=200, alpha=alpha).certify(rows, torch.ones(n).long(), generator=seed)
    false = float((found.radius > sum(bias) / math.sqrt(2.0)).double().mean())
    return Gate("false claims are as rare as promised", false <= alpha, f"{false:.3f} of claims at alpha = {alpha}")
