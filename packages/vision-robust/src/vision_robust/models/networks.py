"""Small standard networks for images of any size and channel count, inputs in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["SmallCNN", "resnet18_32"]


class SmallCNN(nn.Module):
    """Three convolutions and two affine layers, made of layers that every certifier of core can bound.

    Args:
        n_classes: number of classes C.
        shape: (channels, height, width) of the inputs, sides of at least 4.
        width: channels of the first convolution; the second and third have twice as many.
        generator: seed of the initial weights; the global random state is left alone.
    """

    def __init__(self, n_classes: int, shape: tuple[int, int, int], *, width: int = 16, generator: Seed = None) -> None:
        super().__init__()
        channels, height, _ = shape
        if min(shape[1:]) < 4 or n_classes < 2:
            raise ValueError(f"shape={shape}, n_classes={n_classes}: sides of at least 4 and two classes are needed")
        stride = 1 if height < 16 else 2
        with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
            self.features = nn.Sequential(
                nn.Conv2d(channels, width, 3, stride=stride, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
            )
            with torch.no_grad():
                length = self.features(torch.zeros(1, *shape)).shape[1]
            self.hidden = nn.Sequential(nn.Linear(length, 8 * width), nn.ReLU())
            self.linear = nn.Linear(8 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits."""
        return self.linear(self.hidden(self.features(x)))


def resnet18_32(n_classes: int = 10, *, channels: int = 3, generator: Seed = None) -> nn.Module:
    """Return torchvision's ResNet-18 with the stem that images of about 32 x 32 pixels want: 3x3, no pooling."""
    import torchvision  # only here: importing it takes seconds

    with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
        network = torchvision.models.resnet18(num_classes=n_classes)
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.add_module("maxpool", nn.Identity())
    return network
