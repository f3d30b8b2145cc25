"""Neur2RO beside other policies on published knapsacks and on capital budgeting: quality within seconds.

    python benchmarks/neur2ro.py train --out NETWORKS [--family knapsack|capital]
    python benchmarks/neur2ro.py files --networks NETWORKS --files FOLDER [--limit 30] [--every 8] [--json FILE]
    python benchmarks/neur2ro.py capital --networks NETWORKS [--sizes 10 20] [--limit 30] [--json FILE]

``train`` takes minutes on one core and saves the trained network beside the same one untrained. ``files`` solves the
published files of 20 and 30 items (the CSV file of their best known values lies in the same folder): the loop with both
networks and static robust, each within the limit; errors are relative to the best known value. "binaries" are those of
the network in the planner's program for the last scenarios, by how bounds were tightened. ``capital`` measures
k-adaptability and the loop with both networks on capital budgeting: what each guarantees at the end, and when it first
guaranteed as much as the best that k-adaptability reached within the limit. A JSON file that is there already is gone
on with.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from optim_robust.neur2ro import CAPITAL_BUDGETING, KNAPSACK, Neur2RO, ValueModel
from optim_robust.neur2ro.data import generate
from optim_robust.neur2ro.main_problem import MainProblem
from optim_robust.neur2ro.train import train, untrained
from optim_robust.two_stage import TwoStageProblem, TwoStageSolution
from optim_robust.two_stage.capital_budgeting import CapitalBudgeting
from optim_robust.two_stage.k_adaptability import KAdaptability
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.static import StaticRobust
from robust_core.claim import versions

WIDTHS: dict[str, Any] = {"embed": (32, 16), "post": (16, 8), "value": (8,)}
SIZES = {"knapsack": (10, 15, 20, 25, 30), "capital": (10, 20, 30, 40, 50)}


def learn(out: Path, family: str, seed: int) -> None:
    """Train one network and save it beside the same one untrained."""
    chosen = KNAPSACK if family == "knapsack" else CAPITAL_BUDGETING
    started = time.perf_counter()
    data = generate(
        chosen, n_instances=400, n_first_stage=6, n_scenarios=24, sizes=SIZES[family], sampler="aligned",
        per_instance=True, generator=seed,
    )  # fmt: skip
    labelled = time.perf_counter() - started
    model = untrained(data, chosen, label_scaling="per_instance", generator=seed, **WIDTHS)
    model.save(out / f"{family}-untrained")
    errors = train(model, data, epochs=40, learning_rate=6e-3, batch_size=512, contrast=0.8, generator=seed)
    model.save(out / family)
    seconds = {"data": round(labelled, 1), "training": round(time.perf_counter() - started - labelled, 1)}
    print(json.dumps({"errors": errors, "seconds": seconds}))


def _row(answer: TwoStageSolution, best: float) -> dict[str, Any]:
    error = 100.0 * (answer.upper - best) / abs(best) if math.isfinite(answer.upper) else None
    gap = answer.gap if math.isfinite(answer.gap) else None
    return {
        "relative error %": error, "certified gap": gap, "status": str(answer.status), "seconds": answer.seconds,
        "scenarios": len(answer.scenarios),
        "history": [[s.seconds, s.lower_bound, s.worst_case] for s in answer.history if math.isfinite(s.worst_case)],
    }  # fmt: skip


def _binaries(solver: Neur2RO, problem: TwoStageProblem, answer: TwoStageSolution) -> dict[str, int]:
    found = {"units": int(answer.info["units of the planner"])}
    for bounds in ("interval", "crown", "lp"):
        main = MainProblem(solver.instance(problem), bounds=bounds)
        for xi in answer.scenarios:
            main.add_scenario(xi)
        main.build()
        found[bounds] = main.n_binaries
    return found


def published(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Solve every k-th published file with each policy."""
    with (options.files / "ResultsForBranchAndPrice.csv").open(encoding="utf-8") as table:
        best = {row["File name"]: -float(row["Best primal bound"]) for row in csv.DictReader(table)}
    files = sorted(options.files.glob("RKP_*_n[23]0_*"))[options.first :: options.every]
    networks = {name: ValueModel.load(options.networks / name) for name in ("knapsack", "knapsack-untrained")}
    for file in files:
        if file.name in known:
            continue
        problem = RobustKnapsack.from_file(file)
        rows: dict[str, Any] = {
            "static": _row(StaticRobust().solve(problem, time_limit=options.limit), best[file.name])
        }
        for name, network in networks.items():
            solver = Neur2RO(network, adversary=options.adversary, time_limit=options.limit)
            answer = solver.solve(problem)
            rows[name] = _row(answer, best[file.name])
            rows[name]["binaries"] = _binaries(solver, problem, answer)
        known[file.name] = rows
        _save(options, known)


