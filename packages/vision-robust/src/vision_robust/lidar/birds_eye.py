"""Frames seen from above, as figures for papers and pages: points, boxes, detections, tracks, weights of points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from robust_core.checks import check_number
from robust_core.evaluation.plots import ACCENT, COOL, LINE, MUTED, WARM, canvas, legend
from vision_robust.lidar.boxes import bev_corners
from vision_robust.lidar.types import Detections, Frame

__all__ = ["birds_eye_plot"]

_MOST_POINTS = 30_000


def _outlines(axes: object, boxes: Tensor, colour: str, style: str, name: str) -> None:
    """Draw boxes, each with a line from its centre to its front."""
    corners = bev_corners(boxes.detach().cpu().double()).numpy()
    label: str | None = name
    for box, quad in zip(boxes.detach().cpu().double().numpy(), corners, strict=True):
        closed = np.concatenate([quad, quad[:1]])
        front = (quad[0] + quad[3]) / 2
        axes.plot(closed[:, 0], closed[:, 1], color=colour, lw=1.1, ls=style, label=label)  # pyright: ignore
        axes.plot([box[0], front[0]], [box[1], front[1]], color=colour, lw=0.8)  # pyright: ignore
        label = None


def birds_eye_plot(
    frame: Frame,
    *,
    detections: Detections | None = None,
    trails: Sequence[np.ndarray] = (),
    weights: Tensor | None = None,
    reach: float = 45.0,
    title: str = "",
) -> Figure:
    """Return a frame from above: x to the right, y up, metres; boxes point to their front.

    Args:
        frame: points and true boxes; those marked ``ignore`` are dashed.
        detections: drawn in another colour.
        trails: paths (T, 2) in the frame's coordinates, such as those of tracks.
        weights: (N,) in [0, 1], a colour for each point; by height when None.
        reach: metres to every side.
        title: of the plot.
    """
    check_number("reach", reach, low=0, open_low=True)
    figure, axes = canvas(4.8, 4.8)
    points = frame.points.detach().cpu()
    near = (points[:, :2].abs() <= reach).all(1)
    colour = points[:, 2].clamp(-2.5, 1.5) if weights is None else weights.detach().cpu()
    points, colour = points[near], colour[near]
    if len(points) > _MOST_POINTS:
        kept = torch.linspace(0, len(points) - 1, _MOST_POINTS).long()
        points, colour = points[kept], colour[kept]
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), c=colour.numpy(), s=0.6, lw=0, rasterized=True,
                 cmap="viridis" if weights is None else "plasma")  # fmt: skip
    _outlines(axes, frame.boxes[~frame.ignore], COOL, "-", "true")
    _outlines(axes, frame.boxes[frame.ignore], MUTED, ":", "ignored")
    if detections is not None:
        _outlines(axes, detections.boxes, WARM, "-", "found")
    for trail in trails:
        axes.plot(trail[:, 0], trail[:, 1], color=ACCENT, lw=1.0)
    axes.plot(0, 0, marker="^", color=ACCENT, ms=5)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_xlabel("x, m (forward)")
    axes.set_ylabel("y, m (left)")
    axes.grid(visible=True, color=LINE, linewidth=0.4)
    if title:
        axes.set_title(title, fontsize=9)
    if len(frame.boxes) or detections is not None:
        legend(axes, loc="upper right")
    return figure
