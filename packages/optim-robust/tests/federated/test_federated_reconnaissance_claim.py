"""The claim's shape, and its negative control on three lines."""

from __future__ import annotations

import torch

from optim_robust.claims import federated_reconnaissance as claim
from optim_robust.federated.reconnaissance import PrototypeState


def _one(mean: float, count: int) -> PrototypeState:
    return PrototypeState(torch.tensor([0]), torch.tensor([[mean]]).double(), torch.tensor([count]))


def test_the_published_merge_counts_old_examples_twice() -> None:
    server, added = _one(0.0, 3), _one(4.0, 1)
    # the client's total is 1.0 of four examples; it enters with weight 1/4 beside the old 0.0: 0.25, not 1.0
    assert claim.published_merge(server, added, server).mean.item() == 0.25


def test_statements_are_fixed_beforehand() -> None:
    figures = [statement.figure for statement in claim.STATEMENTS]
    assert len(set(figures)) == len(figures) == 8
    assert {statement.margin for statement in claim.STATEMENTS} == {30.0, -8.0, -5.0, 0.0, -3.0}
