"""The claim has the shape that reports need."""

import numpy as np

from optim_robust.claims import neur2ro as claim
from optim_robust.neur2ro import KNAPSACK
from optim_robust.neur2ro.data import generate
from optim_robust.neur2ro.train import untrained


def test_statements_are_fixed_and_the_gate_passes_for_any_network() -> None:
    figures = [statement.figure for statement in claim.STATEMENTS]
    assert len(set(figures)) == len(figures) == 6
    assert all(statement.reason for statement in claim.STATEMENTS)
    data = generate(KNAPSACK, n_instances=2, n_first_stage=2, n_scenarios=2, sizes=(6,), per_instance=True)
    model = untrained(data, KNAPSACK, label_scaling="per_instance", embed=(6, 4), post=(6, 3), value=(4,))
    assert claim._exactness(model, 0).passed


def test_quick_instances_differ_between_seeds() -> None:
    first, second = (claim._instances(seed, "quick") for seed in (0, 1))
    assert len(first) == 6
    assert not np.array_equal(first[0].weight, second[0].weight)
