"""Components: prototypes with a distance and a reach, and how strongly each is detected in an input.

A component is detected with probability ``d_k(x) = exp(-t_k(x))``, ``t_k = g(delta_k(x)) / sigma_k``, where ``g`` is
the identity, or the square for ``distance="squared"``. Distances are computed from differences: the usual expansion
``|x|^2 - 2 x w + |w|^2`` loses all digits near a prototype, and no error bound would hold for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count, check_inputs, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["DISTANCES", "Components", "euclidean_distance", "sigma_rule", "tangent_distance"]

DISTANCES = ("euclidean", "squared", "tangent")
LEAST_SIGMA = 1e-7
"""Added to ``|s|``, as published, so that sigma stays above 0 whatever the optimiser does."""
_DETECTED_FAR_AWAY = 0.01


def euclidean_distance(x: Tensor, points: Tensor) -> Tensor:
    """Return (B, K) ``|x - w_k|`` of (B, d) and (K, d), to a few units in the last place."""
    return torch.cdist(x, points, compute_mode="donot_use_mm_for_euclid_dist")


def tangent_residual(x: Tensor, points: Tensor, basis: Tensor) -> Tensor:
    """Return (B, K, d) ``(I - Q_k Q_k^T)(x - w_k)``, what the subspaces do not explain."""
    difference = x[:, None] - points
    inside = torch.einsum("bkd,kds->bks", difference, basis)
    return difference - torch.einsum("bks,kds->bkd", inside, basis)


def tangent_distance(x: Tensor, points: Tensor, basis: Tensor) -> Tensor:
    """Return (B, K) distances of (B, d) to the affine subspaces ``w_k + span Q_k``.

    Args:
        x: (B, d).
        points: (K, d).
        basis: (K, d, s), columns orthonormal up to rounding. The function is 1-Lipschitz as long as no eigenvalue of
            ``Q^T Q`` exceeds 2, so rounding does no harm.
    """
    return torch.linalg.vector_norm(tangent_residual(x, points, basis), dim=2)


def sigma_rule(distances: Tensor, *, squared: bool) -> float:
    """Return the sigma at which a squared distance one standard deviation above the mean is detected with 0.01.

    That is the published rule, for squared distances (58 for digits of 28x28). For plain ones its root is taken (7.6),
    which lets components reach as far; their own rule would give a third of it, and hardly any radius.

    Args:
        distances: of data and prototypes, any shape.
        squared: whether exponents are squares of distances.
    """
    wide = distances.detach().double().square()
    rule = max(float(wide.mean() + wide.std(correction=0)) / -math.log(_DETECTED_FAR_AWAY), 1e-6)
    return rule if squared else math.sqrt(rule)


class Components(nn.Module):
    """K trainable prototypes in input space, shared by all classes.

    Args:
        n_components: K.
        shape: of one input, without the batch.
        distance: ``"euclidean"``, ``"squared"`` (its square) or ``"tangent"`` (to an affine subspace).
        subspace_dim: dimensions s of the subspaces, below the number of features; for ``"tangent"`` only.
        sigma: initial reach of every component, above 0, in units of ``g(delta)``.
        domain: prototypes are kept in here by :meth:`restrict`; None leaves them free.
        generator: seed of the initial values: U(0.45, 0.55), the middle of [0, 1], as published.
    """

    basis: nn.Parameter | None

    def __init__(
        self,
        n_components: int,
        shape: tuple[int, ...],
        *,
        distance: str = "euclidean",
        subspace_dim: int = 12,
        sigma: float = 2.0,
        domain: tuple[float, float] | None = (0.0, 1.0),
        generator: Seed = None,
    ) -> None:
        super().__init__()
        k = check_count("n_components", n_components)
        self.shape = tuple(check_count("shape", size) for size in shape)
        self.distance = check_choice("distance", distance, DISTANCES)
        check_number("sigma", sigma, low=0, open_low=True)
        self.domain = domain
        d, seed = math.prod(self.shape), resolve_seed(generator)
        draws = torch.Generator().manual_seed(derive(seed, "components"))
        self.points = nn.Parameter(0.45 + 0.1 * torch.rand(k, d, generator=draws))
        self.scale = nn.Parameter(torch.full((k,), float(sigma)))
        self.basis = None
        if distance == "tangent":
            if check_count("subspace_dim", subspace_dim) >= d:
                raise ValueError(f"subspace_dim={subspace_dim}: below the number of features ({d}) is needed")
            self.basis = nn.Parameter(torch.linalg.qr(torch.randn(k, d, subspace_dim, generator=draws)).Q)

    @property
    def sigma(self) -> Tensor:
        """(K,) reach of each component, above 0."""
        return self.scale.abs() + LEAST_SIGMA

    def flat(self, x: Tensor) -> Tensor:
        """Return (B, d) inputs.

        Raises:
            ValueError: inputs of another shape.
        """
        if x.shape[1:] != self.shape and x.shape[1:] != (self.points.shape[1],):
            raise ValueError(f"x has shape {tuple(x.shape)}; (B, {', '.join(map(str, self.shape))}) is needed")
        return x.flatten(1)

    def distances(self, x: Tensor) -> Tensor:
        """Return (B, K) distances delta, before the square."""
        flat = self.flat(x)
        if self.basis is None:
            return euclidean_distance(flat, self.points)
        return tangent_distance(flat, self.points, self.basis)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) exponents t: the detection probability is ``exp(-t)``."""
        delta = self.distances(x)
        return (delta.square() if self.distance == "squared" else delta) / self.sigma

    @torch.no_grad()
    def restrict(self) -> None:
        """Put prototypes back into the domain and bases back to orthonormal, after an optimiser step."""
        if self.domain is not None:
            self.points.clamp_(*self.domain)
        if self.basis is not None:
            self.basis.copy_(torch.linalg.qr(self.basis).Q)

    @torch.no_grad()
    def initialise(
        self,
        x: Tensor,
        *,
        points: str = "kmeans++",
        sigma: float | None = None,
        generator: Seed = None,
        n_samples: int = 10_000,
    ) -> None:
        """Start from data.

        Args:
            x: (N, ...) training inputs; at most ``n_samples`` of them, drawn at random, are looked at.
            points: ``"kmeans++"``: training inputs far from each other; ``"samples"``: any; ``"keep"``: as they are.
                Bases of ``"tangent"`` are the principal directions of the training inputs nearest to each prototype.
            sigma: reach; by :func:`sigma_rule` where None.
            generator: seed.
            n_samples: see ``x``.
        """
        check_choice("points", points, ("kmeans++", "samples", "keep"))
        check_inputs(x)
        seed, k = resolve_seed(generator), len(self.points)
        flat = self.flat(x).to(self.points)
        draws = torch.Generator().manual_seed(derive(seed, "initialise"))
        order = torch.randperm(len(flat), generator=draws)[:n_samples]
        flat = flat[order.to(flat.device)]
        if points != "keep":
            if len(flat) < k:
                raise ValueError(f"x holds {len(flat)} samples, fewer than the {k} components")
            self.points.copy_(_spread(flat, k, seed) if points == "kmeans++" else flat[:k])
        if self.basis is not None:
            self.basis.copy_(_principal_directions(flat, self.points, self.basis))
        if sigma is None:
            sigma = sigma_rule(self.distances(flat), squared=self.distance == "squared")
        self.scale.fill_(check_number("sigma", sigma, low=0, open_low=True))
        self.restrict()

    def extra_repr(self) -> str:
        """Say what is inside; this is part of the fingerprint."""
        return f"{len(self.points)} components, shape={self.shape}, distance={self.distance!r}"


def _spread(flat: Tensor, k: int, seed: int) -> Tensor:
    """Return (k, d) rows chosen by k-means++."""
    from sklearn.cluster import kmeans_plusplus  # only here: importing it takes a second

    _, rows = kmeans_plusplus(flat.double().cpu().numpy(), k, random_state=derive(seed, "kmeans++") & 0x7FFFFFFF)
    return flat[torch.from_numpy(rows).to(flat.device)]


def _principal_directions(flat: Tensor, points: Tensor, basis: Tensor) -> Tensor:
    """Return (K, d, s): principal directions of the rows nearest to each point; the given ones where rows lack."""
    s = basis.shape[2]
    found = basis.clone()
    nearest = euclidean_distance(flat, points).topk(min(len(flat), 4 * s + 4), dim=0, largest=False).indices
    for k in range(len(points)):
        near = flat[nearest[:, k]]
        directions = torch.linalg.svd(near - near.mean(0), full_matrices=False).Vh[: min(s, len(near) - 1)].mT
        found[k] = torch.linalg.qr(torch.cat([directions, basis[k]], dim=1)).Q[:, :s]
    return found
