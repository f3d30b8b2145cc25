"""What ``robust optim solve`` and ``compare`` do once their words are read."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim_robust.cli.words import split_method
from optim_robust.two_stage.branch_and_price import BranchAndPrice
from optim_robust.two_stage.ccg import ExactCCG, ScenarioEnumeration
from optim_robust.two_stage.comparison import Comparison, Method, compare
from optim_robust.two_stage.files import load_problem
from optim_robust.two_stage.k_adaptability import KAdaptability
from optim_robust.two_stage.knapsack import RobustKnapsack
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.pyomo_model import PyomoProblem
from optim_robust.two_stage.pyros import PyROS
from optim_robust.two_stage.solution import Step, relative_gap
from optim_robust.two_stage.static import Nominal, StaticRobust
from robust_core.cli import console
from robust_core.errors import DataMissingError
from robust_core.io import write_json

if TYPE_CHECKING:
    from optim_robust.neur2ro.model import ValueModel

__all__ = ["make_method", "run", "train_network"]


def make_method(words: str, problem: TwoStageProblem, *, tol: float, net: Path | None, seed: int) -> Method:
    """Return the solver that ``words`` name; Neur2RO trains a network first where ``net`` holds none."""
    name, value = split_method(words)
    if name == "neur2ro":
        return _neur2ro(problem, net, seed)
    return {
        "ccg": lambda: ExactCCG(tol),
        "enumeration": lambda: ScenarioEnumeration(tol=tol),
        "branch-and-price": lambda: BranchAndPrice(tol),
        "k-adaptability": lambda: KAdaptability(2 if value is None else value, tol),
        "static": lambda: StaticRobust(tol),
        "nominal": lambda: Nominal(tol),
        "pyros": lambda: PyROS(1 if value is None else value, tol),
    }[name]()


def _neur2ro(problem: TwoStageProblem, net: Path | None, seed: int) -> Method:
    """Load the network in ``net``, or train a small one for the problem's family and size (about a minute)."""
    from optim_robust.neur2ro.loop import Neur2RO
    from optim_robust.neur2ro.model import ValueModel

    if net is not None and (net / "model.json").is_file():
        return Neur2RO(ValueModel.load(net), root_bound=True, generator=seed)
    if net is not None and net.is_dir() and any(net.iterdir()):
        raise DataMissingError(
            f"--net {net} holds no finished network: train one into an empty folder, or finish an interrupted run, "
            "with robust optim learn"
        )
    console.info("neur2ro: no network is given (--net); a small one is trained for this family and size first")
    model, _ = train_network(problem, net, seed)
    return Neur2RO(model, root_bound=True, generator=seed)


def train_network(
    problem: TwoStageProblem, net: Path | None, seed: int, **training: Any
) -> tuple[ValueModel, dict[str, Any]]:
    """Train a network for a problem's family or for the problem itself, and save it with what is known of it.

    Args:
        problem: an instance of the family, or the user's own.
        net: folder for checkpoints, network and ``training.json``; None keeps nothing.
        seed: of everything.
        **training: options of ``quick_network``.
    """
    from optim_robust.neur2ro.loop import quick_network

    clock = time.perf_counter()
    if net is not None:
        training["checkpoint"] = net / "checkpoints"
    with console.progress() as report:
        model, errors = quick_network(problem, generator=seed, on_step=report, **training)
    document = {"problem": problem.name, "family": model.family, "sizes": model.sizes.tolist(), "seed": seed, **errors}
    document["seconds"] = round(time.perf_counter() - clock, 1)
    if net is not None:
        model.save(net)
        write_json(net / "training.json", document)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in errors.items())
    console.info(f"neur2ro: trained in {document['seconds']:.0f} s ({shown}, of the labels' range)")
    return model, document


def _fitting(methods: list[str], problem: TwoStageProblem) -> list[str]:
    """Leave out, and say so, what does not apply to a problem; a method asked for alone raises by itself."""
    if len(methods) == 1:
        return methods
    continuous = not (problem.x.integer.any() or problem.y.integer.any())
    limits = {
        "branch-and-price": ("knapsacks", isinstance(problem, RobustKnapsack)),
        "pyros": ("continuous Pyomo models", isinstance(problem, PyomoProblem) and continuous),
    }
    kept = []
    for words in methods:
        what, applies = limits.get(split_method(words)[0], ("", True))
        if applies:
            kept.append(words)
        else:
            console.info(f"{problem.name}: {words} is left out, it is for {what}")
    return kept


def run(
    problems: list[str], methods: list[str], *, time_limit: float, tol: float, net: Path | None, seed: int, command: str
) -> Comparison:
    """Load, solve and measure; bounds and incumbents are told on stderr as they come."""
    clock = time.perf_counter()
    loaded = [load_problem(words) for words in problems]
    entries, last = [], [0.0]

    def tell(name: str, method: str, step: Step) -> None:
        now = time.perf_counter()
        if now - last[0] < 0.2:
            return
        last[0] = now
        sense = next(p.sense for p in loaded if p.name == name)
        gap = relative_gap(step.worst_case, step.lower_bound)
        held, bound = (f"{sense * v:.6g}" if math.isfinite(v) else "none" for v in (step.worst_case, step.lower_bound))
        share = f", gap {100 * gap:.2f} %" if math.isfinite(gap) else ""
        console.info(f"{step.seconds:8.1f} s  {name}  {method}: held {held}, bound {bound}{share}")

    for problem in loaded:
        fitting = _fitting(methods, problem)
        made = {words: make_method(words, problem, tol=tol, net=net, seed=seed) for words in fitting}
        entries += compare([problem], made, time_limit=time_limit, on_step=tell)
    return Comparison(entries, command, time.perf_counter() - clock, time_limit, seed)
