"""Training with noise: the noise is there, the best check is kept, an interrupted run goes on, recipes build."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_robust.rollout import collect
from rl_robust.task import Normaliser, Task
from rl_robust.train_smoothed import RECIPES, SmoothedRecipe, train_smoothed, training_env

SMALL = SmoothedRecipe(
    Task("CartPole-v1", max_steps=60, n_frames=2),
    "ppo",
    settings={"n_steps": 64, "batch_size": 64, "n_epochs": 4, "policy_kwargs": {"net_arch": [16]}},
    n_steps=1024,
    check_every=256,
    check_episodes=5,
)


def test_training_repeats_leaves_the_global_state_and_fits_the_task() -> None:
    state = torch.get_rng_state()
    policies = [train_smoothed(SMALL, 0.1, n_envs=2, generator=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (p.policy.state_dict() for p in policies)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert collect(policies[0], SMALL.task, 5, sigma=0.1).mean > 5


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_smoothed(SMALL, 0.1, checkpoint=tmp_path, on_step=stop)
    seen_before = list(seen)
    train_smoothed(SMALL, 0.1, checkpoint=tmp_path, on_step=lambda what, done, total: seen.append(done))
    assert seen[len(seen_before)] > seen_before[-1]
    assert seen[-1] == SMALL.n_steps


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_papers_recipes_train_two_steps(name: str) -> None:
    """The full environments, shapes and networks; only the number of steps and the buffer are small."""
    recipe = RECIPES[name]
    settings = {**recipe.settings}
    if recipe.algorithm in ("dqn", "ddpg"):
        settings |= {"learning_starts": 2, "batch_size": 2, "buffer_size": 20, "train_freq": 2, "gradient_steps": 1}
    small = replace(recipe, settings=settings, n_steps=4, check_every=4, check_episodes=1)
    small = replace(
        small, task=replace(small.task, max_steps=6) if isinstance(small.task.env, str) else _short(small.task)
    )
    policy = train_smoothed(small, recipe.sigmas[0])
    sample = collect(policy, small.task, 2, sigma=recipe.sigmas[0])
    assert np.all(sample.returns >= recipe.lower)
    env = training_env(small.task, 0.1, 0)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(np.asarray(obs))
    env.close()


def _short(task: Task) -> Task:
    return replace(task, kwargs={**task.kwargs, "max_steps": 6})


def test_training_shows_what_the_engine_shows() -> None:
    """Scale, frozen statistics and frames stand where they stand when the policy is measured; noise comes on top."""
    frozen = Normaliser(torch.full((4,), 0.01), torch.full((4,), 0.3))
    task = Task("CartPole-v1", scale=0.5, normaliser=frozen, n_frames=2)
    env = training_env(task, 0.0, 0)
    obs, _ = env.reset(seed=3)
    raw = task.make().reset(seed=3)[0]
    assert np.array_equal(obs, np.stack([task.observe(raw[None])[0].numpy()] * 2))
    assert not np.array_equal(training_env(task, 0.1, 0).reset(seed=3)[0], obs)


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(ValueError, match="layout"):
        training_env(Task("CartPole-v1", n_frames=2, layout="concat"), 0.1, 0)
    with pytest.raises(ValueError, match="algorithm"):
        train_smoothed(replace(SMALL, algorithm="magic"), 0.1)
    with pytest.raises(ValueError, match="sigma"):
        train_smoothed(SMALL, -0.1)
