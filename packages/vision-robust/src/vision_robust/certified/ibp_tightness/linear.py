"""Deep linear networks, where tightness is a formula: products of weights against products of their absolute values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = [
    "embedding_growth",
    "expected_init_tightness",
    "is_propagation_invariant",
    "linear_tightness",
    "linear_widths",
    "sign_violations",
]


def _matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights in float64 if they are matrices that can be multiplied in this order, first layer first."""
    if isinstance(weights, Tensor) or not len(weights):
        raise ValueError("weights must be a non-empty list of matrices (..., out, in), first layer first")
    for number, weight in enumerate(weights):
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.is_floating_point():
            raise TypeError(f"weights[{number}] is no floating-point matrix (..., out, in)")
        if number and weight.shape[-1] != weights[number - 1].shape[-2]:
            raise ValueError(
                f"weights[{number}] takes {weight.shape[-1]} inputs, the layer before gives "
                f"{weights[number - 1].shape[-2]}; list the first layer first"
            )
    return [weight.double() for weight in weights]


def linear_widths(weights: Sequence[Tensor], eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the half-widths of the outputs of a deep linear network: the exact ones, and those of intervals.

    Args:
        weights: matrices (..., out, in), first layer first; leading axes are networks side by side.
        eps: (..., in) radii of the inputs, all at least 0; 1 when None.

    Returns:
        ``|W_L .. W_1| eps`` and ``|W_L| .. |W_1| eps``, (..., out) float64 each.
    """
    matrices = _matrices(weights)
    first = matrices[0]
    radius = first.new_ones(first.shape[-1]) if eps is None else eps.double()
    if radius.shape[-1] != first.shape[-1] or not bool((radius >= 0).all()):
        raise ValueError(f"eps has shape {tuple(radius.shape)}; (..., {first.shape[-1]}) radii >= 0 are needed")
    product, loose = first, radius.unsqueeze(-1)
    for matrix in matrices[1:]:
        product = matrix @ product
    for matrix in matrices:
        loose = matrix.abs() @ loose
    return (product.abs() @ radius.unsqueeze(-1)).squeeze(-1), loose.squeeze(-1)


def linear_tightness(weights: Sequence[Tensor], eps: Tensor | None = None) -> Tensor:
    """Return (..., out) in [0, 1]: the tightness of interval bounds on a deep linear network; NaN where they are 0.

    It does not depend on the input, on a common scale of ``eps``, nor on the scale of any layer. See
    :func:`linear_widths` for the arguments.
    """
    exact, loose = linear_widths(weights, eps)
    return torch.where(loose > 0, exact / loose, torch.nan)


def is_propagation_invariant(w1: Tensor, w2: Tensor, tol: float = 0.0) -> bool:
    """Return whether interval bounds of ``W2 W1`` are exact on every box.

    They are just if, for each output i and input j, the products ``W2[i, k] W1[k, j]`` over k have one sign. The sums
    of positive and of negative products are formed apart, so that exact zeros are seen as such.

    Args:
        w1: (d, in) first layer.
        w2: (out, d) second layer.
        tol: share of the smaller sum in both up to which it is forgiven.
    """
    first, second = _matrices([w1, w2])
    check_number("tol", tol, low=0, high=0.5)
    plus, minus = (second.clamp(min=0), first.clamp(min=0)), (-second.clamp(max=0), -first.clamp(max=0))
    positive = plus[0] @ plus[1] + minus[0] @ minus[1]
    negative = plus[0] @ minus[1] + minus[0] @ plus[1]
    return bool((torch.minimum(positive, negative) <= tol * (positive + negative)).all())


def sign_violations(w1: Tensor, w2: Tensor) -> int:
    """Count the pairs of outputs and pairs of inputs whose four products in ``W = W2 W1`` forbid invariance.

    With no zero in rows i, i' of ``W2`` and columns j, j' of ``W1``, invariance needs
    ``W_ij W_ij' W_i'j W_i'j' >= 0``: the signs of a dense invariant product have rank one, which leaves
    ``2 ** (out + in - 1)`` of the ``2 ** (out * in)`` patterns. One violation is proof that intervals lose; none is
    not proof that they do not (:func:`is_propagation_invariant`).

    Args:
        w1: (d, in) first layer.
        w2: (out, d) second layer.
    """
    first, second = _matrices([w1, w2])
    dense = (second != 0).all(1)[:, None] & (first != 0).all(0)
    signs = (second @ first).sign() * dense
    agreement, together = signs @ signs.t(), signs.abs() @ signs.abs().t()
    # Of the columns that two rows share, (together +- agreement) / 2 have equal and opposite signs.
    pairs = (together.square() - agreement.square()) / 4
    return int(pairs.triu(1).sum().round())


def expected_init_tightness(widths: Sequence[int], *, relu: bool = False) -> float:
    """Return E of the exact width over E of the interval width, for independent centred Gaussian weights.

    ``prod_k rho(d_k)`` over the hidden widths with ``rho(d) = sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2))``, about
    ``sqrt(pi / (2 d))``: it falls polynomially with width and exponentially with depth. The variances of the layers
    do not matter. Inputs and outputs do not count.

    Args:
        widths: of the hidden layers; none gives 1.
        relu: ReLUs switch about half of the units off: ``rho(d / 2)``, an approximation.
    """
    total = 0.0
    for number, width in enumerate(widths):
        d = check_count(f"widths[{number}]", width) / (2 if relu else 1)
        log_rho = 0.5 * math.log(math.pi) - math.log(d) + math.lgamma((d + 1) / 2) - math.lgamma(d / 2)
        total += min(log_rho, 0.0)
    return math.exp(total)


def embedding_growth(
    n_features: int, n_components: int, *, n_draws: int = 100, generator: Seed = None
) -> tuple[float, float]:
    """Return the mean growth of a unit box through ``U U^T x``: of intervals layer by layer, and of the exact box.

    ``U`` (n_features, n_components) is orthonormal and Haar-random, as the components of isotropic data are. Intervals
    grow by ``n_components (2 / pi + (1 - 2 / pi) / n_features)`` in expectation, the exact box by at most
    ``sqrt(n_components)``.

    Args:
        n_features: d.
        n_components: k, at most d.
        n_draws: random subspaces to average over.
        generator: seed.
    """
    d, k = check_count("n_features", n_features), check_count("n_components", n_components)
    if k > d:
        raise ValueError(f"n_components={k} is more than n_features={d}")
    random = torch.Generator().manual_seed(derive(resolve_seed(generator), "embedding"))
    normal = torch.randn(check_count("n_draws", n_draws), d, k, generator=random, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # makes the distribution uniform
    exact, loose = linear_widths([basis.mT, basis])
    return float(loose.mean()), float(exact.mean())
