"""From the words of the command line to task, policy and attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from gymnasium import spaces

from rl_robust.attacks import BudgetedPGD, CriticAttack, MaximalActionDifference, RandomNoise, RobustSarsa, fit_sarsa
from rl_robust.attacks.episode import offsets
from rl_robust.attacks.sarsa import ActionValue
from rl_robust.cli.words import split_policy
from rl_robust.observation import Budget, EpisodeBudget, ObservationAttack, StepBudget
from rl_robust.policy import Policy, as_policy, require
from rl_robust.sb3 import load_sb3
from rl_robust.task import Normaliser, Task
from robust_core.loading import load_factory, load_into
from robust_core.models import model_device
from robust_core.threats import parse_threat

__all__ = ["attacks_of", "load_policy", "shown_space", "task_of"]


def task_of(
    env: str,
    settings: Sequence[str],
    *,
    max_steps: int | None,
    scale: float,
    normaliser: Path | None,
    frames: int,
    layout: str,
) -> Task:
    """Return the task that the options describe.

    Args:
        env: a registered id.
        settings: ``name=value`` for ``gymnasium.make``; numbers and true/false are read as such.
        max_steps: where episodes are cut.
        scale: of observations.
        normaliser: file written by :meth:`rl_robust.task.Normaliser.save`.
        frames: that the policy sees.
        layout: of the frames.
    """
    kwargs: dict[str, Any] = {}
    for word in settings:
        name, sign, text = word.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"--env-set {word!r}: name=value is needed")
        kwargs[name] = _read(text)
    frozen = None if normaliser is None else Normaliser.load(normaliser)
    return Task(env, kwargs, max_steps, scale, frozen, frames, cast("Any", layout))


def _read(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def shown_space(task: Task) -> tuple[spaces.Box, spaces.Space]:
    """Return the space of what the policy sees, frames stacked, and that of its actions."""
    env = task.make()
    space, actions = cast("spaces.Box", env.observation_space), env.action_space
    env.close()
    low, high, kind = space.low, space.high, space.dtype
    if task.scale != 1.0 or task.normaliser is not None:
        low, high, kind = np.full_like(low, -np.inf, np.float32), np.full_like(high, np.inf, np.float32), np.float32
    if task.n_frames > 1 and task.layout == "stack":
        low, high = (np.repeat(bound[None], task.n_frames, 0) for bound in (low, high))
    elif task.n_frames > 1:
        low, high = (np.concatenate([bound] * task.n_frames, -1) for bound in (low, high))
    return spaces.Box(low, high, dtype=cast("Any", kind)), actions


def load_policy(words: str, task: Task, device: Any) -> Policy:
    """Return the policy that ``words`` name, for this task."""
    kind, name, more = split_policy(words)
    seen, actions = shown_space(task)
    if kind == "sb3":
        return load_sb3(name, seen, actions, algorithm=more, device=device)
    network = load_factory(name)
    if more is not None:
        load_into(network, more)
    return as_policy(network.to(device).eval(), actions)


def attacks_of(
    names: str,
    policy: Policy,
    task: Task,
    *,
    eps: Sequence[float],
    norm: str,
    per: Literal["step", "episode"],
    duration: int,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, ObservationAttack]:
    """Return the attacks, each for each radius; names carry the radius where there are several.

    Args:
        names: with commas.
        policy: the victim, which some attacks watch first.
        task: the environment.
        eps: radii.
        norm: of a step's ball.
        per: what the radius is for.
        duration: steps among which an episode's budget is shared.
        seed: of what is fitted.
        on_step: called with (what is done, done, in all) while something is fitted.
    """
    domain, found = task.domain, {}
    critic = _critic(names, policy, task, max(eps), seed, on_step)
    for radius in eps:
        step = StepBudget(type(parse_threat(norm, radius))(radius, domain))
        budget: Budget = EpisodeBudget(radius, domain) if per == "episode" else step
        for name in (word.strip() for word in names.split(",") if word.strip()):
            if critic is not None and name in _SARSA:
                sarsa = RobustSarsa(budget, critic, _SARSA[name], duration=duration)
                found[name if len(eps) == 1 else f"{name}@{radius:g}"] = sarsa
                continue
            for label, attack in _built(name, budget, task, duration).items():
                found[label if len(eps) == 1 else f"{label}@{radius:g}"] = attack
    return found


_SARSA = {"sarsa": 1.0, "sarsa+mad": 0.5}


def _critic(
    names: str, policy: Policy, task: Task, radius: float, seed: int, on_step: Callable[[str, int, int], None] | None
) -> ActionValue | None:
    """Return Q of the victim if an attack asks for it; a victim that is never random is watched under noise."""
    if not any(name.strip() in _SARSA for name in names.split(",")):
        return None
    require(policy, "outputs")
    sigma = 0.0 if policy.n_draws else radius
    return fit_sarsa(policy, task, sigma=sigma, generator=seed, on_step=on_step).to(model_device(policy))  # pyright: ignore


def _built(name: str, budget: Budget, task: Task, duration: int) -> dict[str, Any]:
    if name in ("pgd", "offset") and not isinstance(budget, EpisodeBudget):
        raise ValueError(f"--attacks {name}: it spends the budget of an episode; add --per episode")
    if name == "offset":
        size = int(np.prod(shown_space(task)[0].shape)) // task.n_frames
        if size > 64:
            raise ValueError(f"--attacks offset: one for each of {size} elements both ways would take days")
        return offsets(budget, size, (duration,))  # pyright: ignore[reportArgumentType]
    if name == "pgd":
        return {"pgd": BudgetedPGD(budget, n_smoothing=32)}  # pyright: ignore[reportArgumentType]
    kinds = {"random": RandomNoise, "critic": CriticAttack, "mad": MaximalActionDifference}
    return {name: kinds[name](budget, duration=duration)}
