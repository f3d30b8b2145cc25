"""Attack the certificates of two-stage problems: whatever the method, and whenever it is stopped.

    python benchmarks/two_stage_soundness.py [--problems 40] [--first-seed S] [--json FILE]

Small random problems of four kinds (knapsack; capital budgeting without and with loans; stores with integer lots, of
which demand and a hauler's capacity are uncertain) are solved by every method under time limits from 2 ms to 1 s, most
of which cut it short. An answer claims that its x costs at most ``upper``, at least ``worst_case``, and that no first
stage is better than ``lower_bound``. The attacker searches scenarios by sampling, corners and climbing for one in which
x costs more than ``upper``; he enumerates first stages for one that surely costs less than ``lower_bound``; and he
recomputes the cost at the scenario that was named. Counted are claims (finite ends) and how many were broken. For
``evaluate`` the search itself is stopped after every number of looks at the clock, and the interval is held against the
whole search. Exit code 1 on any break.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optim_robust.neur2ro import Family, Neur2RO, ValueModel, family_of
from optim_robust.neur2ro.data import generate
from optim_robust.neur2ro.train import untrained
from optim_robust.solver import Deadline
from optim_robust.two_stage import (
    AffineMatrix,
    AffineVector,
    BranchAndPrice,
    CapitalBudgeting,
    ExactCCG,
    KAdaptability,
    RobustKnapsack,
    ScenarioEnumeration,
    Stage,
    StaticRobust,
    TwoStageProblem,
)
from optim_robust.two_stage.evaluate import evaluate
from optim_robust.uncertainty import Box
from robust_core.claim import versions

Array = NDArray[np.float64]
LIMITS = (0.002, 0.008, 0.03, 0.1, 0.3, 1.0)
TOLERANCE = 2e-4  # relative; the methods' own is 1e-4
LOOKS = 240


class Looks(Deadline):
    """Passes after it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def passed(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def stores(seed: int) -> TwoStageProblem:
    """Stock two stores now, order lots once demand and the hauler's capacity are known."""
    rng = np.random.default_rng(seed)
    slopes = np.stack([-rng.uniform(0.5, 2.0, 2), rng.uniform(0.2, 1.0, 2)])
    return TwoStageProblem(
        x=Stage.of(2, upper=2), y=Stage.of(3, upper=[3, 3, 6]), uncertainty=Box([-1.0, -1.0], [1.0, 1.0]),
        c=AffineVector([2.0, 3.0], dim=2), d=AffineVector([3.0, 4.0, 9.0], rng.uniform(-1, 1, (3, 2))),
        technology=AffineMatrix([[-1.0, -1.0], [0.0, 0.0]]), recourse=AffineMatrix([[-1.0] * 3, [1.0, 1.0, 0.0]]),
        rhs=AffineVector([-4.0, 4.0], slopes), name=f"stores-{seed}",
    )  # fmt: skip


def problem_of(seed: int) -> TwoStageProblem:
    kinds = (
        lambda: RobustKnapsack.random(5, generator=seed),
        lambda: CapitalBudgeting.random(5, generator=seed),
        lambda: CapitalBudgeting.random(3, loans=True, generator=seed),
        lambda: stores(seed),
    )
    return kinds[seed % len(kinds)]()


def network(problem: TwoStageProblem) -> ValueModel:
    """Return an untrained network: certificates must hold whatever it thinks."""
    family: Family = family_of(problem)
    size = family.features(problem, True).size
    data = generate(
        family, n_instances=2, n_first_stage=3, n_scenarios=4, sizes=(size,), per_instance=True, generator=0
    )
    return untrained(data, family, label_scaling="per_instance", generator=0, embed=(8, 4), post=(6, 3), value=(4,))


def methods(problem: TwoStageProblem) -> dict[str, Any]:
    model = network(problem)
    found: dict[str, Any] = {
        "ccg": ExactCCG(), "enumeration": ScenarioEnumeration(), "static": StaticRobust(),
        "k-adaptability": KAdaptability(2), "neur2ro": Neur2RO(model, adversary="gradient"),
        "neur2ro-root": Neur2RO(model, root_bound=True),
    }  # fmt: skip
    return found | ({"branch-and-price": BranchAndPrice()} if isinstance(problem, RobustKnapsack) else {})


def first_stages(problem: TwoStageProblem) -> list[Array]:
    """Return whole first stages of X; of a loan, none and the most."""
    ends = [
        np.arange(low, up + 1) if whole else np.array([low, up])
        for low, up, whole in zip(problem.x.lower, problem.x.upper, problem.x.integer, strict=True)
    ]
    points = [np.array(p, dtype=float) for p in itertools.product(*ends)]
    return [p for p in points if problem.first_stage_violation(p) <= 1e-9]


def hurt(problem: TwoStageProblem, x: Array, draw: np.random.Generator) -> float:
    """Return the greatest cost of x that an attacker finds: samples, corners, then steps about the best of them."""

    def cost(xi: Array) -> float:
        return problem.first_stage_cost(x, xi) + problem.recourse(x, xi).value

    tried = [
        *problem.uncertainty.vertices(limit=64),
        *problem.uncertainty.sample(60, generator=int(draw.integers(2**31))),
    ]
    values = [cost(xi) for xi in tried]
    best, at = max(values), tried[int(np.argmax(values))]
    for scale in np.geomspace(0.3, 1e-3, 40):
        xi = np.clip(at + scale * draw.standard_normal(len(at)), problem.uncertainty.lower, problem.uncertainty.upper)
        if problem.uncertainty.contains(xi) and (value := cost(xi)) > best:
            best, at = value, xi
    return best


def attack(problem: TwoStageProblem, seed: int) -> Counter[str]:
    """Return claims and breaks of one problem."""
    counts: Counter[str] = Counter()
    draw = np.random.default_rng(seed)
    sure = min(problem.evaluate(x).upper for x in first_stages(problem))
    harm: dict[bytes, float] = {}
    for name, method in methods(problem).items():
        for limit in LIMITS:
            answer = method.solve(problem, time_limit=limit)
            slack = TOLERANCE * max(1.0, abs(sure))
            counts[f"{name} solves"] += 1
            counts[f"{name} cut short"] += str(answer.status) == "time_limit"
            if math.isfinite(answer.lower_bound):
                counts[f"{name} claims"] += 1
                counts[f"{name} broken"] += answer.lower_bound > sure + slack
            if answer.x is None or not math.isfinite(answer.upper):
                continue
            key = answer.x.tobytes()
            if key not in harm:
                harm[key] = hurt(problem, answer.x, draw)
            counts[f"{name} claims"] += 1
            counts[f"{name} broken"] += harm[key] > answer.upper + slack or answer.worst_case > answer.upper + slack
    return counts


def interrupt(problem: TwoStageProblem) -> Counter[str]:
    """Return claims and breaks of searches for the worst case that were stopped at every look."""
    counts: Counter[str] = Counter()
    x = np.zeros(problem.x.size)
    whole = evaluate(problem, x)
    slack = 1e-6 * max(1.0, abs(whole.value))
    for looks in range(LOOKS):
        part = evaluate(problem, x, deadline=Looks(looks))
        counts["evaluate solves"] += 1
        counts["evaluate cut short"] += not part.certified
        counts["evaluate claims"] += math.isfinite(part.upper)
        counts["evaluate broken"] += part.upper < whole.value - slack or part.value > whole.upper + slack
        if part.certified:
            break
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for seed in range(options.first_seed, options.first_seed + options.problems):
        problem = problem_of(seed)
        counts += attack(problem, seed) + interrupt(problem)
    names = sorted({key.rpartition(" ")[0].removesuffix(" cut") for key in counts})
    table = {
        name: {what: counts[f"{name} {what}"] for what in ("solves", "cut short", "claims", "broken")} for name in names
    }
    total = {what: sum(row[what] for row in table.values()) for what in ("solves", "cut short", "claims", "broken")}
    document = {"problems": options.problems, "total": total, "methods": table, "versions": versions()}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"total": total, "methods": table}, indent=1))
    return int(total["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
