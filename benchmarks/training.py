"""Training: what a step of ``fit`` costs beside the bare loop, and what bounds its memory.

    python benchmarks/training.py [--json] [--quick]

* overhead: ``fit(model, (x, y), Standard(), ...)`` against zero_grad, forward, cross entropy, backward, step on the
  same batches in the same order with the same optimiser; alternated, medians over steps of processor time (all
  threads), which a busy machine disturbs less than the clock on the wall. The final weights are compared too.
* checkpoint: the processor time of one checkpoint in units of a step.
* memory: highest resident set of a forked process, in excess of that before: over eight times as much data (made when
  asked for), and with the batch in one piece and in eight micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from robust_core.training import Standard, fit
from robust_core.training.batches import epoch_order


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8192, 10),
    )


def resnet18() -> nn.Module:
    from torchvision import models

    return models.resnet18(num_classes=10)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def bare_steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> list[float]:
    optimiser, times = sgd(model.parameters()), []
    model.train()
    last = time.process_time()
    for rows in epoch_order(0, 0, len(x)).split(batch_size):
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        now = time.process_time()
        times.append(now - last)
        last = now
    return times[1:]


def fit_steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int, **options) -> list[float]:
    marks: list[float] = []
    fit(
        model,
        (x, y),
        Standard(),
        epochs=1,
        optimiser=sgd,
        batch_size=batch_size,
        on_step=lambda state, loss: marks.append(time.process_time()),
        **options,
    )
    return [b - a for a, b in pairwise(marks)]


def overhead(name: str, make: Callable[[], nn.Module], n_steps: int, batch_size: int, repeats: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    n = n_steps * batch_size
    x, y = torch.rand(n, 3, 32, 32, generator=draw), torch.randint(10, (n,), generator=draw)
    start = make().state_dict()
    bare, fitted, equal = [], [], True
    for _ in range(repeats):
        models = [make(), make()]
        for model in models:
            model.load_state_dict(start)
        bare.append(statistics.median(bare_steps(models[0], x, y, batch_size)))
        fitted.append(statistics.median(fit_steps(models[1], x, y, batch_size)))
        states = [model.state_dict() for model in models]
        equal &= all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with tempfile.TemporaryDirectory() as folder:
        model = make()
        model.load_state_dict(start)
        saving = statistics.median(fit_steps(model, x, y, batch_size, checkpoint=folder, checkpoint_every=1))
    ratios = [b / a for a, b in zip(bare, fitted, strict=True)]
    return {
        "model": name,
        "inputs": [batch_size, 3, 32, 32],
        "steps": n_steps * repeats,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ms_per_step": 1000 * statistics.median(fitted),
        "overhead_ms": 1000 * (statistics.median(fitted) - statistics.median(bare)),
        "same_bits": equal,
        "checkpoint_in_steps": (saving - statistics.median(fitted)) / statistics.median(fitted),
    }


class Made(torch.utils.data.Dataset):
    """Samples that exist only when asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        if position >= self.n:
            raise IndexError
        draw = torch.Generator().manual_seed(position)
        return torch.rand(3, 32, 32, generator=draw), position % 10


def peak_mib(work: Callable[[], object]) -> float:
    """Return how much the highest resident set of a fork that does ``work`` exceeds that of one that does nothing."""
    peaks = []
    for task in (lambda: None, work):
        child = os.fork()
        if child == 0:
            task()
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss / 1024)
    return peaks[1] - peaks[0]


def memory() -> dict:
    def over(n: int) -> float:
        return peak_mib(lambda: fit(small_cnn(), Made(n), Standard(), epochs=1, batch_size=64, n_classes=10))

    def split(parts: int) -> float:
        return peak_mib(
            lambda: fit(resnet18(), Made(256), Standard(), epochs=1, batch_size=256, accumulate=parts, n_classes=10)
        )

    return {
        "small CNN, batch 64, MiB over 256 samples": over(256),
        "small CNN, batch 64, MiB over 2048 samples": over(2048),
        "ResNet-18, batch 256, MiB in one piece": split(1),
        "ResNet-18, batch 256, MiB in 8 micro-batches": split(8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    arguments = parser.parse_args()
    few = 3 if arguments.quick else 1
    torch.set_num_threads(1)  # forks and ratios want one thread
    resnet18()
    result = {
        "schema": "robust.benchmark/1",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory": memory(),  # first: later on, what earlier runs have freed would be used again
        "overhead": [
            overhead("small CNN", small_cnn, 60 // few, 64, 7 // few),
            overhead("ResNet-18", resnet18, 10 // few, 64, 5 // few),
        ],
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["overhead"]:
        cost = f"{row['overhead_ms']:.2f} ms of {row['ms_per_step']:.1f} ms"
        print(f"{row['model']}: {row['ratio']:.3f} x the bare loop ({cost}), same bits: {row['same_bits']}")
        print(f"  a checkpoint costs {row['checkpoint_in_steps']:.1f} steps")
    for name, value in result["memory"].items():
        print(f"{name}: {value:.0f}")


if __name__ == "__main__":
    main()
