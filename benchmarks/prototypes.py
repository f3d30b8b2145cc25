"""Certificates of prototype networks: nobody gets inside, and what they cost.

    python benchmarks/prototypes.py [--models 1000] [--json FILE] [--first-seed S]

Random networks of every distance, reasoning, dtype, with and without a domain, are attacked at the certified radius of
each input by gradient descent and by straight walks to and from every prototype, on stored tensors. The tight bound is
compared with the formula. Timings are of one thread, relative to a forward pass of the same inputs in the same run.
Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_core.attacks import PGD
from robust_core.claim import versions
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.threats import L2
from vision_robust.explain.rbf_prototype_network import CBC, CBCCertifier, closed_radius

SCALES = {
    "digits: 8x8, 20 components, 20 concepts": (10, (1, 8, 8), 20, 2, 512),
    "MNIST: 28x28, 20 components, 20 concepts": (10, (1, 28, 28), 20, 2, 512),
    "CIFAR-100: 3x32x32, 400 components, 200 concepts": (100, (3, 32, 32), 400, 2, 64),
}


def random_model(seed: int) -> tuple[CBC, Tensor]:
    generator = stream(seed, 0, "prototypes")
    d, k, c, m = (
        int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 9), (1, 9), (2, 6), (1, 4))
    )
    model = CBC(
        c, (d,), k, concepts_per_class=m, distance=("euclidean", "squared", "tangent")[seed % 3], subspace_dim=2,
        positive=seed // 3 % 3 == 0, generator=seed,
    ).eval().requires_grad_(False)  # fmt: skip
    model.components.points.copy_(torch.rand(k, d, generator=generator))
    model.components.scale.copy_(0.05 + 2 * torch.rand(k, generator=generator) ** 2)
    model.reasoning.logits.copy_(3 * torch.randn(model.reasoning.logits.shape, generator=generator))
    x = (1.4 * torch.rand(4, d, generator=generator) - 0.2).clamp(0, 1)
    return (model.double(), x.double()) if seed % 2 else (model, x)


def fuzz(seeds: range, counts: Counter[str], ratios: list[float]) -> None:
    for seed in seeds:
        model, x = random_model(seed)
        tight = CBCCertifier(model).certify(x)
        formula = closed_radius(model.double(), x.double(), tight.prediction, form="published")
        model = model.to(x.dtype)
        slack = 1e-9 if x.dtype == torch.float64 else 1e-2 * float(formula.abs().max()) + 1e-3  # rounding of float32
        counts["violations_order"] += int((tight.radius < formula - slack).sum())
        ratios += (tight.radius / formula)[(formula > 1e-3) & tight.certified].tolist()
        for domain in (None, (0.0, 1.0)):
            certificate = CBCCertifier(model, domain=domain).certify(x)
            for row in certificate.certified.nonzero().flatten().tolist():
                threat, one, label = L2(float(certificate.radius[row]), domain), x[row : row + 1], tight.prediction[row]
                found = PGD(threat, n_iter=20, loss="margin", n_restarts=2).run(model, one, label[None], generator=seed)
                ways = torch.cat([model.components.points - one, one - model.components.points])
                walked = threat.rescale(one.expand(len(ways), -1).contiguous(), ways, fill=True)
                inside = threat.contains(walked, one.expand_as(walked))
                moved = (predict_logits(model, walked).argmax(1) != label) & inside
                counts["attacked"] += 1
                counts["violations_attacked"] += int(bool(found.success.any()) or bool(moved.any()))
        counts["models"] += 1


def least(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def timings() -> dict[str, dict[str, float]]:
    found = {}
    for name, (c, shape, k, m, n) in SCALES.items():
        generator = stream(0, 0, name)
        x, y = torch.rand(n, *shape, generator=generator), torch.randint(c, (n,), generator=generator)
        x = torch.where(x < 0.3, 0.0, x)
        start = torch.rand(2 * k, *shape, generator=generator)
        model = CBC(c, shape, k, concepts_per_class=m).initialise(start, points="samples").eval().requires_grad_(False)
        forward = least(lambda m=model, x=x: predict_logits(m, x), 5)
        row = {"forward, ms for an input": 1e3 * forward / n}
        kinds = {"tight": CBCCertifier(model), "closed": CBCCertifier(model, "closed")}
        kinds["tight, domain"] = CBCCertifier(model, domain=(0.0, 1.0))
        for kind, certifier in kinds.items():
            row[f"{kind}, forward passes"] = least(lambda f=certifier, x=x: f.certify(x), 2) / forward
        row["robust loss, forward passes"] = least(lambda m=model, x=x, y=y: closed_radius(m, x, y), 3) / forward
        found[name] = {key: round(value, 4) for key, value in row.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    started, counts, ratios = time.perf_counter(), Counter[str](), list[float]()
    torch.set_num_threads(1)
    fuzz(range(options.first_seed, options.first_seed + options.models), counts, ratios)
    quantiles = torch.tensor(ratios).quantile(torch.tensor([0.0, 0.5, 0.9])).tolist()
    document = {
        "schema": "robust.benchmark.prototypes/1",
        "counts": {name: value for name, value in sorted(counts.items()) if not name.startswith("violations")},
        "violations": {name.removeprefix("violations_"): v for name, v in counts.items() if name.startswith("viol")},
        "tight over published": dict(zip(("least", "median", "90 %"), (round(q, 3) for q in quantiles), strict=True)),
        "timings": timings(),
        "first_seed": options.first_seed,
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
