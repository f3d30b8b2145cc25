"""Neur2RO (arXiv 2310.04345): are first stages from a learned inner problem near-optimal, and is it the learning?

Quick scale: knapsacks of the published generator; one network for each seed, trained on 150 instances of 10 items (6
decisions x 12 scenarios each), tested on 6 others of 10 items against branch and price (60 s), with 15 s for a solve.
Figures are relative errors to the best known value, in percent. The same network untrained is the control (explicit
recourse in the planner's program does much of the work by itself); static robust, which is not in the paper, is the
policy that a user would try first. Full scale: the paper's data (500 x 10 x 50), 500 epochs, its widths, the published
files of 20 and 30 items (``ROBUST_DATA/two_stage_robust_knapsack``), 30 s for each solve.

Found over eight seeds (three, run first, left three statements open): near-optimality and argmax against max hold, and
so does the learning: mean errors of 0 to 1.8 percent trained, 0 to 3.6 untrained, never worse. Against static robust,
where it errs, nothing is settled: better on six seeds, worse on one (3.5 against 1.1 percent). Tightening saves 28 to
83 percent of the binaries.

Gates check what must hold for any network: the program's optimum is the enumeration's, bounds lie below values.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from optim_robust.neur2ro import KNAPSACK, Neur2RO, ValueModel
from optim_robust.neur2ro.chains import encode
from optim_robust.neur2ro.data import generate
from optim_robust.neur2ro.main_problem import MainProblem
from optim_robust.neur2ro.train import train, untrained
from optim_robust.solver import Deadline
from optim_robust.two_stage import TwoStageSolution
from optim_robust.two_stage.branch_and_price import BranchAndPrice
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.static import StaticRobust
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.errors import DataMissingError
from robust_core.random import derive

__all__ = ["STATEMENTS", "run"]

_PERCENT = "percent"
_REASON = "the paper's figure is of its own 20-item instances (median 1.4 to 1.6, mean 2.0 to 2.6), with Gurobi"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="First stages are near-optimal: the median relative error is at most 3 percent.",
        metric="median over test instances of the relative error to branch and price, against 3",
        figure="median_error",
        unit=_PERCENT,
        margin=0.0,
        higher_is_better=False,
        reason=_REASON,
    ),
    Statement(
        text="The mean relative error is at most 6 percent.",
        metric="mean over test instances of the relative error to branch and price, against 6",
        figure="mean_error",
        unit=_PERCENT,
        margin=0.0,
        higher_is_better=False,
        reason=_REASON,
    ),
    Statement(
        text="It is the learning: the same loop with the same network untrained is worse.",
        metric="mean relative error, against the same network with its first weights (negative control)",
        figure="error_against_untrained",
        unit=_PERCENT,
        margin=0.0,
        higher_is_better=False,
        reason="the paper has no such control",
    ),
    Statement(
        text="Where the static policy is suboptimal, the loop is better than it.",
        metric="mean relative error over the instances on which static robust errs by more than 1e-4, against static's",
        figure="error_against_static",
        unit=_PERCENT,
        margin=0.0,
        higher_is_better=False,
        reason="the paper does not report static robust",
    ),
    Statement(
        text="Letting the network choose the scenario but not price it (argmax) is no worse than minimising its values "
        "(max).",
        metric="mean relative error of the paper's loop (verify=False) in mode argmax, against mode max",
        figure="argmax_against_max",
        unit=_PERCENT,
        margin=0.0,
        higher_is_better=False,
        reason="the paper: max is 0.25 to 3.6 percent worse",
    ),
    Statement(
        text="Tightened bounds leave at least 30 percent fewer binaries in the planner's program than intervals do.",
        metric="binaries with CROWN and linear programs, three scenarios, against 0.7 of those with plain intervals",
        figure="binaries",
        unit="binaries, mean over test instances",
        margin=0.0,
        higher_is_better=False,
        reason="the paper leaves bounds to its solver",
    ),
)

_WIDTHS: dict[str, Any] = {"embed": (32, 16), "post": (16, 8), "value": (8,)}


def _networks(seed: int, scale: Scale) -> tuple[ValueModel, ValueModel]:
    """Return the trained network and the same one untrained."""
    full = scale == "full"
    counts: dict[str, Any] = {"n_instances": 150, "n_first_stage": 6, "n_scenarios": 12, "sizes": (10,)}
    if full:
        counts = {"n_instances": 500, "n_first_stage": 10, "n_scenarios": 50}
    data = generate(KNAPSACK, **counts, sampler="aligned", per_instance=True, generator=derive(seed, "data"))
    widths: dict[str, Any] = {} if full else _WIDTHS
    trained, control = (untrained(data, KNAPSACK, label_scaling="per_instance", generator=seed, **widths) for _ in "ab")
    train(trained, data, epochs=500 if full else 40, learning_rate=1e-3 if full else 5e-3, contrast=0.8, generator=seed)
    return trained, control


def _instances(seed: int, scale: Scale) -> list[RobustKnapsack]:
    if scale == "quick":
        return [RobustKnapsack.random(10, generator=derive(seed, "test", i)) for i in range(6)]
    folder = Path(os.environ.get("ROBUST_DATA", ".")) / "two_stage_robust_knapsack"
    files = sorted(folder.glob("RKP_*_n[23]0_*"))
    if not files:
        raise DataMissingError(
            f"{folder} holds no published instances (RKP_*_n20_*, RKP_*_n30_*); get them from "
            "github.com/borisdetienne/RobustDecomposition and set ROBUST_DATA"
        )
    return [RobustKnapsack.from_file(file) for file in files]


def _error(answer: TwoStageSolution, best: float) -> float:
    return 100.0 * max(0.0, answer.worst_case - best) / max(1e-9, abs(best)) if answer.x is not None else 100.0


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    trained, control = _networks(seed, scale)
    instances = _instances(seed, scale)
    limit = 15.0 if scale == "quick" else 30.0
    solvers = {
        "trained": Neur2RO(trained, time_limit=limit, anchors=0),  # the network alone judges what is not yet known
        "untrained": Neur2RO(control, time_limit=limit, anchors=0),
        "argmax": Neur2RO(trained, time_limit=limit, verify=False, incumbent="last"),
        "max": Neur2RO(trained, time_limit=limit, verify=False, incumbent="last", mode="max"),
        "static": StaticRobust(),
        "exact": BranchAndPrice(),
    }
    errors: dict[str, list[float]] = {name: [] for name in solvers}
    sound, counts = [], {"lp": [], "interval": []}
    for problem in instances:
        answers = {
            name: solver.solve(problem, time_limit=60.0 if name == "exact" else limit)
            for name, solver in solvers.items()
        }
        best = min(answer.worst_case for answer in answers.values())
        for name, answer in answers.items():
            errors[name].append(_error(answer, best))
        slack = 1e-5 * abs(best)
        sound += [answers[name].lower_bound <= best + slack for name in ("trained", "untrained", "argmax")]
        for bounds, found in counts.items():
            found.append(_binaries(solvers["trained"], problem, bounds))  # pyright: ignore[reportArgumentType]
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    beaten = [i for i, value in enumerate(errors["static"]) if value > 0.01]
    measured = {
        "median_error": float(np.median(errors["trained"])),
        "mean_error": mean["trained"],
        "error_against_untrained": mean["trained"],
        "error_against_static": float(np.mean([errors["trained"][i] for i in beaten])) if beaten else 0.0,
        "argmax_against_max": mean["argmax"],
        "binaries": float(np.mean(counts["lp"])),
    }
    baseline = {
        "median_error": 3.0,
        "mean_error": 6.0,
        "error_against_untrained": mean["untrained"],
        "error_against_static": float(np.mean([errors["static"][i] for i in beaten])) if beaten else 0.0,
        "argmax_against_max": mean["max"],
        "binaries": 0.7 * float(np.mean(counts["interval"])),
    }
    gates = (
        Gate("bounds lie below the best known value", all(sound), f"{sum(sound)} of {len(sound)}"),
        _exactness(trained, seed),
    )
    content = b"".join(p.profit.tobytes() + p.weight.tobytes() for p in instances)
    return Figures(measured, baseline, gates, {f"knapsack/{seed}": hashlib.sha256(content).hexdigest()})


def _binaries(solver: Neur2RO, problem: RobustKnapsack, bounds: str) -> int:
    """Return the binaries of the network in the planner's program over three scenarios."""
    main = MainProblem(solver.instance(problem), bounds=bounds)
    for xi in problem.sample_uncertainty(3, scheme="mixed", generator=0):
        main.add_scenario(xi)
    main.build()
    return main.n_binaries


def _exactness(model: ValueModel, seed: int) -> Gate:
    """The planner's program decides as an enumeration of all first stages does."""
    problem = RobustKnapsack.random(6, generator=derive(seed, "exactness"))
    instance = Neur2RO(model).instance(problem)
    scenarios = problem.sample_uncertainty(3, scheme="mixed", generator=seed)
    main = MainProblem(instance, mip_gap=0.0)
    for xi in scenarios:
        main.add_scenario(xi)
    answer, _ = main.solve(Deadline(60.0))
    points = np.array(np.meshgrid(*[[0.0, 1.0]] * 6)).reshape(6, -1).T
    codes = encode(instance.decision, points)
    values = np.stack(
        [encode(instance.value(encode(instance.scenario, xi[None])[0], of="xi"), codes)[:, 0] for xi in scenarios]
    )
    costs = [
        problem.first_stage_cost(x, scenarios[k]) + problem.recourse(x, scenarios[k]).value
        for x, k in zip(points, values.argmax(0), strict=True)
    ]
    difference = abs(answer.value - min(costs))
    return Gate("the planner's optimum is the enumeration's", difference < 1e-3, f"{difference:.1e}")
