"""Networks for certified training: batch normalisation after every layer but the last, ReLU, no pooling by maxima.

``cnn7`` is that of Shi et al. 2021 (arXiv 2103.17268); the residual networks follow their description (one block for
each of three stages, a hidden linear layer in front of the logits), the details are reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_core.checks import check_count
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["cnn7", "mlp", "wide_resnet8"]

Size = tuple[int, int, int]


def _normalised(layer: nn.Module, batchnorm: bool) -> list[nn.Module]:
    """Return a layer without bias and its batch normalisation, or the layer as it is."""
    if not batchnorm:
        return [layer]
    norm = nn.BatchNorm2d(layer.out_channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(layer.out_features)  # pyright: ignore
    return [layer, norm]


def _check(n_classes: int, shape: Size) -> None:
    check_count("n_classes", n_classes, low=2)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape={shape}: (channels, height, width) is needed")


def mlp(
    n_classes: int,
    shape: Size,
    *,
    widths: Sequence[int] = (64, 64, 64, 64),
    batchnorm: bool = True,
    generator: Seed = None,
) -> nn.Sequential:
    """Return a network of fully connected layers.

    Args:
        n_classes: number of classes.
        shape: (channels, height, width) of the inputs.
        widths: units of each hidden layer.
        batchnorm: normalise behind each hidden layer.
        generator: seed of torch's initial weights; see ``ibp_init_`` for those of certified training.
    """
    _check(n_classes, shape)
    with reseeded(resolve_seed(generator)):
        layers: list[nn.Module] = [nn.Flatten()]
        before = math.prod(shape)
        for width in widths:
            layers += [*_normalised(nn.Linear(before, check_count("widths", width)), batchnorm), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.Linear(before, n_classes))


def cnn7(
    n_classes: int,
    shape: Size,
    *,
    width: int = 64,
    linear: int = 512,
    batchnorm: bool = True,
    generator: Seed = None,
) -> nn.Sequential:
    """Return the usual network of certified training: five 3x3 convolutions, one hidden linear layer, the logits.

    Args:
        n_classes: number of classes.
        shape: (channels, height, width) of the inputs.
        width: channels of the first two convolutions; the last three, the first of stride 2, have twice as many.
        linear: units of the hidden linear layer.
        batchnorm: normalise behind each layer but the last.
        generator: seed of torch's initial weights; see ``ibp_init_`` for those of certified training.
    """
    _check(n_classes, shape)
    channels, height, across = shape
    sizes = [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)]
    with reseeded(resolve_seed(generator)):
        layers: list[nn.Module] = []
        for out, stride in sizes:
            layers += [*_normalised(nn.Conv2d(channels, out, 3, stride, 1), batchnorm), nn.ReLU()]
            channels = out
        flat = channels * math.ceil(height / 2) * math.ceil(across / 2)
        layers += [nn.Flatten(), *_normalised(nn.Linear(flat, linear), batchnorm), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(linear, n_classes))


class _Block(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, ReLU behind their sum."""

    def __init__(self, channels: int, out: int, stride: int, groups: int, batchnorm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normalised(nn.Conv2d(channels, out, 3, stride, 1, groups=groups), batchnorm),
            nn.ReLU(),
            *_normalised(nn.Conv2d(out, out, 3, 1, 1, groups=groups), batchnorm),
        )
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_normalised(nn.Conv2d(channels, out, 1, stride), batchnorm))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def wide_resnet8(
    n_classes: int,
    shape: Size,
    *,
    widen: int = 4,
    groups: int = 1,
    linear: int = 512,
    batchnorm: bool = True,
    generator: Seed = None,
) -> nn.Sequential:
    """Return a residual network of eight layers with weights: a stem, three blocks, one hidden linear layer.

    Args:
        n_classes: number of classes.
        shape: (channels, height, width) of the inputs.
        widen: factor on the 16, 32 and 64 channels of the blocks.
        groups: of the convolutions in blocks; more than 1 gives a ResNeXt.
        linear: units of the hidden linear layer.
        batchnorm: normalise behind each layer but the last.
        generator: seed of torch's initial weights; see ``ibp_init_`` for those of certified training.
    """
    _check(n_classes, shape)
    channels, height, across = shape
    with reseeded(resolve_seed(generator)):
        layers: list[nn.Module] = [*_normalised(nn.Conv2d(channels, 16, 3, 1, 1), batchnorm), nn.ReLU()]
        channels = 16
        for stage, stride in ((16, 1), (32, 2), (64, 2)):
            layers.append(_Block(channels, stage * widen, stride, groups, batchnorm))
            channels = stage * widen
        flat = channels * math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(across / 2) / 2)
        layers += [nn.Flatten(), *_normalised(nn.Linear(flat, linear), batchnorm), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(linear, n_classes))
