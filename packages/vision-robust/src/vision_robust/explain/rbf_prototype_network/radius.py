r"""The certified radius as a formula: differentiable, for training, and the paper's own figure.

Let concept i belong to the class that is certified and j to another, sigma the least reach, and

    A = sum_k d_k (r_plus[i] + r_minus[j]),  C = sum_k d_k (r_minus[i] + r_plus[j]),  B = sum_k r_minus[i] - r_minus[j].

Moving an input by eps changes every distance by at most eps, so every ``d_k`` by a factor of at most
``z = exp(eps / sigma)`` either way, and ``p_i - p_j >= A / z - C z + B``. That is 0 at
``z = (B + sqrt(B^2 + 4 A C)) / (2 C)``, hence ``eps_ij = sigma log z``: negative where j wins. The radius of a class is
the least over rival concepts of the greatest over its own.

With ``d = exp(-delta^2 / sigma)`` the exponents change by at most ``2 D eps + eps^2``, D the greatest distance, so with
``rho = sigma log z`` the radius solves ``eps^2 + 2 D eps = rho`` (:func:`squared_radius`; the paper's own solves
``3 eps^2 + 2 D eps = rho``, which is smaller). For distances to subspaces the paper halves the radius; such a distance
is 1-Lipschitz as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_core.checks import check_choice
from vision_robust.explain.rbf_prototype_network.components import Components
from vision_robust.explain.rbf_prototype_network.model import CBC

__all__ = ["closed_radius", "crossing_factor", "pairwise_factors", "squared_radius"]

_LEAST = 1e-12
"""Put under A and C: keeps gradients finite. The certifier checks what comes of it."""


def crossing_factor(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the positive root z of ``a / z - c z + b = 0`` for ``a, c > 0``; nothing cancels."""
    half = (b.abs() + torch.sqrt(b.square() + 4 * a * c)) / 2
    return torch.where(b >= 0, half / c, a / half)


def pairwise_factors(model: CBC, exponents: Tensor, y: Tensor) -> Tensor:
    """Return (B, I, M) factors z of each concept of class ``y`` (B,) against all; infinite against its own class.

    Args:
        model: the classifier.
        exponents: (B, K) ``model.components(x)``.
        y: (B,) class.
    """
    reasoning = model.reasoning
    plus, minus = reasoning.weights()
    if reasoning.positive:  # only ratios count, which a common factor leaves as they are
        exponents = exponents - exponents.detach().amin(1, keepdim=True)
    d = torch.exp(-exponents)
    presence, absence, base = d @ plus.mT, d @ minus.mT, minus.sum(1)
    size = reasoning.concepts_per_class
    own = y[:, None] * size + torch.arange(size, device=y.device)
    a = (presence.gather(1, own)[:, :, None] + absence[:, None]).clamp(min=_LEAST)
    c = (absence.gather(1, own)[:, :, None] + presence[:, None]).clamp(min=_LEAST)
    z = crossing_factor(a, base[own][:, :, None] - base, c)
    mine = torch.arange(len(plus), device=y.device) // size == y[:, None]
    return z.masked_fill(mine[:, None], torch.inf)


def squared_radius(rho: Tensor, farthest: Tensor, *, published: bool = False) -> Tensor:
    """Return the eps at which exponents may have changed by ``rho >= 0``, for squared distances.

    Args:
        rho: (B,).
        farthest: (B,) greatest distance D to a prototype.
        published: the paper's smaller figure ``-D / 3 + sqrt(D^2 / 9 + rho / 3)``.
    """
    factor = 3.0 if published else 1.0
    # -D + sqrt(D^2 + f rho), over f, as a quotient that does not cancel
    return rho / (farthest + torch.sqrt(farthest.square() + factor * rho)).clamp(min=1e-30)


def closed_radius(model: CBC, x: Tensor, y: Tensor, *, form: str = "closed", negative_weight: float = 1.0) -> Tensor:
    """Return (B,) differentiable radii of class ``y``: positive where it wins, negative where it loses.

    Args:
        model: the classifier.
        x: (B, ...) inputs.
        y: (B,) classes.
        form: ``"closed"``, or ``"published"`` for the paper's smaller figures of squared and tangent distances.
        negative_weight: factor on negative values for squared distances, whose two signs differ in scale.
    """
    check_choice("form", form, ("closed", "published"))
    components = model.components
    exponents = components(x)
    z = pairwise_factors(model, exponents, y).amax(1).amin(1)
    rho = components.sigma.amin() * z.log()
    published = form == "published"
    if components.distance == "squared":
        farthest = (exponents * components.sigma).amax(1).clamp(min=1e-30).sqrt()
        return torch.where(
            rho > 0, squared_radius(rho.clamp(min=0), farthest, published=published), negative_weight * rho
        )
    return rho / lipschitz(components).amax() * (0.5 if published and components.distance == "tangent" else 1.0)


@torch.no_grad()
def lipschitz(components: Components) -> Tensor:
    """Return (K,) Lipschitz constants of the distances: 1 exactly, unless a basis is far from orthonormal."""
    one = torch.ones_like(components.scale)
    if components.basis is None:
        return one
    basis = components.basis.detach().double()
    stretch = (1 - torch.linalg.eigvalsh(basis.mT @ basis)).abs().amax(1) * (1 + 1e-9)
    return torch.maximum(one, stretch.to(one))
