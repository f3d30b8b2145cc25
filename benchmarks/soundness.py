"""Fuzz the certifiers of network bounds: nobody may get under a bound.

    python benchmarks/soundness.py [--nets 10000] [--json FILE] [--first-seed S]

For each random network (six shapes, float32 and float64), three threats and three radii, the least margin that each
certifier proves is compared with what corners, random points, gradient descent and a walk through neighbouring floats
reach *in the dtype of the model*. There is no tolerance: one attacked margin below a proven one is a violation.
Planted counter-examples, injected NaN and infinity, and the rounding attack at the largest certified radius are
counted apart. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_core.certificates import Crown, IntervalBounds, LipschitzCertifier
from robust_core.claim import versions
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.testing.networks import KINDS, planted_network, random_network
from robust_core.threats import L1, L2, Linf, Threat

THREATS: tuple[Threat, ...] = (Linf(0.05), L2(0.1), L1(0.2))
METHODS = ("crown", "crown-ibp", "alpha-crown")


def margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    true = logits.gather(1, y[:, None]).squeeze(1)
    return (true - logits.scatter(1, y[:, None], -math.inf).amax(1)).double()


def descend(model: nn.Module, threat: Threat, x: Tensor, y: Tensor, start: Tensor, steps: int = 8) -> Tensor:
    """Return (B, ...) the point of least margin met by projected gradient descent and a walk between floats."""
    best, point = start, start
    least = margin(model, start, y)
    for i in range(steps):
        leaf = point.detach().clone().requires_grad_(True)
        logits = model(leaf)
        true = logits.gather(1, y[:, None]).squeeze(1)
        gap = true - logits.scatter(1, y[:, None], -math.inf).amax(1)
        (gradient,) = torch.autograd.grad(gap.sum(), leaf)
        step = -2 * threat.eps / (i + 1) * threat.steepest(gradient)
        point = threat.project((leaf + step).detach(), x)
        if i >= steps - 2:
            point = threat.project(torch.nextafter(point, point + step), x)
        found = margin(model, point, y)
        better = (found < least).reshape(-1, *[1] * (x.ndim - 1))
        best, least = torch.where(better, point, best), torch.minimum(found, least)
    return best


def attacked(model: nn.Module, threat: Threat, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Return (B,) the least margin that four attacks reach."""
    noise = torch.randn((4, *x.shape), generator=stream(seed, 0, "fuzz"), dtype=torch.float64).to(x.dtype)
    least = torch.full((len(x),), math.inf, dtype=torch.float64)
    for one in noise[:2]:
        start = threat.project(x + one.sign() * threat.eps, x)
        least = torch.minimum(least, margin(model, start, y))
        least = torch.minimum(least, margin(model, descend(model, threat, x, y, start), y))
    for one in noise[2:]:
        least = torch.minimum(least, margin(model, threat.project(x + one * threat.eps, x), y))
    return least


def fuzz_bounds(seeds: range, counts: Counter[str]) -> None:
    for seed in seeds:
        kind = KINDS[seed % len(KINDS)]
        model, x = random_network(seed, kind, scale=0.6 + 0.2 * (seed // len(KINDS) % 4))
        if seed // len(KINDS) % 2:
            model, x = model.double(), x.double()
        y = predict_logits(model, x).argmax(1)
        base = THREATS[seed % 3]
        tested = (IntervalBounds(model, base), Crown(model, base, METHODS[seed // 3 % 3], n_iter=4))
        for factor in (0.1, 1.0, 3.0):
            threat = base.with_eps(base.eps * factor)
            reached = attacked(model, threat, x, y, seed)
            for certifier in tested:
                certifier.threat = threat
                result = certifier.certify(x)
                counts["bounds"] += len(x)
                counts["certified"] += int(result.certified.sum())
                counts["violations_bounds"] += int((~(result.details["margin"] <= reached)).sum())
        lipschitz = LipschitzCertifier(model, base.name).certify(x)
        for row in lipschitz.certified.nonzero().squeeze(1).tolist():
            ball = type(base)(float(lipschitz.radius[row]), None)
            reached = attacked(model, ball, x[row : row + 1], y[row : row + 1], seed)
            counts["lipschitz"] += 1
            counts["violations_lipschitz"] += int((reached <= 0).sum())
        counts["nets"] += 1


def fuzz_planted(seeds: range, counts: Counter[str]) -> None:
    for seed in seeds:
        model, x, _ = planted_network(seed, eps=0.1)
        for certifier in (IntervalBounds(model, Linf(0.1)), Crown(model, Linf(0.1), "alpha-crown")):
            counts["planted"] += 1
            counts["violations_planted"] += int(certifier.certify(x).certified.sum())


def fuzz_numbers(seeds: range, counts: Counter[str]) -> None:
    """NaN or infinity in one whole parameter: a sample whose logits are not finite is never certified."""
    for seed in seeds:
        for value in (math.nan, math.inf, -math.inf):
            model, x = random_network(seed, KINDS[seed % len(KINDS)])
            parameters = list(model.parameters())
            parameters[seed // len(KINDS) % len(parameters)].data.fill_(value)
            broken = ~torch.isfinite(predict_logits(model, x)).all(1)
            for certifier in (IntervalBounds(model, Linf(1e-6)), Crown(model, Linf(1e-6)), LipschitzCertifier(model)):
                counts["injections"] += 1
                counts["violations_injections"] += int((certifier.certify(x).certified & broken).sum())


def fuzz_rounding(seeds: range, counts: Counter[str]) -> None:
    """Affine networks in float32, whose bounds are exact up to rounding, at the largest certified radius."""
    for seed in seeds:
        generator = stream(seed, 0, "rounding")
        d = 20 + 8 * (seed % 5)
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Linear(d, 12), nn.Linear(12, 2)) if seed % 2 else nn.Linear(d, 2)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 10.0 ** (seed % 4))
        x = 0.3 + 0.4 * torch.rand((4, d), generator=generator)
        result = Crown(model, Linf(0.05)).radius(x, max_eps=0.3, steps=40)
        for row in result.certified.nonzero().squeeze(1).tolist():
            ball = Linf(float(result.radius[row]))
            here, y = x[row : row + 1], result.prediction[row : row + 1]
            counts["rounding"] += 1
            for repeats in (1, 5):
                many, labels = here.repeat(repeats, 1), y.repeat(repeats)
                worst = descend(model, ball, many, labels, many, steps=4)
                counts["violations_rounding"] += int((predict_logits(model, worst).argmax(1) != labels).any())
                counts["violations_rounding"] += int((margin(model, worst, labels) <= 0).any())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=120, help="random networks; the other counts follow from it")
    parser.add_argument("--first-seed", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    started, counts = time.perf_counter(), Counter[str]()
    first, n = options.first_seed, options.nets
    fuzz_bounds(range(first, first + n), counts)
    fuzz_planted(range(first, first + max(30, n // 50)), counts)
    fuzz_numbers(range(first, first + max(20, n // 50)), counts)
    fuzz_rounding(range(first, first + max(30, n // 10)), counts)
    document = {
        "schema": "robust.soundness/1",
        "counts": {name: value for name, value in sorted(counts.items()) if not name.startswith("violations")},
        "violations": {name.removeprefix("violations_"): v for name, v in counts.items() if name.startswith("viol")},
        "first_seed": first,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return int(any(document["violations"].values()))


if __name__ == "__main__":
    sys.exit(main())
