"""Calibration and selective prediction: does a stated confidence mean what it says?

Sources: Guo et al. 2017 (ECE over equal-width bins, temperature scaling), Nixon et al. 2019 (adaptive and class-wise
ECE), Geifman and El-Yaniv 2017 (risk-coverage, AURC). ECE here: 15 bins of equal width, *right-closed* (0, 1/15], ...,
on the confidence of the top class. ECE is biased upward: even a perfectly calibrated model shows some.
:func:`noise_floor` says how much at this sample size, and a value below it is no evidence of miscalibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax

from robust_core.checks import check_count, check_same_length
from robust_core.evaluation.metrics.estimate import Array, as_array
from robust_core.random import Seed, resolve_seed, stream

__all__ = [
    "N_BINS",
    "Reliability",
    "adaptive_ece",
    "aurc",
    "brier",
    "classwise_ece",
    "ece",
    "fit_temperature",
    "log_probabilities",
    "negative_log_likelihood",
    "noise_floor",
    "reliability",
    "risk_coverage",
]

N_BINS = 15


def log_probabilities(logits: Array) -> np.ndarray:
    """Return (N, C) float64 log-softmax."""
    return log_softmax(as_array(logits, np.float64), axis=1)


def negative_log_likelihood(logits: Array, y: Array) -> np.ndarray:
    """Return (N,) -log p(y), in nats."""
    labels = as_array(y, np.int64)
    return -np.take_along_axis(log_probabilities(logits), labels[:, None], 1)[:, 0]


def brier(logits: Array, y: Array) -> np.ndarray:
    """Return (N,) squared distance between the probabilities and the one-hot label, in [0, 2]."""
    p, labels = np.exp(log_probabilities(logits)), as_array(y, np.int64)
    p[np.arange(len(p)), labels] -= 1
    return (p**2).sum(1)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: each field (n_bins,), NaN in empty bins.

    Attributes:
        edges: (n_bins + 1,) limits of the right-closed bins.
        count: samples in each bin.
        confidence: mean confidence.
        accuracy: share correct.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: |accuracy - confidence| weighted by count."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gap * self.count) / max(1, self.count.sum()))


def _binned(edges: np.ndarray, bins: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Reliability:
    n_bins = len(edges) - 1
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, n_bins) / count
        accuracy = np.bincount(bins, correct.astype(np.float64), n_bins) / count
    return Reliability(edges, count, mean_confidence, accuracy)


def _check(confidence: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    scores, flags = as_array(confidence, np.float64), as_array(correct)
    check_same_length(confidence=len(scores), correct=len(flags))
    if len(scores) and not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1 + 1e-9):
        raise ValueError("confidence must be finite and lie in [0, 1]: give probabilities, not logits")
    return scores, flags


def reliability(confidence: Array, correct: Array, *, n_bins: int = N_BINS) -> Reliability:
    """Return accuracy and confidence in equal-width right-closed bins (a confidence of 0 falls into the first)."""
    check_count("n_bins", n_bins)
    scores, flags = _check(confidence, correct)
    edges = np.linspace(0, 1, n_bins + 1)
    bins = (np.searchsorted(edges, scores, side="left") - 1).clip(0, n_bins - 1)
    return _binned(edges, bins, scores, flags)


def ece(confidence: Array, correct: Array, *, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error over equal-width bins."""
    return reliability(confidence, correct, n_bins=n_bins).ece


def adaptive_ece(confidence: Array, correct: Array, *, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error over bins of equal mass."""
    check_count("n_bins", n_bins)
    scores, flags = _check(confidence, correct)
    order = np.argsort(scores, kind="stable")
    bins = np.arange(len(scores)) * n_bins // max(1, len(scores))
    return _binned(np.linspace(0, 1, n_bins + 1), bins, scores[order], flags[order]).ece


def classwise_ece(probabilities: Array, y: Array, *, n_bins: int = N_BINS) -> float:
    """Return the mean over classes of the calibration error of "probability of class c" against "is class c"."""
    p, labels = as_array(probabilities, np.float64), as_array(y, np.int64)
    return float(np.mean([ece(p[:, c], labels == c, n_bins=n_bins) for c in range(p.shape[1])]))


def noise_floor(
    confidence: Array, *, n_bins: int = N_BINS, n_draws: int = 200, generator: Seed = None
) -> tuple[float, float]:
    """Return mean and 95 % quantile of the ECE that a *perfectly calibrated* model with these confidences shows.

    Labels are drawn so that each prediction is correct with exactly its confidence (Vaicenavicius et al. 2019).
    """
    scores, _ = _check(confidence, confidence)
    draws = stream(resolve_seed(generator), 0, "noise floor of the calibration error")
    found = [
        ece(scores, torch.rand(len(scores), generator=draws, dtype=torch.float64).numpy() < scores, n_bins=n_bins)
        for _ in range(n_draws)
    ]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def fit_temperature(logits: Array, y: Array) -> float:
    """Return the temperature T that minimises the NLL of ``logits / T``.

    Fit it on a held-out split only, never on the data that it is then judged on.
    """
    from scipy.optimize import minimize_scalar  # only here: importing it takes a second

    scores, labels = as_array(logits, np.float64), as_array(y, np.int64)

    def loss(log_t: float) -> float:
        return float(negative_log_likelihood(scores / math.exp(log_t), labels).mean())

    found: Any = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def risk_coverage(confidence: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (coverage, risk), each (N,): error among the k most confident samples, k = 1 .. N.

    Samples of equal confidence cannot be told apart, so each counts with the error rate of its tie group.
    """
    scores, flags = as_array(confidence, np.float64), as_array(correct)
    n = check_same_length(confidence=len(scores), correct=len(flags))
    order = np.argsort(-scores, kind="stable")
    _, group = np.unique(-scores[order], return_inverse=True)
    wrong = 1.0 - flags[order].astype(np.float64)
    shared = (np.bincount(group, wrong) / np.bincount(group))[group] if n else wrong
    k = np.arange(1, n + 1)
    return k / max(1, n), np.cumsum(shared) / k


def aurc(confidence: Array, correct: Array) -> float:
    """Return the area under the risk-coverage curve: mean risk over all coverages (0 is best)."""
    _, risk = risk_coverage(confidence, correct)
    return float(risk.mean()) if len(risk) else math.nan
