"""Telling unknown inputs from known ones: AUROC, AUPR and FPR at 95 % TPR.

Convention (``POSITIVE = "ood"``, as in OpenOOD; many older papers take the known inputs as positive): scores grow with
strangeness, and a true positive is an *unknown* input that was noticed. FPR95 is thus the share of known inputs that
are rejected at the threshold where 95 % of the unknown ones are noticed. Ties get half credit in AUROC.
The AUROC interval is DeLong's (Biometrics 1988), from the placement values of both samples.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from robust_core.evaluation.metrics.estimate import Array, Estimate, as_array

__all__ = ["POSITIVE", "auroc", "ood_figures"]

POSITIVE = "ood"


def _both(score_in: Array, score_ood: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    known, unknown = as_array(score_in, np.float64), as_array(score_ood, np.float64)
    if not len(known) or not len(unknown):
        raise ValueError(f"{len(known)} known and {len(unknown)} unknown scores: at least one of each is needed")
    scores = np.concatenate([known, unknown])
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: an input without a score cannot be ranked")
    return known, unknown, scores


def auroc(score_in: Array, score_ood: Array) -> Estimate:
    """Return the AUROC with DeLong's 95 % interval, clipped to [0, 1].

    Args:
        score_in: (N,) scores of known inputs.
        score_ood: (M,) scores of unknown inputs, which should be higher.
    """
    from scipy.stats import rankdata  # only here: importing these takes seconds
    from sklearn.metrics import roc_auc_score

    known, unknown, scores = _both(score_in, score_ood)
    n, m = len(known), len(unknown)
    truth = np.r_[np.zeros(n), np.ones(m)]
    value = float(roc_auc_score(truth, scores))
    if min(n, m) < 2:
        return Estimate(value, None, n + m)
    ranks = rankdata(scores)
    over_known = (ranks[n:] - rankdata(unknown)) / n  # for each unknown: share of known inputs below it
    over_unknown = 1 - (ranks[:n] - rankdata(known)) / m
    spread = math.sqrt(over_known.var(ddof=1) / m + over_unknown.var(ddof=1) / n)
    half = float(ndtri(0.975)) * spread
    return Estimate(value, (max(0.0, value - half), min(1.0, value + half)), n + m)


def ood_figures(score_in: Array, score_ood: Array) -> dict[str, Estimate]:
    """Return ``auroc``, ``aupr_out`` (unknown positive), ``aupr_in`` (known positive) and ``fpr95``."""
    from sklearn.metrics import average_precision_score, roc_curve  # only here: importing it takes a second

    known, unknown, scores = _both(score_in, score_ood)
    n = len(scores)
    truth = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {
        "auroc": auroc(known, unknown),
        "aupr_out": Estimate(float(average_precision_score(truth, scores)), None, n),
        "aupr_in": Estimate(float(average_precision_score(1 - truth, -scores)), None, n),
        "fpr95": Estimate(float(fpr[np.argmax(tpr >= 0.95)]), None, n),
    }
