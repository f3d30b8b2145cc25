"""The mixed classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.checks import check_number
from vision_robust.inference.adaptive_smoothing.network import TappedNetwork

__all__ = ["MixedClassifier", "Mixture", "mixture"]


def mixture(accurate_logits: Tensor, robust_logits: Tensor, mixing_weight: Tensor) -> Tensor:
    """Return (B, K) ``log((1 - w) softmax(a) + w softmax(r))``, the paper's f, without leaving log space.

    The naive form underflows to -inf in float32 and its gradient to NaN, which masks gradients from attackers.

    Args:
        accurate_logits: (B, K) a, already scaled.
        robust_logits: (B, K) r, already scaled.
        mixing_weight: (B,) or scalar w in [0, 1] (the paper's alpha).
    """
    w = mixing_weight.reshape(-1, 1)
    floor = torch.finfo(w.dtype).tiny  # log 0 would be right in the value and NaN in the gradient
    accurate, robust = F.log_softmax(accurate_logits, 1), F.log_softmax(robust_logits, 1)
    mixed = torch.logaddexp(accurate + torch.log((1 - w).clamp(min=floor)), robust + torch.log(w.clamp(min=floor)))
    return torch.where(w == 0, accurate, torch.where(w == 1, robust, mixed))


def _surrogate(model: Any) -> nn.Module:
    return model.surrogate() if hasattr(model, "surrogate") else model


@dataclass(frozen=True)
class Mixture:
    """One pass of a mixed classifier.

    Attributes:
        log_probabilities: (B, K), the paper's f.
        gamma: (B,) logit of the weight before it is scaled into its range; None for a constant weight.
        mixing_weight: (B,) weight of the robust classifier, the paper's alpha.
    """

    log_probabilities: Tensor
    gamma: Tensor | None
    mixing_weight: Tensor


class MixedClassifier(nn.Module):
    """Mix an accurate and a robust classifier on their probabilities.

    Both base models stay frozen in eval mode, whatever the mode of the mixture; only the mixing network trains.

    Args:
        accurate: (B, ...) -> (B, K) logits of the standard classifier (paper: STD, g).
        robust: (B, ...) -> (B, K) logits of the robust classifier (paper: ROB, h).
        mixing_weight: constant weight of the robust classifier in [0, 1]; certificates need at least 1/2. Give either
            this or ``mixing_network``.
        mixing_network: maps the tapped features of both to (B,) scores; see :class:`.network.MixingNetwork`.
        accurate_scale: factor on the logits of ``accurate``, above 0. Mixing acts on probabilities, so scales matter.
        robust_scale: factor on the logits of ``robust``, above 0.
        weight_range: (lowest, highest) weight at evaluation with a mixing network, inside [0, 1].
        gamma_scale: (training, evaluation) factor on the normalised score.
        gamma_bias: (training, evaluation) offset of the normalised score.
        momentum: of the running statistics that normalise the score; the paper's 0.01 wants thousands of steps.

    Raises:
        ValueError: weights outside [0, 1], scales not above 0, both or neither of weight and network.
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        *,
        mixing_weight: float | None = None,
        mixing_network: TappedNetwork | None = None,
        accurate_scale: float = 1.0,
        robust_scale: float = 1.0,
        weight_range: tuple[float, float] = (0.84, 0.99),
        gamma_scale: tuple[float, float] = (2.0, 2.0),
        gamma_bias: tuple[float, float] = (0.4, 1.3),
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if (mixing_weight is None) == (mixing_network is None):
            raise ValueError("give either mixing_weight (constant) or mixing_network, not both or neither")
        if mixing_weight is not None:
            check_number("mixing_weight", mixing_weight, low=0, high=1)
        low, high = weight_range
        check_number("weight_range[0]", low, low=0, high=1)
        check_number("weight_range[1]", high, low=low, high=1)
        self.accurate, self.robust = accurate, robust
        for model in (accurate, robust):
            model.requires_grad_(False).eval()
        self.mixing_network = mixing_network
        self.normalise = nn.BatchNorm1d(1, affine=False, momentum=momentum) if mixing_network is not None else None
        self.constant_weight = mixing_weight
        self.weight_range = (low, high)
        self.accurate_scale = check_number("accurate_scale", accurate_scale, low=0, open_low=True)
        self.robust_scale = check_number("robust_scale", robust_scale, low=0, open_low=True)
        self.gamma_scale, self.gamma_bias = gamma_scale, gamma_bias

    # -- what attackers must know --

    @property
    def stochastic(self) -> bool:
        """Whether a base model draws random numbers at inference, by its own declaration."""
        return any(bool(getattr(m, "stochastic", False)) for m in (self.accurate, self.robust))

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the input through both base models, by their own declaration."""
        return all(bool(getattr(m, "differentiable", True)) for m in (self.accurate, self.robust))

    @property
    def optimises_at_test_time(self) -> bool:
        """Whether a base model optimises at inference, by its own declaration."""
        return any(bool(getattr(m, "optimises_at_test_time", False)) for m in (self.accurate, self.robust))

    def surrogate(self) -> nn.Module:
        """Return the mixture of the base models' own surrogates; the mixture itself where they have none."""
        bases = [_surrogate(self.accurate), _surrogate(self.robust)]
        if bases[0] is self.accurate and bases[1] is self.robust:
            return self
        twin = object.__new__(MixedClassifier)
        twin.__dict__.update({**self.__dict__, "_modules": dict(self._modules)})
        twin.accurate, twin.robust = bases
        return twin

    @property
    def lowest_weight(self) -> float:
        """The least weight that any input can get at evaluation: what certificates may rely on."""
        return self.weight_range[0] if self.constant_weight is None else self.constant_weight

    def train(self, mode: bool = True) -> MixedClassifier:
        """Set the mode of the mixing network; the base models stay in eval mode."""
        super().train(mode)
        self.accurate.eval()
        self.robust.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) log-probabilities: ``softmax`` of them is the mixture itself."""
        return self.mix(x).log_probabilities

    def mixing_weight(self, x: Tensor) -> Tensor:
        """Return (B,) weights of the robust classifier (paper: alpha(x))."""
        return self.mix(x).mixing_weight

    def mix(self, x: Tensor) -> Mixture:
        """Return log-probabilities, gamma and weights from one pass through both models."""
        if self.mixing_network is None:
            return self._assemble(self.accurate(x), self.robust(x), None)
        with self.mixing_network.tap(self.accurate, self.robust) as features:
            accurate, robust = self.accurate(x), self.robust(x)
        return self._assemble(accurate, robust, self._gamma(self.mixing_network(*features())))

    def _gamma(self, score: Tensor) -> Tensor:
        if self.training:  # keeps outliers from dominating the statistics of the one normalised feature
            centre, spread = score.mean().detach(), score.std().detach()
            score = torch.minimum(torch.maximum(score, centre - 0.6 * spread), centre + 0.6 * spread)
        score = self.normalise(score.reshape(-1, 1)).reshape(-1)  # pyright: ignore[reportOptionalCall]
        phase = 0 if self.training else 1
        return score * self.gamma_scale[phase] + self.gamma_bias[phase]

    def _assemble(self, accurate: Tensor, robust: Tensor, gamma: Tensor | None) -> Mixture:
        if accurate.shape != robust.shape:
            shapes = f"{tuple(accurate.shape)} and {tuple(robust.shape)}"
            raise ValueError(f"accurate and robust return logits of shapes {shapes}; both must know the same classes")
        if gamma is None:
            weight = torch.full_like(accurate[:, 0], float(self.lowest_weight))
        else:
            weight = torch.sigmoid(gamma)
            if not self.training:
                low, high = self.weight_range
                weight = low + (high - low) * weight
        scaled = accurate * self.accurate_scale, robust * self.robust_scale
        return Mixture(mixture(*scaled, weight), gamma, weight)
