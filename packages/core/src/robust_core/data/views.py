"""Views of tensors without torchvision: several augmented versions of one batch, one draw for each sample.

Buys: weak and strong views for self- and semi-supervised methods on tensors of any device, where a batch transform
of torchvision draws once for the whole batch. Each sample's draw depends on (seed, index, view, step) only::

    views = Views(weak=(flip, random_crop), strong=(flip, random_crop, jitter_affine, cutout), n=2)
    out = views(batch["x"], batch["index"], generator=0, step=epoch)  # {"weak": ..., "strong_0": ..., "strong_1": ...}

Weak views flip and crop after reflecting 12.5 % of the side (FixMatch, 2001.07685). Full RandAugment and the SimCLR
set are torchvision's, in packages that depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from robust_core.checks import check_count, check_number
from robust_core.data.corruptions.filters import border
from robust_core.random import SampleStreams, Seed, resolve_seed

__all__ = ["Views", "cutout", "flip", "gaussian_noise", "jitter_affine", "random_crop", "random_resized_crop"]

Transform = Callable[[Tensor, SampleStreams], Tensor]


class Views:
    """Named views of a batch.

    Args:
        n: number of draws of each view; with more than one they are called ``name_0``, ``name_1``, ...
        **views: name -> transforms, applied in order; each is called as ``transform(x, streams)``.
    """

    def __init__(self, n: int = 1, **views: tuple[Transform, ...] | Transform) -> None:
        check_count("n", n)
        if not views:
            raise ValueError("give at least one view, e.g. Views(weak=flip)")
        self.n = n
        self.views = {name: view if isinstance(view, tuple) else (view,) for name, view in views.items()}

    def __call__(self, x: Tensor, index: Tensor, *, generator: Seed = None, step: int = 0) -> dict[str, Tensor]:
        """Return name -> (B, ...) view.

        Args:
            x: (B, ...) inputs.
            index: (B,) positions of the samples in the original data.
            generator: seed of the run.
            step: changes the draws, e.g. the epoch.
        """
        seed, out = resolve_seed(generator), {}
        if index.shape != (len(x),):
            raise ValueError(f"index has shape {tuple(index.shape)}; ({len(x)},) is needed, one for each sample")
        for name, transforms in self.views.items():
            for copy in range(self.n):
                view = x
                for place, transform in enumerate(transforms):
                    purpose = f"view/{name}/{copy}/{place}/{step}"
                    view = transform(view, SampleStreams(seed, index.to(x.device), purpose))
                out[name if self.n == 1 else f"{name}_{copy}"] = view
        return out


def _images(x: Tensor) -> tuple[int, int]:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; images (B, C, H, W) are needed")
    return x.shape[2], x.shape[3]


def flip(x: Tensor, streams: SampleStreams) -> Tensor:
    """Mirror half of the images left to right."""
    _images(x)
    return torch.where(streams.uniform((1, 1, 1)) < 0.5, x.flip(3), x)


def random_crop(x: Tensor, streams: SampleStreams, *, share: float = 0.125) -> Tensor:
    """Shift each image by up to ``share`` of its sides; what comes in is reflected."""
    h, w = _images(x)
    reach = [max(1, round(side * check_number("share", share, low=0, high=0.5))) for side in (h, w)]
    u = streams.uniform((2,))
    rows, columns = (
        border(torch.arange(n, device=x.device) + (u[:, i] * (2 * r + 1)).to(torch.int64)[:, None] - r, n, "mirror")
        for i, (n, r) in enumerate(zip((h, w), reach, strict=True))
    )
    flat = (rows[:, :, None] * w + columns[:, None, :]).reshape(len(x), 1, -1)
    return x.flatten(2).gather(2, flat.expand(-1, x.shape[1], -1)).reshape(x.shape)


def random_resized_crop(
    x: Tensor,
    streams: SampleStreams,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut a random box out of each image and enlarge it, bilinearly, to the size of the whole.

    Args:
        x: (B, C, H, W).
        streams: the samples' numbers.
        scale: least and largest area of the box, as a share of the image's; drawn uniformly.
        ratio: least and largest ratio of width to height, in units of the image's own; its logarithm is drawn
            uniformly. A side that would not fit is cut to the image.
    """
    _images(x)
    check_number("scale[0]", scale[0], low=0, high=check_number("scale[1]", scale[1], low=0, high=1), open_low=True)
    check_number("ratio[0]", ratio[0], low=0, high=check_number("ratio[1]", ratio[1], low=0), open_low=True)
    u = streams.uniform((4,), dtype=x.dtype)
    area = scale[0] + u[:, 0] * (scale[1] - scale[0])
    stretch = torch.exp(math.log(ratio[0]) + u[:, 1] * math.log(ratio[1] / ratio[0]))
    width, height = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    zero = torch.zeros_like(area)
    rows = [
        torch.stack([width, zero, (2 * u[:, 2] - 1) * (1 - width)], 1),
        torch.stack([zero, height, (2 * u[:, 3] - 1) * (1 - height)], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def jitter_affine(
    x: Tensor, streams: SampleStreams, *, degrees: float = 15, shift: float = 0.1, scale: float = 0.1
) -> Tensor:
    """Turn, shift and scale each image a little, bilinearly; what comes in is the border's value.

    Args:
        x: (B, C, H, W).
        streams: the samples' numbers.
        degrees: largest angle.
        shift: largest shift, as a share of the side.
        scale: largest change of size.
    """
    _images(x)
    u = streams.uniform((4,), dtype=x.dtype) * 2 - 1
    angle = torch.deg2rad(u[:, 0] * degrees)
    size = 1 + u[:, 1] * check_number("scale", scale, low=0, high=0.9)
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [torch.stack([cos, -sin, 2 * shift * u[:, 2]], 1), torch.stack([sin, cos, 2 * shift * u[:, 3]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def gaussian_noise(x: Tensor, streams: SampleStreams, *, sigma: float = 0.1) -> Tensor:
    """Add N(0, sigma^2) and clip to [0, 1]."""
    check_number("sigma", sigma, low=0)
    return (x + sigma * streams.normal(x.shape[1:], dtype=x.dtype)).clamp(0, 1)


def cutout(x: Tensor, streams: SampleStreams, *, share: float = 0.5, fill: float = 0.5) -> Tensor:
    """Cover a square of ``share`` of the shorter side, centred anywhere in the image, with ``fill``."""
    h, w = _images(x)
    half = max(1, round(min(h, w) * check_number("share", share, low=0, high=1))) / 2
    u = streams.uniform((2, 1))
    rows, columns = ((torch.arange(n, device=x.device) + 0.5 - u[:, i] * n).abs() < half for i, n in enumerate((h, w)))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], fill)
