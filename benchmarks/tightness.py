"""Local tightness beside the way it is usually computed: K - 1 backward passes, one after the other.

    python benchmarks/tightness.py [--json FILE] [--quick]

The plain port takes the gradient of each margin by autograd in a loop over classes, and carries radii through layers
of |W| masked by the signs of pre-activations, in float64 as ours. Tracing and the float64 copy are counted on our
side. The largest relative difference of the two tightnesses stands beside the times.

One thread; alternated; medians of ratios of processor time, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.claim import versions
from robust_core.random import stream
from robust_core.threats import Linf
from vision_robust.certified.fast_certified_training import ibp_init_
from vision_robust.certified.ibp_tightness import local_tightness
from vision_robust.models import cnn7, mlp

EPS = 2 / 255


def layer_radius(layer: nn.Module, radius: Tensor, value: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
    if isinstance(layer, nn.Linear):
        return F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).abs()
        return radius * scale.reshape(1, -1, *[1] * (radius.ndim - 2))
    return radius * (value >= 0) if isinstance(layer, nn.ReLU) else layer(radius)


def port(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    model, x = copy.deepcopy(model).double().eval(), x.double()
    radius = ((x + EPS).clamp(max=1) - (x - EPS).clamp(min=0)) / 2
    point = x.clone().requires_grad_(True)
    logits = model(point)
    others = [[c for c in range(logits.shape[1]) if c != label] for label in y.tolist()]
    columns = torch.tensor(others)
    margins = logits.gather(1, y[:, None]) - logits.gather(1, columns)
    exact = []
    for column in range(columns.shape[1]):
        (gradient,) = torch.autograd.grad(margins[:, column].sum(), point, retain_graph=True)
        exact.append((gradient.abs() * radius).flatten(1).sum(1))
    with torch.no_grad():
        value = x
        for layer in model[:-1]:
            radius = layer_radius(layer, radius, value)
            value = layer(value)
        weight = model[-1].weight
        merged = (weight[y][:, None] - weight[columns]).abs()
        loose = (merged * radius.unsqueeze(1)).sum(2)
    return torch.stack(exact, 1) / loose


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(name: str, model: nn.Sequential, x: Tensor, y: Tensor, repeats: int) -> dict[str, object]:
    model = ibp_init_(model, x, generator=0).eval()

    def ours() -> Tensor:
        return local_tightness(model, x, y, threat=Linf(EPS))

    first, second = ours(), port(model, x, y)
    times = [(seconds(ours), seconds(lambda: port(model, x, y))) for _ in range(repeats)]
    return {
        "network": name,
        "batch": len(x),
        "classes": int(first.shape[1]) + 1,
        "ratio": statistics.median(a / b for a, b in times),
        "seconds": statistics.median(a for a, _ in times),
        "largest_relative_difference": float(((first - second) / second).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="three repeats")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 7
    random = stream(0, 0, "benchmark")
    rows = []
    for name, build, size, channels, classes, batch in (
        ("mlp of 4 x 64", mlp, 8, 1, 10, 256),
        ("cnn7 of width 16", cnn7, 32, 3, 10, 16),
        ("cnn7 of width 16", cnn7, 16, 3, 100, 8),
    ):
        options_ = {"width": 16, "linear": 128} if build is cnn7 else {}
        model = build(classes, (channels, size, size), **options_, generator=0)
        x = torch.rand(batch, channels, size, size, generator=random)
        y = torch.randint(classes, (batch,), generator=random)
        rows.append(compare(name, model, x, y, repeats))
        print(rows[-1], flush=True)
    if options.json is not None:
        document = {"schema": "robust.benchmark/1", "tightness": rows, "versions": versions()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
