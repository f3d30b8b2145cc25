"""Published trainings by name, for ``--recipe``: environment, radius, steps and settings of a method.

``hopper``, ``walker2d``, ``halfcheetah``, ``ant``: :mod:`rl_robust.nondominated.recipes`; ``cartpole``, ``pong``,
``freeway``, ``mountain-car``: :data:`rl_robust.train_smoothed.RECIPES`; ``cartpole-ppo``: PPO as the zoo of
stable-baselines3 has it, but for learning rate and clipping, which fall linearly there from 1e-3 and 0.2 (here the rate
begins at 5e-4, and clipping stays at 0.1), radius ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_robust import train_smoothed
from rl_robust.nondominated import recipes
from rl_robust.task import Task

__all__ = ["RECIPES", "Published", "published", "usual_settings", "with_defaults"]

_GAMES = ("ppo", "sa-ppo", "atla", "non-dominated")
_ZOO = {"rollout": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98, "learning_rate": 5e-4,
        "clip_range": 0.1}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One of them, for one method.

    Attributes:
        task: environment.
        n_steps: environment steps of each policy.
        n_envs: environments side by side.
        eps: l-infinity radius of a step, where the method needs one.
        normalise: whether statistics of observations are learned.
        settings: of the method.
        smoothed: the whole training, of those that are no PPO.
    """

    task: Task
    n_steps: int
    n_envs: int = 8
    eps: float | None = None
    normalise: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    smoothed: train_smoothed.SmoothedRecipe | None = None


RECIPES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(recipes.RECIPES, _GAMES),
    **dict.fromkeys(train_smoothed.RECIPES, ("smoothed",)),
    "cartpole-ppo": (*_GAMES, "smoothed"),
}
"""Name -> methods that it is for."""


def published(name: str, method: str) -> Published:
    """Return a published training for a method.

    Raises:
        ValueError: no such recipe, or one that is for other methods.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe {name!r}: choose one of {', '.join(RECIPES)}")
    if method not in RECIPES[name]:
        raise ValueError(f"--recipe {name!r} is for {', '.join(RECIPES[name])}, not for {method}")
    if name == "cartpole-ppo":
        more = {"sigma": 0.2} if method == "smoothed" else {}
        return Published(Task("CartPole-v1"), 100_000, eps=0.1, settings={**_ZOO, **more})
    if method == "smoothed":
        found = train_smoothed.RECIPES[name]
        return Published(found.task, found.n_steps, 1, settings={"sigma": found.sigmas[0]}, smoothed=found)
    return _mujoco(recipes.RECIPES[name], method)


def _mujoco(recipe: recipes.Recipe, method: str) -> Published:
    victim = dict(recipe.victim)
    shared = {"rollout": victim["n_steps"], **{k: victim[k] for k in _KEPT if k in victim}}
    term = {"kappa": recipe.kappa, "ramp": recipe.ramp / recipe.n_updates}
    rival = {f"attacker_{k}": recipe.attacker[k] for k in ("learning_rate", "ent_coef", "clip_range")}
    span = {"lowest": recipe.reward_range[0], "highest": recipe.reward_range[1]}
    own = {"ppo": {}, "sa-ppo": term, "atla": rival}.get(method, {**term, **rival, **span, "n_policies": 5})
    steps = recipe.n_updates * victim["n_steps"]
    return Published(recipe.task, steps, 1, recipe.eps, True, {**shared, **own})


def usual_settings(task: Task, method: str, n_envs: int) -> Mapping[str, Any]:
    """Return settings for a shorter training on an environment that has a published recipe of PPO; else none.

    What belongs to the length of training is left out; a set has two policies.
    """
    for name in ("cartpole-ppo", *recipes.RECIPES):
        found = published(name, "ppo" if method == "smoothed" else method)
        if found.task.env == task.env:
            kept = {k: v for k, v in found.settings.items() if k not in _OF_LENGTH}
            kept |= {"n_policies": 2} if method == "non-dominated" else {}
            return {**kept, "rollout": max(1, found.settings["rollout"] * found.n_envs // n_envs)}
    return {}


_KEPT = ("learning_rate", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "ent_coef")
_OF_LENGTH = ("ramp", "n_policies", "lowest", "highest")


def with_defaults(words: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Return ``name=value`` words with a recipe's settings for the names that they do not set."""
    own = {word.partition("=")[0].strip().replace("-", "_") for word in words}
    return [*words, *(f"{k}={v}" for k, v in settings.items() if k not in own)]
