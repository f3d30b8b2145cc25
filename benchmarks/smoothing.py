"""Randomized smoothing: what it costs beside bare forward passes, and what early stopping saves.

    python benchmarks/smoothing.py [--json] [--quick] [--parts memory overhead stopping] [--update FILE]

* overhead: ``Smoothing.certify`` against a loop that draws the same amount of noise with a native generator into one
  buffer and calls the model: same dtype, batch size and threads; alternated, medians of ratios
  of processor time (all threads), which a busy machine disturbs less than the clock on the wall.
* early stopping: a plain port of the sequential rules published with arXiv 2406.17830 (betting, union bound over
  geometric looks, four stages of Clopper-Pearson) and ours, all on the *same* noisy votes of a network trained here;
  samples until decided, and agreement with the verdict of all samples. The published betting rule claims at a wealth
  of 1 / (2 alpha), so that its own guarantee is 2 alpha over both sides; it is compared as published, and at 1 / alpha.
* memory: resident set before and after fifty times as many samples, and with a larger batch.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from robust_core.certificates import Smoothing
from robust_core.certificates.statistics import clopper_pearson_lower, clopper_pearson_upper
from robust_core.certificates.stopping import Evidence, RadiusPlan
from robust_core.certificates.votes import NoisyPasses, Segment, fine_chunk_sizes, hard_votes
from robust_core.random import stream

ALPHA, SIGMA = 0.001, 0.5


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


def bare(model: nn.Module, x: torch.Tensor, n: int, batch_size: int) -> float:
    """The same noise through the same model, and nothing else."""
    buffer = torch.empty(batch_size, *x.shape[1:])
    generator = stream(0, 0, "bare")
    started = time.process_time()
    with torch.no_grad():
        for row in x:
            left = n
            while left:
                part = buffer[: min(batch_size, left)]
                part.normal_(0.0, SIGMA, generator=generator).add_(row)
                model(part)
                left -= len(part)
    return time.process_time() - started


def overhead(name: str, model: nn.Module, x: torch.Tensor, n: int, batch_size: int, repeats: int) -> dict:
    y = torch.zeros(len(x), dtype=torch.int64)
    model.eval()
    smoothing = Smoothing(model, SIGMA, n_samples=n, alpha=ALPHA, batch_size=batch_size, give_up=0)
    bare(model, x[:1], min(n, 1000), batch_size)
    ratios, seconds = [], []
    for _ in range(repeats):
        first = bare(model, x, n, batch_size)
        started = time.process_time()
        smoothing.certify(x, y)
        ours = time.process_time() - started
        second = bare(model, x, n, batch_size)
        ratios.append(ours / ((first + second) / 2))
        seconds.append(ours)
    return {
        "model": name,
        "inputs": list(x.shape),
        "n_samples": n,
        "batch_size": batch_size,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "microseconds_per_sample": 1e6 * statistics.median(seconds) / (n * len(x)),
    }


def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network trained with noise on the bundled 8 x 8 digits, and its test images."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(len(x))
        x, y = x[order], y[order]
        model = small_cnn()
        model(x[:2])
        optimiser = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(25):
            for rows in torch.randperm(1400).split(100):
                loss = nn.functional.cross_entropy(model(x[rows] + SIGMA * torch.randn_like(x[rows])), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval(), x[1400:], y[1400:]


def vote_paths(model: nn.Module, x: torch.Tensor, y: torch.Tensor, n: int) -> np.ndarray:
    """(B, n) running counts of votes for the label, in the order in which certify draws them."""
    passes = NoisyPasses(model, x, torch.arange(len(x)), seed=0, sigma=SIGMA, batch_size=1024)
    paths = np.zeros((len(x), n), dtype=bool)
    work = [Segment(row, c, size) for row in range(len(x)) for c, size in enumerate(fine_chunk_sizes(n))]
    at = np.zeros(len(x), dtype=int)
    with torch.no_grad():
        for segments, rows, logits in passes.run("smoothing/sequential", iter(work)):
            right = (hard_votes(logits) == y[rows]).numpy()
            start = 0
            for row, _, size in segments:
                paths[row, at[row] : at[row] + size] = right[start : start + size]
                at[row] += size
                start += size
    return np.cumsum(paths, axis=1, dtype=np.int32)


def betting_boundary(p: float, level: float, n: int) -> np.ndarray:
    """Port of the published betting rule: counts at which the wealth against ``p`` exceeds ``level``."""
    from scipy.special import betaln, xlog1py, xlogy

    size = np.arange(1, n + 1, dtype=np.float64)
    low, high = np.ceil(p * size) - 1, size + 1
    for _ in range(40):
        middle = np.floor((low + high) / 2)
        wealth = betaln(middle + 0.5, size - middle + 0.5) - math.log(math.pi)
        wealth -= xlogy(middle, p) + xlog1py(size - middle, -p)
        enough = wealth > math.log(level)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.minimum.accumulate(high[::-1])[::-1]


def union_boundary(p: float, alpha: float, n: int) -> np.ndarray:
    """Port of the published union bound: looks at 1.1**k, the k-th with the budget 5 alpha / ((k + 4)(k + 5))."""
    limit, k = np.full(n, 2 * n, dtype=np.int64), 11
    for size in range(1, n + 1):
        if size > 1.1**k:
            k += 1
            share = 5 * alpha / ((k - 7) * (k - 6))
            limit[size - 1] = binom.ppf(1 - share, size, p) + 1
    return np.minimum.accumulate(limit[::-1])[::-1]


def two_sided(path: np.ndarray, upper: np.ndarray, failures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples, verdict 1 / 0 / -1) of a rule that looks after every sample."""
    n = path.shape[1]
    size = np.arange(1, n + 1)
    above, below = path >= upper, (size - path) >= failures
    first = [np.where(hit.any(1), hit.argmax(1), n) for hit in (above, below)]
    stop = np.minimum(*first)
    verdict = np.where(stop == n, -1, np.where(first[0] < first[1], 1, 0))
    return np.minimum(stop + 1, n), verdict


