"""Plots of a policy's report: returns, certificates, attacks step by step, and what the victim was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rl_robust.returns import Trace
from robust_core.evaluation.plots import SERIES, canvas, legend, percent_axis

__all__ = ["certificate_plot", "returns_plot", "trace_plot"]


def returns_plot(samples: Mapping[str, np.ndarray]) -> Figure:
    """Plot, for each attack, the share of episodes that bring at least a return.

    Args:
        samples: name -> (N,) returns.
    """
    figure, axes = canvas()
    for number, (name, returns) in enumerate(samples.items()):
        colour, _, style = SERIES[number % len(SERIES)]
        levels = np.sort(returns)
        share = 1.0 - np.arange(len(levels)) / len(levels)
        axes.step(levels, share, where="pre", color=colour, linestyle=style, linewidth=1.6, label=name[:32])
    percent_axis(axes)
    axes.set_xlabel("return of an episode")
    axes.set_ylabel("episodes that bring at least this")
    legend(axes, loc="best")
    return figure


def certificate_plot(
    eps: np.ndarray, bound: np.ndarray, attacked: Sequence[tuple[str, float, float, tuple[float, float] | None]]
) -> Figure:
    """Plot the certified expected return against the budget, and the means that attacks left.

    Args:
        eps: (K,) budgets, ascending.
        bound: (K,) certified expected return.
        attacked: (name, eps, mean return, interval), each on or above the curve.
    """
    figure, axes = canvas()
    colour, _, _ = SERIES[2]
    axes.plot(eps, bound, color=colour, linewidth=1.8, label="certified: no attacker leaves less")
    for number, (name, radius, value, interval) in enumerate(attacked):
        shade, marker, _ = SERIES[number % len(SERIES)]
        error = None if interval is None else [[value - interval[0]], [interval[1] - value]]
        axes.errorbar([radius], [value], yerr=error, fmt=marker, color=shade, markersize=5, label=name[:32])
    axes.set_xlabel("budget of the attacker for an episode, L2, in units of the observation")
    axes.set_ylabel("expected return")
    axes.set_ylim(bottom=min(0.0, float(np.min(bound))))
    legend(axes, loc="best")
    return figure


def trace_plot(traces: Mapping[str, Trace]) -> Figure:
    """Plot the reward collected, step by step, of one episode for each attack; dots show how much was spent."""
    figure, axes = canvas()
    for number, (name, trace) in enumerate(traces.items()):
        colour, _, style = SERIES[number % len(SERIES)]
        collected = np.cumsum(trace.reward)
        steps = np.arange(1, len(collected) + 1)
        axes.plot(steps, collected, color=colour, linestyle=style, linewidth=1.6, label=name[:32])
        top = trace.distance.max(initial=0.0)
        if top > 0:
            axes.scatter(steps, collected, s=18 * trace.distance / top, color=colour, alpha=0.6, linewidths=0)
    axes.set_xlabel("step")
    axes.set_ylabel("reward collected")
    legend(axes, loc="best")
    return figure
