"""Ready cases of this package's methods, each built in under 5 s: what the cards name as ``example``."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import Linf

__all__ = ["comp_sum_losses", "randomized_smoothing"]


def comp_sum_losses() -> Case:
    """Return the smooth adversarial comp-sum objective on a small network for the digits."""
    from robust_core.losses import SmoothAdvCompSumLoss
    from robust_core.training import FastPGD

    x, y = digits()
    subject = SmoothAdvCompSumLoss(FastPGD(Linf(0.1), n_iter=3), nu=0.1)
    return Case(subject, digits_cnn(), x[:32].clone(), y[:32].clone())


def randomized_smoothing() -> Case:
    """Return the smoothed version of a small network for the digits."""
    from robust_core.certificates import Smoothing

    x, y = digits()
    model = digits_cnn()
    return Case(Smoothing(model, 0.15, n_samples=1000), model, x[:16].clone(), y[:16].clone())
