"""What attackers of erased models lower, from the published formulas.

A diffusion model is a classifier: under a uniform prior ``p(c|x) ~ exp(-a(c))`` with ``a(c) = E |e - e(x_t|c)|^2`` over
times and noise, so the prompt that best explains a picture of the concept has the least denoising error. In full, for
candidates c_j, ``1 / p(c'|x) = sum_j exp(a(c') - a(c_j)) <= (1/2) sum_j exp(2 a(c')) + (1/2) sum_j exp(-2 a(c_j))`` (a
product is at most half the sum of squares), whose second sum does not depend on c'.

- :func:`denoising_error`: ``|e - e(x_t|c')|`` squared, or absolute (UnlearnDiffAtk, Zhang et al. 2024, arXiv
  2310.11868, eq. 6). Means over entries, as in the released code: Adam does not see the factor.
- :func:`imitation_error`: ``|e_o(x_t|c) - e(x_t|c')|^2``, to say what the original says (P4D, Chin et al. 2024, arXiv
  2309.06135, eq. 4).
- :func:`even_times`: times in the middle of equal parts, ``T/2n, 3T/2n, ...``.
- :func:`scaled_gradient`: keeps gradients of half precision from vanishing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_unlearn.pipeline import Conditioning, TextToImage
from robust_core.checks import check_choice, check_count

__all__ = ["LOSSES", "denoising_error", "distance", "even_times", "imitation_error", "scaled_gradient"]

LOSSES = ("l2", "l1")


def distance(found: Tensor, wanted: Tensor, loss: str = "l2") -> Tensor:
    """Return (B,) mean squared or absolute differences of (B, C, H, W), in single precision at least."""
    check_choice("loss", loss, LOSSES)
    gap = (found - wanted).to(torch.promote_types(found.dtype, torch.float32))
    return (gap.square() if loss == "l2" else gap.abs()).flatten(1).mean(1)


def denoising_error(
    parts: TextToImage, x0: Tensor, noise: Tensor, t: Tensor, condition: Conditioning, *, loss: str = "l2"
) -> Tensor:
    """Return (B,) how badly the prompt explains the pictures.

    Args:
        parts: the victim.
        x0: (B, C, H, W) scaled latents of pictures of the concept.
        noise: (B, C, H, W) of N(0, 1).
        t: time, a scalar or (B,) int64.
        condition: B rows, the prompt.
        loss: ``"l2"`` or ``"l1"``.
    """
    found = parts.predict(parts.noised(x0, noise, t), t, condition)
    return distance(found, parts.target(x0, noise, t), loss)


def imitation_error(
    parts: TextToImage,
    x_t: Tensor,
    t: Tensor,
    condition: Conditioning,
    *,
    original: TextToImage,
    told: Conditioning,
    loss: str = "l2",
) -> Tensor:
    """Return (B,) how far the victim under a prompt is from what the original says under its own.

    Args:
        parts: the victim.
        x_t: (B, C, H, W) noised latents.
        t: time, a scalar or (B,).
        condition: B rows, the prompt.
        original: the model before the erasure.
        told: B rows of its own encoders, the original prompt.
        loss: ``"l2"`` or ``"l1"``.
    """
    with torch.no_grad():
        wanted = original.predict(x_t, t, told)
    return distance(parts.predict(x_t, t, condition), wanted, loss)


def even_times(n: int, n_train: int = 1000) -> Tensor:
    """Return (n,) int64 ascending times in the middle of n equal parts: 10, 30, ..., 990 for 50 of 1000."""
    if check_count("times", n) > n_train:
        raise ValueError(f"times={n}: the model knows {n_train}")
    return ((torch.arange(n, dtype=torch.float64) + 0.5) * n_train / n).to(torch.int64)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0] * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``factor``."""
    found: Any = _Scaled.apply(x, factor)
    return found
