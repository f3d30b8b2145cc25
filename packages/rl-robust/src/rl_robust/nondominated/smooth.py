"""The state-adversarial regulariser of SA-PPO, on the PPO of stable-baselines3 without a copy of it.

``kappa * mean ||(mu(seen) - mu(s)) / std||^2`` with ``seen`` after noisy sign-gradient steps (SGLD) in the ball: Zhang
et al. 2020 (arXiv 2003.08938), Gaussian policies; for discrete actions the divergence of the softmax. PPO's loss holds
``- ent_coef * mean(entropy)``, and the entropy comes from the policy: :class:`SmoothPolicy` returns ``entropy_weight *
entropy - kappa * penalty`` and is trained with ``ent_coef = 1``. :func:`smooth_settings` sets all of it.

Defaults as released: 2 steps of ``eps / 2`` from random signs times ``eps / 2``, noise ``sqrt(2 * step * 1e-5) /
(i + 2)`` in step i. ``eps`` is an attribute, so that a loop can ramp it up; the noise comes from the global generator
of torch, as PPO's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

__all__ = ["SmoothPolicy", "smooth_settings"]


class SmoothPolicy(ActorCriticPolicy):
    """An actor-critic whose entropy carries the regulariser.

    Args:
        args, kwargs: of the base class.
        kappa: weight of the regulariser.
        smooth_eps: radius of the l-infinity ball.
        entropy_weight: weight of the entropy proper.
        n_iter: steps of the inner ascent.
    """

    def __init__(
        self,
        *args: Any,
        kappa: float = 0.0,
        smooth_eps: float = 0.0,
        entropy_weight: float = 0.0,
        n_iter: int = 2,
        **kwargs: Any,
    ) -> None:
        if kappa < 0 or smooth_eps < 0:
            raise ValueError(f"kappa={kappa}, smooth_eps={smooth_eps}: numbers of at least 0 are needed")
        super().__init__(*args, **kwargs)
        self.kappa, self.smooth_eps, self.entropy_weight, self.n_iter = kappa, smooth_eps, entropy_weight, n_iter

    def divergence(self, seen: Tensor, clean: tuple[Tensor, Tensor | None]) -> Tensor:
        """Return (B,) how far the action distribution at ``seen`` is from the one at the true observation."""
        inner: Any = self.get_distribution(seen).distribution
        if clean[1] is None:
            before, after = clean[0].log_softmax(1), inner.logits.log_softmax(1)
            return (before.exp() * (before - after)).sum(1)
        return ((inner.mean - clean[0]) / clean[1]).square().sum(1)

    def penalty(self, obs: Tensor) -> Tensor:
        """Return (B,) the regulariser at the points that the inner ascent found."""
        with torch.no_grad():
            inner: Any = self.get_distribution(obs).distribution
            discrete = hasattr(inner, "probs")
            clean = (inner.logits, None) if discrete else (inner.mean, inner.stddev)
        eps, step = self.smooth_eps, self.smooth_eps / self.n_iter
        seen = obs + torch.sign(torch.rand_like(obs) - 0.5) * step
        for i in range(self.n_iter):
            seen = seen.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.divergence(seen, clean).sum(), seen)
            noise = math.sqrt(2 * step * 1e-5) / (i + 2) * torch.randn_like(obs)
            moved = seen.detach() + step * torch.sign(gradient + noise)
            seen = torch.minimum(torch.maximum(moved, obs - eps), obs + eps)
        return self.divergence(seen.detach(), clean)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values, log-probabilities, and the entropy with the regulariser taken off."""
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        own = -log_prob if entropy is None else entropy
        total = self.entropy_weight * own
        if self.kappa > 0 and self.smooth_eps > 0:
            total = total - self.kappa * self.penalty(obs)
        return values, log_prob, total


def smooth_settings(
    settings: Mapping[str, Any], *, kappa: float, eps: float, net_arch: tuple[int, ...] = (64, 64)
) -> dict[str, Any]:
    """Return settings of PPO for a :class:`SmoothPolicy`: its ``ent_coef`` goes to the policy."""
    found = dict(settings)
    weight = float(found.pop("ent_coef", 0.0))
    inner = {"net_arch": list(net_arch), **dict(found.pop("policy_kwargs", {}))}
    inner.update(kappa=kappa, smooth_eps=eps, entropy_weight=weight)
    return {**found, "ent_coef": 1.0, "policy_kwargs": inner}
