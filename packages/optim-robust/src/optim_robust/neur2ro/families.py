"""Families of instances: what is drawn for training, and what the network sees of an instance.

The paper's two (capital budgeting also with loans), and any problem of the user's own: a family of one instance, whose
items are told apart by one-hot features, so that the network learns the value of that problem alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.two_stage import TwoStageProblem
from optim_robust.two_stage.capital_budgeting import CapitalBudgeting
from optim_robust.two_stage.knapsack import RobustKnapsack
from robust_core.random import derive

__all__ = ["CAPITAL_BUDGETING", "CAPITAL_BUDGETING_LOANS", "KNAPSACK", "Family", "family_of", "fixed"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """Instances of one kind.

    Attributes:
        name: stands in saved networks.
        sizes: numbers of items that training draws from.
        instance: (size, seed) -> problem.
        features: (problem, per_instance) -> what the network sees; features in units of the instance if per_instance.
        first_stage: (problem, n, seed) -> (n, n_x) points of X.
        scenarios: (problem, n, scheme, seed) -> (n, dim) points of the uncertainty set.
    """

    name: str
    sizes: tuple[int, ...]
    instance: Callable[[int, int], TwoStageProblem]
    features: Callable[[TwoStageProblem, bool], ItemFeatures]
    first_stage: Callable[[TwoStageProblem, int, int], Array]
    scenarios: Callable[[TwoStageProblem, int, str, int], Array]


def _knapsack_features(problem: TwoStageProblem, per_instance: bool) -> ItemFeatures:
    """Features (c, p, p-hat, f, t, C) of both sets; xi itself follows xi."""
    if not isinstance(problem, RobustKnapsack):
        raise TypeError(f"problem is a {type(problem).__name__}; the knapsack family reads a RobustKnapsack")
    n, mean, total = problem.n, float(problem.weight.mean()), float(problem.weight.sum())
    columns = (problem.weight, problem.profit, problem.degradation, problem.outsourcing, problem.repair)
    table = np.stack(columns, axis=1) / (mean if per_instance else 1.0)
    capacity = np.full((n, 1), problem.capacity / (total if per_instance else 1.0))
    if per_instance:  # sums over items grow with their number, labels of this scaling do not
        table, capacity = table, np.hstack([capacity, np.full((n, 1), problem.gamma / n), np.full((n, 1), 10.0 / n)])
    static = np.hstack([table, capacity])
    return ItemFeatures(
        static, static, np.eye(n)[:, None, :], np.zeros((n, 1)), problem.x.lower, problem.x.upper,
        unit=float(np.abs(problem.outsourcing).sum()), size=n, total=False,
    )  # fmt: skip


def _capital_features(problem: TwoStageProblem, per_instance: bool) -> ItemFeatures:
    """Features (c-bar, r-bar); of uncertain items also the factors (1 + phi'xi / 2, 1 + psi'xi / 2).

    The early loan is an item that costs its negative: it adds ``max_loan`` to the budget, for its price.
    """
    if not isinstance(problem, CapitalBudgeting):
        raise TypeError(f"problem is a {type(problem).__name__}; the family of capital budgeting reads that problem")
    n = len(problem.cost)
    unit = float(problem.cost.mean()) if per_instance else 1.0
    static = np.stack([problem.cost, problem.revenue], axis=1) / unit
    slope = np.stack([problem.phi, problem.psi], axis=1) / 2
    loan = np.array([[-problem.max_loan, -problem.loan_cost * problem.max_loan]]) / unit
    first = np.vstack([static, loan]) if problem.max_loan else static
    return ItemFeatures(
        first, static, slope, np.ones((n, 2)), problem.x.lower, problem.x.upper,
        unit=float(problem.revenue.sum()), size=n, total=True,
    )  # fmt: skip


def _fixed_features(problem: TwoStageProblem, per_instance: bool) -> ItemFeatures:
    uncertainty, n = problem.uncertainty, problem.x.size
    width = np.where(uncertainty.upper > uncertainty.lower, uncertainty.upper - uncertainty.lower, 1.0)
    slope = np.diag(1 / width)[:, None, :]
    return ItemFeatures(
        np.eye(n), np.eye(problem.dim), slope, (-uncertainty.lower / width)[:, None], problem.x.lower, problem.x.upper,
        unit=1.0, size=n, total=not (problem.c.is_constant and problem.c0.is_constant),
    )  # fmt: skip


def fixed(problem: TwoStageProblem) -> Family:
    """Return the family whose only instance is ``problem``, a user's own model.

    Raises:
        ValueError: a first-stage variable without finite bounds, which no network can be embedded over.
    """
    if not (np.isfinite(problem.x.lower).all() and np.isfinite(problem.x.upper).all()):
        name = problem.x.names[int(np.flatnonzero(~np.isfinite(problem.x.lower + problem.x.upper))[0])]
        raise ValueError(f"first-stage variable {name} has no finite bounds: the network cannot be embedded over it")

    def first_stage(given: TwoStageProblem, n: int, seed: int) -> Array:
        rows, tries = [], 0
        while len(rows) < n:
            rng = np.random.default_rng(derive(seed, "first stage", tries))
            tries += 1
            point = _draw(given, rng)
            if given.first_stage_violation(point) <= 1e-6 or tries > 100 * n:
                rows.append(point)  # beyond many misses points outside X still teach where values lie
        return np.stack(rows)

    def scenarios(given: TwoStageProblem, n: int, scheme: str, seed: int) -> Array:
        points = given.uncertainty.sample(n, generator=seed)
        if scheme == "mixed":
            rng = np.random.default_rng(derive(seed, "vertices"))
            points[1::2] = [given.uncertainty.worst(rng.standard_normal(given.dim)) for _ in points[1::2]]
        return points

    name = f"fixed:{problem.name}:{problem.x.size}x{problem.dim}"
    return Family(name, (problem.x.size,), lambda size, seed: problem, _fixed_features, first_stage, scenarios)


def _draw(problem: TwoStageProblem, rng: np.random.Generator) -> Array:
    """Draw a point between the bounds: a share q uniform, then each binary with probability 1 - q."""
    low, high, whole = problem.x.lower, problem.x.upper, problem.x.integer
    two = whole & (high - low <= 1)
    share = rng.random()
    inner = low + rng.random(len(low)) * (high - low)
    inner = np.where(whole, np.round(inner), inner)
    return np.where(two, np.where(rng.random(len(low)) < 1 - share, high, low), inner)


def _first_stage(problem: TwoStageProblem, n: int, seed: int) -> Array:
    if not isinstance(problem, RobustKnapsack | CapitalBudgeting):
        raise TypeError(f"problem is a {type(problem).__name__}; this family has its own")
    return problem.sample_first_stage(n, generator=seed)


def _scenarios(problem: TwoStageProblem, n: int, scheme: str, seed: int) -> Array:
    if isinstance(problem, RobustKnapsack):
        return problem.sample_uncertainty(n, scheme=scheme, generator=seed)
    points = problem.uncertainty.sample(n, generator=seed)
    if scheme == "mixed":
        rng = np.random.default_rng(derive(seed, "vertices"))
        points[1::2] = [problem.uncertainty.worst(rng.standard_normal(problem.dim)) for _ in points[1::2]]
    return points


def _knapsack(n: int, seed: int) -> TwoStageProblem:
    return RobustKnapsack.random(n, generator=seed)


def _capital(n: int, seed: int) -> TwoStageProblem:
    return CapitalBudgeting.random(n, generator=seed)


def _capital_loans(n: int, seed: int) -> TwoStageProblem:
    return CapitalBudgeting.random(n, loans=True, generator=seed)


KNAPSACK = Family(
    "knapsack", tuple(range(20, 81, 10)), _knapsack,
    _knapsack_features, _first_stage, _scenarios,
)  # fmt: skip
CAPITAL_BUDGETING = Family(
    "capital-budgeting", tuple(range(10, 51, 10)), _capital,
    _capital_features, _first_stage, _scenarios,
)  # fmt: skip
CAPITAL_BUDGETING_LOANS = Family(
    "capital-budgeting-loans", CAPITAL_BUDGETING.sizes, _capital_loans,
    _capital_features, _first_stage, _scenarios,
)  # fmt: skip


def family_of(problem: TwoStageProblem) -> Family:
    """Return the family that a problem belongs to."""
    if isinstance(problem, RobustKnapsack):
        return KNAPSACK
    if isinstance(problem, CapitalBudgeting):
        return CAPITAL_BUDGETING_LOANS if problem.max_loan else CAPITAL_BUDGETING
    return fixed(problem)
