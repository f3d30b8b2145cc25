"""Aggregation of vectors of which some may be wrong: rules, attacks, what can be proved.

>>> import torch
>>> from optim_robust.byzantine import TrimmedMean
>>> TrimmedMean(f=1)(torch.tensor([[1.0], [2.0], [3.0], [1e9]]))
tensor([2.5000])
"""

from optim_robust.byzantine.aggregators import (
    AGGREGATORS,
    ARC,
    CAF,
    CGE,
    MDA,
    NNM,
    SMEA,
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clipping,
    Compose,
    FilterL2,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    Phocas,
    PreAggregator,
    TrimmedMean,
)
from optim_robust.byzantine.attacks import ATTACKS, Attack, Scene
from optim_robust.byzantine.mixing import Aggregation, Mixing, NearestNeighbors, SelfCenteredClipping
from optim_robust.byzantine.monna import MoNNA, MoNNAOptimizer
from optim_robust.byzantine.theory import contracts, kappa, nna_bound, reduction_coefficients
from optim_robust.byzantine.vectors import AggregationError, NonFiniteError, TooFewMessagesError

__all__ = [
    "AGGREGATORS",
    "ARC",
    "ATTACKS",
    "CAF",
    "CGE",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregation",
    "AggregationError",
    "Aggregator",
    "Attack",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clipping",
    "Compose",
    "FilterL2",
    "GeometricMedian",
    "Krum",
    "MeaMed",
    "Mean",
    "Median",
    "Mixing",
    "MoNNA",
    "MoNNAOptimizer",
    "MultiKrum",
    "NearestNeighborAverage",
    "NearestNeighbors",
    "NonFiniteError",
    "Phocas",
    "PreAggregator",
    "Scene",
    "SelfCenteredClipping",
    "TooFewMessagesError",
    "TrimmedMean",
    "contracts",
    "kappa",
    "nna_bound",
    "reduction_coefficients",
]
