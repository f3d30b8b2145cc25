"""From the words of the command line to task, policy and attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from rl_robust.attacks.suite import Suite
from rl_robust.cli.words import split_policy
from rl_robust.observation import Budget, EpisodeBudget, ObservationAttack, StepBudget
from rl_robust.policy import Policy, as_policy
from rl_robust.saved import Hardened, least_return, load_hardened, shown_space
from rl_robust.sb3 import load_sb3
from rl_robust.task import Normaliser, Task
from robust_core.loading import load_factory, load_into
from robust_core.threats import parse_threat

__all__ = ["TaskWords", "attacks_of", "load_policy", "lowest_of", "one_policy", "task_of"]

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TaskWords:
    """The options that say what the environment is; where a saved policy says it, they may be left out."""

    env: str | None
    env_set: Sequence[str] = ()
    max_steps: int | None = None
    scale: float = 1.0
    normaliser: Path | None = None
    frames: int = 1
    layout: str = "stack"

    @property
    def task(self) -> Task:
        """The task that the options describe.

        Raises:
            ValueError: no environment, or settings of it that are none.
        """
        if self.env is None:
            raise ValueError("--env is needed: a registered gymnasium id, such as CartPole-v1")
        return task_of(self.env, self.env_set, max_steps=self.max_steps, scale=self.scale, normaliser=self.normaliser,
                       frames=self.frames, layout=self.layout)  # fmt: skip


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
    frozen = None if normaliser is None else Normaliser.load(normaliser)
    return Task(env, _kwargs(settings), max_steps, scale, frozen, frames, cast("Any", layout))


def _kwargs(settings: Sequence[str]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    for word in settings:
        name, sign, text = word.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"--env-set {word!r}: name=value is needed")
        kwargs[name] = _read(text)
    return kwargs


def _read(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load_policy(policy: str, words: TaskWords, device: Any) -> Hardened:
    """Return what ``--policy`` names, with its task.

    Raises:
        ValueError: options that contradict what a saved policy was made for.
    """
    kind, name, more = split_policy(policy)
    if kind == "saved":
        return _saved(name, more, words, device)
    task = words.task
    seen, actions = shown_space(task)
    if kind == "sb3":
        found: Policy = load_sb3(name, seen, actions, algorithm=more, device=device)
    elif kind == "lipschitz":
        from rl_robust.lipschitz import files

        found = files.load_policy(name, device=device, shown=seen.shape, actions=actions)
    else:
        network = load_factory(name)
        if more is not None:
            load_into(network, more)
        found = as_policy(network.to(device).eval(), actions)
    return Hardened((found,), (policy,), task, "given")


def _saved(folder: str, member: str | None, words: TaskWords, device: Any) -> Hardened:
    found = load_hardened(folder, device=device)
    for option, given in (("env", words.env not in (None, found.task.name)), ("scale", words.scale != 1.0),
                          ("normaliser", words.normaliser is not None), ("frames", words.frames != 1)):  # fmt: skip
        if given:
            raise ValueError(f"--{option}: saved:{folder} says it itself ({found.task.identity}); leave it out")
    task = found.task
    if words.env_set:
        task = replace(task, kwargs=_kwargs(words.env_set))
    if words.max_steps is not None:
        task = replace(task, max_steps=words.max_steps)
    if member is None:
        return replace(found, task=task)
    known = {**{str(k): k for k in range(len(found.names))}, **{name: k for k, name in enumerate(found.names)}}
    if member not in known:
        raise ValueError(f"--policy saved:{folder}@{member}: the set holds {', '.join(found.names)}")
    k = known[member]
    return replace(found, policies=(found.policies[k],), names=(found.names[k],), task=task, reward_range=None)


def one_policy(found: Hardened, words: str) -> Policy:
    """Return the policy that plays alone.

    Raises:
        ValueError: there are several.
    """
    first, *others = found.policies
    if others:
        raise ValueError(
            f"--policy {words}: a set of {len(found.policies)} policies; name one, such as {words}@0, or let a bandit "
            f"play them: robust rl compare --policy set={words}"
        )
    return first


def lowest_of(lower: float | None, task: Task) -> float | None:
    """Return the least possible return: as given, or as the environment's rewards tell."""
    return least_return(task) if lower is None else lower


def attacks_of(
    names: Sequence[str],
    suite: Suite,
    *,
    eps: Sequence[float],
    norm: str,
    per: Literal["step", "episode"],
) -> dict[str, ObservationAttack]:
    """Return the attacks, each for each radius; names carry the radius where there are several.

    Args:
        names: of attacks.
        suite: that makes them.
        eps: radii.
        norm: of a step's ball.
        per: what the radius is for.
    """
    domain, found = suite.task.domain, {}
    if any(name.startswith("sarsa") for name in names):
        suite.critic(max(eps))
    for radius in eps:
        step = StepBudget(type(parse_threat(norm, radius))(radius, domain))
        budget: Budget = EpisodeBudget(radius, domain) if per == "episode" else step
        for label, attack in suite.build(names, budget).items():
            found[label if len(eps) == 1 else f"{label}@{radius:g}"] = attack
    return found