def capital(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Solve generated instances of capital budgeting by k-adaptability and by the loop."""
    networks = {
        "neur2ro": ValueModel.load(options.networks / "capital"),
        "neur2ro-untrained": ValueModel.load(options.networks / "capital-untrained"),
    }
    for size in options.sizes:
        for seed in range(options.instances):
            name = f"n{size}-{seed}"
            if name in known:
                continue
            problem = CapitalBudgeting.random(size, generator=1000 + seed)
            answers = {f"{k}-adaptability": KAdaptability(k).solve(problem, time_limit=options.limit) for k in (2, 3)}
            for method, network in networks.items():
                solver = Neur2RO(network, adversary=options.adversary, time_limit=options.limit)
                answers[method] = solver.solve(problem)
            best = min(answer.upper for answer in answers.values())
            rows = {method: _row(answer, best) for method, answer in answers.items()}
            rows["seconds to equal quality"] = _equal_quality(rows)
            known[name] = rows
            _save(options, known)


def _equal_quality(rows: dict[str, Any]) -> dict[str, float | None]:
    """Return when each method first guaranteed what k-adaptability guaranteed at its best."""
    target = min(step[2] for method, row in rows.items() if "adaptability" in method for step in row["history"])
    bar = target + 1e-6 * abs(target)
    return {method: next((s[0] for s in row["history"] if s[2] <= bar), None) for method, row in rows.items()}


def _save(options: argparse.Namespace, known: dict[str, Any]) -> None:
    document = {"limit": options.limit, "threads": 1, "versions": versions(), "summary": _summary(known), "runs": known}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["summary"]), flush=True)


def _summary(known: dict[str, Any]) -> dict[str, Any]:
    """Return means over the files, and over those on which static robust is suboptimal."""
    methods = sorted({m for rows in known.values() for m, row in rows.items() if "relative error %" in row})
    found: dict[str, Any] = {"instances": len(known)}
    for method in methods:
        errors = [rows[method]["relative error %"] for rows in known.values() if method in rows]
        kept = [100.0 if e is None else e for e in errors]
        found[method] = {"mean error %": statistics.fmean(kept), "median error %": statistics.median(kept)}
        hard = [e for e, rows in zip(kept, known.values(), strict=True) if "static" in rows and _misses(rows["static"])]
        if hard:
            found[method]["mean error % where static is suboptimal"] = statistics.fmean(hard)
            found[method]["such instances"] = len(hard)
    counts = [rows["knapsack"]["binaries"] for rows in known.values() if "knapsack" in rows]
    if counts:
        found["binaries"] = {key: statistics.fmean(c[key] for c in counts) for key in counts[0]}
    return found


def _misses(row: dict[str, Any]) -> bool:
    return row["relative error %"] is None or row["relative error %"] > 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("train", "files", "capital"))
    parser.add_argument("--out", type=Path, default=Path("networks"))
    parser.add_argument("--networks", type=Path, default=Path("networks"))
    parser.add_argument("--family", choices=("knapsack", "capital"), default="knapsack")
    parser.add_argument("--files", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10])
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--adversary", default="gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "train":
        learn(options.out, options.family, options.seed)
        return
    known: dict[str, Any] = {}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    (published if options.what == "files" else capital)(options, known)


if __name__ == "__main__":
    main()
