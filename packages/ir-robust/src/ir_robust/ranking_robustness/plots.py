"""Plots of a report card: queries one by one, drops with their intervals, and how far edited pages climb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ir_robust.pages.plots import draw_sorted
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.plots import INK, MUTED, SERIES, canvas, legend, percent_axis

__all__ = ["change_plot", "climb_plot", "drop_plot", "spread_plot"]


def spread_plot(points: Mapping[str, tuple[float, float]], measure: str) -> Figure:
    """Plot the variance against the mean, (P, V) of each model: low variance counts at a comparable mean only."""
    figure, axes = canvas(4.0, 3.1)
    for number, (name, (p, v)) in enumerate(points.items()):
        colour, marker, _ = SERIES[number % len(SERIES)]
        axes.plot([p], [v], marker, color=colour, markersize=7, label=name[:32])
    axes.set_xlim(0, 1.1 * max(p for p, _ in points.values()) + 0.05)
    axes.set_ylim(0, 1.15 * max(v for _, v in points.values()) + 0.005)
    axes.set_xlabel(f"mean {measure}")
    axes.set_ylabel("variance over queries")
    legend(axes, loc="lower left")
    return figure


def drop_plot(conditions: Sequence[str], drops: Mapping[str, Sequence[Estimate]]) -> Figure:
    """Plot drop rates with their intervals: a row for each condition, a mark for each model."""
    figure, axes = canvas(4.8, 0.9 + max(0.3, 0.16 * len(drops)) * len(conditions) + 0.18 * len(drops))
    rows = np.arange(len(conditions))[::-1].astype(float)
    axes.axvline(0, color=MUTED, linewidth=1)
    for number, (name, estimates) in enumerate(drops.items()):
        colour, marker, _ = SERIES[number % len(SERIES)]
        lift = 0.6 * (0.5 - (number + 0.5) / len(drops))
        value = [e.value for e in estimates]
        ends = [e.interval or (e.value, e.value) for e in estimates]
        axes.hlines(rows + lift, [a for a, _ in ends], [b for _, b in ends], color=colour, linewidth=1.5, alpha=0.6)
        axes.plot(value, rows + lift, marker, color=colour, markersize=5, linestyle="none", label=name[:32])
    axes.set_yticks(rows, [c[:28] for c in conditions])
    axes.set_ylim(-0.6, len(conditions) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("drop rate; left of 0 is lost")
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def change_plot(changes: Mapping[str, np.ndarray], measure: str) -> Figure:
    """Plot what became of each query, the greatest loss first.

    Args:
        changes: model -> (Q,) differences.
        measure: label of the axis.
    """
    figure, axes = canvas()
    axes.axhline(0, color=MUTED, linewidth=1)
    draw_sorted(axes, changes)
    axes.set_xlabel("share of queries, greatest loss first")
    axes.set_ylabel(f"change of {measure}")
    legend(axes, loc="lower right")
    return figure


def climb_plot(ranks: Mapping[str, np.ndarray], k: int) -> Figure:
    """Plot the share of attacked pages that stand at a rank or above it, after the attack.

    Args:
        ranks: model -> (N, 2) ranks before and after.
        k: the top that counts.
    """
    figure, axes = canvas()
    last = max(int(found.max()) for found in ranks.values())
    axes.axvline(k, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(k, 1.0, f" top {k}", color=INK, fontsize=8, va="top")
    places = np.arange(1, last + 1)
    for number, (name, found) in enumerate(ranks.items()):
        colour, _, style = SERIES[number % len(SERIES)]
        share = (found[:, 1][None] <= places[:, None]).mean(axis=1)
        axes.step(places, share, where="post", color=colour, linestyle=style, linewidth=1.6, label=name[:32])
    percent_axis(axes)
    axes.set_xlabel("rank after the attack")
    axes.set_ylabel("attacked pages at this rank or above")
    legend(axes, loc="lower right")
    return figure
