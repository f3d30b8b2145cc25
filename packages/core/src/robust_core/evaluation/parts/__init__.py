"""The parts that an evaluation is composed of."""

from robust_core.evaluation.parts.adversarial import Adversarial, SecurityCurve
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.parts.certified import Certified, NotCertified
from robust_core.evaluation.parts.clean import Calibration, Clean, Shift, TranslationConsistency
from robust_core.evaluation.parts.corruptions import Corruptions, reference_of
from robust_core.evaluation.parts.ood import OpenSet

__all__ = [
    "Adversarial",
    "Calibration",
    "Certified",
    "Clean",
    "Corruptions",
    "NotCertified",
    "OpenSet",
    "Part",
    "SecurityCurve",
    "Shift",
    "Summary",
    "TranslationConsistency",
    "reference_of",
]
