"""Robust aggregators beside ByzFL: one input, one process, equal output, ratios of alternated rounds.

    python benchmarks/aggregators.py [--d 1000000] [--rounds 5] [--json FILE]

Wants an environment that holds ``byzfl`` beside ``optim-robust`` (or both on ``PYTHONPATH``).

n = 30 vectors of float32, f = 7, one thread. A rule is compared where the peer's definition is ours (its own settings
given where they differ); "difference" is the largest difference of the results relative to the largest value. Times are
the medians of alternated rounds. Two floors stand beside them: "gram" is one plain ``x @ x.T``, "pass" one mean of the
rows. Memory is the growth of the process's peak during one call, in a process of its own, in units of the input: what
is allocated beside the input, the result included. MDA and SMEA enumerate subsets in the peer: n = 14 and 10 there;
SMEA is called once. "violations" counts random inputs on which a rule exceeds its proved constant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim_robust.byzantine import AGGREGATORS, NNM, Compose, coordinates, preaggregators, rules, subsets, theory
from robust_core.claim import versions

N, F = 30, 7
Call = Callable[[Tensor], Tensor]


def ours() -> dict[str, Call]:
    return {
        "mean": rules.mean,
        "median": coordinates.median,
        "trimmed mean": lambda x: coordinates.trimmed_mean(x, F),
        "MeaMed": lambda x: coordinates.mean_around_median(x, F),
        "geometric median": rules.geometric_median,
        "geometric median, 3 steps": rules.smoothed_weiszfeld,
        "Krum": lambda x: rules.krum(x, F),
        "multi-Krum": lambda x: rules.multi_krum(x, F),
        "centred clipping": lambda x: rules.centered_clipping(x, tau=100.0),
        "CAF": lambda x: rules.caf(x, F),
        "nearest-neighbour averaging": lambda x: rules.nearest_neighbor_average(x, F, 0),
        "nearest-neighbour mixing": lambda x: preaggregators.nearest_neighbor_mixing(x, F),
        "bucketing": lambda x: preaggregators.bucketing(x, 2),
        "clipping": lambda x: preaggregators.clipping(x, 900.0),
        "ARC": lambda x: preaggregators.adaptive_clipping(x, F),
        "MDA, n=14, f=4": lambda x: subsets.minimum_diameter_average(x[:14], 4),
        "SMEA, n=10, f=3": lambda x: subsets.smea(x[:10], 3),
        "MDA, n=30, f=7": lambda x: subsets.minimum_diameter_average(x, F),
    }


def theirs() -> dict[str, Call]:
    import byzfl

    return {
        "mean": byzfl.Average(),
        "median": byzfl.Median(),
        "trimmed mean": byzfl.TrMean(F),
        "MeaMed": byzfl.Meamed(F),
        "geometric median": byzfl.GeometricMedian(),
        "geometric median, 3 steps": byzfl.GeometricMedian(),
        "Krum": byzfl.Krum(F),
        "multi-Krum": byzfl.MultiKrum(F),
        "centred clipping": byzfl.CenteredClipping(tau=100.0),
        "CAF": byzfl.CAF(F),
        "nearest-neighbour averaging": byzfl.MoNNA(F, 0),
        "nearest-neighbour mixing": byzfl.NNM(F),
        "bucketing": byzfl.Bucketing(2),
        "clipping": lambda x: byzfl.Clipping(900.0)(x.clone()),  # it overwrites its input
        "ARC": lambda x: byzfl.ARC(F)(x.clone()),
        "MDA, n=14, f=4": lambda x: byzfl.MDA(4)(x[:14]),
        "SMEA, n=10, f=3": lambda x: byzfl.SMEA(3)(x[:10]),
    }


EQUAL = {
    "mean", "median", "trimmed mean", "MeaMed", "geometric median, 3 steps", "Krum", "multi-Krum", "centred clipping",
    "clipping", "ARC", "nearest-neighbour averaging", "nearest-neighbour mixing", "MDA, n=14, f=4",
}  # fmt: skip
"""Where the definitions are the same. The peer's geometric median stops after 3 steps, its eigenvectors for CAF and
SMEA are one power step from a random vector, its buckets are drawn."""
NORMS = {"centred clipping", "clipping", "ARC"}
"""Rules that scale by a norm: the peer's is a float32 sum of a million squares, so both are held against float64."""


