"""Real shapes that need no download: scanned digits as clouds of points in the unit ball."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_core.checks import check_count
from robust_core.data import load
from robust_core.random import SampleStreams, Seed, resolve_seed

__all__ = ["digit_clouds"]


def digit_clouds(
    split: str = "train", *, n_points: int = 64, copies: int = 1, generator: Seed = None
) -> dict[str, Tensor]:
    """Return digits as columns ``x`` (S, n_points, 3), ``y`` (S,) and ``image`` (S,), the position of the scan.

    A point is a pixel drawn in proportion to its ink, somewhere within the pixel, at half its ink's height; a cloud is
    centred and scaled into the unit ball. Each of ``copies`` draws other points from the same scans.
    """
    check_count("n_points", n_points)
    check_count("copies", copies)
    data = load("digits", split=split)
    batch = data.batch(range(len(data)))
    ink = batch["x"].flatten(1)
    image = torch.arange(len(ink)).repeat(copies)
    streams = SampleStreams(resolve_seed(generator), torch.arange(len(image)), f"digit clouds/{split}")
    u = streams.uniform((n_points, 3))
    total = ink.cumsum(1)[image].contiguous()
    pixel = torch.searchsorted(total, u[..., 0] * total[:, -1:]).clamp_max(ink.shape[1] - 1)
    side = batch["x"].shape[-1]
    column, row = pixel % side + u[..., 1] - 0.5, pixel // side + u[..., 2] - 0.5
    x = torch.stack([column, -row, 0.5 * ink[image].gather(1, pixel)], -1)
    x = x - x.mean(1, keepdim=True)
    return {"x": x / x.norm(dim=-1).amax(1)[:, None, None], "y": batch["y"].repeat(copies), "image": image}