def stages(path: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Port of the published four stages, each with alpha / 4."""
    n = path.shape[1]
    looks = [100, 1000, 10_000, n]
    samples, verdict = np.full(len(path), n), np.full(len(path), -1)
    for look in looks:
        count = path[:, look - 1]
        low = clopper_pearson_lower(count, look, ALPHA / 4)
        high = clopper_pearson_upper(count, look, ALPHA / 4)
        fresh = (verdict == -1) & ((low > p) | (high < p))
        samples[fresh], verdict[fresh] = look, np.where(low > p, 1, 0)[fresh]
    return samples, verdict


def ours(path: np.ndarray, r: float) -> tuple[np.ndarray, np.ndarray]:
    plan = RadiusPlan(path.shape[1], ALPHA, [r], SIGMA, 0.001)
    b = len(path)
    zeros = [np.zeros(b, dtype=np.int64) for _ in range(3)]
    evidence = Evidence(zeros[0], zeros[1], np.zeros(b), zeros[2], np.zeros(b, dtype=bool))
    samples = np.zeros(b, dtype=np.int64)
    for i, look in enumerate(plan.looks):
        rows = np.flatnonzero(~evidence.done)
        evidence.total[rows] = path[rows, look - 1]
        samples[rows] = look
        plan.look(i, rows, evidence)
    return samples, (evidence.level > 0).astype(int)


def stopping(n_images: int, n: int) -> dict:
    model, x, y = digits()
    x, y = x[:n_images], y[:n_images]
    path = vote_paths(model, x, y, n)
    out: dict = {"images": n_images, "n_samples": n, "sigma": SIGMA, "alpha": ALPHA, "radii": []}
    for r in (0.1, 0.25, 0.5, 0.75, 1.0):
        p = float(ndtr(r / SIGMA))
        rules = {
            "published betting, wealth 1/(2 alpha)": two_sided(
                path, betting_boundary(p, 0.5 / ALPHA, n), betting_boundary(1 - p, 0.5 / ALPHA, n)
            ),
            "published betting, wealth 1/alpha": two_sided(
                path, betting_boundary(p, 1 / ALPHA, n), betting_boundary(1 - p, 1 / ALPHA, n)
            ),
            "published union bound": two_sided(path, union_boundary(p, ALPHA, n), union_boundary(1 - p, ALPHA, n)),
            "published four stages": stages(path, p),
            "ours": ours(path, r),
        }
        fixed = np.asarray(clopper_pearson_lower(path[:, -1], n, ALPHA)) >= p
        row: dict = {"radius": r, "certified_by_all_samples": float(fixed.mean()), "rules": {}}
        for name, (samples, verdict) in rules.items():
            row["rules"][name] = {
                "mean_samples": float(samples.mean()),
                "median_samples": float(np.median(samples)),
                "saving": n / float(samples.mean()),
                "same_verdict": float(((verdict == 1) == fixed).mean()),
                "certified": float((verdict == 1).mean()),
            }
        out["radii"].append(row)
    started = time.perf_counter()
    actual = Smoothing(model, SIGMA, n_samples=n, alpha=ALPHA).certify(x, y, radius=0.5)
    out["certify_at_0.5"] = {
        "seconds": time.perf_counter() - started,
        "mean_samples": float(actual.details["n"].double().mean()),
        "forwards": actual.cost["forwards"],
    }
    return out


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict:
    model, x = small_cnn(), torch.rand(2, 1, 28, 28)
    model(x)
    figures = {}
    for name, n, batch_size in (("n=2,000", 2000, 256), ("n=100,000", 100_000, 256), ("batch 4,096", 10_000, 4096)):
        Smoothing(model.eval(), SIGMA, n_samples=n, batch_size=batch_size).certify(x)
        figures[f"peak resident MB after {name}"] = resident()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parts = ["memory", "overhead", "stopping"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--update", type=Path, help="write the parts that were run into this JSON file")
    arguments = parser.parse_args()
    tenth = 10 if arguments.quick else 1
    small, wide = small_cnn(), small_cnn()
    small(torch.zeros(1, 1, 8, 8)), wide(torch.zeros(1, 1, 28, 28))
    from torchvision.models import resnet18

    result = {"schema": "robust.benchmark/1", "torch": torch.__version__, "threads": torch.get_num_threads()}
    if arguments.update and arguments.update.exists():
        result |= json.loads(arguments.update.read_text())
    if "memory" in arguments.parts:
        result["memory"] = memory()
    if "overhead" in arguments.parts:
        result["overhead"] = [
            overhead("small CNN", small, torch.rand(8, 1, 8, 8), 10_000 // tenth, 256, 5),
            overhead("small CNN", small, torch.rand(8, 1, 8, 8), 1000, 256, 5),
            overhead("small CNN", wide, torch.rand(1, 1, 28, 28), 5000 // tenth, 256, 3),
            overhead("ResNet-18", resnet18(num_classes=10), torch.rand(2, 3, 32, 32), 1024 // tenth, 256, 3),
        ]
    if "stopping" in arguments.parts:
        result["stopping"] = stopping(100 // tenth, 100_000 // tenth)
    if arguments.update:
        arguments.update.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for row in result.get("overhead", []):
        print(f"{row['model']} {row['inputs']} n={row['n_samples']}: {row['ratio']:.3f} x bare passes")
    for row in result.get("stopping", {"radii": []})["radii"]:
        print(f"radius {row['radius']}: certified {row['certified_by_all_samples']:.2f}")
        for name, rule in row["rules"].items():
            figures = f"{rule['mean_samples']:10.0f} samples  {rule['saving']:7.1f} x"
            print(f"  {name:40s} {figures}  same verdict {rule['same_verdict']:.2f}")
    print(result.get("memory", ""))


if __name__ == "__main__":
    main()
