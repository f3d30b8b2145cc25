"""A detector of boxes in plain torch: pillars of points, a small network seen from above, a head at each centre.

Pillars: Lang and others 2019 (arXiv 1812.05784); centre heads: Yin, Zhou and Krähenbühl 2021 (arXiv 2006.11275),
without their second stage. One output map, so that a teacher's answer is one tensor: for each cell of the grid

    (B, n_classes + 8, H, W):  heat (logits) | centre from that of its cell, in cells (2) | z | log length, width,
                               height over the mean ones | sin, cos of yaw

Every point is used (no cap on points of a pillar or on pillars); absent points are never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_count, check_number
from vision_robust.lidar.boxes import nms
from vision_robust.lidar.types import Detections

__all__ = ["Grid", "PillarDetector"]

_NONE_HEAT = -2.19  # log-odds of 0.1, where heat starts: most cells hold nothing


@dataclass(frozen=True)
class Grid:
    """Where things are looked for: metres of the sensor's frame.

    Attributes:
        x: from and to, forward.
        y: from and to, to the left.
        cell: side of a pillar.
    """

    x: tuple[float, float] = (-32.0, 32.0)
    y: tuple[float, float] = (-32.0, 32.0)
    cell: float = 0.5

    def __post_init__(self) -> None:
        check_number("cell", self.cell, low=0.0, open_low=True)
        for name in ("x", "y"):
            low, high = getattr(self, name)
            if not low < high or round((high - low) / self.cell) % 2:
                raise ValueError(f"{name}={(low, high)}: an even number of cells of {self.cell} m is needed, from < to")

    @property
    def shape(self) -> tuple[int, int]:
        """H (cells along y) and W (cells along x)."""
        return round((self.y[1] - self.y[0]) / self.cell), round((self.x[1] - self.x[0]) / self.cell)

    def cells(self, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return flat cell (...) int64 of places (..., 2), the place within it in [0, 1), and whether it is inside."""
        h, w = self.shape
        scaled = (xy - xy.new_tensor([self.x[0], self.y[0]])) / self.cell
        whole = scaled.floor()
        inside = (whole >= 0).all(-1) & (whole[..., 0] < w) & (whole[..., 1] < h)
        flat = whole[..., 1].clamp(0, h - 1) * w + whole[..., 0].clamp(0, w - 1)
        return flat.long(), scaled - whole, inside

    def centres(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (W,) and y (H,) of the middles of the cells."""
        h, w = self.shape
        x = self.x[0] + self.cell * (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5)
        return x, self.y[0] + self.cell * (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    norm = nn.GroupNorm(min(8, outputs), outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm, nn.ReLU())


class PillarDetector(nn.Module):
    """Detect boxes: ``model(points (B, N, C), mask (B, N)) -> (B, n_classes + 8, H, W)``; see the module.

    Norms are of a sample, so that it may also be a teacher that is meta-learned.

    Args:
        n_classes: kinds of things.
        grid: where they are looked for.
        channels: C, columns that are read: x, y, z and more.
        width: of the network; twice as many channels at half the resolution.
        size: mean length, width and height in metres, from where sizes are told.
    """

    def __init__(
        self,
        n_classes: int,
        grid: Grid | None = None,
        *,
        channels: int = 4,
        width: int = 32,
        size: tuple[float, float, float] = (4.0, 1.8, 1.6),
    ) -> None:
        super().__init__()
        self.n_classes = check_count("n_classes", n_classes)
        self.channels = check_count("channels", channels, low=3)
        check_count("width", width, low=8)
        self.grid = grid or Grid()
        self.register_buffer("log_size", torch.tensor(size).log())
        self.point = nn.Sequential(nn.Linear(channels + 5, width), nn.LayerNorm(width), nn.ReLU())
        self.fine = nn.Sequential(_block(width, width), _block(width, width))
        self.coarse = nn.Sequential(
            _block(width, 2 * width, 2), _block(2 * width, 2 * width), _block(2 * width, 2 * width)
        )
        self.head = nn.Sequential(_block(3 * width, width), nn.Conv2d(width, n_classes + 8, 1))
        with torch.no_grad():
            self.head[-1].get_parameter("bias")[:n_classes] = _NONE_HEAT

    def pillars(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, width, H, W) features of the pillars, zero where there is no point."""
        grid, (h, w) = self.grid, self.grid.shape
        cell, within, there = grid.cells(points[..., :2].detach())
        there = there if mask is None else there & mask
        place = torch.where(there, cell, h * w)[..., None]  # a cell of its own for what is not there
        xyz = points[..., :3]
        zeros = xyz.new_zeros(len(xyz), h * w + 1, 3)
        spread = place.expand(-1, -1, 3)
        count = zeros[..., :1].scatter_add(1, place, torch.ones_like(xyz[..., :1]))
        mean = (zeros.scatter_add(1, spread, xyz) / count.clamp_min(1)).gather(1, spread)
        features = self.point(torch.cat([points[..., : self.channels], xyz - mean, within - 0.5], -1))
        wide = place.expand(-1, -1, features.shape[2])
        base = features.new_zeros(len(features), h * w + 1, features.shape[2])
        pooled = base.scatter_reduce(1, wide, features, "amax")[:, :-1]
        return pooled.transpose(1, 2).reshape(len(features), -1, h, w)

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the map of the module's docstring."""
        fine = self.fine(self.pillars(points, mask))
        coarse = F.interpolate(self.coarse(fine), scale_factor=2, mode="nearest")
        return self.head(torch.cat([fine, coarse], 1))

    def boxes(self, outputs: Tensor) -> Tensor:
        """Return (B, H * W, 7) the box that each cell tells of."""
        k = self.n_classes
        x, y = self.grid.centres(outputs)
        at = outputs[:, k : k + 2] * self.grid.cell
        centre = torch.stack([at[:, 0] + x, at[:, 1] + y[:, None], outputs[:, k + 2]], 1)
        size = (outputs[:, k + 3 : k + 6].clamp(-3, 3) + self.get_buffer("log_size")[:, None, None]).exp()
        yaw = torch.atan2(outputs[:, k + 6], outputs[:, k + 7])[:, None]
        return torch.cat([centre, size, yaw], 1).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def detect(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        *,
        threshold: float = 0.1,
        most: int = 100,
        overlap: float = 0.1,
    ) -> list[Detections]:
        """Return what is found in each cloud: peaks of heat of at least ``threshold``, the best ``most``, after NMS."""
        outputs = self(points, mask).float()
        heat = outputs[:, : self.n_classes].sigmoid()
        peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0).flatten(1)
        scores, places = peaks.topk(min(most, peaks.shape[1]), 1)
        boxes, cells = self.boxes(outputs), places % (heat.shape[2] * heat.shape[3])
        labels, found = places // (heat.shape[2] * heat.shape[3]), []
        for i in range(len(outputs)):
            sure = scores[i] >= threshold
            chosen, score, label = boxes[i, cells[i, sure]], scores[i, sure], labels[i, sure]
            kept = nms(chosen, score, overlap, labels=label)
            found.append(Detections(chosen[kept], label[kept], score[kept]))
        return found
