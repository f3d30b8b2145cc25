"""Corruption errors: mCE, relative mCE, plain means and family means.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019): mCE = mean over corruptions of ``sum_s E / sum_s E_ref``; the relative mCE subtracts each model's own
clean error first. Both need a *named reference*. The paper's, AlexNet on ImageNet-C at 224 pixels, is
:data:`ALEXNET_IMAGENET`; for any other data measure a reference model and pass its errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_core.data.corruptions import ALEXNET_ERRORS, FAMILIES

__all__ = ["ALEXNET_IMAGENET", "Reference", "mce", "relative_mce"]


@dataclass(frozen=True)
class Reference:
    """Errors of the model that a mean corruption error is relative to.

    Attributes:
        name: model and data, as a person would cite them.
        clean: error on clean data.
        errors: corruption -> error, mean over the severities or one value for each.
    """

    name: str
    clean: float
    errors: Mapping[str, float | Sequence[float]]


ALEXNET_IMAGENET = Reference("AlexNet (torchvision) on ImageNet-C, 224 pixels", 0.43478, ALEXNET_ERRORS)
"""Valid for ImageNet-C at 224 pixels only. Clean error: torchvision's published top-1 accuracy, 56.522 %."""


def _means(errors: Mapping[str, float | Sequence[float]], reference: Reference) -> list[tuple[float, float]]:
    members = [name for family, names in FAMILIES.items() if family != "extra" for name in names]
    members = ["frost" if name == "frost_procedural" and "frost" in errors else name for name in members]
    absent = [n for n in members if n not in errors or n not in reference.errors]
    if absent:
        raise ValueError(
            f"errors or reference lack {', '.join(absent)}: a mean corruption error is over all 15 corruptions of the "
            f"benchmark, and the reference ({reference.name}) must have met the same ones on the same data"
        )
    return [(float(np.mean(errors[n])), float(np.mean(reference.errors[n]))) for n in members]


def mce(errors: Mapping[str, float | Sequence[float]], reference: Reference) -> float:
    """Return the mean corruption error, 1.0 for the reference itself.

    Args:
        errors: corruption -> error at each severity (or their mean), in [0, 1].
        reference: the model to compare with, on the same data.
    """
    return float(np.mean([model / ref for model, ref in _means(errors, reference)]))


def relative_mce(errors: Mapping[str, float | Sequence[float]], clean: float, reference: Reference) -> float:
    """Return the relative mean corruption error: how much corruption *adds* to the clean error, against the reference.

    Args:
        errors: as for :func:`mce`.
        clean: the model's own error on clean data.
        reference: the model to compare with.
    """
    pairs = _means(errors, reference)
    if any(ref <= reference.clean for _, ref in pairs):
        raise ValueError(f"the reference {reference.name} loses nothing under some corruption: the ratio is undefined")
    return float(np.mean([(model - clean) / (ref - reference.clean) for model, ref in pairs]))
