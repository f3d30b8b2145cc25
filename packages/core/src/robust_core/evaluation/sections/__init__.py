"""What the page says about each part, in plain words."""

from robust_core.evaluation.sections.accuracy import clean, corruptions, open_set, other, shift, translation
from robust_core.evaluation.sections.attacks import adversarial, certified, invariant, security_curve
from robust_core.evaluation.sections.base import (
    Section,
    Table,
    interval_text,
    number,
    percent,
    points,
    points_interval,
    threat_text,
)
from robust_core.evaluation.sections.beside import beside
from robust_core.evaluation.sections.confidence import calibration
from robust_core.evaluation.sections.guarantees import guarantees

__all__ = [
    "Section",
    "Table",
    "adversarial",
    "beside",
    "calibration",
    "certified",
    "clean",
    "corruptions",
    "guarantees",
    "interval_text",
    "invariant",
    "number",
    "open_set",
    "other",
    "percent",
    "points",
    "points_interval",
    "security_curve",
    "shift",
    "threat_text",
    "translation",
]
