"""Classifiers of several modalities: what orthogonal fusion costs, and what its certificates prove for how long.

    python benchmarks/modalities.py [--json FILE] [--quick]

* fusion: forward and backward of orthogonal directions in one step of training at the paper's sizes, two modalities of
  512 features and batches of 64, against one linear layer on both, and against torch's own orthogonal parametrisation
  of the same weights (``torch.nn.utils.parametrizations.orthogonal``, its default map).
* certificates: mean L2 radius and time on the test digits cut into halves, of joint training and of CRMT: by the
  paper's bound, by core's constants of the whole input, by constants part by part, and by CROWN with a search over
  radii, the peer that a user would pick for small networks. The radii are all rigorous but the paper's, whose rounding
  is not accounted for. Preparation, which depends on the weights alone, is counted.

One thread; alternated; medians of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from robust_core.certificates import Crown, LipschitzCertifier
from robust_core.claim import versions
from robust_core.data import load
from robust_core.models import predict_logits
from robust_core.threats import L2
from robust_core.training import Stage, Standard, fit
from vision_robust.certified.crmt import (
    JointFusion,
    MultiModalCertifier,
    MultiModalClassifier,
    OrthogonalFusion,
    Packed,
    crmt_stages,
    encoder_for,
    multimodal_radius,
    score_lipschitz,
)

SHAPES = {"upper": (1, 4, 8), "lower": (1, 4, 8)}


class Parametrised(nn.Module):
    """The same head with torch's parametrisation."""

    def __init__(self, dims: list[int], n_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([orthogonal(nn.Linear(width, n_classes, bias=False)) for width in dims])
        self.weights = nn.Parameter(torch.full((len(dims), n_classes), 0.1))
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def forward(self, features: list[Tensor]) -> Tensor:
        total = self.bias
        for weight, head, part in zip(self.weights, self.heads, features, strict=True):
            total = total + weight * head(part)
        return total


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in found.items()}


def fusion(n_classes: int, repeats: int) -> dict[str, Any]:
    dims, generator = [512, 512], torch.Generator().manual_seed(0)
    features = [torch.randn(64, width, generator=generator) for width in dims]
    y = torch.randint(0, n_classes, (64,), generator=generator)
    heads: dict[str, nn.Module] = {
        "linear": JointFusion(dims, n_classes),
        "orthogonal": OrthogonalFusion(dims, n_classes),
        "parametrised": Parametrised(dims, n_classes),
    }

    def step(head: nn.Module) -> None:
        head.zero_grad()
        nn.functional.cross_entropy(head(features), y).backward()

    found = medians({name: partial(step, head) for name, head in heads.items()}, repeats)
    return {
        "classes": n_classes,
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in found.items()},
        "orthogonal_over_parametrised": round(found["orthogonal"] / found["parametrised"], 3),
    }


def trained(kind: str, epochs: int) -> Packed:
    encoders = {name: encoder_for(shape, 32, generator=i) for i, (name, shape) in enumerate(SHAPES.items())}
    made = (JointFusion if kind == "joint" else OrthogonalFusion)([32, 32], 10)
    view = Packed(MultiModalClassifier(encoders, made), SHAPES, dim=1)
    stages = crmt_stages(epochs=epochs, lr=0.05)
    if kind == "joint":
        stages = [Stage(Standard(), stages[0].optimiser, epochs)]
    fit(view, load("digits", split="train"), stages, batch_size=64)
    return view.eval()


def paper_radius(view: Packed, x: Tensor, y: Tensor) -> float:
    tau = score_lipschitz(view)
    right = predict_logits(view, x).argmax(1) == y
    with torch.no_grad():
        scores = [score.double() for score in view.scores(x)]
        radius = multimodal_radius(scores, y, view.fusion.weights.double(), tau, view.fusion.bias.double())
    return float(torch.where(right, radius, 0.0).mean())


def certificates(kind: str, epochs: int, repeats: int) -> list[dict[str, Any]]:
    view, test = trained(kind, epochs), load("digits", split="test")
    x, y = test.x, test.y
    ways: dict[str, Callable[[], float]] = {
        "the paper's bound": lambda: paper_radius(view, x, y),
        "whole input": lambda: LipschitzCertifier(view).certify(x, y).average_radius(y),
        "part by part": lambda: MultiModalCertifier(view).certify(x, y).average_radius(y),
        "CROWN": lambda: Crown(view, L2(2.0)).radius(x, y, steps=10).average_radius(y),
    }
    times = medians(ways, repeats)
    return [
        {"network": kind, "way": name, "radius": round(way(), 4), "seconds": round(times[name], 3)}
        for name, way in ways.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    epochs, repeats = (5, 1) if given.quick else (60, 3)
    document = {
        "schema": "robust.benchmark/1",
        "fusion": [fusion(n_classes, 4 * repeats) for n_classes in (31, 309)],
        "certificates": [row for kind in ("joint", "crmt") for row in certificates(kind, epochs, repeats)],
        "versions": versions(),
    }
    text = json.dumps(document, indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
