"""Certified accuracy at a radius, its curve, and the average certified radius.

A row counts at radius r if it is certified, its certified prediction is the label, and its radius is at least r.
Abstentions, time-outs and errors count as wrong. ACR is the mean radius, rows that do not count at 0 giving 0.
"""

from __future__ import annotations

import numpy as np

from robust_core.evaluation.metrics.estimate import Array, Estimate, as_array, mean, proportion

__all__ = ["average_certified_radius", "certified_accuracy", "certified_curve"]


def certified_accuracy(radius: Array, correct: Array, r: float) -> Estimate:
    """Return the certified accuracy at ``r``.

    Args:
        radius: (N,) certified radii, 0 where not certified.
        correct: (N,) bool: certified and predicting the label.
        r: radius in the units of the inputs.
    """
    return proportion(as_array(correct) & (as_array(radius, np.float64) >= r))


def certified_curve(radius: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (r, accuracy): the exact staircase, at 0 and at every radius where it falls (value *at* that radius)."""
    radii, flags = as_array(radius, np.float64), as_array(correct)
    levels = np.unique(np.r_[0.0, radii[flags]])
    held = np.sort(radii[flags])
    return levels, (len(held) - np.searchsorted(held, levels, side="left")) / max(1, len(radii))


def average_certified_radius(radius: Array, correct: Array) -> Estimate:
    """Return ACR with the Student interval of a mean."""
    return mean(np.where(as_array(correct), as_array(radius, np.float64), 0.0), low=0)
