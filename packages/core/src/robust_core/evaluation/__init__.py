"""Measure a model, doubt the measurement, and show it to a person.

``evaluate(model, data, threat=Linf(8 / 255)).save("report")`` writes ``result.json``, ``per_sample.npz`` and
``report.html``. What is measured is composed of parts; metric definitions are pure functions in
:mod:`robust_core.evaluation.metrics`.
"""

from robust_core.evaluation.compare import Comparison, IncomparableError, Leaderboard, compare, spread
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.evaluate import evaluate
from robust_core.evaluation.invariant import InvariantError
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.model_checks import ModelChecks, check_model
from robust_core.evaluation.parts import (
    Adversarial,
    Calibration,
    Certified,
    Clean,
    Corruptions,
    NotCertified,
    OpenSet,
    Part,
    SecurityCurve,
    Shift,
    Summary,
    TranslationConsistency,
    reference_of,
)
from robust_core.evaluation.report import Report

__all__ = [
    "Adversarial",
    "Calibration",
    "Certified",
    "Clean",
    "Comparison",
    "Corruptions",
    "DocumentReport",
    "Estimate",
    "IncomparableError",
    "InvariantError",
    "Leaderboard",
    "ModelChecks",
    "NotCertified",
    "OpenSet",
    "Part",
    "Report",
    "SecurityCurve",
    "Shift",
    "Summary",
    "TranslationConsistency",
    "check_model",
    "compare",
    "evaluate",
    "reference_of",
    "spread",
]
