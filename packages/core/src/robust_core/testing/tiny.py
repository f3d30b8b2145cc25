"""Tiny real networks, trained in a second on the bundled digits, for tests and examples."""

from __future__ import annotations

import copy
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.data import load
from robust_core.random import derive, reseeded
from robust_core.threats import Linf
from robust_core.training.inner import FastPGD

__all__ = ["digits", "digits_cnn", "linear_binary"]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return the bundled test digits: x (N, 1, 8, 8) in [0, 1] and y (N,) int64. Do not write into them."""
    data = load("digits", split="test")
    return data.x, data.y


def digits_cnn(kind: Literal["plain", "adversarial"] = "plain", *, seed: int = 0) -> nn.Sequential:
    """Return a fresh copy of a small convolutional network for the digits, in eval mode.

    Args:
        kind: ``"plain"`` (about 97 % clean) or ``"adversarial"``, trained against Linf(0.15).
        seed: of initial weights and order.
    """
    return copy.deepcopy(_trained(kind, seed))


@cache
def _trained(kind: str, seed: int) -> nn.Sequential:
    with reseeded(seed):
        layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
    data = load("digits", split="train")
    attack = FastPGD(Linf(0.15), n_iter=3, step_size=0.125)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for epoch in range(12):
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(derive(seed, "order", epoch)))
        for rows in order.split(64):
            x, y = data.x[rows], data.y[rows]
            if kind == "adversarial":
                x = attack(net, x, y, index=rows, generator=derive(seed, "attack", epoch))
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
    return net.eval().requires_grad_(True)


def linear_binary(n_features: int = 6, *, seed: int = 0) -> nn.Sequential:
    """Return a linear two-class network: every distance to its boundary has a closed form."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(n_features, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, n_features, generator=generator))
        linear.bias.copy_(torch.randn(2, generator=generator) * 0.1)
    return nn.Sequential(nn.Flatten(), linear).eval()
