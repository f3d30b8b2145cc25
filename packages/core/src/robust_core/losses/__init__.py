"""Losses, one family a module: each maps (B, ...) to per-sample values or a scalar, as its docstring says.

Names of ``smooth_adversarial`` are imported on first use: that module attacks, and attacks import losses.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robust_core.losses.comp_sum import (
    CompSumLoss,
    GeneralizedCrossEntropy,
    MAELoss,
    RhoMarginCompSumLoss,
    SumExponentialLoss,
    comp_sum,
    rho_margin_comp_sum,
)
from robust_core.losses.consistency import noise_consistency
from robust_core.losses.distillation import (
    DistillationLoss,
    distillation_kl,
    feature_distance,
    relation_angle,
    relation_distance,
)
from robust_core.losses.dro import (
    KLDROLoss,
    chi_square_value,
    chi_square_weights,
    cvar_value,
    cvar_weights,
    effective_sample_size,
    kl_ball_temperature,
    kl_ball_value,
    kl_dro_value,
    kl_dro_weights,
    kl_to_uniform,
    log_moving_mean,
)
from robust_core.losses.h_consistency import (
    adversarial_constant,
    bounded_optimum,
    comp_sum_bound,
    comp_sum_transform,
    conditional_optimum,
    minimizability_gap_bounded,
)
from robust_core.losses.margin import cross_entropy, dlr, log_odds, margin, targeted_dlr

if TYPE_CHECKING:
    from robust_core.losses.smooth_adversarial import (
        SmoothAdvCompSumLoss,
        margin_drift,
        smooth_adversarial_comp_sum,
        worst_drift,
    )

__all__ = [
    "CompSumLoss",
    "DistillationLoss",
    "GeneralizedCrossEntropy",
    "KLDROLoss",
    "MAELoss",
    "RhoMarginCompSumLoss",
    "SmoothAdvCompSumLoss",
    "SumExponentialLoss",
    "adversarial_constant",
    "bounded_optimum",
    "chi_square_value",
    "chi_square_weights",
    "comp_sum",
    "comp_sum_bound",
    "comp_sum_transform",
    "conditional_optimum",
    "cross_entropy",
    "cvar_value",
    "cvar_weights",
    "distillation_kl",
    "dlr",
    "effective_sample_size",
    "feature_distance",
    "kl_ball_temperature",
    "kl_ball_value",
    "kl_dro_value",
    "kl_dro_weights",
    "kl_to_uniform",
    "log_moving_mean",
    "log_odds",
    "margin",
    "margin_drift",
    "minimizability_gap_bounded",
    "noise_consistency",
    "relation_angle",
    "relation_distance",
    "rho_margin_comp_sum",
    "smooth_adversarial_comp_sum",
    "targeted_dlr",
    "worst_drift",
]

_LATE = ("SmoothAdvCompSumLoss", "margin_drift", "smooth_adversarial_comp_sum", "worst_drift")


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module("robust_core.losses.smooth_adversarial"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
