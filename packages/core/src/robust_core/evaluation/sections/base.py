"""What a section of the page is made of: text, plots, tables with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.report import Report

__all__ = [
    "Passage",
    "Plot",
    "Section",
    "Table",
    "class_name",
    "interval_text",
    "number",
    "percent",
    "plot_of",
    "points",
    "points_interval",
    "rows_of",
    "table_of",
    "threat_text",
    "title_of",
]


@dataclass(frozen=True)
class Table:
    """Header and rows of text; ``numeric`` columns are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Plot:
    """Inline SVG with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Passage:
    """A text that somebody edited, as pieces ("same" | "old" | "new", text)."""

    title: str
    pieces: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    text: Sequence[str]
    plots: Sequence[Plot] = ()
    table: Table | None = None
    more: Sequence[Table] = ()
    notes: Sequence[str] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    examples_text: str = ""
    examples_title: str = "What broke it"
    passages: Sequence[Passage] = ()


def percent(value: float) -> str:
    """Return a share for people."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Return a number for people."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval_text(estimate: Estimate, *, share: bool = True) -> str:
    """Return the interval, or nothing where there is none."""
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f"[{100 * low:.1f}, {100 * high:.1f}] %" if share else f"[{number(low)}, {number(high)}]"


def points(estimate: Estimate) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return "–" if math.isnan(estimate.value) else f"{100 * estimate.value:+.1f} pp"


def points_interval(estimate: Estimate) -> str:
    """Return the interval of a difference of shares."""
    if estimate.interval is None:
        return ""
    return f"[{100 * estimate.interval[0]:+.1f}, {100 * estimate.interval[1]:+.1f}] pp"


def threat_text(threat: Mapping[str, Any] | None) -> str:
    """Return the threat in plain words."""
    if threat is None:
        return ""
    eps, domain = threat["eps_text"], threat["domain"]
    inside = "" if domain is None else f" and must stay in [{domain[0]:g}, {domain[1]:g}]"
    what = {
        "Linf": f"may change every input value by up to {eps}",
        "L2": f"may move the input by a Euclidean distance of up to {eps}",
        "L1": f"may spend {eps} in all on changing input values",
    }[threat["norm"]]
    return f"Threat: {threat['norm']}, eps = {eps}. The attacker knows the model, {what}{inside}."


def plot_of(figure: Figure, alt: str, part: str, which: str, caption: str) -> Plot:
    """Return a figure as SVG whose ids are its own on the page."""
    prefix = "".join(c if c.isalnum() else "-" for c in f"{part}-{which}")
    return Plot(plots.to_svg(figure, alt, f"p-{prefix}"), caption)


def rows_of(report: Report, entries: Sequence[tuple[str, str]], *, share: bool = True) -> list[list[str]]:
    """Return table rows of (label, name of the figure), leaving out what was not measured."""
    rows = []
    for label, name in entries:
        if name not in report.document["figures"]:
            continue
        e = report[name]
        value = "–" if math.isnan(e.value) else percent(e.value) if share else number(e.value)
        rows.append([label, value, interval_text(e, share=share), f"{e.n:,}"])
    return rows


def table_of(rows: Sequence[Sequence[str]], first: str = "figure", caption: str = "") -> Table:
    """Return a table of figures with their intervals."""
    return Table([first, "value", "95 % interval", "n"], rows, caption, numeric=(1, 2, 3))


def class_name(report: Report, label: int) -> str:
    """Return the name of a class, or its number."""
    names = report.document["details"]["classes"]
    return names[label] if 0 <= label < len(names) else str(label)


def title_of(title: str, name: str, usual: str) -> str:
    """Return a heading that names the part where it is not the usual one."""
    return title if name == usual else f"{title}: {name}"
