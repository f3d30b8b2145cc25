"""Several certificates on one page: a panel for each norm, the function that each curve speaks of, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.certified import certified_curve
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections.base import Plot, Section, Table, number, percent, plot_of

__all__ = ["guarantees"]

_NORMS = ("Linf", "L2", "L1")


def guarantees(report: Report) -> Section:
    """Return the section that stands for all parts of kinds ``certified`` and ``not-certified``."""
    parts, absent = report.parts("certified"), report.parts("not-certified")
    text = [
        "Certified accuracy against radius. Curves of one panel may be compared only where they speak of the same "
        "function: a smoothed classifier is another classifier than the network inside it, with a clean accuracy of "
        "its own. Every curve is a lower bound."
    ]
    more = [_what(parts)]
    if absent:
        more.append(_absent(absent))
    panels = [_panel(report, norm, chosen) for norm in _NORMS if (chosen := _of(parts, norm))]
    notes = [f"{part['name']}: {note}" for part in parts for note in part["notes"]]
    return Section("Guarantees", text, panels, _figures(report, parts), more, notes)


def _of(parts: Sequence[dict[str, Any]], norm: str) -> list[dict[str, Any]]:
    return [part for part in parts if part["data"]["norm"] == norm]


def _panel(report: Report, norm: str, parts: Sequence[dict[str, Any]]) -> Plot:
    curves = []
    for part in parts:
        arrays = report.arrays(part["name"])
        levels, accuracy = certified_curve(arrays["radius"], arrays["correct"])
        curves.append((f"{part['name']} ({part['data']['function']})", levels, accuracy))
    told = "; ".join(
        f"{part['name']}: {percent(report[part['name'] + '/accuracy@0'].value)} at 0, average radius "
        f"{number(report[part['name'] + '/acr'].value)}"
        for part in parts
    )
    figure = plots.certified_curves_plot(curves, unit=f"radius, {norm}, in units of the input")
    caption = f"{norm}: certified accuracy; in brackets the function that a curve speaks of."
    return plot_of(figure, f"{norm}. {told}.", "guarantees", norm, caption)


def _figures(report: Report, parts: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for part in parts:
        certified, radius = (report[f"{part['name']}/{key}"] for key in ("accuracy@0", "acr"))
        seconds = part["seconds"] / max(1, part["n"])
        rows.append([part["name"], percent(certified.value), number(radius.value), f"{number(seconds)} s"])
    header = ["certifier", "right and certified", "average radius", "time, each"]
    return Table(header, rows, "Intervals and every outcome stand below, under all figures", (1, 2, 3))


def _what(parts: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for part in parts:
        data = part["data"]
        passes = data.get("cost", {}).get("forwards")
        each = "–" if passes is None else f"{passes / max(1, part['n']):,.0f}"
        chance = f"{data['alpha']:g}" if data["alpha"] else "none"
        about = f"{data['function']}, {data['fingerprint'][:8]}…"
        rows.append([part["name"], about, data["method"], chance, each])
    header = ["certifier", "function", "method", "failure probability, each", "forward passes, each"]
    return Table(header, rows, "What each certificate speaks of, and what it takes", (3, 4))


def _absent(parts: Sequence[dict[str, Any]]) -> Table:
    rows = [[part["name"], part["data"]["why"], part["data"]["harden_first"] or "–"] for part in parts]
    return Table(["certifier", "why not", "harden first"], rows, "Certifiers that cannot speak of this model")
