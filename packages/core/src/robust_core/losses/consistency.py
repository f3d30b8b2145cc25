"""Consistency of a network's answers on noisy copies of one input.

=================================================  =========================================
``mean_i KL(p_mean || p_i)``, p_i = softmax(z_i)   :func:`noise_consistency`, first value
``H(p_mean)``                                      :func:`noise_consistency`, second value
=================================================  =========================================

Jeong and Shin 2020 (arXiv 2006.04062), section 3: the first term pulls the copies together, the second makes what they
agree on confident; both enlarge the vote that randomised smoothing certifies. As there, the mean stands on the *left*
of the divergence, and gradients flow through it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["noise_consistency"]


def noise_consistency(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) divergences and (B,) entropies, in nats and at least 0 up to rounding.

    Args:
        logits: (m, B, C) of ``m`` noisy copies of each input; half precision is computed in float32.

    Raises:
        ValueError: another shape, or no copy.
    """
    if logits.ndim != 3 or not len(logits):
        raise ValueError(f"logits has shape {tuple(logits.shape)}; (copies, B, C) of at least one copy is needed")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(2)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    mean = log_mean.exp()
    return (mean * (log_mean - log_p.mean(0))).sum(1), -(mean * log_mean).sum(1)
