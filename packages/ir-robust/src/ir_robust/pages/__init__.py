"""The pages of reports: made from a report's document, arrays, runs and edits alone."""

from __future__ import annotations

from ir_robust.pages import attack, certificate, evaluation
from ir_robust.report import RankingReport

__all__ = ["render"]

_PAGES = {"evaluation": evaluation.render, "attack": attack.render, "certificate": certificate.render}


def render(report: RankingReport) -> str:
    """Return the page of a report."""
    return _PAGES[report.kind](report)
