"""Policies with a certified Lipschitz constant: a network, a linear gain, an extension of values at points.

All are :class:`rl_robust.policy.Policy` and torch modules. ``lipschitz_bound()`` is an upper bound, in float64 and
rounded up, of the constant of the map that the stored weights define in exact arithmetic, Euclidean on both sides;
clipping to the action space is 1-Lipschitz and keeps it. Rounding in the forward pass is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from rl_robust.lipschitz.graph import extend, pair_ratio
from rl_robust.policy import Memory, sample_actions
from robust_core.certificates.lipschitz import matrix_norm
from robust_core.checks import check_choice, check_count, check_finite, check_number
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["GraphLipschitzPolicy", "LinearLipschitzPolicy", "LipschitzPolicy", "MaxMin", "clip_gain"]

ROOM = 1 - 1e-5
"""Layers orthogonal to float32 leave norms of 1 + 1e-6: the output is scaled so that the bound stays below alpha."""


class _Continuous(nn.Module):
    """What the three have in common: a Box of actions, and no randomness."""

    n_draws = 0

    def __init__(self, out_dim: int, action_space: spaces.Box | None) -> None:
        super().__init__()
        if action_space is None:
            action_space = spaces.Box(-np.inf, np.inf, (out_dim,), np.float32)
        if not isinstance(action_space, spaces.Box) or int(np.prod(action_space.shape)) != out_dim:
            raise ValueError(f"action_space={action_space}: a Box of {out_dim} numbers is needed")
        self.action_space: spaces.Space = action_space

    def outputs(self, obs: Tensor) -> Tensor:
        """Return (B, m) actions before they are cut to the action space, with gradient where there is one."""
        return self(obs)

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions; see :class:`rl_robust.policy.Policy`."""
        return sample_actions(self.outputs(obs), draws, None, self.action_space), None


class MaxMin(nn.Module):
    """Sort pairs of features (GroupSort 2): 1-Lipschitz, and keeps the norm of gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) from (B, K), K even."""
        pairs = x.unflatten(1, (-1, 2))
        return torch.cat([pairs.amax(2), pairs.amin(2)], 1)


