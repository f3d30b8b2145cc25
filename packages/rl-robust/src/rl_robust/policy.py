"""Policies behind one small protocol: torch modules, stable-baselines3, callables, recurrent ones.

A policy maps a batch of observations to actions. What an attacker or a certificate may need beyond that is optional,
and is asked for by name (:func:`require`):

- ``outputs(obs)``: (B, K) differentiable; action values or logits of discrete actions, the mean action elsewhere;
- ``spread``: (K,) standard deviations of a stochastic continuous policy;
- ``value(obs)``: (B,) differentiable estimate of the return to come.

Actions are greedy unless ``draws`` (uniform numbers that belong to episodes, not to batches) say which to sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

__all__ = [
    "CallablePolicy",
    "Memory",
    "NetworkPolicy",
    "Policy",
    "as_policy",
    "env_actions",
    "require",
    "sample_actions",
]

Memory = Any
"""What a recurrent policy carries from step to step: a tensor, or a tuple of tensors, with the batch first."""


@runtime_checkable
class Policy(Protocol):
    """What the episode engine runs.

    Attributes:
        action_space: of the environment.
        n_draws: uniform numbers that one sampled action needs; 0 for policies that are never random.
    """

    action_space: spaces.Space
    n_draws: int

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions and what is to be remembered.

        Args:
            obs: (B, ...) float32, as the policy's pre-processing expects them.
            memory: of the step before, or None.
            start: (B,) bool: the first step of an episode, where memory counts for nothing.
            draws: (B, n_draws) float64 in (0, 1): sample; None takes the greedy action.

        Returns:
            (B,) int64 for discrete, (B, k) for continuous actions inside the action space; and the memory.
        """
        ...


def sample_actions(outputs: Tensor, draws: Tensor | None, spread: Tensor | None, space: spaces.Space) -> Tensor:
    """Return actions from logits or means: greedy, or sampled by inverting the distribution function.

    Args:
        outputs: (B, K) logits or means.
        draws: (B, n) uniform numbers, or None.
        spread: (K,) or (B, K) standard deviations of a Gaussian policy.
        space: Discrete or Box.
    """
    if isinstance(space, spaces.Discrete):
        if draws is None:
            return outputs.argmax(1) + int(space.start)
        edges = outputs.double().softmax(1).cumsum(1)
        return (draws[:, :1] > edges[:, :-1]).sum(1) + int(space.start)
    if not isinstance(space, spaces.Box):
        raise TypeError(f"action space {space}: Discrete or Box is needed")
    if draws is not None and spread is not None:
        outputs = outputs + spread * torch.special.ndtri(draws).to(outputs.dtype)
    low, high = (torch.as_tensor(b, dtype=outputs.dtype, device=outputs.device) for b in (space.low, space.high))
    shaped = outputs.reshape(len(outputs), *space.shape)
    return torch.minimum(torch.maximum(shaped, low), high)


def env_actions(actions: Tensor, space: spaces.Space) -> np.ndarray:
    """Return actions as an environment takes them.

    Args:
        actions: (B,) of a Discrete, (B, k) or (B, *shape) of a Box.
        space: of the environment.

    Raises:
        ValueError: actions of another shape, not finite, or outside the space.
    """
    found = actions.detach().cpu().numpy()
    if isinstance(space, spaces.Discrete):
        if found.ndim != 1:
            raise ValueError(f"the policy's actions are {found.shape}; one number for each observation is needed")
        inside = (found >= space.start) & (found < space.start + space.n)
    elif isinstance(space, spaces.Box):
        if found[0].size != math.prod(space.shape):
            raise ValueError(f"the policy's actions are {found.shape}; {space.shape} for each observation is needed")
        found = found.reshape(len(found), *space.shape).astype(space.dtype)
        inside = np.isfinite(found) & (found >= space.low) & (found <= space.high)
    else:
        raise TypeError(f"action space {space}: Discrete or Box is needed")
    if not bool(np.all(inside)):
        raise ValueError(f"the policy chose an action outside {space}: {found[:4].tolist()}")
    return found


