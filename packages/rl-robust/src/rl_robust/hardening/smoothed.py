"""Policies that are trained and played under noise: the ones whose return can be certified."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rl_robust.hardening.base import Job, Method, PPOSettings, changed
from rl_robust.saved import ZIP, Hardened, save_hardened
from rl_robust.train_smoothed import SmoothedRecipe, train_smoothed
from robust_core.checks import check_count, check_number

__all__ = ["METHOD", "Settings"]

_CHECKS = 10


@dataclass(frozen=True)
class Settings(PPOSettings):
    """PPO's, the noise in units of what the policy is shown, and how often the best policy so far is looked for."""

    sigma: float = 0.1
    check_every: int | None = None
    check_episodes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma, low=0, open_low=True)
        check_count("check_episodes", self.check_episodes)


def _recipe(job: Job, settings: Settings, image: bool) -> SmoothedRecipe:
    every = settings.check_every or max(job.n_envs * settings.rollout, job.n_steps // _CHECKS)
    if job.recipe is not None:
        own = {"sigma", "check_every", "check_episodes"}
        others = sorted(set(changed(settings)) - own)
        if others:
            raise ValueError(f"--set {others[0]}: the recipe has its own settings of {job.recipe.algorithm}")
        return replace(job.recipe, task=job.task, n_steps=job.n_steps,
                       check_every=settings.check_every or job.recipe.check_every)  # fmt: skip
    more = settings.ppo
    if image:
        more["policy_kwargs"] = {**more["policy_kwargs"], "normalize_images": False}
    return SmoothedRecipe(job.task, "ppo", "CnnPolicy" if image else "MlpPolicy", more, job.n_steps, every,
                          settings.check_episodes)  # fmt: skip


def _train(job: Job, settings: Settings) -> Hardened:
    _, task = job.frozen(settings)
    job = replace(job, task=task)
    env = task.make()
    image = len(env.observation_space.shape or ()) + (task.n_frames > 1) == 3
    env.close()
    recipe = _recipe(job, settings, image)
    policy = train_smoothed(
        recipe, settings.sigma, n_envs=1 if job.recipe is not None else job.n_envs, generator=job.derived("policy"),
        device=job.device, checkpoint=job.checkpoint("smoothed"), file=job.folder / ZIP, on_step=job.told("smoothed"),
    )  # fmt: skip
    details = {
        "steps": job.n_steps,
        "environment_steps": job.n_steps,
        "seed": str(job.seed),
        "algorithm": recipe.algorithm,
        "settings": vars(settings),
    }
    made = Hardened((policy,), ("smoothed",), task, "smoothed", settings.sigma, details=details)
    save_hardened(job.folder, made, algorithm=recipe.algorithm, settings=recipe.settings)
    return made


METHOD = Method(name="smoothed", train=_train, settings=Settings, seeks="a return under noise that can be certified")
