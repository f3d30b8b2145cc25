"""Hardened policies on disk: weights, the frozen normaliser and ``model.json``, which says what they are for.

    folder/model.json                what, for which environment, with which noise
    folder/policy.zip                one policy: SB3's own zip; or
    folder/policies.safetensors      a set of them, with policies.json
    folder/normaliser.safetensors    frozen statistics, where there are any

Nothing in these files is run when they are read: the zip is not un-pickled, the environment is one that gymnasium
knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rl_robust.adversarial.ppo import blank_policy
from rl_robust.nondominated.sets import PolicySet
from rl_robust.policy import Policy
from rl_robust.sb3 import load_sb3
from rl_robust.task import Normaliser, Task
from rl_robust.train_smoothed import atari
from robust_core.errors import UntrustedFileError
from robust_core.io import read_json, write_json

__all__ = ["MODEL", "Hardened", "least_return", "load_hardened", "save_hardened", "shown_space"]

SCHEMA = "robust.hardened/1"
MODEL, ZIP, STATISTICS = "model.json", "policy.zip", "normaliser.safetensors"
_OWN = {"atari": atari}
_LEAST = {"CartPole-v0": 0.0, "CartPole-v1": 0.0, "InvertedPendulum-v4": 0.0, "InvertedPendulum-v5": 0.0,
          "MountainCar-v0": -1.0, "Acrobot-v1": -1.0, "MountainCarContinuous-v0": -0.1,
          "Pendulum-v1": -16.2736045}  # fmt: skip


@dataclass(frozen=True)
class Hardened:
    """Policies and what they were made for.

    Attributes:
        policies: one, or the members of a set.
        names: of them.
        task: with the frozen normaliser.
        method: that made them.
        sigma: noise with which they are played; 0 is none.
        reward_range: of an episode, for the bandit that chooses among a set; None for a policy that plays alone.
        details: how they were trained.
    """

    policies: tuple[Policy, ...]
    names: tuple[str, ...]
    task: Task
    method: str
    sigma: float = 0.0
    reward_range: tuple[float, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_set(self) -> bool:
        """Whether a bandit is to choose among them."""
        return self.reward_range is not None


def least_return(task: Task) -> float | None:
    """Return a bound below which no return can lie, also under attack, for environments whose rewards are known.

    From the rewards as gymnasium defines them, times the steps of an episode where they are negative; None elsewhere
    (of MuJoCo's walkers, for one: they may run backwards).
    """
    step = _LEAST.get(task.name)
    if step is None or task.kwargs:
        return None
    env = task.make()
    steps = env.spec.max_episode_steps if env.spec is not None else None
    env.close()
    if step >= 0:
        return 0.0
    return None if steps is None else step * steps


def shown_space(task: Task) -> tuple[spaces.Box, spaces.Space]:
    """Return the space of what the policy sees, frames stacked, and that of its actions."""
    env = task.make()
    space: Any = env.observation_space
    actions = env.action_space
    env.close()
    low, high, kind = space.low, space.high, space.dtype
    if task.scale != 1.0 or task.normaliser is not None:
        low, high, kind = np.full_like(low, -np.inf, np.float32), np.full_like(high, np.inf, np.float32), np.float32
    if task.n_frames > 1 and task.layout == "stack":
        low, high = (np.repeat(bound[None], task.n_frames, 0) for bound in (low, high))
    elif task.n_frames > 1:
        low, high = (np.concatenate([bound] * task.n_frames, -1) for bound in (low, high))
    return spaces.Box(low, high, dtype=kind), actions


def save_hardened(
    folder: str | os.PathLike[str], made: Hardened, *, algorithm: str = "ppo", settings: Mapping[str, Any] | None = None
) -> None:
    """Write ``model.json`` and the normaliser, and the weights of a set; ``policy.zip`` is there already.

    Args:
        folder: where to write.
        made: what was made.
        algorithm: of ``policy.zip``.
        settings: of PPO, which say how the networks of a set are built.
    """
    path, task = Path(folder), made.task
    path.mkdir(parents=True, exist_ok=True)
    if task.normaliser is not None:
        task.normaliser.save(path / STATISTICS)
    kwargs = dict((settings or {}).get("policy_kwargs", {}))
    if made.is_set:
        PolicySet(made.policies, task, names=made.names).save(path)
    document = {
        "schema": SCHEMA,
        "method": made.method,
        "env": task.name,
        "kwargs": dict(task.kwargs),
        "max_steps": task.max_steps,
        "scale": task.scale,
        "frames": task.n_frames,
        "layout": task.layout,
        "normaliser_sha256": None if task.normaliser is None else task.normaliser.sha256,
        "sigma": made.sigma,
        "names": list(made.names),
        "algorithm": algorithm,
        "policy_kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()},
        "reward_range": None if made.reward_range is None else list(made.reward_range),
        "details": dict(made.details),
    }
    write_json(path / MODEL, document)


def load_hardened(folder: str | os.PathLike[str], *, task: Task | None = None, device: Any = "cpu") -> Hardened:
    """Read what :func:`save_hardened` wrote.

    Args:
        folder: the folder.
        task: for environments of your own, which no file can name; scale, frames and normaliser come from the folder.
        device: where to put the policies.

    Raises:
        UntrustedFileError: ``model.json`` is not of this form, or a file is damaged.
        ValueError: weights that do not fit, or another normaliser than the policies were made with.
    """
    path = Path(folder)
    told = read_json(path / MODEL)
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise UntrustedFileError(f"{path / MODEL}: not of schema {SCHEMA!r}")
    try:
        made = _task(told, path, task)
        names, method, sigma = tuple(map(str, told["names"])), str(told["method"]), float(told["sigma"])
        kwargs, algorithm, bounds = dict(told["policy_kwargs"]), str(told["algorithm"]), told["reward_range"]
        details = dict(told["details"])
    except (KeyError, TypeError) as error:
        raise UntrustedFileError(f"{path / MODEL}: {error} is missing or of another kind") from error
    if bounds is not None:
        policies = PolicySet.load(path, made, lambda: blank_policy(made, {"policy_kwargs": kwargs})).policies
        policies = tuple(policy.to(device) for policy in policies)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        seen, actions = shown_space(made)
        policies = (load_sb3(path / ZIP, seen, actions, algorithm=algorithm, policy_kwargs=kwargs, device=device),)
    span = None if bounds is None else (float(bounds[0]), float(bounds[1]))
    return Hardened(policies, names, made, method, sigma, span, details)


def _task(told: Mapping[str, Any], path: Path, task: Task | None) -> Task:
    frozen = Normaliser.load(path / STATISTICS) if told["normaliser_sha256"] is not None else None
    if frozen is not None and frozen.sha256 != told["normaliser_sha256"]:
        raise ValueError(f"{path / STATISTICS}: not the statistics that the policies were made with")
    if task is None:
        env = _OWN.get(str(told["env"]), str(told["env"]))
        task = Task(env, dict(told["kwargs"]), told["max_steps"])
    elif task.name != told["env"]:
        raise ValueError(f"{path} was made for {told['env']}, not for {task.name}")
    return replace(task, scale=float(told["scale"]), normaliser=frozen, n_frames=int(told["frames"]),
                   layout=told["layout"])  # fmt: skip
