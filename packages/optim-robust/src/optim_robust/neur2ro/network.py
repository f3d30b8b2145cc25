"""The set-based network: the value of the inner problem as a function of two sets, decisions and uncertain items.

``Q_hat(x, xi) = v([rho_x(sum_i phi_x(x_i, f_i)), rho_xi(sum_j phi_xi(xi_j, g_j))])``: order does not matter, the
number of items is free, and each of phi, rho, v is Linear-ReLU-Linear, so that a mixed-integer program can hold it.
phi has no bias: padded items are zero and add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count

__all__ = ["SetValueNetwork"]


def _stack(widths: Sequence[int], *, bias: bool) -> nn.Sequential:
    layers = nn.Sequential()
    for position, (a, b) in enumerate(pairwise(widths)):
        if position:
            layers.append(nn.ReLU())
        layers.append(nn.utils.skip_init(nn.Linear, a, b, bias=bias))
    return layers


class SetValueNetwork(nn.Module):
    """Predict the value of the inner problem from features of items.

    Defaults are the published network for the knapsack (Dumouchelle, Julien, Kurtz and Khalil 2024).

    Args:
        x_dim: features of one decision, the decision itself first.
        xi_dim: features of one uncertain item.
        embed: widths of phi: hidden layers and output.
        post: widths of rho.
        value: hidden widths of v.
        agg: ``"sum"`` over items, or ``"mean"`` over those that are there.
        bias_embed: give phi a bias; padded items are then left out by masks alone.
        bias_post: give rho a bias.
        generator: seed of the weights.

    Raises:
        ValueError: a width below 1, an unknown ``agg``.
    """

    def __init__(
        self,
        x_dim: int,
        xi_dim: int,
        *,
        embed: Sequence[int] = (32, 16),
        post: Sequence[int] = (64, 8),
        value: Sequence[int] = (8,),
        agg: str = "sum",
        bias_embed: bool = False,
        bias_post: bool = False,
        generator: int = 0,
    ) -> None:
        super().__init__()
        for name, widths in (
            ("x_dim", (x_dim,)),
            ("xi_dim", (xi_dim,)),
            ("embed", embed),
            ("post", post),
            ("value", value),
        ):
            for width in widths:
                check_count(name, width)
        self.agg = check_choice("agg", agg, ("sum", "mean"))
        self.options: dict[str, Any] = {
            "x_dim": x_dim, "xi_dim": xi_dim, "embed": list(embed), "post": list(post), "value": list(value),
            "agg": agg, "bias_embed": bias_embed, "bias_post": bias_post,
        }  # fmt: skip
        self.embed_x = _stack((x_dim, *embed), bias=bias_embed)
        self.embed_xi = _stack((xi_dim, *embed), bias=bias_embed)
        self.post_x = _stack((embed[-1], *post), bias=bias_post)
        self.post_xi = _stack((embed[-1], *post), bias=bias_post)
        self.value = _stack((2 * post[-1], *value, 1), bias=True)
        self._draw(generator)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draw the weights as torch does, from a stream of their own: the global state stays as it is."""
        stream = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.copy_((torch.rand(parameter.shape, generator=stream) * 2 - 1) * bound)

    def encode_x(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, post) from items (B, n, x_dim) and a mask (B, n) that is True where there is an item."""
        return self.post_x(self._pool(self.embed_x(items), mask))

    def encode_xi(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, post) from items (B, m, xi_dim) and a mask (B, m)."""
        return self.post_xi(self._pool(self.embed_xi(items), mask))

    def _pool(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            embedded = embedded * mask.unsqueeze(-1)
        pooled = embedded.sum(1)
        if self.agg == "mean":
            n = embedded.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
            pooled = pooled / n
        return pooled

    def forward(
        self, x_items: Tensor, xi_items: Tensor, x_mask: Tensor | None = None, xi_mask: Tensor | None = None
    ) -> Tensor:
        """Return (B,) predictions, or (k B,) for k batches of scenarios.

        Args:
            x_items: (B, n, x_dim).
            xi_items: (B, m, xi_dim), or (k B, m, xi_dim): k batches of scenarios, one after another, for the same x.
            x_mask: (B, n) True where there is an item; all by default.
            xi_mask: (B, m).

        Raises:
            ValueError: wrong shapes.
        """
        for name, items, width in (("x_items", x_items, "x_dim"), ("xi_items", xi_items, "xi_dim")):
            if items.ndim != 3 or items.shape[2] != self.options[width]:
                raise ValueError(f"{name} has shape {tuple(items.shape)}; (B, items, {self.options[width]}) is needed")
        z_x, z_xi = self.encode_x(x_items, x_mask), self.encode_xi(xi_items, xi_mask)
        if not len(z_x) or len(z_xi) % len(z_x):
            raise ValueError(f"xi_items holds {len(z_xi)} rows; a multiple of the {len(z_x)} rows of x_items is needed")
        if len(z_xi) > len(z_x):
            z_x = z_x.repeat(len(z_xi) // len(z_x), 1)
        return self.value(torch.cat([z_x, z_xi], dim=1)).squeeze(1)
