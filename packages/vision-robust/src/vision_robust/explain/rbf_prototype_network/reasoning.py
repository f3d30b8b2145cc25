"""Reasoning: which components speak for a class by their presence, and which by their absence.

A reasoning concept c holds a joint distribution over (component, sign): ``r_plus[c, k]`` and ``r_minus[c, k]`` are at
least 0 and sum to 1. Its score is the probability that detection and reasoning agree,

    p_c = sum_k d_k r_plus[c, k] + (1 - d_k) r_minus[c, k],

a sum of positive terms, so rounding costs a few units in the last place. Without ``r_minus`` ("positive") it is an RBF
network with normalised output weights; its logarithm is then exact however far an input is from every prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_core.checks import check_count
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Reasoning", "agreement", "initial_reasoning"]


def agreement(present: Tensor, absent: Tensor, r_plus: Tensor, r_minus: Tensor) -> Tensor:
    """Return (B, M) probabilities of agreement.

    Args:
        present: (B, K) detection probabilities d.
        absent: (B, K) ``1 - d``.
        r_plus: (M, K) weight of presence.
        r_minus: (M, K) weight of absence.
    """
    return present @ r_plus.mT + absent @ r_minus.mT


def initial_reasoning(n_concepts: int, n_components: int, *, positive: bool, generator: Seed = None) -> Tensor:
    """Return (M, 2K) initial logits, (M, K) if ``positive``.

    The prior of a component is ``softmax(U)``, its requiredness ``r_plus / (r_plus + r_minus)`` is ``0.6 - 0.2 U``,
    U uniform on (0, 1), as published.
    """
    draws = torch.Generator().manual_seed(derive(resolve_seed(generator), "reasoning"))
    prior = torch.rand(n_concepts, n_components, generator=draws).log_softmax(1)
    if positive:
        return prior
    required = 0.6 - 0.2 * torch.rand(n_concepts, n_components, generator=draws)
    return torch.cat([prior + required.log(), prior + (1 - required).log()], dim=1)


class Reasoning(nn.Module):
    """M = ``n_classes * concepts_per_class`` trainable concepts; concept m is of class ``m // concepts_per_class``.

    Args:
        n_components: K.
        n_classes: C, at least 2.
        concepts_per_class: ways to be a member of a class; the best one counts.
        positive: no reasoning by absence.
        generator: seed of the initial values.
    """

    def __init__(
        self,
        n_components: int,
        n_classes: int,
        concepts_per_class: int = 1,
        *,
        positive: bool = False,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        self.n_classes = check_count("n_classes", n_classes, low=2)
        self.concepts_per_class = check_count("concepts_per_class", concepts_per_class)
        self.positive = positive
        m = n_classes * concepts_per_class
        self.logits = nn.Parameter(initial_reasoning(m, n_components, positive=positive, generator=generator))

    @torch.no_grad()
    def prefer(self, shares: Tensor, *, gain: float = 6.0) -> None:
        """Let classes ask for the presence, and not for the absence, of components that are theirs.

        Args:
            shares: (K, C) how much each component is each class's, in [0, 1].
            gain: added to the logits of presence, taken from those of absence.
        """
        wanted = gain * shares.mT.repeat_interleave(self.concepts_per_class, 0).to(self.logits)
        self.logits.add_(wanted if self.positive else torch.cat([wanted, -wanted], dim=1))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return (M, K) ``r_plus`` and ``r_minus``; over both, each row sums to 1."""
        r = self.logits.softmax(1)
        if self.positive:
            return r, torch.zeros_like(r)
        plus, minus = r.chunk(2, dim=1)
        return plus, minus

    def forward(self, present: Tensor, absent: Tensor) -> Tensor:
        """Return (B, M) scores of the concepts in [0, 1] from detections d and ``1 - d``, (B, K) each."""
        return agreement(present, absent, *self.weights())

    def log_scores(self, exponents: Tensor) -> Tensor:
        """Return (B, M) log scores of the concepts where components are detected with ``exp(-exponents)`` (B, K)."""
        if self.positive:
            shift = exponents.detach().amin(1, keepdim=True)
            present = torch.exp(shift - exponents)
            return log(present @ self.weights()[0].mT) - shift
        return log(self(torch.exp(-exponents), -torch.expm1(-exponents)))

    def best(self, concepts: Tensor) -> Tensor:
        """Return (B, C) the best concept of each class."""
        return concepts.unflatten(1, (self.n_classes, self.concepts_per_class)).amax(2)

    def extra_repr(self) -> str:
        """Say what is inside; this is part of the fingerprint."""
        sign = ", positive" if self.positive else ""
        return f"n_classes={self.n_classes}, concepts_per_class={self.concepts_per_class}{sign}"


def log(probability: Tensor) -> Tensor:
    """Return the logarithm, finite at 0."""
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
