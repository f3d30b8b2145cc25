"""Train the base policy of policy smoothing: ordinary reinforcement learning on noised observations.

Noise of the same ``sigma`` as at run time is put on each raw observation, before frames are stacked; otherwise nothing
differs from stable-baselines3, which trains. The policy with the best mean noisy return among regular checks is kept;
certify it on other episodes.

Recipes of Kumar, Levine and Feizi 2022 (arXiv 2106.11420), as their scripts have them: :data:`RECIPES`. MountainCar's
settings could not be recovered; the one here is DDPG with the library's own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import gymnasium as gym

from rl_robust.adversarial.ppo import scaled_rewards
from rl_robust.checkpoints import Checkpoint, running, set_running
from rl_robust.rollout import collect
from rl_robust.sb3 import SB3Policy
from rl_robust.smoothing import NoisyObservation
from rl_robust.task import Task
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["RECIPES", "SmoothedRecipe", "train_smoothed", "training_env"]

ON_POLICY = ("a2c", "ppo")
LEARNERS = ("a2c", "ddpg", "dqn", "ppo", "sac", "td3")
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SmoothedRecipe:
    """How a smoothed policy is trained.

    Attributes:
        task: environment, scale and frames.
        algorithm: of stable-baselines3.
        policy: its policy class by name.
        settings: keyword arguments of the algorithm.
        n_steps: environment steps.
        check_every: steps between checks.
        check_episodes: episodes of a check.
        lower: the least return that the environment can give, for the certificate.
        sigmas: noise levels of the paper, in units of the scaled observation.
    """

    task: Task
    algorithm: str
    policy: str = "MlpPolicy"
    settings: Mapping[str, Any] = field(default_factory=dict)
    n_steps: int = 500_000
    check_every: int = 2_000
    check_episodes: int = 10
    lower: float = 0.0
    sigmas: tuple[float, ...] = ()


_PIXELS = {"buffer_size": 10_000, "batch_size": 32, "learning_rate": 1e-4, "learning_starts": 100_000, "train_freq": 4,
           "target_update_interval": 1000, "exploration_final_eps": 0.01,
           "policy_kwargs": {"normalize_images": False}}  # fmt: skip


def _pixels(game: str, **kwargs: Any) -> Task:
    return Task(atari, {"game": game, **kwargs}, scale=1 / 255, n_frames=4)


def atari(game: str, *, one_round: bool = False, max_steps: int | None = None, **kwargs: Any) -> gym.Env:
    """Return an Atari game in grey 84 x 84 frames, four raw frames for each step.

    Args:
        game: id such as ``ALE/Pong-v5``.
        one_round: end the episode at the first point.
        max_steps: cut episodes there.
        kwargs: for ``gymnasium.make``.
    """
    import ale_py

    gym.register_envs(ale_py)
    env = gym.wrappers.AtariPreprocessing(gym.make(game, frameskip=1, **kwargs), frame_skip=4, noop_max=0)
    env = _OneRound(env) if one_round else env
    return env if max_steps is None else gym.wrappers.TimeLimit(env, max_steps)


class _OneRound(gym.Wrapper):
    """End an episode at its first point."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment."""
        obs, reward, ended, cut, info = self.env.step(action)
        return obs, reward, ended or float(reward) != 0.0, cut, info


RECIPES: Mapping[str, SmoothedRecipe] = MappingProxyType(
    {
        "cartpole": SmoothedRecipe(
            Task("CartPole-v1", max_steps=200, n_frames=5),
            "dqn",
            settings={
                "policy_kwargs": {"net_arch": [256, 256]}, "learning_rate": 1e-4, "buffer_size": 100_000,
                "batch_size": 1024, "learning_starts": 1000, "train_freq": 256, "gradient_steps": 128,
                "target_update_interval": 10, "exploration_fraction": 0.16, "exploration_final_eps": 0.0,
            },
            sigmas=(0.2, 0.4, 0.6, 0.8),
        ),
        "pong": SmoothedRecipe(
            _pixels("ALE/Pong-v5", one_round=True),
            "dqn",
            "CnnPolicy",
            {**_PIXELS, "exploration_fraction": 0.1},
            n_steps=10_000_000,
            check_every=100_000,
            check_episodes=100,
            lower=-1.0,
            sigmas=(0.05, 0.1),
        ),
        "freeway": SmoothedRecipe(
            _pixels("ALE/Freeway-v5", max_steps=250, difficulty=1, repeat_action_probability=0.25),
            "dqn",
            "CnnPolicy",
            {**_PIXELS, "exploration_fraction": 0.2},
            n_steps=10_000_000,
            check_every=100_000,
            check_episodes=100,
            sigmas=(0.05, 0.1),
        ),
        "mountain-car": SmoothedRecipe(
            Task("MountainCarContinuous-v0"), "ddpg", n_steps=300_000, check_every=10_000, lower=-99.9, sigmas=(0.4,)
        ),
    }
)  # fmt: skip
"""The paper's environments; MountainCar's steps each cost at most 0.1 in 999 steps, which bounds its return."""


