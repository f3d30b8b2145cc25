"""Non-dominated policies: a small set, each best against some attack, for a bandit that picks one in each episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rl_robust.adversarial.ppo import train_policy
from rl_robust.attacks.gradient import MaximalActionDifference, RandomNoise
from rl_robust.hardening.base import Job, Method
from rl_robust.hardening.game import GameSettings
from rl_robust.nondominated.discovery import Discovery, discover_policies
from rl_robust.observation import StepBudget
from rl_robust.saved import Hardened, load_hardened, save_hardened
from rl_robust.task import Task
from robust_core.checks import check_count, check_number

__all__ = ["METHOD", "Settings"]

RANGE_EPISODES = 20


@dataclass(frozen=True)
class Settings(GameSettings):
    """Those of a game (the SA term is for the policies after the first); size of the set, least gain of a policy.

    ``lowest`` and ``highest`` are the range of an episode's return for the bandit; where they are not given, the least
    and the largest return of the set in 20 episodes in peace, under noise and under maximal action difference.
    """

    n_policies: int = 3
    attacker: Literal["pa-ad", "sa-rl"] = "pa-ad"
    delta: float = 0.0
    choose_every: int = 10
    lowest: float | None = None
    highest: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_policies", self.n_policies, low=2)
        check_count("choose_every", self.choose_every)
        check_number("delta", self.delta)
        if (self.lowest is None) != (self.highest is None):
            raise ValueError("lowest and highest: give both, or neither")


def _first(job: Job, settings: Settings) -> tuple[Any, Task]:
    if job.first is not None:
        return load_hardened(job.first, task=job.task, device=job.device).policies[0], job.task
    return train_policy(
        job.task, n_steps=job.n_steps, normalise=job.normalise, n_envs=job.n_envs, settings=settings.ppo,
        generator=job.derived("policy"), device=job.device, checkpoint=job.checkpoint("initial"),
        on_step=job.told("initial"),
    )  # fmt: skip


def _discover(job: Job, settings: Settings) -> tuple[Discovery, Task]:
    first, task = _first(job, settings)
    updates = max(1, round(job.n_steps / (job.n_envs * settings.rollout)))
    found = discover_policies(
        task, first, budget=StepBudget(job.threat), n_policies=settings.n_policies, delta=settings.delta,
        attacker=settings.attacker, n_updates=updates, ramp=round(settings.ramp * updates),
        choose_every=settings.choose_every, n_envs=job.n_envs, kappa=settings.kappa, victim_settings=settings.ppo,
        attacker_settings=settings.rival, generator=job.derived("discovery"), device=job.device,
        checkpoint=job.checkpoint("set"), on_step=job.on_step,
    )  # fmt: skip
    return found, task


def _span(found: Discovery, budget: StepBudget, settings: Settings, seed: int) -> tuple[float, float]:
    if settings.lowest is not None and settings.highest is not None:
        return settings.lowest, settings.highest
    attacks = {"none": None, "random": RandomNoise(budget), "mad": MaximalActionDifference(budget)}
    seen = found.policies.payoff(attacks, RANGE_EPISODES, generator=seed).returns
    low, high = float(np.min(seen)), float(np.max(seen))
    return low, max(high, low + 1e-6 + 1e-6 * abs(low))


def _train(job: Job, settings: Settings) -> Hardened:
    found, task = _discover(job, settings)
    span = _span(found, StepBudget(job.threat), settings, job.derived("range"))
    rounds = len(found.policies) - 1 + found.stopped
    details = {
        "steps": job.n_steps, "environment_steps": job.n_steps * (1 + 3 * rounds), "seed": str(job.seed),
        "threat": str(job.threat), "settings": vars(settings), "gains": list(found.values), "stopped": found.stopped,
    }  # fmt: skip
    made = Hardened(found.policies.policies, found.policies.names, task, "non-dominated", 0.0, span, details)
    save_hardened(job.folder, made, settings=settings.ppo)
    return made


METHOD = Method(
    name="non-dominated",
    train=_train,
    settings=Settings,
    seeks="high return with and without attack, by several policies",
)
