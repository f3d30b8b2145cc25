"""SA-PPO: a policy that acts alike on all observations within reach of an attacker.

    model = SAPPO("MlpPolicy", env, regulariser=StateAdversarialRegulariser(Linf(0.075, domain=None), kappa=0.3))
    model.learn(1_000_000)

Zhang, Chen, Xiao, Li, Liu, Boning and Hsieh 2020, "Robust Deep Reinforcement Learning against Adversarial
Perturbations on State Observations" (arXiv 2003.08938), section 3.3.

==========================================================================  =======================================
R = mean over s of max over seen in B(s) of D(pi(.|s), pi(.|seen))          :class:`StateAdversarialRegulariser`
D = ||(mu(seen) - mu(s)) / std||^2, or KL of the softmax                    :func:`difference`
inner maximum: noisy sign steps (SGLD), projected ascent (PGD)              ``inner="sgld"``, ``"pgd"``
inner maximum: an upper bound by intervals                                  :func:`bounded_difference`, ``"interval"``
PPO's loss + kappa R                                                        :class:`SAPPO`
==========================================================================  =======================================

The outputs at the true observation and the spread carry no gradient. Defaults of SGLD are those of the released code: 2
steps of ``eps / 2`` from random signs times ``eps / 2``, noise ``sqrt(2 * step * 1e-5) / (i + 2)`` in step i. Intervals
stand where the paper has linear relaxations: looser, and a few passes instead of many. Left out: SA-DDPG, SA-DQN.

In a loop of one's own, with any module behind :class:`rl_robust.policy.NetworkPolicy`::

    loss = ppo_loss + regulariser(policy, {"x": obs, "share": done / total}).total
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor, nn

from rl_robust.attacks.gradient import action_difference
from rl_robust.policy import NetworkPolicy, require
from rl_robust.sb3 import SB3Policy
from robust_core.certificates.bounds import IntervalBounds
from robust_core.checks import check_choice, check_count, check_number
from robust_core.models import frozen
from robust_core.random import SampleStreams, Seed
from robust_core.threats import Threat
from robust_core.training import Batch, Loss, RandomObjective

__all__ = ["SAPPO", "StateAdversarialRegulariser", "bounded_difference", "difference"]

INNER = ("sgld", "pgd", "interval")


def difference(policy: Any, before: Tensor, after: Tensor) -> Tensor:
    """Return (B,) D: ``||(after - before) / std||^2`` of means (twice the KL divergence), KL of logits."""
    found = action_difference(policy, before, after)
    return found if isinstance(policy.action_space, spaces.Discrete) else 2 * found


def bounded_difference(policy: Any, before: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return (B,) an upper bound of D over all outputs in a box.

    For logits, ``-log q_a <= log(e^lower_a + sum of e^upper_b over b != a) - lower_a``.

    Args:
        policy: gives the action space and the spread.
        before: (B, K) outputs at the true observation.
        lower: (B, K) least outputs.
        upper: (B, K) largest outputs.
    """
    if isinstance(policy.action_space, spaces.Discrete):
        p = before.log_softmax(1)
        own = torch.eye(before.shape[1], dtype=torch.bool, device=before.device)
        worst = torch.where(own, lower[:, None, :], upper[:, None, :]).logsumexp(2) - lower
        return (p.exp() * (p + worst)).sum(1)
    spread = getattr(policy, "spread", None)
    far = torch.maximum(upper - before, before - lower)
    return (far if spread is None else far / spread.detach()).square().flatten(1).sum(1)