class NetworkPolicy(nn.Module):
    """A torch module as a policy.

    Args:
        network: (B, ...) observations -> (B, K) logits or action values (Discrete), or mean actions (Box).
        action_space: of the environment.
        value: (B, ...) -> (B,) or (B, 1), if there is one.
        spread: standard deviation of a stochastic policy for continuous actions; None is deterministic.
        stochastic: whether discrete actions may be sampled from the softmax of the logits.
    """

    def __init__(
        self,
        network: nn.Module,
        action_space: spaces.Space,
        *,
        value: nn.Module | None = None,
        spread: Tensor | float | None = None,
        stochastic: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, spaces.Discrete | spaces.Box):
            raise TypeError(f"action_space {action_space}: Discrete or Box is needed")
        self.network, self.value_network = network, value
        self.action_space: spaces.Space = action_space
        discrete = isinstance(action_space, spaces.Discrete)
        size = 1 if discrete else int(np.prod(action_space.shape))
        self.n_draws = size if (stochastic if discrete else spread is not None) else 0
        wide = None if spread is None else torch.as_tensor(spread, dtype=torch.float32).expand(size).clone()
        self.spread: Tensor | None
        self.register_buffer("spread", wide)

    def outputs(self, obs: Tensor) -> Tensor:
        """Return (B, K) logits or mean actions, with gradient."""
        return self.network(obs)

    def value(self, obs: Tensor) -> Tensor:
        """Return (B,) values, with gradient; where there is no value network, the largest of discrete action values."""
        if self.value_network is not None:
            return self.value_network(obs).reshape(len(obs))
        if isinstance(self.action_space, spaces.Discrete):
            return self.outputs(obs).amax(1)
        raise TypeError("this policy has no value network; give NetworkPolicy(value=…)")

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions; see :class:`Policy`."""
        return sample_actions(self.outputs(obs), draws, self.spread, self.action_space), None


class CallablePolicy:
    """A function of numpy arrays as a policy: it can be attacked by what needs no gradients, and certified.

    Args:
        function: (B, ...) observations -> (B, ...) actions.
        action_space: of the environment.
    """

    n_draws = 0

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], action_space: spaces.Space) -> None:
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}; a callable is needed")
        self.function, self.action_space = function, action_space

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions; see :class:`Policy`."""
        actions = np.asarray(self.function(obs.detach().cpu().numpy()))
        if len(actions) != len(obs):
            raise ValueError(
                f"the policy returned {actions.shape} for {len(obs)} observations; one action each is needed"
            )
        dtype = torch.int64 if isinstance(self.action_space, spaces.Discrete) else torch.float32
        return torch.as_tensor(np.array(actions), dtype=dtype), None


def as_policy(policy: Any, action_space: spaces.Space) -> Policy:
    """Return anything that acts as a policy: a :class:`Policy`, an SB3 model or policy, a module, a callable."""
    if isinstance(policy, Policy):
        return policy
    if hasattr(policy, "policy") and hasattr(policy, "predict"):  # an SB3 algorithm
        policy = policy.policy
    if type(policy).__module__.startswith(("stable_baselines3", "sb3_contrib")) or hasattr(policy, "predict_values"):
        from rl_robust.sb3 import SB3Policy

        return SB3Policy(policy)
    if isinstance(policy, nn.Module):
        return NetworkPolicy(policy, action_space)
    return CallablePolicy(policy, action_space)


def require(policy: Policy, *names: str) -> Any:
    """Return the policy if it has all of ``names``.

    Raises:
        TypeError: it lacks one; the message says what that is for.
    """
    why = {
        "outputs": "differentiable logits or mean actions",
        "value": "a differentiable estimate of the return",
        "spread": "the standard deviations of its actions",
    }
    missing = [name for name in names if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"{type(policy).__name__} has no {missing[0]}() ({why.get(missing[0], missing[0])}); give a torch module "
            "or an SB3 policy, or use an attack that needs no gradients"
        )
    return policy
