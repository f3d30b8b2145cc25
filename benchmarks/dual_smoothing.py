"""Dual smoothing: what it costs beside two smoothings of half images, and what early stopping saves.

    python benchmarks/dual_smoothing.py [--json] [--quick] [--parts small resnet stopping] [--update FILE]

* small, resnet: ``DualSmoothing.certify`` against ``Smoothing.certify`` of the left side's network on its pixels and
  of the right side's on its own: the same networks, noise, samples and batch size; alternated, medians of ratios of
  processor time (all threads).
* stopping: samples that a radius, a grid of radii or a tolerance needs, against all of them, on two halves of digits
  trained here; the share of rows with the verdict of all samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from robust_core.certificates import Smoothing
from robust_core.data import load
from robust_core.training import NoiseConsistency, fit
from vision_robust.certified.dual_randomized_smoothing import (
    DualClassifier,
    DualSmoothing,
    EachSide,
    checkerboard_partition,
)
from vision_robust.models import SmallCNN, resnet18_32

ALPHA, SIGMA = 0.001, 0.25
PARTS = ("small", "resnet", "stopping")


def pooled_cnn() -> nn.Module:
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def overhead(name: str, network: nn.Module, shape: tuple[int, ...], feed: str, n: int, repeats: int) -> dict:
    """Return the ratio of processor times for eight images of ``shape``."""
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(8, dtype=torch.int64)
    dual = DualClassifier(network, copy.deepcopy(network), checkerboard_partition(*shape[1:]), feed=feed).eval()
    both = DualSmoothing(dual, SIGMA, n_samples=n, alpha=ALPHA, give_up=0)
    halves = [Smoothing(side.classifier, SIGMA, n_samples=n, alpha=ALPHA, give_up=0) for side in dual.sides]
    pixels = [side.kept(x) for side in dual.sides]

    def apart() -> float:
        started = time.process_time()
        for smoothing, kept in zip(halves, pixels, strict=True):
            smoothing.certify(kept, y)
        return time.process_time() - started

    apart()
    ratios, seconds = [], []
    for _ in range(repeats):
        first = apart()
        started = time.process_time()
        both.certify(x, y)
        ours = time.process_time() - started
        ratios.append(ours / ((first + apart()) / 2))
        seconds.append(ours)
    return {
        "model": name,
        "inputs": list(x.shape),
        "feed": feed,
        "n_samples": n,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "microseconds_per_sample": 1e6 * statistics.median(seconds) / (2 * n * len(x)),
    }


def stopping(n: int) -> dict:
    """Return samples drawn for each question, as a share of all."""
    network = SmallCNN(10, (1, 8, 8))
    dual = DualClassifier(network, copy.deepcopy(network), checkerboard_partition(8, 8), feed="maxpool")
    objective = EachSide(NoiseConsistency(SIGMA, copies=2, lam=5.0, entropy=0.25))
    fit(dual, load("digits", "train"), objective, epochs=15, batch_size=64)
    test = load("digits", "test").batch(range(100))
    smoothing = DualSmoothing(dual.eval(), SIGMA, n_samples=n, alpha=ALPHA)
    full = DualSmoothing(dual, SIGMA, n_samples=n, alpha=ALPHA, give_up=0).certify(test["x"])
    rows = [{"question": "all samples", "samples": float(full.details["n"].double().mean())}]
    for radius in (0.0, 0.25, 0.5, 0.75):
        found = smoothing.certify(test["x"], radius=radius)
        same = (found.certified == (full.certified & (full.radius >= radius))).double().mean()
        rows.append({"question": f"radius {radius}", **_drawn(found), "same_verdict": float(same)})
    grid = smoothing.certify(test["x"], radius=[0.25, 0.5, 0.75])
    rows.append({"question": "radii 0.25, 0.5, 0.75", **_drawn(grid)})
    tolerant = smoothing.certify(test["x"], tolerance=0.05)
    kept = tolerant.radius[full.certified] / full.radius[full.certified]
    rows.append({"question": "tolerance 0.05", **_drawn(tolerant), "mean_share_of_radius": float(kept.mean())})
    return {"n_samples": n, "rows": rows}


def _drawn(certificate) -> dict:
    drawn = certificate.details["n"].double()
    return {"samples": float(drawn.mean()), "median_samples": float(drawn.median())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few samples and repetitions")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--update", type=Path, help="results file in which to replace the parts that ran")
    args = parser.parse_args()
    n, repeats = (300, 2) if args.quick else (1000, 5)
    result: dict = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if "small" in args.parts:
        feeds = ("zero", "half", "maxpool")
        result["small"] = [overhead("two convolutions", pooled_cnn(), (1, 28, 28), feed, n, repeats) for feed in feeds]
    if "resnet" in args.parts:
        result["resnet"] = [overhead("resnet18-32", resnet18_32(10), (3, 32, 32), "maxpool", 16, 2)]
    if "stopping" in args.parts:
        result["stopping"] = stopping(1000 if args.quick else 5000)
    if args.update:
        before = json.loads(args.update.read_text()) if args.update.exists() else {}
        args.update.write_text(json.dumps({"schema": "robust.benchmark/1", **before, **result}, indent=2) + "\n")
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for row in (*result.get("small", ()), *result.get("resnet", ())):
        print(f"{row['model']:<18} {row['feed']:<8} {row['ratio']:.3f} times two half smoothings")
    for row in result.get("stopping", {}).get("rows", ()):
        print(f"{row['question']:<24} {row['samples']:>9.0f} samples a row (both halves)")


if __name__ == "__main__":
    main()
