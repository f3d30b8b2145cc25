"""Attack every certificate of vision-robust: no point inside a certified radius may change the prediction.

    python benchmarks/guarantees.py [--n 96] [--samples 2000] [--json FILE] [--only NAME]

Deterministic certificates are attacked at every certified row's own radius, in the norm that it speaks of and inside
the domain for which it holds (all of space where it names none), with more than one attack: ascent of the margin from
the point and from random starts, of the cross-entropy, and the minimum-norm attacks of core. One changed prediction is
a violation. Certificates by sampling speak of smoothed functions: attacks average over fresh noise (EOT), and a break
is counted where PREDICT, on the attacked input and with new noise, returns another class than the certified one; breaks
may happen with probability ``alpha`` for each row. Exit code 1 on any violation of a deterministic certificate, or on
more breaks than chance allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from robust_core.attacks import FAB, AutoAttack, CarliniWagner
from robust_core.certificates import Certificate, Crown, IntervalBounds, LipschitzCertifier, Smoothing
from robust_core.claim import versions
from robust_core.data import load
from robust_core.models import predict_logits
from robust_core.testing.tiny import digits
from robust_core.threats import L2, Linf
from robust_core.training import GaussianNoise, Standard, fit
from vision_robust import _examples
from vision_robust.models import SmallCNN


@dataclass(frozen=True)
class Count:
    """What became of one certifier."""

    name: str
    certified: int
    attacks: int
    broken: int
    alpha: float
    radius: float
    seconds: float


def broken_inside(
    model: nn.Module, x: Tensor, certificate: Certificate, domain: tuple[float, float] | None, *, restarts: int = 3
) -> tuple[int, int]:
    """Return (rows whose prediction an attack changes inside radius and domain, attacks run on each row)."""
    rows = certificate.certified & (certificate.radius > 0)
    x, label, radius = x[rows], certificate.prediction[rows], certificate.radius[rows]
    kind = Linf if certificate.about.norm == "Linf" else L2
    broken = torch.zeros(len(x), dtype=torch.bool)
    attacks = 0
    threats = partial(kind, domain=domain)
    for point in candidates(model, x, label, radius, threats, restarts):
        attacks += 1
        inside = kind(1.0, None).norm(point.double() - x.double()) <= radius
        broken |= inside & (predict_logits(model, point).argmax(1) != label)
    return int(broken.sum()), attacks


def candidates(
    model: nn.Module, x: Tensor, label: Tensor, radius: Tensor, kind: Callable[[float], Any], restarts: int
) -> Iterator[Tensor]:
    """Yield attacked points: margin and cross-entropy ascent inside the radius, and minimum-norm attacks."""
    generator = torch.Generator().manual_seed(0)
    column = radius.reshape(-1, *[1] * (x.ndim - 1))
    whole = kind(float(radius.max()))
    unit = type(whole)(1.0, None)
    for loss in ("margin", "cross-entropy"):
        for restart in range(restarts):
            start = torch.zeros_like(x) if restart == 0 else torch.randn(x.shape, generator=generator, dtype=x.dtype)
            z = unit.project(start, torch.zeros_like(x))
            for step in range(60):
                z = z.detach().requires_grad_(True)
                logits = model((x + column * z).to(x.dtype))
                (gradient,) = torch.autograd.grad(objective(loss, logits, label).sum(), z)
                length = 2.0 * (1 - step / 60) + 0.02
                z = unit.project(z.detach() + length * 0.25 * unit.steepest(gradient), torch.zeros_like(x))
                z = (whole.clamp((x + column * z).to(x.dtype)) - x) / column
            yield whole.clamp(inward(x, (column * z).to(x.dtype), radius, unit))
    minimum: list[Any] = [FAB(whole, n_iter=50)]
    if isinstance(whole, L2):
        minimum.append(CarliniWagner(whole, n_iter=100))
    for attack in minimum:
        yield attack.run(model, x, label).x_adv


def objective(loss: str, logits: Tensor, label: Tensor) -> Tensor:
    if loss == "cross-entropy":
        return torch.nn.functional.cross_entropy(logits, label, reduction="none")
    own = logits.gather(1, label[:, None]).squeeze(1)
    return logits.scatter(1, label[:, None], -torch.inf).amax(1) - own


def inward(x: Tensor, delta: Tensor, radius: Tensor, unit: Any) -> Tensor:
    """Return ``x + delta`` shortened until the stored difference is no longer than the radius."""
    point = x + delta
    for _ in range(4):
        over = unit.norm(point.double() - x.double()) > radius
        if not bool(over.any()):
            break
        mask = over.reshape(-1, *[1] * (x.ndim - 1))
        delta = torch.where(mask, delta * (1 - 1e-6), delta)
        point = x + delta
    return point


def smoothed_breaks(certifier: Any, x: Tensor, certificate: Certificate, *, n_iter: int = 20) -> tuple[int, int]:
    """Return (rows for which PREDICT returns another class on an attacked input, attacks run on each)."""
    rows = certificate.certified & (certificate.radius > 0)
    x, label, radius = x[rows], certificate.prediction[rows], certificate.radius[rows]
    broken = torch.zeros(len(x), dtype=torch.bool)
    column = radius.reshape(-1, *[1] * (x.ndim - 1))
    unit = L2(1.0, None)
    for attempt in range(2):
        soft = certifier.smoothed(n_samples=16, fresh=True, generator=attempt + 1)
        z = torch.zeros_like(x)
        for step in range(n_iter):
            z = z.detach().requires_grad_(True)
            logits = soft((x + column * z).to(x.dtype))
            (gradient,) = torch.autograd.grad(objective("margin", logits, label).sum(), z)
            z = unit.project(z.detach() + 0.5 * (1 - step / n_iter) * unit.steepest(gradient), torch.zeros_like(x))
        point = inward(x, (column * z).detach().to(x.dtype), radius, unit)
        found = certifier.predict(point, generator=1000 + attempt)
        broken |= (found >= 0) & (found != label)
    return int(broken.sum()), 2


def judge(name: str, certifier: Any, model: nn.Module, x: Tensor, y: Tensor) -> Count:
    started = time.perf_counter()
    certificate = certifier.certify(x, y) if name.startswith("smooth") else certifier.certify(x)
    rows = certificate.certified & (certificate.radius > 0)
    domain = getattr(getattr(certifier, "threat", None), "domain", None)
    if certificate.alpha > 0:
        broken, attacks = smoothed_breaks(certifier, x, certificate)
    else:
        broken, attacks = broken_inside(model, x, certificate, domain)
        if certificate.about.norm == "Linf" and bool(rows.any()):
            threat = Linf(float(certificate.radius[rows].min()))
            found = AutoAttack(threat).run(model, x[rows], certificate.prediction[rows])
            broken, attacks = broken + int(found.success.sum()), attacks + 1
    mean = float(certificate.radius[rows].mean()) if bool(rows.any()) else 0.0
    seconds = round(time.perf_counter() - started, 1)
    return Count(name, int(rows.sum()), attacks, broken, certificate.alpha, round(mean, 5), seconds)


def trained(objective: nn.Module, epochs: int = 15, **more: Any) -> nn.Module:
    network = SmallCNN(10, (1, 8, 8), generator=0)
    fit(network, load("digits", "train"), objective, epochs=epochs, batch_size=64, generator=0, **more)
    return network.eval()


def interval_trained() -> nn.Module:
    from vision_robust.certified.fast_certified_training import FastCertified, SmoothedEps, ibp_init_
    from vision_robust.models import mlp

    x, _ = digits()
    model = ibp_init_(mlp(10, (1, 8, 8), widths=(64, 64)), x[:1])
    goal = FastCertified(Linf(0.05), SmoothedEps(0.05, 0.04, 0.36))
    fit(model, load("digits", "train"), goal, epochs=25, batch_size=64, generator=0, clip_norm=10.0,
        optimiser=partial(torch.optim.Adam, lr=2e-3))  # fmt: skip
    return model.eval()


def cases(samples: int) -> dict[str, Callable[[], tuple[Any, nn.Module]]]:
    """Return name -> (certifier, the model that attacks see)."""

    def bounds(make: Callable[[nn.Module], Any]) -> tuple[Any, nn.Module]:
        model = interval_trained()
        return make(model), model

    def example(name: str) -> tuple[Any, nn.Module]:
        case = getattr(_examples, name)()
        return case.subject, case.model

    def plain() -> tuple[Any, nn.Module]:
        model = trained(GaussianNoise(0.25))
        return Smoothing(model, 0.25, n_samples=samples), model

    def denoised() -> tuple[Any, nn.Module]:
        from vision_robust.certified.denoised_smoothing import Denoised, DenoisingMSE, DnCNN

        model = Denoised(DnCNN(1, depth=4, width=16, generator=0), trained(Standard()))
        fit(model, load("digits", "train"), DenoisingMSE(0.25), epochs=5, batch_size=64, generator=0)
        return Smoothing(model.eval(), 0.25, n_samples=samples), model

    def dual() -> tuple[Any, nn.Module]:
        from vision_robust.certified.dual_randomized_smoothing import (
            DualClassifier,
            DualSmoothing,
            checkerboard_partition,
        )

        sides = (trained(GaussianNoise(0.18)), trained(GaussianNoise(0.18)))
        model = DualClassifier(*sides, checkerboard_partition(8, 8), feed="maxpool").eval()
        return DualSmoothing(model, 0.18, n_samples=samples), model

    return {
        "interval (fast-certified-training)": lambda: bounds(lambda m: IntervalBounds(m, Linf(0.05))),
        "crown (fast-certified-training)": lambda: bounds(lambda m: Crown(m, Linf(0.05), method="crown")),
        "crown L2 (fast-certified-training)": lambda: bounds(lambda m: Crown(m, L2(0.15), method="crown")),
        "lipschitz (fast-certified-training)": lambda: bounds(lambda m: LipschitzCertifier(m, "L2")),
        "rbf-prototype-network": lambda: example("rbf_prototype_network"),
        "crmt": lambda: example("crmt"),
        "smoothing": plain,
        "smoothing, denoised": denoised,
        "smoothing, dual": dual,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    x, y = (part[-arguments.n :] for part in digits())
    counts, failed = [], False
    for name, build in cases(arguments.samples).items():
        if arguments.only not in name:
            continue
        certifier, model = build()
        count = judge(name, certifier, model, x, y)
        allowed = int(stats.binom.ppf(0.9999, count.certified, count.alpha)) if count.alpha else 0
        failed |= count.broken > allowed or count.certified == 0
        counts.append({**vars(count), "allowed": allowed})
        print(
            f"{name:<40} {count.certified:>4} certified, mean radius {count.radius:.4f}, {count.attacks} attacks each: "
            f"{count.broken} broken (chance allows {allowed}), {count.seconds} s",
            flush=True,
        )
    if arguments.json:
        document = {"schema": "robust.benchmark/1", "n": arguments.n, "samples": arguments.samples, "counts": counts}
        arguments.json.write_text(json.dumps({**document, "versions": versions()}, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
