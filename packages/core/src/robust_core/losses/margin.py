"""What an attack climbs: per-sample losses that grow as a sample gets closer to being misclassified.

Every function maps logits (B, C) and labels (B,) to (B,), row by row, to be *maximised*; half precision is
computed in float32.

Attacks normalise the gradient of each row, so only its direction and the order of the values matter. The
cross-entropy is ``softplus(log_odds)``: the same direction and the same order as :func:`log_odds`, which
neither saturates nor underflows however confident the network is. Attacks therefore climb ``log_odds`` where
the literature says cross-entropy; a network cannot hide its gradient by scaling its logits.

Sources: DLR and targeted DLR, Croce and Hein 2020 (arXiv 2003.01690), equations 5 and 6; margin, Carlini and
Wagner 2017 (arXiv 1608.04644). The published losses need 3 and 4 classes. With fewer, the denominator that is
left is used: :func:`dlr` becomes the margin at 2 classes; :func:`targeted_dlr` divides by ``z_1 - z_3`` at 3
classes and by nothing at 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "cross_entropy",
    "dlr",
    "log_odds",
    "margin",
    "misclassified",
    "targeted_cross_entropy",
    "targeted_dlr",
    "targeted_log_odds",
]

_LEAST = 1e-12  # of a denominator, as published


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _pick(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column[:, None]).squeeze(1)


def _without(logits: Tensor, column: Tensor) -> Tensor:
    return logits.scatter(1, column[:, None], -torch.inf)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) bool: the arg-max is not ``y``. Logits that hold NaN count as misclassified."""
    value, place = logits.max(1)  # NaN wins every maximum
    return (place != y) | value.isnan()


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) ``max_{i != y} z_i - z_y``: positive when another class wins, 0 at a tie."""
    logits = _wide(logits)
    return _without(logits, y).amax(1) - _pick(logits, y)


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) ``log((1 - p_y) / p_y)``: the cross-entropy without its saturation."""
    logits = _wide(logits)
    return _without(logits, y).logsumexp(1) - _pick(logits, y)


def targeted_log_odds(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (B,) ``log(p_t / (1 - p_t))`` of the class ``target`` (B,); ``y`` is not used."""
    del y
    return -log_odds(logits, target)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) ``-log p_y``, exact down to the smallest float (``log(1 + e^-50)`` is not 0)."""
    return F.softplus(log_odds(logits, y), threshold=30)


def targeted_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (B,) ``log p_t`` of the class ``target`` (B,); ``y`` is not used."""
    del y
    return -cross_entropy(logits, target)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) ``-(z_y - max_{i != y} z_i) / (z_1 - z_3)`` with ``z_1 >= z_2 >= ...``."""
    logits = _wide(logits)
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _LEAST)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (B,) ``-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)``, ``z_1 >= z_2 >= ...``, for ``target`` (B,)."""
    logits = _wide(logits)
    ahead = _pick(logits, target) - _pick(logits, y)
    n_classes = logits.shape[1]
    if n_classes < 3:
        return ahead
    top = logits.topk(min(n_classes, 4), dim=1).values
    return ahead / (top[:, 0] - top[:, 2:].mean(1) + _LEAST)
