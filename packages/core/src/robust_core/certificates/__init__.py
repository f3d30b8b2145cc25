"""Certifiers: ``certifier.certify(x, y=None) -> Certificate``; what is not proved is never called certified."""

from robust_core.certificates.betting import betting_lower, betting_upper
from robust_core.certificates.bounds import Crown, IntervalBounds, robust_cross_entropy
from robust_core.certificates.lipschitz import LipschitzCertifier
from robust_core.certificates.mixed import (
    certify_mixed_lipschitz,
    certify_mixed_smoothing,
    mixed_certificate,
    smoothed_lipschitz,
)
from robust_core.certificates.parts import PartsCertifier
from robust_core.certificates.result import ABSTAIN, About, Certificate, Certifier, Status, merge
from robust_core.certificates.sequential import crossing_boundary, crossing_probability
from robust_core.certificates.smoothed import SmoothedClassifier, SmoothingState
from robust_core.certificates.smoothing import Smoothing
from robust_core.certificates.statistics import (
    anytime_lower,
    anytime_upper,
    binomial_p_value,
    chernoff_lower,
    chernoff_upper,
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    family_alpha,
    hoeffding_lower,
    hoeffding_upper,
    normal_cdf_upper,
    normal_quantile_lower,
    normal_quantile_upper,
    split_alpha,
)

__all__ = [
    "ABSTAIN",
    "About",
    "Certificate",
    "Certifier",
    "Crown",
    "IntervalBounds",
    "LipschitzCertifier",
    "PartsCertifier",
    "SmoothedClassifier",
    "Smoothing",
    "SmoothingState",
    "Status",
    "anytime_lower",
    "anytime_upper",
    "betting_lower",
    "betting_upper",
    "binomial_p_value",
    "certify_mixed_lipschitz",
    "certify_mixed_smoothing",
    "chernoff_lower",
    "chernoff_upper",
    "clopper_pearson",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "crossing_boundary",
    "crossing_probability",
    "empirical_bernstein_lower",
    "family_alpha",
    "hoeffding_lower",
    "hoeffding_upper",
    "merge",
    "mixed_certificate",
    "normal_cdf_upper",
    "normal_quantile_lower",
    "normal_quantile_upper",
    "robust_cross_entropy",
    "smoothed_lipschitz",
    "split_alpha",
]
