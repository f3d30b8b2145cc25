"""Training of anyone's model, with any objective, that goes on after a crash with the same bits.

from robust_core.threats import Linf
from robust_core.training import Adversarial, FastPGD, fit

state = fit(model, (x, y), Adversarial(FastPGD(Linf(8 / 255))), epochs=30, checkpoint="run/")
"""

from robust_core.training import weights
from robust_core.training.buffers import DistributionAlignment, FeatureQueue, PerSample, PrototypeBank
from robust_core.training.ema import EMA
from robust_core.training.fit import fit
from robust_core.training.inner import FastPGD
from robust_core.training.log import JsonLines, TensorBoardLog
from robust_core.training.objective import Batch, Loss, Objective, Stage
from robust_core.training.objectives import (
    Adversarial,
    GaussianNoise,
    Interval,
    NoiseConsistency,
    RandomObjective,
    Standard,
    Trades,
)
from robust_core.training.schedules import constant, cosine, cyclic, piecewise, scheduled, sigmoid_ramp, smoothed_ramp
from robust_core.training.state import TrainState

__all__ = [
    "EMA",
    "Adversarial",
    "Batch",
    "DistributionAlignment",
    "FastPGD",
    "FeatureQueue",
    "GaussianNoise",
    "Interval",
    "JsonLines",
    "Loss",
    "NoiseConsistency",
    "Objective",
    "PerSample",
    "PrototypeBank",
    "RandomObjective",
    "Stage",
    "Standard",
    "TensorBoardLog",
    "Trades",
    "TrainState",
    "constant",
    "cosine",
    "cyclic",
    "fit",
    "piecewise",
    "scheduled",
    "sigmoid_ramp",
    "smoothed_ramp",
    "weights",
]
