"""Points as figures for papers and pages: frames from above with boxes, tracks and weights; shapes seen aslant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from robust_core.checks import check_number
from robust_core.evaluation.plots import ACCENT, COOL, INK, LINE, MUTED, WARM, canvas
from vision_robust.lidar.boxes import bev_corners
from vision_robust.lidar.types import Detections, Frame

__all__ = ["birds_eye_plot", "extent", "shapes_plot"]

_MOST_POINTS = 30_000
_QUIET = "#8b94a5"
"""Points of no weight: to be seen on a light page and on a dark one."""
_WEIGHTS = LinearSegmentedColormap.from_list("weights", [_QUIET, "#9c179e", "#ed7953", "#f0f921"])
"""From what does not stand out on any page to what does."""
_ABREAST = 3
"""Shapes in a row."""
_SHARP = 180
"""Dots an inch of the points, which are pictures inside of the drawing."""


def _outlines(axes: Axes, boxes: Tensor, colour: str, style: str, name: str) -> None:
    """Draw boxes, each with a line from its centre to its front."""
    corners = bev_corners(boxes.detach().cpu().double()).numpy()
    label: str | None = name
    for box, quad in zip(boxes.detach().cpu().double().numpy(), corners, strict=True):
        closed = np.concatenate([quad, quad[:1]])
        front = (quad[0] + quad[3]) / 2
        axes.plot(closed[:, 0], closed[:, 1], color=colour, lw=1.1, ls=style, label=label)
        axes.plot([box[0], front[0]], [box[1], front[1]], color=colour, lw=0.8)
        label = None


def _tracks(axes: Axes, trails: Mapping[int, np.ndarray]) -> None:
    """Draw where each track came from, and its number where it is."""
    label: str | None = "track"
    for identity, path in trails.items():
        axes.plot(path[:, 0], path[:, 1], color=ACCENT, lw=1.2, marker=".", ms=2.5, label=label)
        label = None
        axes.annotate(
            str(identity), path[-1], (4, 4), textcoords="offset points", color=ACCENT, fontsize=7, annotation_clip=True
        )


def extent(frame: Frame, reach: float = 45.0) -> tuple[float, float, float, float]:
    """Return where a frame has points or boxes, and the sensor: from x, to x, from y, to y in metres.

    Args:
        frame: what is to be seen.
        reach: metres from the sensor at most.
    """
    places = torch.cat([frame.points[:, :2], frame.boxes[:, :2].to(frame.points), frame.points.new_zeros(1, 2)])
    near = places[(places.abs() <= reach).all(1)]
    low, high = (near.amin(0) - 2).clamp_min(-reach).tolist(), (near.amax(0) + 2).clamp_max(reach).tolist()
    return low[0], high[0], low[1], high[1]


def birds_eye_plot(
    frame: Frame,
    *,
    detections: Detections | None = None,
    trails: Mapping[int, np.ndarray] | None = None,
    weights: Tensor | None = None,
    reach: float = 45.0,
    view: tuple[float, float, float, float] | None = None,
    title: str = "",
) -> Figure:
    """Return a frame from above: x to the right, y up, metres; boxes point to their front.

    Args:
        frame: points and true boxes; those marked ``ignore`` are dotted.
        detections: drawn in another colour.
        trails: identity -> path (T, 2) in the frame's coordinates, as of
            :func:`vision_robust.lidar.tracking.trails_of`.
        weights: (N,) in [0, 1], such as saliency: a colour for each point that has any, with a bar that tells it; by
            height when None.
        reach: metres from the sensor that are seen at most.
        view: from x, to x, from y, to y in metres, in the place of :func:`extent`.
        title: of the plot.
    """
    check_number("reach", reach, low=0, open_low=True)
    left, right, low, high = view or extent(frame, reach)
    figure, axes = canvas(5.4, 1.1 + 4.1 * float(np.clip((high - low) / (right - left), 0.3, 1.2)))
    figure.set_dpi(_SHARP)
    points = frame.points.detach().cpu()
    near = (points[:, 0] >= left) & (points[:, 0] <= right) & (points[:, 1] >= low) & (points[:, 1] <= high)
    colour = points[:, 2] if weights is None else weights.detach().cpu()
    points, colour = points[near], colour[near]
    if len(points) > _MOST_POINTS:
        kept = torch.linspace(0, len(points) - 1, _MOST_POINTS).long()
        points, colour = points[kept], colour[kept]
    dots = {"lw": 0, "rasterized": True, "zorder": 1.5}
    if weights is None:
        drawn = axes.scatter(*points[:, :2].numpy().T, c=colour.numpy(), s=1.2, vmin=-2.5, vmax=1.5, **dots)
        _bar(figure, drawn, axes, "height, m")
    else:
        quiet = colour <= 0
        axes.scatter(*points[quiet, :2].numpy().T, color=_QUIET, s=0.8, **dots)
        drawn = _weighed(axes, points[~quiet, :2].numpy(), colour[~quiet].numpy(), 7.0)
        _bar(figure, drawn, axes, "saliency")
    _outlines(axes, frame.boxes[~frame.ignore], COOL, "-", "true")
    _outlines(axes, frame.boxes[frame.ignore], MUTED, ":", "ignored")
    if detections is not None:
        _outlines(axes, detections.boxes, WARM, "-", "found")
    _tracks(axes, trails or {})
    axes.plot(0, 0, marker="^", color=INK, ms=5, ls="", label="sensor")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("x, m (forward)")
    axes.set_ylabel("y, m (left)")
    axes.grid(visible=True, color=LINE, linewidth=0.4)
    if title:
        axes.set_title(title, fontsize=9, color=INK)
    figure.legend(frameon=False, labelcolor=INK, fontsize=8, handlelength=1.6, loc="outside lower center", ncols=5)
    return figure


def _bar(figure: Figure, drawn: PathCollection, axes: Axes | list[Axes], label: str) -> None:
    """Draw the bar that tells the colours."""
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=18, pad=0.02)
    bar.set_label(label, color=INK, fontsize=8)
    bar.ax.tick_params(colors=MUTED, labelsize=7, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _weighed(axes: Axes, xy: np.ndarray, weights: np.ndarray, size: float) -> PathCollection:
    """Draw points in the colours of their weights, the weighty ones on top."""
    order = np.argsort(weights, kind="stable")
    return axes.scatter(
        xy[order, 0], xy[order, 1], c=weights[order], s=size, lw=0, rasterized=True, cmap=_WEIGHTS, vmin=0, vmax=1,
        zorder=1.6,
    )  # fmt: skip


def _aslant(points: np.ndarray) -> np.ndarray:
    """Return (N, 2) a shape (N, 3) seen from 20 degrees to the right and 15 above: y stays up, depth shows."""
    turn, tilt = math.radians(20), math.radians(15)
    x = points[:, 0] * math.cos(turn) - points[:, 2] * math.sin(turn)
    depth = points[:, 0] * math.sin(turn) + points[:, 2] * math.cos(turn)
    return np.stack([x, points[:, 1] * math.cos(tilt) - depth * math.sin(tilt)], 1)


def shapes_plot(
    clouds: Sequence[Tensor],
    captions: Sequence[str],
    right: Sequence[bool],
    *,
    weights: Sequence[Tensor] | None = None,
    title: str = "",
) -> Figure:
    """Return shapes in rows, seen aslant with y up; what is written under each is green or red.

    Args:
        clouds: (N_i, 3+) in the unit sphere.
        captions: what is said of each.
        right: whether that is right.
        weights: (N_i,) in [0, 1], such as saliency, a colour for each point, with a bar that tells it.
        title: of the plot.
    """
    columns, rows = min(len(clouds), _ABREAST), -(-len(clouds) // _ABREAST)
    figure, first = canvas(1.5 * columns + 0.6, 1.65 * rows + 0.2)
    figure.set_dpi(_SHARP)
    first.remove()
    every, drawn = list(figure.subplots(rows, columns, squeeze=False).flat), None
    for spare in every[len(clouds) :]:
        spare.remove()
    used = every[: len(clouds)]
    for i, (cloud, caption, good, axes) in enumerate(zip(clouds, captions, right, used, strict=True)):
        xy, size = (
            _aslant(cloud[:, :3].detach().cpu().double().numpy()),
            float(np.clip(1200 / max(len(cloud), 1), 3, 14)),
        )
        if weights is None:
            axes.scatter(*xy.T, color=_QUIET, s=size, lw=0, rasterized=True)
        else:
            drawn = _weighed(axes, xy, weights[i].detach().cpu().numpy(), size)
        axes.set_xlim(-1.15, 1.15)
        axes.set_ylim(-1.15, 1.15)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_title(f"{'✓' if good else '✗'} {caption}", fontsize=8, color=COOL if good else WARM, y=-0.14)
        axes.patch.set_alpha(0)
    if drawn is not None:
        _bar(figure, drawn, used, "saliency")
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return figure
