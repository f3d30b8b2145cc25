"""Counterfactuals: what a stability costs beside its bare passes, and a search of all rows beside a loop over rows.

    python benchmarks/counterfactuals.py [--json] [--quick] [--update FILE]

* stability: ``Meter`` (draws included) against the bare forward passes of the same points (draws included); alternated,
  medians of ratios of processor time.
* search: T-Rex:I of all queries at once against a plain loop over queries of the published algorithm, with the same
  network, draws per step, step size and number of steps; medians of ratios of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_core.models import frozen
from robust_core.random import SampleStreams
from vision_robust.explain.robust_counterfactuals import ClosestCounterfactual, Recourse, Score, TRexIterative
from vision_robust.models import SmallCNN

SIGMA, TAU, STEPS = 0.05, 0.999, 20


def mlp(n_features: int) -> nn.Module:
    layers = (nn.Linear(n_features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*layers).eval()


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def ratios(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> list[float]:
    ours(), theirs()
    found = []
    for _ in range(repeats):
        before, own, after = seconds(theirs), seconds(ours), seconds(theirs)
        found.append(own / ((before + after) / 2))
    return found


def stability_cost(name: str, model: nn.Module, x: Tensor, k: int, repeats: int) -> dict:
    """Return the ratio to the bare passes of ``k`` draws around each row."""
    recourse = Recourse(Score(model), sigma=SIGMA, n_samples=k)

    def ours() -> Tensor:
        return recourse.meter(x, "report")(x)[0]

    def bare() -> Tensor:
        with frozen(model), torch.no_grad():
            streams = SampleStreams(0, torch.zeros(1, dtype=torch.int64), "stability report")
            noise = SIGMA * streams.normal((k, *x.shape[1:]))[0]
            values = torch.cat([model(row + noise).softmax(1)[:, 1] for row in x])
            here = model(x).softmax(1)[:, 1]
            values = values.reshape(len(x), k)
            return (values - (here[:, None] - values).abs()).mean(1)

    torch.testing.assert_close(ours().float(), bare(), rtol=0, atol=1e-5)
    found = ratios(ours, bare, repeats)
    return {"model": name, "inputs": list(x.shape), "n_samples": k, "ratio": statistics.median(found), "ratios": found}


def loop(model: nn.Module, start: Tensor, k: int) -> Tensor:
    """Walk each row on its own, as the published algorithm does."""
    ends = []
    for row in start:
        x = row.clone()
        for _ in range(STEPS):
            leaf = x.clone().requires_grad_(True)
            values = model(leaf + SIGMA * torch.randn(k, *x.shape)).softmax(1)[:, 1]
            here = model(leaf[None]).softmax(1)[0, 1]
            stability = values.mean() - (values - here).abs().mean()
            (gradient,) = torch.autograd.grad(stability, leaf)
            x = (x + 0.01 * gradient / gradient.norm()).clamp(0, 1)
        ends.append(x)
    return torch.stack(ends)


def search_cost(name: str, model: nn.Module, x: Tensor, k: int, repeats: int) -> dict:
    """Return the ratio of T-Rex:I (20 steps that never arrive) to the loop, from the same starts."""
    recourse = Recourse(Score(model), sigma=SIGMA, n_samples=k)
    start = ClosestCounterfactual(recourse).generate(x)
    search = TRexIterative(recourse, TAU, n_steps=STEPS)
    model.requires_grad_(False)  # as the search freezes it
    found = ratios(
        lambda: search.improve(x, start.points, start.valid), lambda: loop(model, start.points[start.valid], k), repeats
    )
    n = int(start.valid.sum())
    return {"model": name, "queries": n, "n_samples": k, "ratio": statistics.median(found), "ratios": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few draws and repetitions")
    parser.add_argument("--update", type=Path, help="results file to write")
    args = parser.parse_args()
    k, repeats = (100, 2) if args.quick else (1000, 5)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(40, 30, generator=generator)
    images = torch.rand(8, 1, 28, 28, generator=generator)
    result = {
        "schema": "robust.benchmark/1",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "stability": [
            stability_cost("mlp 128-128", mlp(30), table, k, repeats),
            stability_cost("small-cnn", SmallCNN(2, (1, 28, 28)).eval(), images, k, repeats),
        ],
        "search": [search_cost("mlp 128-128", mlp(30), table[:16], n, min(repeats, 3)) for n in (100, k)],
    }
    text = json.dumps(result, indent=2)
    if args.update:
        args.update.write_text(text + "\n")
    if args.json:
        print(text)
        return
    for row in result["stability"]:
        print(f"{row['model']:<14} stability of {row['inputs'][0]} rows: {row['ratio']:.2f} times the bare passes")
    for row in result["search"]:
        print(
            f"{row['model']:<14} search of {row['queries']} rows, k {row['n_samples']}: {row['ratio']:.2f} times a loop"
        )


if __name__ == "__main__":
    main()