def data(d: int) -> Tensor:
    """Heterogeneous senders of whom 7 are far off."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, d, generator=generator)
    x.mul_(torch.linspace(0.8, 1.2, N)[:, None])
    x[3:10] += 1.5
    return x


def gap(result: Tensor, reference: Tensor) -> float:
    return float((result - reference).abs().max() / reference.abs().max())


def once(call: Call, x: Tensor) -> float:
    begin = time.perf_counter()
    call(x)
    return time.perf_counter() - begin


def peak() -> int:
    """Return the peak of the resident memory since the last reset, in bytes, and reset it (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def memory(d: int) -> dict[str, float]:
    """Return the growth of the peak during one call of each rule, in units of the input, in a fresh process."""
    command = [sys.executable, __file__, "--d", str(d), "--memory"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(d: int) -> None:
    x, found = data(d), {}
    for name, call in ours().items():
        call(x[:, :4096].contiguous())  # libraries load before the count begins
        peak()
        before = peak()
        result = call(x)
        found[name] = (peak() - before) / x.nbytes
        del result
    print(json.dumps(found))


def measure(d: int, rounds: int, with_peer: bool) -> dict[str, Any]:
    x = data(d)
    mine, peer = ours(), theirs() if with_peer else {}
    floors: dict[str, Call] = {"gram": lambda v: v @ v.T, "pass": lambda v: v.mean(0)}
    found: dict[str, Any] = {}
    used = memory(d)
    for name, call in mine.items():
        other = peer.get(name)
        slow = name.startswith("SMEA")
        times: dict[str, list[float]] = {"ours": [], "peer": [], "gram": [], "pass": []}
        result = call(x)
        reference = other(x) if other is not None and not slow else None
        for _ in range(rounds):
            for floor, bare in floors.items():
                times[floor].append(once(bare, x))
            times["ours"].append(once(call, x))
            if other is not None and not slow:
                times["peer"].append(once(other, x))
        if other is not None and slow:
            begin = time.perf_counter()
            reference = other(x)
            times["peer"].append(time.perf_counter() - begin)
        medians = {who: statistics.median(values) for who, values in times.items() if values}
        entry: dict[str, Any] = {"ms": {who: round(1e3 * value, 2) for who, value in medians.items()}}
        if other is not None:
            entry["times_faster"] = round(medians["peer"] / medians["ours"], 2)
        if name in EQUAL and reference is not None:
            entry["difference"] = gap(result, reference)
        if name in NORMS and reference is not None:
            exact = call(x.double())
            entry["off_float64"] = {"ours": gap(result, exact), "peer": gap(reference, exact)}
        entry["over_gram_and_pass"] = round(medians["ours"] / (medians["gram"] + medians["pass"]), 3)
        entry["memory"] = round(used[name], 3)
        found[name] = entry
        print(name, entry, flush=True)
    return found


def violations(geometries: int) -> dict[str, int]:
    """Count inputs on which a rule, alone or after mixing, exceeds its proved constant over all S of n - f senders."""
    found = {name: 0 for name in theory.KAPPA_RULES if name != "mean"}
    for number in range(geometries):
        n = 5 + number % 5
        f = 1 + number % ((n - 1) // 2)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(n, 1 + number % 4, generator=generator, dtype=torch.float64)
        x[:f] += 10.0 ** (number % 7 - 2) * torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
        x = (2 * x).round() if number % 3 == 0 else x
        for name in found:
            rule = AGGREGATORS[name](f)
            for whole in (rule, Compose(NNM(f), rule)):
                limit = whole.kappa(n)
                assert limit is not None
                found[name] += theory.measured_kappa(x, whole(x), f) > limit
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--geometries", type=int, default=1000, help="random inputs for the proved constants")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--memory", action="store_true", help="print the memory of each rule, and stop")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print_memory(options.d)
        return
    found = {
        "about": __doc__.splitlines()[0],
        "versions": versions() | ({} if options.without_peer else _peer_version()),
        "n": N, "f": F, "d": options.d, "dtype": "float32", "threads": 1,
        "violations": {"geometries": options.geometries, **violations(options.geometries)},
        "rules": measure(options.d, options.rounds, not options.without_peer),
    }  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)
            file.write("\n")


def _peer_version() -> dict[str, str]:
    from importlib.metadata import version

    return {"byzfl": version("byzfl")}


if __name__ == "__main__":
    main()
