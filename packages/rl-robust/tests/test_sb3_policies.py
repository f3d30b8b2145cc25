"""Zips of stable-baselines3 act here as they act there, and run no code."""

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3 import PPO

from rl_robust.policy import as_policy, require
from rl_robust.rollout import collect
from rl_robust.sb3 import SB3Policy, load_sb3
from rl_robust.task import Task
from robust_core.errors import ResourceError, UntrustedFileError

KINDS = [
    ("PPO", "CartPole-v1", "MlpPolicy"),
    ("PPO", "Pendulum-v1", "MlpPolicy"),
    ("DQN", "CartPole-v1", "MlpPolicy"),
    ("QRDQN", "CartPole-v1", "MlpPolicy"),
    ("SAC", "Pendulum-v1", "MlpPolicy"),
    ("TD3", "Pendulum-v1", "MlpPolicy"),
    ("TQC", "Pendulum-v1", "MlpPolicy"),
    ("RecurrentPPO", "CartPole-v1", "MlpLstmPolicy"),
]


def learner(name: str) -> Any:
    """The class of an algorithm; those of sb3-contrib come with the extra ``contrib``."""
    library = stable_baselines3 if hasattr(stable_baselines3, name) else importlib.import_module("sb3_contrib")
    return getattr(library, name)


def saved(kind: type[Any], name: str, words: str, path: Path, **kwargs: Any) -> tuple[Any, gym.Env]:
    env = gym.make(name)
    model = kind(words, env, seed=0, **kwargs)
    model.save(path)
    return model, env


@pytest.mark.parametrize(("kind", "name", "words"), KINDS)
def test_actions_are_those_of_the_library(tmp_path: Path, kind: str, name: str, words: str) -> None:
    model, env = saved(learner(kind), name, words, tmp_path / "m.zip", policy_kwargs={"net_arch": [16, 16]})
    policy = load_sb3(tmp_path / "m.zip", env.observation_space, env.action_space)
    obs = np.random.default_rng(0).normal(size=(9, *env.observation_space.shape)).astype(np.float32)  # pyright: ignore
    with torch.no_grad():
        actions, memory = policy.act(torch.as_tensor(obs))
        native, state = model.predict(obs, deterministic=True)
        np.testing.assert_allclose(actions.numpy(), native, atol=1e-6)
        if memory is not None:  # the second step of a recurrent policy, with some episodes beginning anew
            start = torch.arange(9) % 3 == 0
            actions, _ = policy.act(torch.as_tensor(2 * obs), memory, start)
            native, _ = model.predict(2 * obs, state=state, episode_start=start.numpy(), deterministic=True)
            np.testing.assert_allclose(actions.numpy(), native, atol=1e-6)
    x = torch.as_tensor(obs).requires_grad_(True)
    policy.outputs(x).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    if not policy.recurrent:
        assert policy.value(x).shape == (9,)
    assert len(collect(policy, Task(name, max_steps=10), 3)) == 3


@pytest.mark.quick
def test_sampling_follows_the_policys_distribution(tmp_path: Path) -> None:
    for name in ("CartPole-v1", "Pendulum-v1"):
        model, env = saved(PPO, name, "MlpPolicy", tmp_path / "m.zip")
        policy = SB3Policy(model.policy)
        obs = torch.full((4000, *env.observation_space.shape), 0.3)  # pyright: ignore[reportOptionalIterable]
        draws = torch.rand(4000, policy.n_draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            actions, _ = policy.act(obs, draws=draws)
            if name == "CartPole-v1":
                p = policy.outputs(obs[:1]).softmax(1)[0, 1]
                assert abs(float(actions.double().mean()) - float(p)) < 0.03
            else:
                inside = actions.abs() < 2  # the ends of the action space cut the tails
                mean, spread = policy.outputs(obs[:1])[0], policy.spread
                assert spread is not None
                assert abs(float(actions.median() - mean)) < 0.1
                assert abs(float((actions[inside] < mean).double().mean()) - 0.5) < 0.05


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("boom").write_text, ("ran",))


def test_nothing_in_a_zip_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import pickle

    monkeypatch.chdir(tmp_path)
    _, env = saved(PPO, "CartPole-v1", "MlpPolicy", tmp_path / "m.zip")
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(parts["data"])
    for value in data.values():
        if isinstance(value, dict) and ":serialized:" in value:
            value[":serialized:"] = base64.b64encode(pickle.dumps(Boom())).decode()
    parts["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    policy = load_sb3(tmp_path / "hostile.zip", env.observation_space, env.action_space)
    assert isinstance(policy, SB3Policy)
    assert not (tmp_path / "boom").exists()
    parts["policy.pth"] = pickle.dumps(Boom())
    with zipfile.ZipFile(tmp_path / "worse.zip", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UntrustedFileError):
        load_sb3(tmp_path / "worse.zip", env.observation_space, env.action_space)
    assert not (tmp_path / "boom").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, env = saved(PPO, "CartPole-v1", "MlpPolicy", tmp_path / "m.zip")
    other = gym.make("Pendulum-v1")
    with pytest.raises(ValueError, match="does not fit"):
        load_sb3(tmp_path / "m.zip", other.observation_space, other.action_space)
    with pytest.raises(ValueError, match="does not fit"):
        load_sb3(tmp_path / "m.zip", env.observation_space, env.action_space, algorithm="dqn")
    with pytest.raises(ValueError, match="choose one of"):
        load_sb3(tmp_path / "m.zip", env.observation_space, env.action_space, algorithm="magic")
    with pytest.raises(ResourceError, match="no such file"):
        load_sb3(tmp_path / "absent.zip", env.observation_space, env.action_space)
    whole = (tmp_path / "m.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("other", "x")
    for name in ("cut.zip", "text.zip", "empty.zip"):
        with pytest.raises(UntrustedFileError):
            load_sb3(tmp_path / name, env.observation_space, env.action_space)


def test_what_a_policy_lacks_is_named() -> None:
    env = gym.make("CartPole-v1")
    policy = as_policy(lambda obs: np.zeros(len(obs), np.int64), env.action_space)
    with pytest.raises(TypeError, match="no outputs"):
        require(policy, "outputs")
