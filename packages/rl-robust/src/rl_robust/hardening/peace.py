"""PPO and SA-PPO: trained without an attacker, the second so that it acts alike on all observations in the ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rl_robust.adversarial.ppo import train_policy
from rl_robust.adversarial.sa_ppo import INNER, StateAdversarialRegulariser
from rl_robust.hardening.base import Job, Method, PPOSettings
from rl_robust.saved import ZIP, Hardened, save_hardened
from robust_core.checks import check_choice, check_number

__all__ = ["METHODS", "SASettings"]


@dataclass(frozen=True)
class SASettings(PPOSettings):
    """PPO's, and the regulariser's: its weight, the search for its maximum, the share of training of its ramp."""

    kappa: float = 0.3
    inner: Literal["sgld", "pgd", "interval"] = "sgld"
    ramp: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("kappa", self.kappa, low=0)
        check_choice("inner", self.inner, INNER)
        check_number("ramp", self.ramp, low=0, high=1)


def _train(job: Job, settings: PPOSettings) -> Hardened:
    term, name = None, "ppo"
    if isinstance(settings, SASettings):
        name = "sa-ppo"
        term = StateAdversarialRegulariser(
            job.threat, settings.kappa, inner=settings.inner, ramp=settings.ramp, generator=job.derived("term")
        )
    policy, task = train_policy(
        job.task, term, n_steps=job.n_steps, normalise=job.normalise, n_envs=job.n_envs, settings=settings.ppo,
        generator=job.derived("policy"), device=job.device, checkpoint=job.checkpoint(name), file=job.folder / ZIP,
        on_step=job.told(name),
    )  # fmt: skip
    details = {
        "steps": job.n_steps,
        "environment_steps": job.n_steps,
        "seed": str(job.seed),
        "threat": str(job.threat),
        "settings": vars(settings),
    }
    made = Hardened((policy,), (name,), task, name, details=details)
    save_hardened(job.folder, made, settings=settings.ppo)
    return made


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ppo": Method(name="ppo", train=_train, settings=PPOSettings, seeks="the best return in peace: the baseline"),
        "sa-ppo": Method(name="sa-ppo", train=_train, settings=SASettings, seeks="to act alike in a ball"),
    }
)
