r"""Gradients from function values alone, for training in front of something that only answers queries.

Two estimates of the gradient of a loss l at z, both from differences over a distance ``spread`` (the papers' mu):

- random directions, ``(d / q) sum_i (l(z + mu u_i) - l(z)) / mu * u_i``, u_i uniform on the unit sphere of R^d ->
  :func:`random_gradient`: q + 1 queries for each sample whatever d is, unbiased as mu -> 0, with
  ``E |g - grad|^2 = (d - 1) / q |grad|^2`` on linear functions (and their limit);
- coordinates, ``(l(z + mu e_j) - l(z - mu e_j)) / (2 mu)`` in coordinate j -> :func:`coordinate_gradient`: 2 d queries,
  exact on quadratics; one-sided d + 1 queries.

:func:`surrogate_loss` carries an estimate back through the part of a model that is differentiable:
``mean_i <z_i, g_i>`` has the gradient J' g.

Source: Liu et al. 2020, "A Primer on Zeroth-Order Optimization" (arXiv 2006.06224), section III; the variance is
derived. The attack on scores in :mod:`robust_core.attacks.zeroth_order` keeps its probes inside the domain of its
threat and draws signs, and has its own loop.

Every sample has its own directions, drawn in one go: estimates do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.random import Seed, resolve_seed, stream

__all__ = [
    "GradientEstimate",
    "PointLoss",
    "coordinate_gradient",
    "coordinate_queries",
    "random_gradient",
    "random_queries",
    "surrogate_loss",
]

PointLoss = Callable[[Tensor, Tensor], Tensor]
"""(points (m, ...), rows (m,) int64: the sample that each point belongs to) -> (m,) losses."""


@dataclass(frozen=True)
class GradientEstimate:
    """An estimated gradient, with what it cost.

    Attributes:
        gradient: (B, ...) like z.
        value: (B,) the loss at z (of central differences: the mean over all probes, off by O(spread^2)).
        queries: points that were evaluated, in all.
    """

    gradient: Tensor
    value: Tensor
    queries: int


def random_queries(n_directions: int) -> int:
    """Return the queries that :func:`random_gradient` makes for each sample."""
    return n_directions + 1


def coordinate_queries(dimension: int, *, central: bool = True) -> int:
    """Return the queries that :func:`coordinate_gradient` makes for each sample of ``dimension`` numbers."""
    return 2 * dimension if central else dimension + 1


@torch.no_grad()
def random_gradient(
    loss: PointLoss,
    z: Tensor,
    *,
    n_directions: int,
    spread: float,
    index: Tensor | None = None,
    generator: Seed = None,
    batch_size: int = 1024,
) -> GradientEstimate:
    """Estimate the gradient of ``loss`` at z from random directions.

    Args:
        loss: (points, rows) -> losses.
        z: (B, ...) points.
        n_directions: directions for each sample.
        spread: distance of the probes, above 0.
        index: (B,) int64 positions in the original data set, which name the directions; 0 .. B-1 by default.
        generator: seed of the directions; give another one in each step.
        batch_size: points in one call of ``loss``, at most.
    """
    check_count("n_directions", n_directions)
    _check(z, spread, batch_size)
    seed, names = resolve_seed(generator), list(range(len(z))) if index is None else index.tolist()

    def steps(rows: range) -> Tensor:
        drawn = z.new_empty((len(rows), n_directions, z[0].numel()))
        for place, row in enumerate(rows):
            source = stream(seed, names[row], "zeroth-order/directions", device=z.device)
            drawn[place].normal_(generator=source)
        return drawn.mul_(spread / torch.linalg.vector_norm(drawn, dim=2, keepdim=True))

    base = torch.cat([values for _, _, values in _probe(loss, z, None, 1, batch_size)]).squeeze(1)
    scale = z[0].numel() / (n_directions * spread**2)
    parts = []
    for rows, step, values in _probe(loss, z, steps, n_directions, batch_size):
        rise = (values - base[rows.start : rows.stop, None]).to(z.dtype)
        parts.append(torch.bmm(rise[:, None], step).squeeze(1) * scale)
    gradient = torch.cat(parts).reshape(z.shape)
    return GradientEstimate(gradient, base, len(z) * random_queries(n_directions))


@torch.no_grad()
def coordinate_gradient(
    loss: PointLoss, z: Tensor, *, spread: float, central: bool = True, batch_size: int = 1024
) -> GradientEstimate:
    """Estimate the gradient of ``loss`` at z coordinate by coordinate.

    Args:
        loss: (points, rows) -> losses.
        z: (B, ...) points.
        spread: distance of the probes, above 0.
        central: look to both sides; one-sided differences need half the queries and are exact on linear functions only.
        batch_size: points in one call of ``loss``, at most.
    """
    _check(z, spread, batch_size)
    dimension = z[0].numel()
    axes = spread * torch.eye(dimension, dtype=z.dtype, device=z.device)[None]
    axes = torch.cat([axes, -axes], 1) if central else axes
    values = torch.cat([v for _, _, v in _probe(loss, z, lambda rows: axes, axes.shape[1], batch_size)])
    if central:
        value = values.mean(1)
        slope = (values[:, :dimension] - values[:, dimension:]) / (2 * spread)
    else:
        value = torch.cat([v for _, _, v in _probe(loss, z, None, 1, batch_size)]).squeeze(1)
        slope = (values - value[:, None]) / spread
    queries = len(z) * coordinate_queries(dimension, central=central)
    return GradientEstimate(slope.to(z.dtype).reshape(z.shape), value, queries)


def surrogate_loss(z: Tensor, estimate: GradientEstimate) -> Tensor:
    """Return a scalar whose value is the mean loss and whose gradient is that of ``mean_i <z_i, g_i>``.

    Args:
        z: (B, ...) with gradient, where the estimate was made.
        estimate: at z.
    """
    linear = (z * estimate.gradient).flatten(1).sum(1).mean()
    return linear - linear.detach() + estimate.value.mean().to(z.dtype)


def _check(z: Tensor, spread: float, batch_size: int) -> None:
    check_number("spread", spread, low=0, open_low=True)
    check_count("batch_size", batch_size)
    if z.ndim < 2 or not len(z) or not z[0].numel() or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} of shape {tuple(z.shape)}; a floating-point batch (B, ...) is needed")


def _probe(
    loss: PointLoss, z: Tensor, steps: Callable[[range], Tensor] | None, n: int, batch_size: int
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield (rows, their steps (1 or g, n, d), losses (g, n)) for groups of samples that fill a batch."""
    z = z.detach()
    group = max(1, batch_size // n)
    for start in range(0, len(z), group):
        rows = range(start, min(start + group, len(z)))
        flat = z[rows.start : rows.stop].flatten(1)[:, None]
        step = flat.new_zeros(()) if steps is None else steps(rows)
        points = (flat + step).reshape(-1, *z.shape[1:])
        which = torch.arange(rows.start, rows.stop, device=z.device).repeat_interleave(n)
        values = [
            _losses(loss, part, owners)
            for part, owners in zip(points.split(batch_size), which.split(batch_size), strict=True)
        ]
        yield rows, step, torch.cat(values).reshape(len(rows), n)


def _losses(loss: PointLoss, points: Tensor, rows: Tensor) -> Tensor:
    values = loss(points, rows)
    if values.shape != (len(points),):
        raise ValueError(f"loss returned {tuple(values.shape)} for {len(points)} points; one value for each is needed")
    return values
