"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits, digits_cnn
from vision_robust.inference.adaptive_smoothing import MixedClassifier

__all__ = ["adaptive_smoothing"]


def adaptive_smoothing() -> Case:
    """Return a plain and an adversarially trained network for the digits, mixed."""
    x, y = digits()
    mixed = MixedClassifier(digits_cnn(), digits_cnn("adversarial"), mixing_weight=0.85).eval()
    return Case(mixed, mixed, x[:32], y[:32])
