"""Training by queries: what a step costs beside its bare queries, and how many queries that is.

    python benchmarks/zeroth_order.py [--json] [--quick]

* step: ``QueryStability`` (noise, denoiser and encoder forward, probes, the losses of all answers, backward, Adam)
  against passing as many ready-made points through decoder and classifier in batches of the same size, for random
  directions after drawing and normalising as many; alternated, medians of processor time.
* parts: the same against bare queries plus a bare pass forward and backward through what is trained, which no method of
  this kind can spare.
* queries: counted by the black box, against q + 1, d + 1 or 2 d.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vision_robust.certified.zo_ae_ds import (
    AutoencodedDenoised,
    BlackBox,
    Denoised,
    DnCNN,
    QueryStability,
    conv_autoencoder,
    paper_autoencoder,
)
from vision_robust.models import SmallCNN

BATCH = 1024


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int]
    latent: int
    estimator: str
    n_directions: int
    n: int
    central: bool = True


CASES = (
    Case("28x28, coordinates of 24", (1, 28, 28), 24, "coordinates", 0, 64),
    Case("28x28, 48 directions of 24", (1, 28, 28), 24, "random", 48, 64),
    Case("28x28, 48 directions of 784", (1, 28, 28), 0, "random", 48, 64),
    Case("3x32x32, coordinates of 192", (3, 32, 32), 192, "coordinates", 0, 16),
    Case("3x32x32, 192 directions of 3072", (3, 32, 32), 0, "random", 192, 16),
)


def build(case: Case) -> tuple[Denoised, QueryStability]:
    box = BlackBox(SmallCNN(10, case.shape, width=32, generator=0), scores="logits")
    denoiser = DnCNN(case.shape[0], depth=5, width=16, generator=0)
    objective = QueryStability(
        0.25, estimator=case.estimator, n_directions=case.n_directions or 1, central=case.central, batch_size=BATCH
    )
    if not case.latent:
        return Denoised(denoiser, box), objective
    wide = case.shape == (3, 32, 32)
    autoencoder = paper_autoencoder("cifar10") if wide else conv_autoencoder(case.shape, case.latent, width=16)
    return AutoencodedDenoised(denoiser, autoencoder, box), objective


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(case: Case, repeats: int) -> dict:
    model, objective = build(case)
    model.train()
    x = torch.rand(case.n, *case.shape, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "y": torch.zeros(case.n, dtype=torch.int64), "index": torch.arange(case.n)}
    objective.setup(model, case.n, 10)
    optimiser = torch.optim.Adam(list(objective.trainable(model)), lr=1e-4)
    with torch.no_grad():
        z = model.front(x)
    size = z[0].numel()
    each = objective.queries_per_sample(size)
    points = z.repeat_interleave(each, 0)[:BATCH]
    total = case.n * each
    rest = total % BATCH

    def step() -> None:
        optimiser.zero_grad()
        objective(model, batch).total.backward()
        optimiser.step()

    def queries() -> None:
        with torch.no_grad():
            if case.estimator == "random":
                draw = torch.Generator().manual_seed(0)
                for _ in range(case.n):
                    u = torch.empty(case.n_directions, size).normal_(generator=draw)
                    u.div_(u.norm(dim=1, keepdim=True))
            for _ in range(total // BATCH):
                model.back(points)
            if rest:
                model.back(points[:rest])

    def trained() -> None:
        optimiser.zero_grad()
        (model.front(x) * z).sum().backward()
        optimiser.step()

    box = model.get_submodule("classifier")
    assert isinstance(box, BlackBox)
    step()  # the images' own answers, once
    before = box.queries
    step()
    counted = box.queries - before
    rows = [(timed(step), timed(queries), timed(trained)) for _ in range(repeats)]
    steps, bare, front = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "case": case.name,
        "images": case.n,
        "queries_each": each,
        "queries_counted": counted,
        "queries_due": total,
        "ms_step": 1000 * steps,
        "ms_queries": 1000 * bare,
        "ms_trained_part": 1000 * front,
        "ratio_to_queries": statistics.median(s / q for s, q, _ in rows),
        "ratio_to_parts": statistics.median(s / (q + f) for s, q, f in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, 3 if options.quick else 9) for case in CASES]
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    if options.json:
        print(json.dumps({"schema": "robust.benchmark/1", "name": "zeroth-order", **machine, "rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['case']:34} {row['ms_step']:8.1f} ms a step, {row['ratio_to_queries']:.3f} x its queries, "
            f"{row['ratio_to_parts']:.3f} x all parts; {row['queries_counted']} of {row['queries_due']} queries"
        )


if __name__ == "__main__":
    main()
