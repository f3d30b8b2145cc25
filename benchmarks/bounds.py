"""Bounds of networks beside what they could cost: two bare passes for intervals, auto_LiRPA for CROWN.

    python benchmarks/bounds.py [--json FILE] [--quick] [--peer-path CHECKOUT [--peer-deps FOLDER]]

* intervals: boxes of all logits in the dtype of the model against two forward passes of the same batch: the centre
  needs one, the radius another. Also the rigorous bounds against two passes in float64.
* CROWN: margins of a small convolutional network against auto_LiRPA (a checkout of it), method CROWN, K - 1
  specification rows, lower bounds only, float32; the peer's graph construction is not counted, nor is our tracing.
  The largest difference of the bounds either way stands beside the times.

One thread; alternated; medians of ratios of processor time, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from robust_core.certificates import Crown, IntervalBounds
from robust_core.certificates.bounds import trace
from robust_core.certificates.bounds.backward import Analysis, margin_rows
from robust_core.certificates.bounds.box import Rounding
from robust_core.certificates.bounds.region import Region
from robust_core.claim import versions
from robust_core.random import stream
from robust_core.threats import Linf


def convolutional(size: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def perceptron(size: int, channels: int) -> nn.Module:
    widths = [channels * size * size, 512, 512, 512]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10))


def resnet18(size: int, channels: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(ours: Callable[[], object], bare: Callable[[], object], repeats: int) -> float:
    ours(), bare()
    return statistics.median(seconds(ours) / seconds(bare) for _ in range(repeats))


def problem(build: Callable[[int, int], nn.Module], size: int, channels: int, batch: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(size, channels).eval()
    return model, torch.rand((batch, channels, size, size), generator=stream(0, 0, "images"))


@torch.no_grad()
def intervals(repeats: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for build, size, channels, batch in (
        (perceptron, 28, 1, 128),
        (convolutional, 32, 3, 64),
        (resnet18, 32, 3, 16),
    ):
        model, x = problem(build, size, channels, batch)
        plain = IntervalBounds(model, Linf(2 / 255))
        fast = ratio(lambda: plain.bounds(x), lambda: (model(x), model(x)), repeats)  # noqa: B023 - called at once
        wide, twin = x.double(), model.double()
        graph, rounding = trace(twin, wide, fixed=True), Rounding.of(torch.float32)
        eps = torch.full((batch,), 2 / 255, dtype=torch.float64)

        def rigorous() -> object:
            region = Region.of(Linf(2 / 255), wide, eps, rounding=rounding)  # noqa: B023
            return Analysis.start(graph, region, rounding).boxes[-1].lower  # noqa: B023

        slow = ratio(rigorous, lambda: (twin(wide), twin(wide)), repeats)  # noqa: B023
        rows.append(
            {
                "network": build.__name__,
                "batch": batch,
                "float32_over_two_passes": round(fast, 3),
                "rigorous_over_two_float64_passes": round(slow, 3),
                "target": 1.3,
            }
        )
        print(rows[-1], flush=True)
    return rows


def peer(path: Path, deps: Path | None) -> Callable[[nn.Module, Tensor, Tensor, float, str], tuple[float, Tensor]]:
    sys.path[:0] = [str(path), *([str(deps)] if deps else [])]
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # pyright: ignore[reportMissingImports]

    def run(model: nn.Module, x: Tensor, rows: Tensor, eps: float, method: str) -> tuple[float, Tensor]:
        bounded = BoundedModule(model, x)
        ball = PerturbationLpNorm(norm=float("inf"), x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))
        point = BoundedTensor(x, ball)
        started = time.process_time()
        lower, _ = bounded.compute_bounds(x=(point,), C=rows, method=method, bound_upper=False)
        return time.process_time() - started, lower

    return run


@torch.no_grad()
def crown(repeats: int, run: Callable[..., tuple[float, Tensor]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for size, channels, batch, eps in ((28, 1, 8, 0.02), (32, 3, 4, 2 / 255)):
        model, x = problem(convolutional, size, channels, batch)
        y = model(x).argmax(1)
        specification, others = margin_rows(y, 10, torch.float32)
        for theirs, ours in (("CROWN", "crown"), ("CROWN-IBP", "crown-ibp")):
            certifier = Crown(model, Linf(eps), ours)
            lower = certifier.margins(x, y).gather(1, others)
            looser = lower - IntervalBounds(model, Linf(eps)).margins(x, y).gather(1, others)
            ratios, peers = [], torch.empty(0)
            for _ in range(repeats):
                spent, peers = run(model, x, specification, eps, theirs)
                ratios.append(seconds(lambda: certifier.margins(x, y)) / spent)  # noqa: B023
            rows.append(
                {
                    "network": f"convolutional {channels}x{size}x{size}",
                    "batch": batch,
                    "method": theirs,
                    "time_over_peer": round(statistics.median(ratios), 3),
                    "target": 0.3,
                    "least_gain_over_peer": float((lower - peers).min()),
                    "greatest_gain_over_peer": float((lower - peers).max()),
                    "least_gain_over_intervals": float(looser.min()),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="three repeats")
    parser.add_argument("--peer-path", type=Path, help="a checkout of auto_LiRPA")
    parser.add_argument("--peer-deps", type=Path, help="a folder with the pure-Python packages that it imports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 9
    document: dict[str, object] = {"schema": "robust.benchmark/1", "intervals": intervals(repeats)}
    if options.peer_path is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            document["crown"] = crown(repeats, peer(options.peer_path, options.peer_deps))
    document["versions"] = versions()
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
