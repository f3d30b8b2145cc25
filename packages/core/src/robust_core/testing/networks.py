"""Small random networks of every supported shape, for property tests and fuzzing of certifiers.

Weights come from the given seed alone; the global random state is left as found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.models import Normalize
from robust_core.random import stream

__all__ = ["KINDS", "planted_network", "random_network"]

KINDS = ("mlp", "conv", "residual", "pooling", "smooth", "deep")


class Residual(nn.Module):
    """A residual block with batch normalisation, a projection shortcut and functional calls."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride)."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


def _mlp(d: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 7), nn.ReLU(), nn.Linear(7, 6), nn.LeakyReLU(0.1), nn.Linear(6, classes))


def _deep(d: int, classes: int) -> nn.Module:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())]
    return nn.Sequential(nn.Linear(d, 5), nn.ReLU(), *hidden, nn.Dropout(0.5), nn.Linear(5, classes))


def _smooth(d: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, classes))


def _conv(d: int, classes: int) -> nn.Module:
    return nn.Sequential(
        Normalize([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, classes),
    )


def _pooling(d: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, classes),
    )


def _residual(d: int, classes: int) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), Residual(3, 4, 2), *head)


_BUILDERS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (5,)),
    "conv": (_conv, (2, 6, 6)),
    "residual": (_residual, (2, 6, 6)),
    "pooling": (_pooling, (2, 6, 6)),
    "smooth": (_smooth, (5,)),
    "deep": (_deep, (5,)),
}


def random_network(
    seed: int, kind: str, *, n_classes: int = 3, n_samples: int = 4, scale: float = 1.0
) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode and inputs (n_samples, ...) in [0, 1], all drawn from ``seed``.

    Args:
        seed: integer seed.
        kind: one of :data:`KINDS`.
        n_classes: number of logits.
        n_samples: number of inputs.
        scale: multiplies every weight.
    """
    build, shape = _BUILDERS[kind]
    with torch.random.fork_rng(devices=[]):
        model = build(int(torch.Size(shape).numel()), n_classes)
    generator = stream(seed, 0, "random network")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or (name.endswith(("mean", "std")) and "running" not in name):
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(drawn.square() + 0.1)
            elif tensor.ndim > 1:
                tensor.copy_(scale * drawn * (2.0 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.5 * drawn)
    x = torch.rand((n_samples, *shape), generator=generator)
    return model.eval(), x


def planted_network(seed: int, *, eps: float, d: int = 6, steep: float = 200.0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, one input and a counter-example hidden in a corner of its Linf ball.

    A detector fires only where every coordinate is within a hundredth of ``eps`` of that corner, where random points
    and gradients do not lead; there, and only there, class 1 wins.
    """
    generator = stream(seed, 0, "planted")
    x = 0.3 + 0.4 * torch.rand(1, d, generator=generator)
    signs = torch.randint(0, 2, (d,), generator=generator) * 2.0 - 1
    corner = x + signs * eps * (1 - 1e-4)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(d, d + 3), nn.ReLU(), nn.Linear(d + 3, 2))
    first, last = model[0], model[2]
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        raise TypeError("the planted network starts and ends with dense layers")
    with torch.no_grad():
        first.weight.copy_(0.3 * torch.randn(first.weight.shape, generator=generator))
        first.bias.copy_(0.3 * torch.randn(d + 3, generator=generator))
        last.weight.copy_(0.1 * torch.randn(last.weight.shape, generator=generator))
        # The last hidden unit is the detector: signs . (x - corner) + margin > 0 near the corner alone.
        first.weight[-1] = signs * steep
        first.bias[-1] = steep * (-(signs * corner[0]).sum() + 0.01 * eps * d)
        last.weight[:, -1] = 0
        calm = model(x)[0]
        last.bias[0] += 1.0 - (calm[0] - calm[1]) + 4 * eps * d
        height = float(model(corner)[0].diff().abs() + 1.0)
        last.weight[1, -1] = height / float(torch.relu(first(corner))[0, -1])
    return model.eval(), x, corner
