"""Point clouds: corruptions beside plain numpy loops, sweeps a second, overlap of rotated boxes, in one run.

The references are what one writes from the papers' rules with numpy, cloud by cloud, as the public code does; those of
free-form and radial deformations are the loops of the libraries that it calls. ``occlusion`` and ``lidar`` have none,
because there they need a mesh and a display. Corruptions: one thread on both sides, 1,024 float32 points a cloud,
severity 3. Boxes: the reference clips polygons in Python. Runs alternate; the figures are medians of processor time,
which other programs of the machine disturb less than the clock; sweeps a second are by the clock.

Training: one step of ``harden`` beside the bare passes that it needs on the same network and batch: forward and
backward on clean clouds, on disturbed ones where the method has them, the attacker's passes on its share of the batch,
the teacher's where its outputs are not kept, and the optimiser's step. Noise, sums of losses, the loop and its checks
are what comes on top.

    python benchmarks/lidar.py --out benchmarks/results/lidar.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.special import comb

from robust_core.random import SampleStreams
from vision_robust.lidar.boxes import bev_corners, iou
from vision_robust.lidar.corruptions import corrupt_batch

RNG = np.random.RandomState(0)  # the generator that the public code uses
Array = np.ndarray
LEVEL = 2


def sphere(p: Array) -> Array:
    p = p - p.mean(0)
    return p / np.sqrt((p**2).sum(1)).max()


def cube(p: Array) -> Array:
    p = p - (p.max(0) + p.min(0)) / 2
    return p * (2 / (p.max(0) - p.min(0)).max())


def shuffled(p: Array) -> Array:
    return np.take_along_axis(p, RNG.rand(len(p), 1).argsort(0), 0)


def cluster_sizes(total: int) -> list[int]:
    n = RNG.randint(1, 8)
    owner = RNG.randint(n, size=total)
    return [int(sum(owner == i)) for i in range(n)]


def euler(angles: Array) -> tuple[Array, Array, Array]:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    return (
        np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]),
        np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]),
        np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]),
    )


def c_scale(p: Array) -> Array:
    return sphere((p * RNG.uniform(1 / 1.8, 1.8, 3)).astype("float32"))


def c_jitter(p: Array) -> Array:
    return p + 0.03 * RNG.randn(*p.shape)


def c_rotate(p: Array) -> Array:
    x, y, z = euler(RNG.uniform(-math.pi / 10, math.pi / 10, 3))
    return p @ (z @ (y @ x))


def c_drop_global(p: Array) -> Array:
    return shuffled(p)[: len(p) // 2]


def c_drop_local(p: Array) -> Array:
    left = len(p)
    for k in cluster_sizes(300):
        p = shuffled(p)
        order = ((p - p[:1]) ** 2).sum(1, keepdims=True).argsort(0)[::-1]
        left -= k
        p = np.take_along_axis(p, order, 0)[:left]
    return p


def c_add_global(p: Array) -> Array:
    r, height, turn = RNG.uniform(size=(30, 1)) ** (1 / 3), RNG.uniform(-1, 1, (30, 1)), RNG.uniform(0, 7, (30, 1))
    theta = np.arccos(height)
    new = [r * np.sin(theta) * np.cos(turn), r * np.sin(theta) * np.sin(turn), r * np.cos(theta)]
    return np.concatenate([p, np.concatenate(new, 1)])


def c_add_local(p: Array) -> Array:
    p, added = shuffled(p), []
    for i, k in enumerate(cluster_sizes(300)):
        added.append(p[i] + RNG.uniform(0.075, 0.125) * RNG.randn(k, 3))
    new = np.concatenate(added)
    far = (new**2).sum(1, keepdims=True).repeat(3, 1)
    new[far > 1] = new[far > 1] / far[far > 1]
    return np.concatenate([p, new])


def u_uniform(p: Array) -> Array:
    return cube((p + RNG.uniform(-0.03, 0.03, p.shape)).astype("float32"))


def u_gaussian(p: Array) -> Array:
    return np.clip((p + RNG.normal(size=p.shape) * 0.02).astype("float32"), -1, 1)


def u_background(p: Array) -> Array:
    return cube(np.concatenate([p, RNG.uniform(-1, 1, (len(p) // 35, 3))]).astype("float32"))


def u_impulse(p: Array) -> Array:
    p, k = p.copy(), len(p) // 20
    p[RNG.choice(len(p), k, replace=False)] += RNG.choice([-1, 1], size=(k, 3)) * 0.1
    return cube(p)


def u_upsampling(p: Array) -> Array:
    k = len(p) // 3
    added = p[RNG.choice(len(p), k, replace=False)] + RNG.uniform(-0.05, 0.05, (k, 3))
    return cube(np.concatenate([p, added]).astype("float32"))


def u_rotation(p: Array) -> Array:
    angles = np.array([RNG.uniform(5, 10) * RNG.choice([-1, 1]) * np.pi / 180 for _ in range(3)])
    for matrix in euler(angles):
        p = np.matmul(p, matrix)
    return cube(p.astype("float32"))


def u_shear(p: Array) -> Array:
    b, d, e, f = (RNG.uniform(0.1, 0.2) * RNG.choice([-1, 1]) for _ in range(4))
    return cube(np.matmul(p, np.array([[1, 0, b], [d, 1, e], [f, 0, 1]])).astype("float32"))


def u_ffd(p: Array) -> Array:
    move = RNG.rand(3, 5, 5, 5) * 0.6 - 0.3
    s = (p + 1) / 2
    basis = np.array([[comb(4, i) * s[:, a] ** i * (1 - s[:, a]) ** (4 - i) for i in range(5)] for a in range(3)])
    shift = np.zeros_like(p)
    for i in range(5):
        for j in range(5):
            for k in range(5):
                weight = basis[0, i] * basis[1, j] * basis[2, k]
                for a in range(3):
                    shift[:, a] += weight * move[a, i, j, k]
    return cube(p + 2 * shift)


def radial(p: Array, kernel: Callable[[Array], Array]) -> Array:
    line = np.linspace(-1, 1, 5)
    grid = np.stack(np.meshgrid(line, line, line), -1).reshape(-1, 3)
    a, g = RNG.uniform(-np.pi, np.pi, 125), RNG.uniform(-np.pi, np.pi, 125)
    moved = grid + 0.075 * np.stack([np.cos(a) * np.sin(g), np.sin(a) * np.sin(g), np.cos(g)], 1)
    system = np.zeros((129, 129))
    system[:125, :125] = kernel(cdist(grid, grid))
    system[:125, 125], system[125, :125] = 1, 1
    system[:125, 126:], system[126:, :125] = grid, grid.T
    weights = np.linalg.solve(system, np.concatenate([moved, np.zeros((4, 3))]))
    return cube(np.hstack([kernel(cdist(p, grid)), np.ones((len(p), 1)), p]) @ weights).astype("float32")


def u_rbf(p: Array) -> Array:
    return radial(p, lambda r: np.sqrt(r * r + 0.25))


def u_rbf_inv(p: Array) -> Array:
    return radial(p, lambda r: 1 / np.sqrt(r * r + 0.25))


def region(p: Array, k: int) -> Array:
    distance = ((p - p[RNG.choice(len(p), 1)]) ** 2).sum(1, keepdims=True)
    return np.argpartition(distance, k, axis=0)[:k].squeeze()


def u_cutout(p: Array) -> Array:
    for _ in range(5):
        p = np.delete(p, region(p, 30), axis=0)
    return p


def u_density_dec(p: Array) -> Array:
    for _ in range(3):
        p = np.delete(p, region(p, 100)[RNG.choice(100, 75, replace=False)], axis=0)
    return p


def u_density_inc(p: Array) -> Array:
    kept = []
    for _ in range(3):
        at = region(p, 50)
        kept.append(p[at])
        p = np.delete(p, at, axis=0)
    return np.concatenate([*kept, p[RNG.choice(len(p), 512 - 150)]])


REFERENCES = {f"modelnet-c/{name[2:]}": f for name, f in globals().copy().items() if name.startswith("c_")}
REFERENCES |= {f"modelnet40-c/{name[2:]}": f for name, f in globals().copy().items() if name.startswith("u_")}


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    function()
    return clock() - start


def corruption(name: str, repeats: int, n_ours: int = 1000, n_theirs: int = 50) -> dict[str, float]:
    x = RNG.normal(size=(n_ours, 1024, 3))
    x = (x / np.sqrt((x**2).sum(2)).max(1)[:, None, None]).astype("float32")
    tensor, few = torch.from_numpy(x), x[:n_theirs]
    corrupt_batch(tensor[:40], name, LEVEL + 1)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: corrupt_batch(tensor, name, LEVEL + 1)) / n_ours)
        theirs.append(seconds(lambda: np.array([len(REFERENCES[name](p)) for p in few])) / n_theirs)
    return {
        "ours_ms_for_1000": round(1e6 * median(ours), 2),
        "reference_ms_for_1000": round(1e6 * median(theirs), 2),
        "ratio": round(median(t / o for t, o in zip(theirs, ours, strict=True)), 2),
    }


def floors(repeats: int) -> dict[str, float]:
    """What nobody can do without: the numbers of the noise alone, and one pass over the coordinates."""
    x, streams = torch.rand(1000, 1024, 3), SampleStreams(0, torch.arange(1000), "bare")
    return {
        "copy_ms_for_1000": round(1e3 * median(seconds(x.clone) for _ in range(repeats)), 2),
        "normal_draws_ms_for_1000": round(
            1e3 * median(seconds(lambda: streams.coarse_normal((1024, 3))) for _ in range(repeats)), 2
        ),
        "numpy_normal_draws_ms_for_1000": round(
            1e6 / 100 * median(seconds(lambda: [RNG.randn(1024, 3) for _ in range(100)]) for _ in range(repeats)), 2
        ),
    }


def clipped(a: Array, b: Array) -> float:
    polygon = [tuple(p) for p in a]
    for (x0, y0), (x1, y1) in zip(b, np.roll(b, -1, 0), strict=True):
        sides = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in polygon]
        kept = []
        for (p, s), (q, t) in zip(
            zip(polygon, sides, strict=True), zip(polygon[1:] + polygon[:1], sides[1:] + sides[:1], strict=True),
            strict=True,
        ):  # fmt: skip
            if s >= 0:
                kept.append(p)
            if (s >= 0) != (t >= 0):
                kept.append((p[0] + s / (s - t) * (q[0] - p[0]), p[1] + s / (s - t) * (q[1] - p[1])))
        polygon = kept
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def boxes(repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    size = np.tile([3.9, 1.6, 1.56], (1000, 1))
    spread = torch.from_numpy(np.c_[rng.uniform(-70, 70, (1000, 2)), rng.normal(0, 0.1, 1000), size,
                                    rng.uniform(-3, 3, 1000)]).float()  # fmt: skip
    dense = spread.clone()
    dense[:, :2] /= 50
    few = bev_corners(spread[:60]).numpy()
    ours = median(seconds(lambda: iou(spread, spread)) for _ in range(repeats))
    crowded = median(seconds(lambda: iou(dense, dense)) for _ in range(3))
    theirs = seconds(lambda: [clipped(a, b) for a in few for b in few]) * 1e6 / 3600
    return {"scene_ms": round(1e3 * ours, 2), "all_overlapping_ms": round(1e3 * crowded, 1),
            "python_clipping_ms": round(1e3 * theirs, 1), "ratio": round(theirs / ours, 1)}  # fmt: skip


def sweeps(repeats: int) -> dict[str, float]:
    from vision_robust.lidar.simulator import Drive, LidarSpec

    spec = LidarSpec(n_beams=64, azimuth_step_deg=0.5)
    drive = Drive(200, spec=spec, generator=0)
    drive[0]
    took = [seconds(lambda i=i: drive[i], time.perf_counter) for i in range(8 * repeats)]
    busy = median(seconds(lambda i=i: drive[i]) for i in range(8 * repeats))
    return {
        "processor_ms": round(1e3 * busy, 1),
        "sweeps_per_s_median": round(1 / median(took), 1),
        "sweeps_per_s_best": round(1 / min(took), 1),
    }


def bare_steps(model: Any, teacher: Any, columns: dict[str, Any], task: Any, method: str, batch: int, n: int) -> list:
    """Return the seconds of ``n`` steps that take the passes of a method and nothing else."""
    optimiser, took = torch.optim.Adam(model.parameters(), lr=1e-3), []
    everyone, quarter = list(model.parameters()), batch // 4
    for i in range(n + 2):
        at = torch.arange(i * batch, (i + 1) * batch) % len(columns["x"])
        part = {name: column[at] for name, column in columns.items()}
        x, mask = part["x"], part["mask"]
        cut = {name: column[:quarter] for name, column in part.items()}
        model.train()
        start = time.process_time()
        optimiser.zero_grad(set_to_none=True)
        loss = task.loss(model(x, mask), part).mean()
        if method == "intact":
            model.eval()
            for p in everyone:
                p.requires_grad_(False)
            for _ in range(3):
                points = cut["x"].clone().requires_grad_(True)
                torch.autograd.grad(task.gap(model(points, cut["mask"]), cut).sum(), points)
            for p in everyone:
                p.requires_grad_(True)
            model.train()
        if method != "standard":
            outputs = model(x, mask)
            loss = 0.5 * loss + 0.5 * task.loss(outputs, part).mean()
            if method == "intact":
                with torch.no_grad():
                    said = part["teacher"] if teacher is None else teacher(x, mask)
                loss = loss + 0.1 * task.distance(outputs, said, 1.0).mean()
        loss.backward()
        optimiser.step()
        took.append(time.process_time() - start)
    return took[2:]


def our_steps(make: Any, columns: dict[str, Any], task: Any, method: str, batch: int, n: int, **options: Any) -> list:
    """Return the seconds of ``n`` steps of ``harden``, from one report of progress to the next."""
    from robust_core.random import reseeded
    from vision_robust.lidar.intact import harden

    class Enough(Exception):  # noqa: N818 - a way out, not an error
        pass

    stamps: list[float] = []

    def tell(phase: str, done: int, total: int) -> None:
        stamps.extend([time.process_time()] if phase == method else [])
        if len(stamps) > n + 2:
            raise Enough

    with reseeded(0):
        student, teacher = make(), make()
    try:
        harden(student, columns, method, task=task(student), teacher=teacher, epochs=10_000, batch_size=batch,
               optimiser=partial(torch.optim.Adam, lr=1e-3), generator=0, on_step=tell, **options)  # fmt: skip
    except Enough:
        return list(np.diff(stamps)[2:])
    raise RuntimeError("training ended early")


def tasks_of_training() -> dict[str, tuple[Any, dict[str, Any], Any, int, int, Any]]:
    """Return name -> (network, columns, task, batch, steps, noise)."""
    from vision_robust.lidar.digits import digit_clouds
    from vision_robust.lidar.intact import Classification, Detection, TargetedPerturbation, columns_of
    from vision_robust.lidar.models import Grid, PillarDetector, PointNet
    from vision_robust.lidar.simulator import Drive, LidarSpec

    found = {}
    small = partial(PointNet, 10, (64, 64, 128), (64,), frequencies=2, norm="none", dropout=0.0)
    for points, make, batch, steps in ((64, small, 64, 150), (1024, partial(PointNet, 10), 16, 4)):
        digits = digit_clouds("train", n_points=points)
        columns = {"x": digits["x"][: 8 * batch], "y": digits["y"][: 8 * batch]}
        name = f"PointNet, digits, {points:,} points, batch {batch}"
        found[name] = (make, columns, lambda _: Classification(), batch, steps, TargetedPerturbation())
    spec = LidarSpec(n_beams=32, azimuth_step_deg=0.5, max_range_m=50.0)
    frames = [Drive(8, dt_s=0.5, spec=spec, generator=i)[k] for i in range(2) for k in range(8)]
    make = partial(PillarDetector, 3, Grid((-32.0, 32.0), (-32.0, 32.0), 0.5), width=32)
    ray = TargetedPerturbation(direction="ray")
    found["pillar detector, width 32, batch 4"] = (make, columns_of(frames), Detection, 4, 6, ray)
    return found


def training(repeats: int) -> dict[str, dict[str, float]]:
    from robust_core.random import reseeded
    from vision_robust.lidar.intact import Settings

    table = {}
    for name, (make, columns, task, batch, steps, noise) in tasks_of_training().items():
        kept = name.startswith("PointNet")
        settings = Settings(noise=noise, teacher_steps=1, n_draws=1, n_tasks=1)
        for method in ("standard", "curriculum", "intact"):
            bare, ours = [], []
            for _ in range(repeats if steps < 100 else 3 * repeats):  # quick steps, of which other programs take most
                with reseeded(0):
                    model, teacher = make(), make()
                whole = {"mask": torch.ones(columns["x"].shape[:2], dtype=torch.bool), **columns}
                if kept:
                    whole["teacher"] = torch.zeros(len(columns["x"]), 10)
                bare += bare_steps(model, None if kept else teacher, whole, task(model), method, batch, steps)
                ours += our_steps(make, columns, task, method, batch, steps, settings=settings, keep_outputs=kept)
            row = {"bare_ms": round(1e3 * median(bare), 2), "step_ms": round(1e3 * median(ours), 2)}
            table[f"{name}: {method}"] = row | {"ratio": round(row["step_ms"] / row["bare_ms"], 3)}
            print(f"{name}: {method}", *table[f"{name}: {method}"].values())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="corruptions whose name holds this word")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {}
    for name in REFERENCES:
        if arguments.only in name:
            table[name] = corruption(name, arguments.repeats)
            print(f"{name:28s}", *(f"{value:10.1f}" for value in table[name].values()))
    slowest = min((row["ratio"], name) for name, row in table.items())
    total = [sum(row[key] for row in table.values()) for key in ("reference_ms_for_1000", "ours_ms_for_1000")]
    whole = round(total[0] / total[1], 1)
    print("slowest ratio:", slowest, "all together:", whole)
    overlap, simulator = boxes(arguments.repeats), sweeps(arguments.repeats)
    print("boxes:", overlap, "simulator:", simulator)
    steps = training(max(2, arguments.repeats // 2))
    document = {
        "schema": "robust.benchmark/1",
        "what": "1,000 clouds of 1,024 points, severity 3, one thread; ratio = reference seconds / our seconds, "
        "medians of alternating runs; 1,000 x 1,000 rotated boxes; sweeps of 64 x 720 rays with labels and visibility; "
        "training: processor time of a step of harden beside its bare passes. Other programs ran on the machine (load)",
        "corruptions": table, "slowest": slowest, "all_together": whole,
        "floors": floors(arguments.repeats), "boxes": overlap, "simulator": simulator, "training": steps,
        "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
