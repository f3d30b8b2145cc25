"""Training data: instances, decisions, scenarios, and the exact value of the second stage for each combination."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from optim_robust.neur2ro.families import Family
from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.solver import Deadline, Program, SolverError
from optim_robust.two_stage import TwoStageProblem
from robust_core.checks import check_choice, check_count
from robust_core.execution import run_shards
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["SAMPLERS", "ValueData", "generate"]

Array = NDArray[np.float64]
SAMPLERS = ("paper", "mixed", "aligned")


@dataclass(frozen=True)
class ValueData:
    """Labelled combinations of a number of instances.

    Attributes:
        features: of each instance.
        x: of each instance, (X, n).
        xi: of each instance, (S, dim).
        values: of each instance, (X, S) labels in the objective's unit; NaN where there is no recourse.
    """

    features: tuple[ItemFeatures, ...]
    x: tuple[Array, ...]
    xi: tuple[Array, ...]
    values: tuple[Array, ...]

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.features)

    @property
    def index(self) -> NDArray[np.int64]:
        """(N, 3) positions (instance, x, xi) of all labels that are finite."""
        parts = []
        for i, values in enumerate(self.values):
            rows, columns = np.nonzero(np.isfinite(values))
            parts.append(np.stack([np.full(len(rows), i), rows, columns], axis=1))
        return np.concatenate(parts).astype(np.int64)


def _one(
    i: int, *, family: Family, sizes: tuple[int, ...], n_first_stage: int, n_scenarios: int, sampler: str,
    per_instance: bool, seed: int,
) -> tuple[ItemFeatures, Array, Array, Array]:  # fmt: skip
    size = sizes[int(np.random.default_rng(derive(seed, "size", i)).integers(len(sizes)))]
    problem = family.instance(size, derive(seed, "instance", i))
    features = family.features(problem, per_instance)
    x = family.first_stage(problem, n_first_stage, derive(seed, "x", i))
    plain = "mixed" if sampler == "aligned" else sampler
    xi = family.scenarios(problem, n_scenarios, plain, derive(seed, "xi", i))
    if sampler == "aligned":
        x, xi = _align(problem, x, xi, np.random.default_rng(derive(seed, "aligned", i)))
    values = np.full((len(x), len(xi)), math.nan)
    for a, decision in enumerate(x):
        for b, scenario in enumerate(xi):
            answer = problem.recourse(decision, scenario)
            if answer.y is not None:
                first = problem.first_stage_cost(decision, scenario) if features.total else 0.0
                values[a, b] = first + answer.value
    return features, x, xi, values


def _align(problem: TwoStageProblem, x: Array, xi: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Move half of the decisions and two thirds of the scenarios to where the two players meet.

    Random decisions and scenarios hardly touch each other: the value then varies with x alone. Here every second
    decision is a best answer to a sampled scenario, and scenarios are those that hurt a decision with its best
    recourse most, with noise, half of them averaged with one another (the worst case need not be a vertex).
    """
    x, xi = x.copy(), xi.copy()
    for a in range(1, len(x), 2):
        program, columns = _certain(problem, xi[rng.integers(len(xi))])
        answer = program.solve(Deadline(1.0), mip_gap=1e-2)
        if answer.point is not None:
            x[a] = np.where(problem.x.integer, np.round(answer.point[columns]), answer.point[columns])
    hurt: list[Array] = []
    for b in range(len(xi)):
        decision = x[rng.integers(len(x))]
        answer = problem.recourse(decision, xi[b] if rng.random() < 0.5 else problem.uncertainty.nominal)
        if answer.y is None or b % 3 == 0:
            continue
        slope = problem.cost_form(decision, answer.y)[1]
        point = problem.uncertainty.worst(slope * rng.uniform(0.2, 1.0, len(slope)))
        if b % 3 == 2 and hurt:
            share = rng.random()
            point = share * point + (1 - share) * hurt[rng.integers(len(hurt))]
        hurt.append(point)
        xi[b] = point
    return x, xi


def _certain(problem: TwoStageProblem, xi: Array) -> tuple[Program, NDArray[np.int32]]:
    """Return the problem with ``xi`` known, and the columns of x."""
    program = Program()
    x = problem.first_stage_block(program)
    y = problem.scenario_block(program, x, xi)
    program.set_cost(x, problem.c.at(xi))
    program.set_cost(y, problem.d.at(xi))
    return program, x


def generate(
    family: Family,
    *,
    n_instances: int = 500,
    n_first_stage: int = 10,
    n_scenarios: int = 50,
    sizes: tuple[int, ...] | None = None,
    sampler: str = "mixed",
    per_instance: bool = False,
    workers: int = 1,
    generator: Seed = None,
    on_step: Callable[[int, int], None] | None = None,
) -> ValueData:
    """Draw instances and label them; the defaults are the paper's 250,000 second stages.

    Args:
        family: what is drawn.
        n_instances: instances; a family of one instance repeats it with other points.
        n_first_stage: decisions for each instance.
        n_scenarios: scenarios for each instance.
        sizes: numbers of items; the family's by default.
        sampler: ``"paper"`` (interior points), ``"mixed"`` (every second one a vertex, where the adversary ends) or
            ``"aligned"`` (decisions and scenarios also where the two players meet; needs a convex uncertainty set).
        per_instance: features in units of the instance.
        workers: processes; the data do not depend on it.
        generator: seed; an instance is a function of the seed and its position.
        on_step: called with (instances done, instances).

    Raises:
        SolverError: no combination has a recourse.
    """
    for name, value in (("n_instances", n_instances), ("n_first_stage", n_first_stage), ("n_scenarios", n_scenarios)):
        check_count(name, value)
    check_choice("sampler", sampler, SAMPLERS)
    one = partial(
        _one, family=family, sizes=tuple(sizes or family.sizes), n_first_stage=n_first_stage, n_scenarios=n_scenarios,
        sampler=sampler, per_instance=per_instance, seed=resolve_seed(generator),
    )  # fmt: skip
    rows = run_shards(
        one, list(range(n_instances)), backend="here" if workers == 1 else "processes", workers=workers, on_step=on_step
    )
    data = ValueData(*(tuple(part) for part in zip(*rows, strict=True)))
    if not len(data.index):
        raise SolverError(
            f"family {family.name!r}: none of the sampled decisions has a recourse; no label to learn from"
        )
    return data
