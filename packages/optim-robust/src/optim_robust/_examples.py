"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits

__all__ = ["federated_reconnaissance"]


def federated_reconnaissance() -> Case:
    """Return the episode loss on a small encoder for the digits, whose 64 features stand for labels 0 .. 63."""
    from optim_robust.federated.reconnaissance import Prototypical, conv_encoder

    x, y = digits()
    return Case(Prototypical(3), conv_encoder(1, 16, blocks=2, generator=0), x[:64], y[:64], {"lr": 0.01})
