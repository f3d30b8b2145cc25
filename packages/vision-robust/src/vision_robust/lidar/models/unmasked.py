"""Your own network, which reads clouds of one size and knows no mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice

__all__ = ["LAYOUTS", "Unmasked"]

LAYOUTS = ("BNC", "BCN")


class Unmasked(nn.Module):
    """Call a network that knows no mask: absent points are stood in for by present ones of the same cloud.

    A network that pools by a maximum does not see the copies; one that averages, or looks for neighbours, does: that is
    what such a network meets in use, where clouds are filled up the same way.

    Args:
        model: reads (B, N, C) or (B, C, N).
        layout: one of :data:`LAYOUTS`.
        channels: columns that it reads; all if None.
    """

    def __init__(self, model: nn.Module, *, layout: str = "BNC", channels: int | None = None) -> None:
        super().__init__()
        check_choice("layout", layout, LAYOUTS)
        self.model, self.layout, self.channels = model, layout, channels

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what the network says of the clouds; an empty cloud stands in with its first place."""
        if mask is not None:
            order = torch.argsort(~mask, dim=1, stable=True)  # those that are there first, then cycled through
            place = torch.arange(mask.shape[1], device=mask.device) % mask.sum(1, keepdim=True).clamp_min(1)
            source = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), order.gather(1, place))
            points = points.gather(1, source[..., None].expand(-1, -1, points.shape[2]))
        x = points if self.channels is None else points[..., : self.channels]
        return self.model(x if self.layout == "BNC" else x.transpose(1, 2))
