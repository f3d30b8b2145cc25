"""What counterfactuals cost and are worth, and what they change, as matplotlib figures; pyplot is never touched."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from robust_core.data import Column
from robust_core.evaluation.plots import canvas, percent_axis
from vision_robust.explain.robust_counterfactuals.evaluate import Table

__all__ = ["changes", "changes_plot", "cost_validity_plot", "strip_plot"]

_INK, _MUTED, _COOL, _WARM = "#1b2230", "#5a6475", "#2457c5", "#b4470f"


def cost_validity_plot(table: Table) -> Figure:
    """Plot validity under changed models, with its interval, against the mean L2 cost of each method."""
    figure, axes = canvas()
    for row in table.rows:
        if not math.isfinite(row.validity):
            continue
        spread = [[row.validity - row.validity_low], [row.validity_high - row.validity]]
        colour = _COOL if row.method.startswith("T-Rex") else _MUTED
        axes.errorbar([row.cost_l2], [row.validity], yerr=spread, fmt="o", color=colour, capsize=2, elinewidth=0.8)
        axes.annotate(row.method, (row.cost_l2, row.validity), (4, 4), textcoords="offset points", fontsize=7)
    percent_axis(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean L2 distance to the query")
    axes.set_ylabel("accepted by changed models")
    return figure


def changes(columns: Sequence[Column], before: Tensor, after: Tensor) -> list[tuple[str, object, object, float]]:
    """Return (column, value before, value after, change in scaled units) of the columns that differ.

    Args:
        columns: of the table.
        before: (D,) query.
        after: (D,) counterfactual.
    """
    found = []
    for column in columns:
        positions = list(column.positions)
        moved = (after[positions] - before[positions]).abs().max()
        if float(moved) > 0:
            sign = 1.0 if column.kind == "category" else float((after[positions] - before[positions]).sign()[0])
            found.append((column.name, column.read(before[None])[0], column.read(after[None])[0], sign * float(moved)))
    return sorted(found, key=lambda change: -abs(change[3]))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def changes_plot(columns: Sequence[Column], before: Tensor, after: Tensor, *, top: int = 12) -> Figure:
    """Plot the largest changes of one row, as shares of each column's range, labelled in the user's units."""
    found = changes(columns, before, after)
    shown = found[:top][::-1]
    figure, axes = canvas(5.6, 0.7 + 0.24 * max(len(shown), 1))
    axes.barh(range(len(shown)), [c[3] for c in shown], color=[_COOL if c[3] > 0 else _WARM for c in shown])
    axes.set_yticks(
        range(len(shown)), [f"{name}: {_short(old)} → {_short(new)}" for name, old, new, _ in shown], fontsize=7
    )
    axes.axvline(0, color=_INK, linewidth=0.6)
    axes.set_xlabel("change, as a share of the column's range")
    if len(found) > top:
        axes.set_title(f"the largest {top} of {len(found)} changes", fontsize=8)
    return figure


def strip_plot(before: Tensor, after: Tensor, titles: Sequence[str] = ("before", "after", "difference")) -> Figure:
    """Plot rows of (before, after, difference) for images (B, C, H, W) in [0, 1].

    Raises:
        ValueError: the inputs are no images of one or three channels.
    """
    if before.ndim != 4 or before.shape != after.shape or before.shape[1] not in (1, 3):
        raise ValueError(f"images (B, 1 or 3, H, W) are needed, not {tuple(before.shape)} and {tuple(after.shape)}")
    n = len(before)
    figure = Figure(figsize=(3.9, 1.3 * n + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    difference = (after - before).mean(1).detach().cpu().numpy()
    limit = max(float(abs(difference).max()), 1e-6)
    for row in range(n):
        for place, images in enumerate((before, after)):
            axes = figure.add_subplot(n, 3, 3 * row + place + 1)
            image = images[row].detach().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            axes.set_title(titles[place] if row == 0 else "", fontsize=8, color=_INK)
        axes = figure.add_subplot(n, 3, 3 * row + 3)
        axes.imshow(difference[row], cmap="coolwarm", vmin=-limit, vmax=limit)
        axes.set_axis_off()
        axes.set_title(titles[2] if row == 0 else "", fontsize=8, color=_INK)
    return figure