class _Contraction(nn.Module):
    """Divide a matrix by its spectral norm where that exceeds 1: the last layer may be flatter than orthogonal."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight, ord=2).clamp(min=1.0)


class LipschitzPolicy(_Continuous):
    """A network whose constant cannot exceed ``lipschitz``, whatever training does.

    Args:
        in_dim, out_dim: sizes of observation and action.
        lipschitz: the bound (the paper's alpha), in units of action per unit of observation.
        hidden: widths; even for ``"maxmin"``.
        activation: ``"maxmin"`` or ``"tanh"``.
        action_space: actions are cut to it; unbounded when None.
        generator: seed of the initial weights.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        lipschitz: float,
        hidden: Sequence[int] = (64, 64, 64),
        activation: Literal["maxmin", "tanh"] = "maxmin",
        action_space: spaces.Box | None = None,
        generator: Seed = None,
    ) -> None:
        super().__init__(check_count("out_dim", out_dim), action_space)
        check_number("lipschitz", lipschitz, low=0, open_low=True)
        check_choice("activation", activation, ("maxmin", "tanh"))
        for width in hidden:
            if check_count("hidden", width) % 2 and activation == "maxmin":
                raise ValueError(f"hidden={tuple(hidden)}: MaxMin sorts pairs, widths must be even")
        self.lipschitz, self.activation = float(lipschitz), activation
        sizes = [check_count("in_dim", in_dim), *hidden]
        self.sizes, self.in_dim = (*sizes, out_dim), in_dim
        layers: list[nn.Module] = []
        with reseeded(resolve_seed(generator)):
            for before, after in pairwise(sizes):
                layers.append(parametrizations.orthogonal(nn.Linear(before, after), orthogonal_map="cayley"))
                layers.append(MaxMin() if activation == "maxmin" else nn.Tanh())
            last = nn.Linear(sizes[-1], out_dim)
            parametrize.register_parametrization(last, "weight", _Contraction())
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, m) from (B, n)."""
        return self.layers(x) * (ROOM * self.lipschitz)

    def lipschitz_bound(self) -> float:
        """Return ``alpha`` times the product of the exact norms of the layers, rounded up."""
        with torch.no_grad():
            norms = [matrix_norm(layer.weight) for layer in self.layers if isinstance(layer, nn.Linear)]
        return self.lipschitz * ROOM * math.prod(norms) * (1 + 1e-12)


def clip_gain(gain: Tensor, lipschitz: float) -> Tensor:
    """Return the nearest (m, n) matrix of spectral norm at most ``lipschitz``: its singular values are clipped."""
    left, sizes, right = torch.linalg.svd(gain, full_matrices=False)
    return (left * sizes.clamp(max=lipschitz)) @ right


class LinearLipschitzPolicy(_Continuous):
    """``u = K x`` with the largest singular value of K at most ``lipschitz``.

    Args:
        gain: (m, n); refused where it is too large, use :func:`clip_gain`.
        lipschitz: the bound.
        action_space: actions are cut to it.
    """

    gain: Tensor

    def __init__(self, gain: Tensor, *, lipschitz: float, action_space: spaces.Box | None = None) -> None:
        if gain.ndim != 2:
            raise ValueError(f"gain has shape {tuple(gain.shape)}; (m, n) is needed")
        super().__init__(gain.shape[0], action_space)
        self.lipschitz = float(check_number("lipschitz", lipschitz, low=0, open_low=True))
        self.in_dim = gain.shape[1]
        self.register_buffer("gain", check_finite("gain", gain).detach().double().clone())
        if self.lipschitz_bound() > self.lipschitz * (1 + 1e-8):
            raise ValueError(f"gain has norm {self.lipschitz_bound():.9g}, above lipschitz={lipschitz}; clip_gain it")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, m) from (B, n)."""
        return F.linear(x.to(self.gain.dtype), self.gain).to(x.dtype)

    def lipschitz_bound(self) -> float:
        """Return the largest singular value, rounded up."""
        return matrix_norm(self.gain)


class GraphLipschitzPolicy(_Continuous):
    """The extension of values at points, Lipschitz everywhere; see :func:`rl_robust.lipschitz.graph.extend`.

    Args:
        x: (N, n) distinct points.
        v: (N, m) values.
        lipschitz: all pairs must be within it.
        action_space: actions are cut to it.
    """

    x: Tensor
    v: Tensor

    def __init__(self, x: Tensor, v: Tensor, *, lipschitz: float, action_space: spaces.Box | None = None) -> None:
        if x.ndim != 2 or v.ndim != 2 or len(x) != len(v) or len(x) < 2:
            raise ValueError(f"x {tuple(x.shape)}, v {tuple(v.shape)}: (N, n) and (N, m) with N >= 2 are needed")
        super().__init__(v.shape[1], action_space)
        self.lipschitz = float(check_number("lipschitz", lipschitz, low=0, open_low=True))
        self.in_dim = x.shape[1]
        self.register_buffer("x", check_finite("x", x).detach().double().clone())
        self.register_buffer("v", check_finite("v", v).detach().double().clone())
        found = pair_ratio(self.x, self.v)
        if not found <= self.lipschitz:
            raise ValueError(f"the pairs have slope {found:.9g}, above lipschitz={lipschitz}; use lipschitz_values")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, m) from (B, n)."""
        return extend(self.x, self.v, self.lipschitz, x).to(x.dtype)

    def lipschitz_bound(self) -> float:
        """Return the constant of the extension, by the theorem; the pairs stored now are checked first.

        Raises:
            ValueError: values that were loaded since break the constant.
        """
        found = pair_ratio(self.x, self.v)
        if not found <= self.lipschitz:
            raise ValueError(f"the pairs have slope {found:.9g}, above lipschitz={self.lipschitz}")
        return self.lipschitz
