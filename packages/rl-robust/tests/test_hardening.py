"""Every method of harden writes a folder that is read again, goes on, and knows its published settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_robust import hardening
from rl_robust.hardening.base import Job, harden
from rl_robust.hardening.published import RECIPES, published, usual_settings, with_defaults
from rl_robust.rollout import collect
from rl_robust.saved import least_return, load_hardened
from rl_robust.task import Task
from robust_core.errors import UntrustedFileError
from robust_core.settings import describe_settings, parse_settings
from robust_core.threats import Linf

CARTPOLE = Task("CartPole-v1", max_steps=20)
TINY: dict[str, Any] = {"rollout": 16, "batch_size": 16, "n_epochs": 1, "net_arch": (8,)}


def job(out: Path, task: Task = CARTPOLE, **more: Any) -> Job:
    return Job(task=task, threat=Linf(0.1, domain=None), out=out, n_steps=64, n_envs=2, seed=3, **more)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("method", list(hardening.METHODS))
def test_what_is_written_is_read_again_and_not_trained_twice(method: str, normalise: bool, tmp_path: Path) -> None:
    made = harden(job(tmp_path, normalise=normalise), method, **TINY)
    read = load_hardened(tmp_path)
    assert (read.method, read.names, read.sigma) == (made.method, made.names, made.sigma)
    assert read.is_set == (method == "non-dominated")
    assert (read.sigma > 0) == (method == "smoothed")
    assert read.task.identity == made.task.identity
    assert (read.task.normaliser is not None) == normalise
    told: list[str] = []
    again = harden(job(tmp_path, normalise=normalise, on_step=lambda what, *_: told.append(what)), method, **TINY)
    assert told == []
    for policies in (read.policies, again.policies):
        for mine, other in zip(made.policies, policies, strict=True):
            one, two = (collect(p, made.task, 3, sigma=made.sigma).returns for p in (mine, other))
            assert one.tolist() == two.tolist()


@pytest.mark.quick
def test_settings_are_words_and_recipes_fill_them() -> None:
    for name in hardening.METHODS:
        assert describe_settings(hardening.find(name).settings)
    words = with_defaults(["kappa=0.7"], published("hopper", "sa-ppo").settings)
    found = parse_settings(hardening.find("sa-ppo").settings, words)
    assert (found.kappa, found.rollout, found.ramp) == (0.7, 2048, pytest.approx(1831 / 2441))
    assert found.ppo["n_steps"] == 2048
    for recipe, methods in RECIPES.items():
        for method in methods:
            settings = published(recipe, method).settings
            parse_settings(hardening.find(method).settings, with_defaults([], settings))
    walker = parse_settings(hardening.find("atla").settings, with_defaults([], published("walker2d", "atla").settings))
    assert walker.rival["learning_rate"] == 1e-3
    assert walker.ppo["clip_range_vf"] == 0.2
    assert usual_settings(Task("CartPole-v1"), "smoothed", 8)["gamma"] == 0.98
    assert usual_settings(Task("Hopper-v5"), "non-dominated", 8)["rollout"] == 256, "updates are as long as published"
    assert usual_settings(Task("Acrobot-v1"), "ppo", 8) == {}
    with pytest.raises(ValueError, match="is for smoothed"):
        published("pong", "ppo")
    with pytest.raises(ValueError, match="choose one of"):
        published("magic", "ppo")
    with pytest.raises(ValueError, match="choose one of"):
        hardening.find("magic")
    with pytest.raises(ValueError, match="both"):
        parse_settings(hardening.find("non-dominated").settings, ["lowest=1"])


def test_the_papers_training_of_smoothed_policies_is_saved_as_what_it_is(tmp_path: Path) -> None:
    found = published("cartpole", "smoothed")
    assert found.smoothed is not None
    small = {"learning_starts": 2, "batch_size": 2, "buffer_size": 20, "train_freq": 2, "gradient_steps": 1}
    recipe = replace(found.smoothed, settings={**found.smoothed.settings, **small})
    task = replace(found.task, max_steps=10)
    harden(job(tmp_path, task, recipe=recipe), "smoothed", sigma=0.3, check_every=64)
    read = load_hardened(tmp_path)
    assert (read.sigma, read.task.n_frames) == (0.3, 5)
    assert read.policies[0].outputs(torch.zeros(1, 5, 4)).shape == (1, 2)  # pyright: ignore
    with pytest.raises(ValueError, match="gamma"):
        harden(job(tmp_path, task, recipe=recipe), "smoothed", gamma=0.5)


def test_bounds_of_returns_are_those_of_the_rewards() -> None:
    assert least_return(Task("CartPole-v1")) == 0.0
    assert least_return(Task("MountainCar-v0")) == -200.0
    assert least_return(Task("MountainCar-v0", max_steps=50)) == -50.0
    assert least_return(Task("Hopper-v5")) is None
    assert least_return(Task("InvertedPendulum-v5", {"reset_noise_scale": 0.1})) is None


def test_damaged_folders_are_told(tmp_path: Path) -> None:
    harden(job(tmp_path, normalise=True), "ppo", **TINY)
    with pytest.raises(ValueError, match="was made for CartPole-v1"):
        load_hardened(tmp_path, task=Task("Acrobot-v1"))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UntrustedFileError, match="schema"):
        load_hardened(tmp_path)
    (tmp_path / "model.json").write_text('{"schema": "robust.hardened/1"}')
    with pytest.raises(UntrustedFileError, match="missing"):
        load_hardened(tmp_path)
