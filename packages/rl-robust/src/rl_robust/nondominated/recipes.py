"""Settings of the paper for MuJoCo, as its released configurations have them.

Common: PPO, 64-64 tanh, orthogonal weights, discount 0.99, lambda 0.95, 2048 steps an update, 10 epochs of 32
minibatches, clip 0.2, Adam with epsilon 1e-5, normalised observations and returns cut at 10. stable-baselines3 has one
learning rate for policy and value, so the policy's is taken; HalfCheetah's recurrent policy (LSTM of length 10) is left
out. Environments are those of today (v5), whose returns are not comparable with the paper's (v2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rl_robust.task import Task

__all__ = ["COMMON", "RECIPES", "Recipe"]

COMMON: Mapping[str, Any] = MappingProxyType(
    {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2}
)


@dataclass(frozen=True)
class Recipe:
    """How policies of a task are discovered.

    Attributes:
        task: the environment.
        eps: l-infinity radius, in normalised observations.
        kappa: weight of the SA-PPO regulariser.
        victim, attacker: settings of PPO.
        n_updates: updates of 2048 steps for each policy.
        ramp: updates over which the regulariser's eps grows.
        value_lr, attacker_value_lr: of the released critics, for the record.
        reward_range: for the bandit; returns outside are counted.
    """

    task: Task
    eps: float
    kappa: float
    victim: Mapping[str, Any] = field(default_factory=dict)
    attacker: Mapping[str, Any] = field(default_factory=dict)
    n_updates: int = 2441
    ramp: int = 1831
    value_lr: float = 3e-4
    attacker_value_lr: float = 1e-3
    reward_range: tuple[float, float] = (0.0, 6000.0)


def _ppo(learning_rate: float, ent_coef: float, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType({**COMMON, "learning_rate": learning_rate, "ent_coef": ent_coef, **more})


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "hopper": Recipe(
            Task("Hopper-v5"), 0.075, 0.3, _ppo(3e-4, 0.01), _ppo(1e-2, 3e-4, clip_range=0.4), 2441, 1831, 3e-4, 1e-3
        ),
        "walker2d": Recipe(
            Task("Walker2d-v5"), 0.05, 0.1, _ppo(4e-4, 3e-4, clip_range_vf=0.2), _ppo(1e-3, 1e-5),
            2441, 732, 3e-4, 1e-4,
        ),
        "halfcheetah": Recipe(
            Task("HalfCheetah-v5"), 0.15, 0.03, _ppo(1e-3, 3e-4, clip_range_vf=0.2), _ppo(1e-2, 3e-4),
            2441, 1831, 3e-3, 1e-2, (-2000.0, 10000.0),
        ),
        "ant": Recipe(
            Task("Ant-v5"), 0.15, 0.1, _ppo(3e-4, 3e-4, clip_range_vf=0.2), _ppo(1e-3, 1e-3),
            4882, 3662, 3e-4, 3e-4, (-2000.0, 10000.0),
        ),
    }
)  # fmt: skip
"""By environment. The reward ranges of HalfCheetah and Ant are ours: their returns can be negative or above 6000."""
