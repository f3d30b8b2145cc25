"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits

__all__ = ["federated_reconnaissance", "monna", "neur2ro"]


def federated_reconnaissance() -> Case:
    """Return the episode loss on a small encoder for the digits, whose 64 features stand for labels 0 .. 63."""
    from optim_robust.federated.reconnaissance import Prototypical, conv_encoder

    x, y = digits()
    return Case(Prototypical(3), conv_encoder(1, 16, blocks=2, generator=0), x[:64], y[:64], {"lr": 0.01})


def monna() -> Case:
    """Return the average around row 0 on vectors of eleven peers, two of whom may lie."""
    import torch

    from optim_robust.byzantine import NearestNeighborAverage

    rule = NearestNeighborAverage(f=2, pivot=0)
    x = 1.0 + torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    return Case(rule, rule, x, torch.zeros(11, dtype=torch.int64), {"f": 2})


def neur2ro() -> Case:
    """Return the loop with a small network on a shop that orders lots of three goods now, or dearer later.

    Its weights are random: what the kit checks must hold for any.
    """
    import itertools

    import numpy as np

    from optim_robust.neur2ro.data import generate
    from optim_robust.neur2ro.families import fixed
    from optim_robust.neur2ro.loop import Neur2RO
    from optim_robust.neur2ro.train import untrained
    from optim_robust.two_stage import AffineMatrix, AffineVector, Stage, TwoStageProblem
    from optim_robust.uncertainty import Budget

    def shop(needed: float) -> TwoStageProblem:
        return TwoStageProblem(
            x=Stage.of(3),
            y=Stage.of(3),
            uncertainty=Budget(np.full(3, 4.0), 1.5),
            c=AffineVector([3.0, 4.0, 5.0], dim=3),
            d=AffineVector([4.0, 5.0, 5.5], np.eye(3)),  # later, each may cost up to 4 more
            technology=AffineMatrix(-np.ones((1, 3))),
            recourse=AffineMatrix(-np.ones((1, 3))),
            rhs=AffineVector([-needed], dim=3),
            name="shop",
        )

    problem = shop(4.0)
    data = generate(fixed(problem), n_instances=1, n_first_stage=8, n_scenarios=6, per_instance=True)
    options = {"embed": (8, 4), "post": (6, 3), "value": (4,)}
    model = untrained(data, fixed(problem), label_scaling="per_instance", **options)
    points = [np.array(point) for point in itertools.product((0.0, 1.0), repeat=3)]
    costs = [problem.evaluate(x).value for x in points]
    extra = {
        "problem": problem,
        "optimum": min(costs),
        "replay": lambda x: problem.evaluate(x).value,
        "infeasible": shop(7.0),
        "bad": "no problem",
    }
    x, y = digits()  # no inputs of a network here: the problem stands in extra
    return Case(Neur2RO(model, time_limit=20.0), model, x[:8], y[:8], extra)