class StateAdversarialRegulariser(RandomObjective):
    """``kappa`` times the mean over states of the largest change of the action distribution in a ball.

    Args:
        threat: the ball around what the policy is shown, e.g. ``Linf(0.075, domain=None)``.
        kappa: weight.
        inner: how the largest change is found: ``"sgld"``, ``"pgd"`` or ``"interval"``.
        n_iter: steps of the first two.
        ramp: share of training (``batch["share"]``) over which the radius grows from 0; 0 uses all of it at once.
        generator: seed.
    """

    def __init__(
        self,
        threat: Threat,
        kappa: float = 0.3,
        *,
        inner: Literal["sgld", "pgd", "interval"] = "sgld",
        n_iter: int = 2,
        ramp: float = 0.0,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        if not isinstance(threat, Threat):
            raise TypeError(f"threat is a {type(threat).__name__}; e.g. Linf(0.075, domain=None) is needed")
        self.threat, self.kappa = threat, check_number("kappa", kappa, low=0)
        self.inner = check_choice("inner", inner, INNER)
        self.n_iter = check_count("n_iter", n_iter)
        self.ramp = check_number("ramp", ramp, low=0, high=1)

    @property
    def identity(self) -> str:
        """All that makes it this term, in one line: for checkpoints."""
        return f"{self.threat!r} kappa={self.kappa:g} {self.inner} {self.n_iter} ramp={self.ramp:g} seed={self.seed}"

    def reach(self, batch: Batch) -> Threat:
        """Return the ball at this point of training."""
        grown = min(1.0, self.share(batch) / self.ramp) if self.ramp else 1.0
        return self.threat.with_eps(self.threat.eps * grown)

    def seen(self, policy: Any, obs: Tensor, before: Tensor, threat: Threat, streams: SampleStreams) -> Tensor:
        """Return (B, ...) observations in the ball where the policy acts differently, by SGLD or PGD."""
        noisy = self.inner == "sgld"
        step = threat.eps / self.n_iter if noisy else 2.5 * threat.eps / self.n_iter
        if noisy:
            signs = torch.sign(streams.uniform(obs.shape[1:], dtype=obs.dtype) - 0.5)
            seen = threat.project(obs + step * signs, obs)
        else:
            seen = threat.random_start(obs, streams)
        for i in range(self.n_iter):
            x = seen.detach().requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(difference(policy, before, policy.outputs(x)).sum(), x)
            if noisy:
                drawn = streams.normal(obs.shape[1:], chunk=i + 1, dtype=obs.dtype)
                gradient = gradient + math.sqrt(2 * step * 1e-5) / (i + 2) * drawn
            seen = threat.project(x.detach() + step * threat.steepest(torch.nan_to_num(gradient)), obs)
        return seen

    def forward(self, model: Any, batch: Batch) -> Loss:
        """Return the term of ``{x: (B, ...) observations}``.

        Args:
            model: a policy with ``outputs``: NetworkPolicy, SB3Policy or your own.
            batch: ``share`` of training that is done moves the ramp.
        """
        policy, obs, threat = require(model, "outputs"), batch["x"].float(), self.reach(batch)
        with torch.no_grad():
            before = policy.outputs(obs)
        if self.inner == "interval":
            lower, upper = IntervalBounds(_network(policy), threat).bounds(obs)
            mean = bounded_difference(policy, before, lower, upper).mean()
        else:
            streams = SampleStreams(self.step_seed(batch), self.index(batch), "state adversary")
            with frozen(policy):
                seen = self.seen(policy, obs, before, threat, streams)
            mean = difference(policy, before, policy.outputs(seen)).mean()
        return Loss(self.kappa * mean, {"state adversary": mean.detach()})


def _network(policy: Any) -> nn.Module:
    """Return the module from observations to outputs, which bounds look into."""
    if isinstance(policy, NetworkPolicy):
        return policy.network
    inner = getattr(policy, "policy", None)
    if isinstance(policy, SB3Policy) and policy.actor_critic and not policy.recurrent:
        from stable_baselines3.common.torch_layers import FlattenExtractor

        if isinstance(inner.features_extractor, FlattenExtractor):  # pyright: ignore[reportOptionalMemberAccess]
            return nn.Sequential(nn.Flatten(), inner.mlp_extractor.policy_net, inner.action_net)  # pyright: ignore
    raise TypeError(
        f"inner='interval' looks into a NetworkPolicy, or an MLP actor-critic of SB3, not a {type(policy).__name__}; "
        "use inner='sgld'"
    )


class _WithTerm(torch.autograd.Function):
    """The values as they are; on the way back, the gradient of a term joins that of the loss, with weight 1."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, term: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())


class SAPPO(PPO):
    """PPO of stable-baselines3 with the regulariser in its loss, and nothing else changed.

    SB3's ``train()`` has no place for another term. It evaluates each minibatch once, so that the term is worked out
    there and its gradient joins that of the values: before gradients are cut, whatever ``vf_coef`` is. What SB3 logs as
    ``train/loss`` is PPO's own; the term stands beside it as ``train/state_adversary``.

    Args:
        args, kwargs: of ``stable_baselines3.PPO``.
        regulariser: of the policy; its ramp follows the progress of ``learn()``, or :attr:`share` where that is set: in
            a loop of many calls, each of which SB3 takes for the whole training.
    """

    def __init__(self, *args: Any, regulariser: StateAdversarialRegulariser | None = None, **kwargs: Any) -> None:
        self.regulariser = regulariser  # None only while a saved model is loaded, which brings its own
        self.share: float | None = None
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        """Update the policy from the rollout buffer, with the term in every minibatch."""
        if self.regulariser is None:
            raise ValueError("regulariser=None: give StateAdversarialRegulariser(...), or use PPO")
        regulariser = self.regulariser.to(self.device)
        policy, victim, terms = self.policy, SB3Policy(self.policy), []
        evaluate = policy.evaluate_actions
        share = 1.0 - self._current_progress_remaining if self.share is None else self.share

        def joined(obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            values, log_prob, entropy = evaluate(obs, actions)  # pyright: ignore[reportArgumentType]
            loss = regulariser(victim, {"x": obs, "share": share})
            terms.append(loss.parts["state adversary"])
            return _WithTerm.apply(values, loss.total), log_prob, entropy  # pyright: ignore

        policy.evaluate_actions = joined  # pyright: ignore[reportAttributeAccessIssue]
        try:
            super().train()
        finally:
            del policy.evaluate_actions
        self.logger.record("train/state_adversary", float(torch.stack(terms).mean()))