def training_env(task: Task, sigma: float, generator: int) -> gym.Env:
    """Return the environment of a task with noise on each scaled, normalised observation, and its frames stacked."""
    env: gym.Env = NoisyObservation(
        task.make(), sigma, scale=task.scale, normaliser=task.normaliser, generator=generator
    )
    if task.n_frames == 1:
        return env
    if task.layout != "stack":
        raise ValueError(f"task.layout={task.layout!r}: training stacks frames on a new axis ('stack')")
    return gym.wrappers.FrameStackObservation(env, task.n_frames)


def train_smoothed(
    recipe: SmoothedRecipe,
    sigma: float,
    *,
    n_envs: int = 1,
    generator: Seed = None,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> SB3Policy:
    """Train with noise, and return the policy of the best check.

    Args:
        recipe: one of :data:`RECIPES`, or your own.
        sigma: standard deviation of the noise, in units of the scaled observation.
        n_envs: environments side by side, as the algorithm takes them.
        generator: seed.
        device: where to train.
        checkpoint: folder; an interrupted run goes on from its last check (replay buffers begin anew).
        file: where SB3's own zip is written at the end.
        on_step: called with ("training", steps done, steps in all).
    """
    check_number("sigma", sigma, low=0)
    check_choice("recipe.algorithm", recipe.algorithm, LEARNERS)
    check_count("n_envs", n_envs)
    import stable_baselines3
    from stable_baselines3.common.vec_env import DummyVecEnv

    seed = resolve_seed(generator)
    learner = getattr(stable_baselines3, recipe.algorithm.upper())
    asked = {"task": recipe.task.identity, "algorithm": recipe.algorithm, "policy": recipe.policy, "sigma": sigma,
             "settings": dict(recipe.settings), "steps": [recipe.n_steps, recipe.check_every, recipe.check_episodes],
             "n_envs": n_envs, "seed": seed}  # fmt: skip
    kept = Checkpoint(checkpoint, asked)
    with reseeded(derive(seed, "training")):
        env: Any = DummyVecEnv([_maker(recipe.task, sigma, derive(seed, "noise", k)) for k in range(n_envs)])
        if recipe.algorithm in ON_POLICY:
            env = scaled_rewards(env, recipe.settings)
        model = learner(recipe.policy, env, seed=seed & 0x7FFFFFFF, device=device, verbose=0, **dict(recipe.settings))
        done, best, state = 0, -float("inf"), model.policy.state_dict()
        if (found := kept.load()) is not None:
            done, best, state = int(found["steps"]), float(found["score"]), found["best"]
            model.set_parameters(found["model"])
            model.num_timesteps = done
            set_running(env, found["running"])
        while done < recipe.n_steps:
            model.learn(min(recipe.check_every, recipe.n_steps - done), reset_num_timesteps=done == 0)
            done = max(int(model.num_timesteps), done + recipe.check_every)
            victim = SB3Policy(model.policy)
            sample = collect(
                victim, recipe.task, recipe.check_episodes, sigma=sigma, generator=derive(seed, "check"), first=done
            )
            if sample.mean >= best:
                best, state = sample.mean, {k: v.clone() for k, v in model.policy.state_dict().items()}
            kept.save({"steps": done, "score": best, "best": dict(state), "model": model.get_parameters(),
                       "running": running(env)})  # fmt: skip
            if on_step is not None:
                on_step("training", min(done, recipe.n_steps), recipe.n_steps)
        env.close()
    model.policy.load_state_dict(state)
    if file is not None:
        model.save(file)
    return SB3Policy(model.policy)


def _maker(task: Task, sigma: float, seed: int) -> Callable[[], gym.Env]:
    return lambda: training_env(task, sigma, seed)
