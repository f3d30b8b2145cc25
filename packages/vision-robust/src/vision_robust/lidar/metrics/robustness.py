"""Mean corruption errors of classifiers of shapes, relative to a reference network.

``CE_c = sum_s (1 - OA_cs) / sum_s (1 - OA_cs of the reference)`` over severities s; ``RCE_c`` likewise with the drop
``OA_clean - OA_cs``; mCE and relative mCE are their means over corruptions (J. Ren and others 2022, 2202.03377). The
reference of ModelNet-C is DGCNN, with the accuracies published there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["DGCNN", "DGCNN_CLEAN", "CorruptionErrors", "corruption_errors"]

DGCNN: Mapping[str, float] = {
    "modelnet-c/scale": 0.906,
    "modelnet-c/jitter": 0.684,
    "modelnet-c/rotate": 0.785,
    "modelnet-c/drop_global": 0.752,
    "modelnet-c/drop_local": 0.793,
    "modelnet-c/add_global": 0.705,
    "modelnet-c/add_local": 0.725,
}
"""Overall accuracy of DGCNN on ModelNet-C, mean over the five severities."""
DGCNN_CLEAN = 0.926


@dataclass(frozen=True)
class CorruptionErrors:
    """Corruption errors by corruption, and their means.

    Attributes:
        errors: CE of each corruption; 1 is the reference's.
        relative: RCE of each corruption.
        mce: mean of the errors.
        relative_mce: mean of the relative errors.
    """

    errors: Mapping[str, float]
    relative: Mapping[str, float]
    mce: float
    relative_mce: float


def corruption_errors(
    accuracy: Mapping[str, Sequence[float] | float],
    clean: float,
    *,
    reference: Mapping[str, Sequence[float] | float] = DGCNN,
    reference_clean: float = DGCNN_CLEAN,
) -> CorruptionErrors:
    """Return mCE and relative mCE.

    Args:
        accuracy: overall accuracy in [0, 1] of each corruption, at each severity or their mean.
        clean: accuracy on clean clouds.
        reference: likewise of the reference network; its corruptions are those that count.
        reference_clean: its clean accuracy.

    Raises:
        ValueError: a corruption is missing, a value is no share, or the reference makes no error, so that the ratio
            means nothing.
    """
    missing = [name for name in reference if name not in accuracy]
    if missing:
        raise ValueError(f"accuracy lacks {', '.join(missing)}; the mean is over all of {', '.join(reference)}")
    ours = {name: _mean(f"accuracy[{name!r}]", accuracy[name]) for name in reference}
    theirs = {name: _mean(f"reference[{name!r}]", reference[name]) for name in reference}
    clean, reference_clean = _mean("clean", clean), _mean("reference_clean", reference_clean)
    if not theirs or max(theirs.values()) >= 1:
        raise ValueError("reference makes no error on some corruption, or is empty; a ratio needs one")
    errors = {name: (1 - ours[name]) / (1 - theirs[name]) for name in ours}
    drops = {name: reference_clean - theirs[name] for name in ours}
    if min(drops.values()) <= 0:
        raise ValueError("reference_clean is no higher than the reference's accuracy on some corruption")
    relative = {name: (clean - ours[name]) / drops[name] for name in ours}
    means = (float(np.mean(list(values.values()))) for values in (errors, relative))
    return CorruptionErrors(errors, relative, *means)


def _mean(name: str, value: Sequence[float] | float) -> float:
    values = np.atleast_1d(np.asarray(value, np.float64))
    if values.size == 0 or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"{name}={value!r}: shares in [0, 1] are needed")
    return float(values.mean())
