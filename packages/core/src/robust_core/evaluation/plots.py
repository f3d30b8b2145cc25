"""Plots of a report, as matplotlib figures for papers and as inline SVG for the page.

Each function takes numbers and returns a ``matplotlib.figure.Figure``; pyplot and its global state are never touched.
:func:`to_svg` turns one into SVG that takes its colours from the page (so that light and dark both work), its font from
the reader's system, keeps text as text, and holds no address, date or random id: the same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from robust_core.evaluation.metrics.calibration import Reliability
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.metrics.shift import Baseline

__all__ = [
    "SERIES",
    "canvas",
    "certified_curve_plot",
    "certified_curves_plot",
    "corruption_heat_map",
    "legend",
    "per_class_plot",
    "percent_axis",
    "png_data_url",
    "reliability_diagram",
    "risk_coverage_plot",
    "security_curve_plot",
    "security_curves_plot",
    "shift_scatter",
    "to_svg",
    "trade_off_plot",
]

# Each colour is used for one thing; on the page it becomes the variable of the style sheet that has its name.
INK, MUTED, LINE, PAPER = "#1b2230", "#5a6475", "#d9dee7", "#fffffe"
ACCENT, WARM, COOL = "#2457c5", "#b4470f", "#0b7a6f"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    WARM: "--warm",
    COOL: "--cool",
    PAPER: "--paper",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robust",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
}


def canvas(width: float = 4.8, height: float = 3.1) -> tuple[Figure, Axes]:
    """Return a figure and its axes in the style of the page; sizes in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    axes.grid(visible=True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def percent_axis(axes: Axes, *, x: bool = False, y: bool = True) -> None:
    """Show shares as percentages on an axis."""
    if y:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if x:
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def legend(axes: Axes, **kwargs: Any) -> None:
    """Draw the legend in the style of the page."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, handlelength=1.6, **kwargs)


def _ends(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    intervals = [e.interval or (e.value, e.value) for e in estimates]
    return [low for low, _ in intervals], [high for _, high in intervals]


def security_curve_plot(
    eps: Sequence[float], accuracy: Sequence[Estimate], *, unit: str, marks: Sequence[tuple[float, Estimate, str]] = ()
) -> Figure:
    """Plot accuracy against the attacker's radius, with the band of the intervals.

    Args:
        eps: radii, ascending.
        accuracy: accuracy at each.
        unit: label of the axis.
        marks: (eps, accuracy, label) of further attacks.
    """
    figure, axes = canvas()
    low, high = _ends(accuracy)
    axes.fill_between(eps, low, high, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(
        eps, [a.value for a in accuracy], color=ACCENT, marker="o", markersize=3.5, linewidth=1.8, label="under attack"
    )
    for position, estimate, label in marks:
        bounds = estimate.interval or (estimate.value, estimate.value)
        error = [[estimate.value - bounds[0]], [bounds[1] - estimate.value]]
        axes.errorbar(
            [position], [estimate.value], yerr=error, fmt="D", color=WARM, markersize=5, capsize=3, label=label
        )
    percent_axis(axes)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy")
    if marks:
        legend(axes, loc="best")
    return figure


SERIES = (
    (ACCENT, "o", "-"),
    (WARM, "s", "--"),
    (COOL, "D", "-."),
    (MUTED, "^", ":"),
    (WARM, "v", "-"),
    (COOL, "P", ":"),
)
"""(colour, marker, line style) of the first, second, ... of several curves."""


def security_curves_plot(curves: Sequence[tuple[str, Sequence[float], Sequence[Estimate]]], *, unit: str) -> Figure:
    """Plot the security curves of several models: (name, radii, accuracy at each)."""
    figure, axes = canvas()
    for number, (name, eps, accuracy) in enumerate(curves):
        colour, marker, style = SERIES[number % len(SERIES)]
        low, high = _ends(accuracy)
        axes.fill_between(eps, low, high, color=colour, alpha=0.14, linewidth=0)
        values = [a.value for a in accuracy]
        axes.plot(eps, values, color=colour, marker=marker, linestyle=style, markersize=3.5, label=name[:32])
    percent_axis(axes)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy under attack")
    legend(axes, loc="best")
    return figure


def trade_off_plot(points: Sequence[tuple[str, Estimate, Estimate]]) -> Figure:
    """Plot accuracy under attack against clean accuracy, one (name, clean, attacked) for each model."""
    figure, axes = canvas()
    for number, (name, clean, attacked) in enumerate(points):
        colour, marker, _ = SERIES[number % len(SERIES)]
        errors = []
        for estimate in (clean, attacked):
            low, high = estimate.interval or (estimate.value, estimate.value)
            errors.append([[estimate.value - low], [high - estimate.value]])
        axes.errorbar(
            [clean.value],
            [attacked.value],
            xerr=errors[0],
            yerr=errors[1],
            fmt=marker,
            color=colour,
            markersize=6,
            elinewidth=1.2,
            label=name[:32],
        )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(-0.02, None)
    axes.set_xlabel("clean accuracy")
    axes.set_ylabel("accuracy under attack")
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def certified_curve_plot(
    radius: np.ndarray,
    accuracy: np.ndarray,
    *,
    n: int,
    unit: str,
    attacked: Sequence[tuple[float, float, str]] = (),
) -> Figure:
    """Plot certified accuracy against the radius, and the accuracy that attacks left at their radii.

    Args:
        radius: (K,) ascending levels of the staircase.
        accuracy: (K,) certified accuracy at each.
        n: samples, for the band.
        unit: label of the axis.
        attacked: (eps, robust accuracy, label), each of which must lie on or above the curve.
    """
    from robust_core.certificates.statistics import clopper_pearson

    figure, axes = canvas()
    low, high = clopper_pearson(np.rint(accuracy * n), np.full(len(accuracy), n), 0.05)
    end = max([float(radius[-1]), *(eps for eps, _, _ in attacked)]) * 1.05 or 1.0
    r, a = np.append(radius, end), np.append(accuracy, 0.0)
    # value AT a level holds down to the level before it
    axes.fill_between(radius, low, high, step="pre", color=COOL, alpha=0.18, linewidth=0)
    axes.step(r, a, where="pre", color=COOL, linewidth=1.8, label="certified: no attack can do worse")
    shown: set[str] = set()
    for eps, value, label in attacked:
        axes.plot([eps], [value], "D", color=WARM, markersize=4.5, label=None if label in shown else label)
        shown.add(label)
    percent_axis(axes)
    axes.set_xlim(-0.02 * end, end)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy")
    legend(axes, loc="upper right")
    return figure


def certified_curves_plot(curves: Sequence[tuple[str, np.ndarray, np.ndarray]], *, unit: str) -> Figure:
    """Plot the certified accuracy of several certifiers: (name, (K,) ascending levels, (K,) accuracy at each)."""
    figure, axes = canvas()
    end = max(float(radius[-1]) for _, radius, _ in curves) * 1.05 or 1.0
    for number, (name, radius, accuracy) in enumerate(curves):
        colour, _, style = SERIES[number % len(SERIES)]
        r, a = np.append(radius, end), np.append(accuracy, 0.0)
        axes.step(r, a, where="pre", color=colour, linestyle=style, linewidth=1.6, label=name[:44])
    percent_axis(axes)
    axes.set_xlim(-0.02 * end, end)
    axes.set_xlabel(unit)
    axes.set_ylabel("certified accuracy")
    legend(axes, loc="upper right")
    return figure


def corruption_heat_map(names: Sequence[str], severities: Sequence[int], accuracy: np.ndarray) -> Figure:
    """Plot accuracy for each corruption (row) and severity (column), (C, S); what lies below 0 is as dark as 0."""
    figure, axes = canvas(4.8, 0.75 + 0.27 * len(names))
    axes.grid(visible=False)
    axes.pcolormesh(np.flipud(accuracy), cmap="cividis", vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
    for row in range(len(names)):
        for column in range(len(severities)):
            value = accuracy[row, column]
            dark = value > 0.5
            axes.text(
                column + 0.5,
                len(names) - row - 0.5,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="#101418" if dark else "#f5f7fa",
            )
    axes.set_xticks(np.arange(len(severities)) + 0.5, [str(s) for s in severities])
    axes.set_yticks(np.arange(len(names)) + 0.5, [name.replace("_", " ") for name in reversed(names)])
    axes.tick_params(length=0)
    axes.set_xlabel("severity")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def reliability_diagram(diagram: Reliability) -> Figure:
    """Plot accuracy against stated confidence; the area of a dot is the share of the samples in its bin."""
    figure, axes = canvas(4.0, 3.4)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="confidence = accuracy")
    full = diagram.count > 0
    x, y = diagram.confidence[full], diagram.accuracy[full]
    axes.vlines(x, np.minimum(x, y), np.maximum(x, y), color=WARM, linewidth=1.4, alpha=0.75)
    size = 14 + 160 * diagram.count[full] / max(1, diagram.count.sum())
    axes.scatter(
        x, y, s=size, color=ACCENT, edgecolors=PAPER, linewidths=0.8, zorder=3, clip_on=False, label="predictions"
    )
    percent_axis(axes, x=True)
    axes.set_xlabel("stated confidence")
    axes.set_ylabel("accuracy")
    legend(axes, loc="upper left")
    return figure


def risk_coverage_plot(coverage: np.ndarray, risk: np.ndarray) -> Figure:
    """Plot the error among the most confident predictions against the share that is kept."""
    figure, axes = canvas(4.0, 3.4)
    keep = np.unique(np.linspace(0, len(coverage) - 1, min(len(coverage), 300)).astype(int))
    axes.plot(coverage[keep], risk[keep], color=ACCENT, linewidth=1.8)
    axes.fill_between(coverage[keep], 0, risk[keep], color=ACCENT, alpha=0.14, linewidth=0)
    percent_axis(axes, x=True, y=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_ylim(0, max(0.02, float(risk.max()) * 1.1))
    axes.set_xlabel("share of predictions kept, most confident first")
    axes.set_ylabel("error among those kept")
    return figure


def per_class_plot(
    names: Sequence[str], accuracy: Sequence[Estimate], *, robust: Sequence[Estimate] | None = None
) -> Figure:
    """Plot the accuracy of each class with its interval, worst first; with ``robust``, that under attack beside it."""
    figure, axes = canvas(4.8, 0.8 + 0.24 * len(names))
    rows = np.arange(len(names))[::-1]

    def dots(estimates: Sequence[Estimate], colour: str, label: str, lift: float) -> None:
        low, high = _ends(estimates)
        value = [e.value for e in estimates]
        axes.hlines(rows + lift, low, high, color=colour, linewidth=1.6, alpha=0.55)
        axes.plot(value, rows + lift, "o", color=colour, markersize=4.5, label=label)

    dots(accuracy, ACCENT, "clean", 0.14 if robust else 0)
    if robust:
        dots(robust, WARM, "under attack", -0.14)
        legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.55 / (0.8 + 0.24 * len(names))), ncols=2)
    percent_axis(axes, x=True, y=False)
    axes.set_yticks(rows, list(names))
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("accuracy")
    return figure


def shift_scatter(points: Sequence[tuple[str, float, float]], *, baseline: Baseline | None = None) -> Figure:
    """Plot accuracy under shift against accuracy in distribution.

    Args:
        points: (name, accuracy in distribution, accuracy under the shift).
        baseline: the line of the declared baselines, drawn with its bootstrap band over their range only.
    """
    figure, axes = canvas(4.0, 3.4)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="no loss under the shift")
    if baseline is not None:
        grid = np.linspace(min(baseline.acc_id), max(baseline.acc_id), 80)
        low, high = baseline.band(grid, n_resamples=300)
        axes.fill_between(grid, low, high, color=COOL, alpha=0.18, linewidth=0)
        axes.plot(grid, baseline.predict(grid), color=COOL, linewidth=1.6, label="line of the baselines")
        axes.plot(baseline.acc_id, baseline.acc_shift, "o", color=COOL, markersize=3, alpha=0.7)
    for name, acc_id, acc_shift in points:
        axes.plot([acc_id], [acc_shift], "D", color=WARM, markersize=5)
        axes.annotate(
            name,
            (acc_id, acc_shift),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            fontsize=8,
        )
    seen = [v for _, a, b in points for v in (a, b)] + [*(baseline.acc_id + baseline.acc_shift if baseline else ())]
    low_end = max(0.0, np.floor(10 * (min(seen, default=0.0) - 0.05)) / 10)
    percent_axis(axes, x=True)
    axes.set_xlim(low_end, 1.01)
    axes.set_ylim(low_end, 1.01)
    axes.set_xlabel("accuracy in distribution")
    axes.set_ylabel("accuracy under the shift")
    legend(axes, loc="upper left")
    return figure


def to_svg(figure: Figure, alt: str, prefix: str) -> str:
    """Return ``figure`` as inline SVG.

    Args:
        figure: from one of the functions here.
        alt: what the plot shows, for people who cannot see it.
        prefix: makes the ids unique on the page: letters, digits and hyphens.
    """
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())  # pyright: ignore
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = text.replace("font-family: 'DejaVu Sans', sans-serif", "font-family: var(--font)")
    text = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text)  # a rule for *every* element of the page
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    opening = (
        f'<svg class="plot" role="img" aria-label="{html.escape(alt, quote=True)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {1.5 * width:.0f}px">'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, text).strip()


def png_data_url(image: np.ndarray) -> str:
    """Return a (C, H, W) image in [0, 1], C of 1 or 3, as the data URL of a PNG."""
    from matplotlib.image import imsave

    pixels = np.clip(np.nan_to_num(image), 0, 1).transpose(1, 2, 0)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    buffer = io.BytesIO()
    imsave(buffer, np.rint(pixels * 255).astype(np.uint8), format="png", metadata={"Software": "robust"})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
