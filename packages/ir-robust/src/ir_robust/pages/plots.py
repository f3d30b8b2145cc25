"""Plots of rankings, in the style of every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.plots import MUTED, SERIES, canvas, legend, percent_axis

__all__ = ["change_plot", "climb_plot", "draw_sorted", "sorted_plot", "trade_off"]


def draw_sorted(axes: Axes, values: Mapping[str, np.ndarray]) -> None:
    """Draw name -> (Q,) values of queries, each from the least to the greatest, against the share of the queries."""
    for number, (name, of_query) in enumerate(values.items()):
        colour, _, style = SERIES[number % len(SERIES)]
        shares = (np.arange(len(of_query)) + 0.5) / len(of_query)
        axes.plot(shares, np.sort(of_query), color=colour, linestyle=style, linewidth=1.8, label=name[:32])
    percent_axis(axes, x=True, y=False)


def sorted_plot(values: Mapping[str, np.ndarray], measure: str) -> Figure:
    """Plot the values of all queries, each run's from worst to best: the left end is what a mean hides."""
    figure, axes = canvas()
    draw_sorted(axes, values)
    axes.set_xlabel("share of queries, worst first")
    axes.set_ylabel(measure)
    legend(axes, loc="best")
    return figure


def change_plot(gain: np.ndarray, measure: str, name: str, first: str) -> Figure:
    """Plot what each query gains or loses, sorted."""
    figure, axes = canvas()
    ordered = np.sort(gain)[::-1]
    better, worse = SERIES[0][0], SERIES[1][0]
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=[better if v >= 0 else worse for v in ordered])
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_xlabel(f"queries, from gained to lost ({name[:24]} against {first[:24]})")
    axes.set_ylabel(f"change of {measure}")
    return figure


def climb_plot(ranks: Mapping[str, np.ndarray], k: int) -> Figure:
    """Plot where attacked documents stood and where they stand: below the diagonal they climbed.

    Args:
        ranks: attack -> (N, 2) ranks before and after.
        k: the first K are what the attacker wanted.
    """
    figure, axes = canvas()
    top = 1.0
    for number, (name, pairs) in enumerate(ranks.items()):
        colour, marker, _ = SERIES[number % len(SERIES)]
        axes.scatter(
            pairs[:, 0], pairs[:, 1], s=14, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name[:32]
        )
        top = max(top, float(pairs.max()))
    axes.plot([1, top], [1, top], color=MUTED, linewidth=0.8)
    axes.axhspan(0.5, k + 0.5, color=SERIES[1][0], alpha=0.1, linewidth=0)
    axes.invert_yaxis()
    axes.set_xlabel("rank before")
    axes.set_ylabel(f"rank after (shaded: the first {k})")
    legend(axes, loc="lower left")
    return figure


def trade_off(ks: Sequence[int], shares: Sequence[Estimate]) -> Figure:
    """Plot the share of certified queries against K, with its intervals."""
    figure, axes = canvas()
    colour = SERIES[0][0]
    low = [(e.interval or (e.value, e.value))[0] for e in shares]
    high = [(e.interval or (e.value, e.value))[1] for e in shares]
    axes.fill_between(ks, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(ks, [e.value for e in shares], color=colour, marker="o", markersize=3.5, linewidth=1.8)
    percent_axis(axes)
    axes.set_xlabel("K")
    axes.set_ylabel("certified queries (CRQ@K)")
    return figure
