"""What a hardening method is given and what it makes.

    made = harden(Job(task=Task("CartPole-v1"), threat=Linf(0.1, domain=None), out="folder"), "sa-ppo", kappa=0.3)

writes ``folder``, which ``--policy saved:folder`` and :func:`rl_robust.saved.load_hardened` read. An interrupted call
goes on when it is repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rl_robust.adversarial.ppo import train_policy
from rl_robust.saved import Hardened
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Task
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, derive, resolve_seed
from robust_core.threats import Threat

__all__ = ["Job", "Method", "OnStep", "PPOSettings", "harden"]

OnStep = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class PPOSettings:
    """Settings of PPO that all methods share: stable-baselines3's, by its names (``rollout`` is its ``n_steps``)."""

    learning_rate: float = 3e-4
    rollout: int = 256
    batch_size: int = 64
    n_epochs: int = 10
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    ent_coef: float = 0.0
    net_arch: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        for name in ("rollout", "batch_size", "n_epochs"):
            check_count(name, getattr(self, name))
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), low=0, high=1)

    @property
    def ppo(self) -> dict[str, Any]:
        """The keyword arguments of SB3's PPO."""
        kept = {f.name: getattr(self, f.name) for f in fields(PPOSettings)}
        rollout, width = kept.pop("rollout"), list(kept.pop("net_arch"))
        return {**kept, "n_steps": rollout, "policy_kwargs": {"net_arch": width}}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of every method.

    Attributes:
        task: the environment.
        threat: ball of a step in which attackers may move what is observed, after the normaliser.
        out: folder of everything that is written.
        n_steps: environment steps of each policy that is trained.
        n_envs: environments side by side.
        normalise: learn statistics of observations and freeze them, where the task has none.
        recipe: a published training of smoothed policies; other methods know theirs as settings.
        first: folder of a natural PPO on this task, which a set takes for its first policy instead of training one.
        seed: of everything.
        device: where to train.
        on_step: progress.
    """

    task: Task
    threat: Threat
    out: str | os.PathLike[str]
    n_steps: int = 100_000
    n_envs: int = 8
    normalise: bool = False
    recipe: Any = None
    first: Path | None = None
    seed: Seed = None
    device: str = "cpu"
    on_step: OnStep | None = None

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.out)

    def checkpoint(self, name: str) -> Path:
        """Return the folder of the checkpoints of one piece of training."""
        return self.folder / "checkpoints" / name

    def derived(self, name: str) -> int:
        """Return the seed of one piece of training."""
        return derive(resolve_seed(self.seed), name)

    def frozen(self, settings: PPOSettings) -> tuple[SB3Policy | None, Task]:
        """Return the task with frozen statistics, for methods that cannot learn them on the way.

        They come from a natural policy that trains for a tenth of the steps; it is returned as well.
        """
        if not self.normalise or self.task.normaliser is not None:
            return None, self.task
        policy, task = train_policy(
            self.task, n_steps=max(1, self.n_steps // 10), n_envs=self.n_envs, settings=settings.ppo,
            generator=self.derived("statistics"), device=self.device, checkpoint=self.checkpoint("statistics"),
            on_step=self.told("statistics"),
        )  # fmt: skip
        return policy, task

    def told(self, name: str) -> OnStep | None:
        """Return progress under another name."""
        tell = self.on_step
        return None if tell is None else lambda _, done, total: tell(name, done, total)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method that hardens.

    Attributes:
        name: behind ``--method``.
        train: (job, settings) -> what was made; it writes the weights and ``model.json``.
        settings: dataclass of its own settings.
        seeks: in a line, what it makes.
    """

    name: str
    train: Callable[[Job, Any], Hardened]
    settings: type[Any]
    seeks: str


def harden(job: Job, method: str = "sa-ppo", **settings: Any) -> Hardened:
    """Train policies that withstand, by one of :data:`rl_robust.hardening.METHODS`.

    Args:
        job: what all methods share.
        method: its name.
        settings: the method's own; ``robust rl settings METHOD`` lists them.

    Raises:
        ValueError, TypeError: no such method, or settings that it does not have.
    """
    from rl_robust.hardening import find

    check_count("n_steps", job.n_steps)
    check_count("n_envs", job.n_envs)
    found = find(method)
    job.folder.mkdir(parents=True, exist_ok=True)
    return found.train(replace(job, seed=resolve_seed(job.seed)), found.settings(**settings))


def changed(settings: Any) -> Mapping[str, Any]:
    """Return the settings that are not the defaults."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
