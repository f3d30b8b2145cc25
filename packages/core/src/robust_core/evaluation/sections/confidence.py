"""The section on confidence: calibration and selective prediction."""

from __future__ import annotations

from typing import Any

import numpy as np

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.calibration import reliability, risk_coverage
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections.base import (
    Section,
    percent,
    plot_of,
    rows_of,
    table_of,
    title_of,
)

__all__ = ["calibration"]


def calibration(report: Report, part: dict[str, Any]) -> Section:
    """Confidence against accuracy."""
    name = part["name"]
    arrays = report.arrays(name)
    diagram = reliability(arrays["confidence"], arrays["correct"], n_bins=part["data"]["n_bins"])
    coverage, risk = risk_coverage(arrays["confidence"], arrays["correct"])
    ece, limit = report[f"{name}/ece"], report[f"{name}/ece_limit"]
    verdict = (
        "more than sampling noise explains: the confidences are off"
        if ece.value > limit.value
        else "what a perfectly calibrated model could show by chance"
    )
    overall = float(np.nansum((diagram.confidence - diagram.accuracy) * diagram.count) / max(1, diagram.count.sum()))
    tendency = f"{'too sure of itself' if overall > 0 else 'too modest'}, by {percent(abs(overall))}"
    if abs(overall) < 0.005:
        tendency = "neither too sure of itself nor too modest"
    text = (
        "Among predictions made with confidence 80 %, four in five should be right. The mean gap (ECE) is "
        f"{percent(ece.value)}; with this many samples up to {percent(limit.value)} can be chance: this is {verdict}. "
        f"On the whole the model is {tendency}."
    )
    entries = [
        ("expected calibration error (ECE)", "ece"),
        ("adaptive ECE", "adaptive_ece"),
        ("class-wise ECE", "classwise_ece"),
    ]
    rows = rows_of(report, [(label, f"{name}/{k}") for label, k in entries])
    more = [
        ("negative log-likelihood (nats)", "nll"),
        ("Brier score", "brier"),
        ("area under risk-coverage (AURC)", "aurc"),
    ]
    more += [
        ("temperature, fitted on held-out data", "temperature"),
        ("NLL at that temperature", "scaled/nll"),
    ]
    rows += rows_of(report, [(label, f"{name}/{k}") for label, k in more], share=False)
    rows += rows_of(report, [("ECE at that temperature", f"{name}/scaled/ece")])
    half, every = float(risk[(len(risk) - 1) // 2]), percent(float(risk[-1]))
    return Section(
        title_of("Confidence", name, "calibration"),
        [text],
        [
            plot_of(
                plots.reliability_diagram(diagram),
                f"Reliability diagram: mean gap between confidence and accuracy {percent(ece.value)}.",
                name,
                "reliability",
                "Dots below the dashed line: too confident. The larger the dot, the more predictions.",
            ),
            plot_of(
                plots.risk_coverage_plot(coverage, risk),
                f"Risk against coverage: error {percent(half)} among the more confident half, {every} over all.",
                name,
                "risk",
                f"If only the more confident half is answered, {percent(half)} are wrong; over all, {every}.",
            ),
        ],
        table_of(rows),
        notes=part["notes"],
    )
