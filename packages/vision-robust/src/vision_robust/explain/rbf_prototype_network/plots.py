"""What a model has learned and why it says what it says, as matplotlib figures; pyplot is never touched.

Heat maps are blue where presence is wanted, red where absence is. In accounts of one input blue is the class that won,
brown the next; hatched bars are evidence by absence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vision_robust.explain.rbf_prototype_network.model import CBC

__all__ = ["explanation_plot", "prototype_plot", "reasoning_plot"]

_INK, _MUTED, _COOL, _WARM = "#1b2230", "#5a6475", "#2457c5", "#b4470f"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _show(axes: Axes, value: Tensor, title: str) -> None:
    """Draw one input: an image of one or three channels, else its features as a profile."""
    value = value.detach().cpu()
    if value.ndim == 3 and value.shape[0] in (1, 3):
        image = (
            value.clamp(0, 1).permute(1, 2, 0).squeeze(2) if value.shape[0] == 1 else value.clamp(0, 1).permute(1, 2, 0)
        )
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    else:
        axes.plot(value.flatten().numpy(), color=_INK, linewidth=1)
        axes.tick_params(labelsize=6, colors=_MUTED)
    axes.set_title(title, fontsize=8, color=_INK)


def prototype_plot(model: CBC, *, columns: int = 5) -> Figure:
    """Plot the prototypes with their reach sigma, in the shape of the inputs."""
    components = model.components
    k = len(components.points)
    rows = -(-k // columns)
    figure = _figure(1.15 * columns, 1.35 * rows)
    sigma = components.sigma.detach()
    for i in range(k):
        axes = figure.add_subplot(rows, columns, i + 1)
        _show(axes, components.points[i].reshape(components.shape), f"{i}: σ = {float(sigma[i]):.2g}")
    figure.suptitle("prototypes and their reach", fontsize=9, color=_INK)
    return figure


def reasoning_plot(model: CBC, classes: Sequence[str] | None = None) -> Figure:
    """Plot ``r_plus - r_minus`` of each concept (row) and component (column) as a heat map."""
    plus, minus = (weight.detach().cpu() for weight in model.reasoning.weights())
    per_class, signed = model.reasoning.concepts_per_class, (plus - minus).numpy()
    figure = _figure(1.4 + 0.26 * signed.shape[1], 1.0 + 0.2 * signed.shape[0])
    axes = figure.add_subplot()
    limit = float(abs(signed).max())
    image = axes.imshow(signed, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    names = [str(c) for c in range(model.reasoning.n_classes)] if classes is None else list(classes)
    axes.set_yticks([per_class * c + (per_class - 1) / 2 for c in range(len(names))], names, fontsize=7)
    for c in range(1, len(names)):
        axes.axhline(per_class * c - 0.5, color=_MUTED, linewidth=0.5)
    axes.set_xticks(range(signed.shape[1]), [str(k) for k in range(signed.shape[1])], fontsize=6)
    axes.set_xlabel("component", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("wanted present (+) or absent (-)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def explanation_plot(
    model: CBC, x: Tensor, *, classes: Sequence[str] | None = None, top: int = 5, radius: float | None = None
) -> Figure:
    """Plot why one input (1, ...) is put into its class, and what the runner-up would have had.

    Args:
        model: the classifier.
        x: one input, with a batch dimension.
        classes: names.
        top: how many components to show: those that tell the two classes apart the most.
        radius: certified radius to mention.

    Raises:
        ValueError: more than one input.
    """
    if len(x) != 1:
        raise ValueError(f"x holds {len(x)} inputs; one is explained at a time (x[i : i + 1])")
    account = model.explain(x)
    with torch.no_grad():
        ranked = model(x).topk(2, dim=1).indices[0]
    other = model.explain(x, ranked[1:])
    names = [str(c) for c in range(model.reasoning.n_classes)] if classes is None else list(classes)
    ahead = (account.present + account.absent - other.present - other.absent)[0].abs()
    shown = ahead.topk(min(top, len(ahead))).indices.tolist()
    figure = _figure(6.4, 0.9 + 0.52 * len(shown))
    left, middle, right = cast("Sequence[Any]", figure.subfigures(1, 3, width_ratios=(1.1, 0.5, 2.0)))
    proof = "" if radius is None else f"\ncertified L2 {radius:.3g}"
    first, second = (names[int(c)] for c in ranked)
    title = f"{first}: {float(account.score[0]):.2f}\nnext {second}: {float(other.score[0]):.2f}{proof}"
    _show(left.add_subplot(), x[0].reshape(model.components.shape), title)
    for place, k in enumerate(shown):
        point = model.components.points[k].reshape(model.components.shape)
        _show(middle.add_subplot(len(shown), 1, place + 1), point, str(k))
    axes = right.add_subplot()
    _bars(axes, account.present[0], account.absent[0], shown, _COOL, offset=-0.18, label=first)
    _bars(axes, other.present[0], other.absent[0], shown, _WARM, offset=0.18, label=second)
    axes.set_yticks(range(len(shown)), [f"{k} (d = {float(account.detection[0, k]):.2f})" for k in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("contribution to the score (hatched: by absence)", fontsize=7)
    axes.tick_params(labelsize=7, colors=_MUTED)
    axes.legend(frameon=False, fontsize=7)
    return figure


def _bars(
    axes: Axes, present: Tensor, absent: Tensor, shown: list[int], colour: str, *, offset: float, label: str
) -> None:
    places = [i + offset for i in range(len(shown))]
    by_presence, by_absence = ([float(values[k]) for k in shown] for values in (present, absent))
    axes.barh(places, by_presence, 0.34, color=colour, label=label)
    axes.barh(places, by_absence, 0.34, left=by_presence, color="none", edgecolor=colour, hatch="////", linewidth=0.6)
