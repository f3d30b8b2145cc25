"""Metric definitions shared by every package: pure functions of arrays, float64, each accuracy with its interval."""

from robust_core.evaluation.metrics.accuracy import (
    group_accuracies,
    label_rank,
    top_k_accuracy,
    worst_group_accuracy,
)
from robust_core.evaluation.metrics.calibration import (
    Reliability,
    adaptive_ece,
    aurc,
    brier,
    classwise_ece,
    ece,
    fit_temperature,
    negative_log_likelihood,
    noise_floor,
    reliability,
    risk_coverage,
)
from robust_core.evaluation.metrics.certified import average_certified_radius, certified_accuracy, certified_curve
from robust_core.evaluation.metrics.corruption import (
    ALEXNET_IMAGENET,
    Reference,
    mce,
    relative_mce,
)
from robust_core.evaluation.metrics.estimate import Estimate, difference, mean, proportion, share
from robust_core.evaluation.metrics.ood import auroc, ood_figures
from robust_core.evaluation.metrics.paired import Paired, compare_correct, paired_bootstrap
from robust_core.evaluation.metrics.shift import Baseline, fit_baseline, relative_robustness

__all__ = [
    "ALEXNET_IMAGENET",
    "Baseline",
    "Estimate",
    "Paired",
    "Reference",
    "Reliability",
    "adaptive_ece",
    "aurc",
    "auroc",
    "average_certified_radius",
    "brier",
    "certified_accuracy",
    "certified_curve",
    "classwise_ece",
    "compare_correct",
    "difference",
    "ece",
    "fit_baseline",
    "fit_temperature",
    "group_accuracies",
    "label_rank",
    "mce",
    "mean",
    "negative_log_likelihood",
    "noise_floor",
    "ood_figures",
    "paired_bootstrap",
    "proportion",
    "relative_mce",
    "relative_robustness",
    "reliability",
    "risk_coverage",
    "share",
    "top_k_accuracy",
    "worst_group_accuracy",
]
