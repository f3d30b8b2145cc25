"""ATLA: a victim and its attacker train in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rl_robust.adversarial.atla import train_atla
from rl_robust.adversarial.sa_ppo import StateAdversarialRegulariser
from rl_robust.hardening.base import Job, Method
from rl_robust.hardening.peace import SASettings
from rl_robust.observation import StepBudget
from rl_robust.saved import ZIP, Hardened, save_hardened
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["METHOD", "GameSettings", "Settings"]


@dataclass(frozen=True)
class GameSettings(SASettings):
    """PPO's, the SA term's, and those in which the attacker's PPO differs from the victim's."""

    attacker: Literal["sa-rl", "pa-ad"] = "sa-rl"
    attacker_learning_rate: float = 3e-4
    attacker_ent_coef: float = 0.0
    attacker_clip_range: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attacker", self.attacker, ("sa-rl", "pa-ad"))
        check_number("attacker_learning_rate", self.attacker_learning_rate, low=0, open_low=True)

    @property
    def rival(self) -> dict[str, Any]:
        """The keyword arguments of the attacker's PPO."""
        own = ("learning_rate", "ent_coef", "clip_range")
        return {**self.ppo, "clip_range_vf": None, **{name: getattr(self, f"attacker_{name}") for name in own}}


@dataclass(frozen=True)
class Settings(GameSettings):
    """Those of a game; the weight of the SA term (0: without it), updates of each side's turns, a victim's memory."""

    kappa: float = 0.0
    victim_updates: int = 1
    attacker_updates: int = 1
    recurrent: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("victim_updates", "attacker_updates"):
            check_count(name, getattr(self, name))


def _train(job: Job, settings: Settings) -> Hardened:
    first, task = job.frozen(settings)
    term = None
    if settings.kappa > 0:
        term = StateAdversarialRegulariser(
            job.threat, settings.kappa, inner=settings.inner, ramp=settings.ramp, generator=job.derived("term")
        )
    found = train_atla(
        task, StepBudget(job.threat), n_steps=job.n_steps, victim_updates=settings.victim_updates,
        attacker_updates=settings.attacker_updates, kind=settings.attacker, regulariser=term,
        recurrent=settings.recurrent, initial=first, n_envs=job.n_envs, victim_settings=settings.ppo,
        attacker_settings=settings.rival, generator=job.derived("game"), device=job.device,
        checkpoint=job.checkpoint("atla"), file=job.folder / ZIP, on_step=job.told("atla"),
    )  # fmt: skip
    in_all = round(job.n_steps * (1 + settings.attacker_updates / settings.victim_updates))
    details = {
        "steps": job.n_steps,
        "environment_steps": in_all,
        "seed": str(job.seed),
        "threat": str(job.threat),
        "settings": vars(settings),
    }
    made = Hardened((found.policy,), ("atla",), task, "atla", details=details)
    algorithm = "recurrent-ppo" if settings.recurrent else "ppo"
    save_hardened(job.folder, made, algorithm=algorithm, settings=settings.ppo)
    return made


METHOD = Method(name="atla", train=_train, settings=Settings, seeks="the best return under an attacker that learns too")
