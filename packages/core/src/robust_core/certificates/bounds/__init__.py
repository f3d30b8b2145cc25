"""Sound bounds of a network's outputs over a ball: intervals and linear relaxations."""

from robust_core.certificates.bounds.activations import LayerBounds, activation_bounds
from robust_core.certificates.bounds.certifier import BoundCertifier, TrainingPass, robust_cross_entropy
from robust_core.certificates.bounds.crown import Crown
from robust_core.certificates.bounds.graph import Graph, trace
from robust_core.certificates.bounds.interval import IntervalBounds

__all__ = [
    "BoundCertifier",
    "Crown",
    "Graph",
    "IntervalBounds",
    "LayerBounds",
    "TrainingPass",
    "activation_bounds",
    "robust_cross_entropy",
    "trace",
]
