"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits

__all__ = ["federated_reconnaissance", "monna"]


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
