"""Training in peace: it repeats itself, shows frames, freezes its statistics, follows the ramp, goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_robust.adversarial import StateAdversarialRegulariser, train_policy
from rl_robust.adversarial.ppo import blank_policy, build_ppo, train_turn, vec_env
from rl_robust.attacks.stage import AttackedVecEnv
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Task
from robust_core.errors import UntrustedFileError
from robust_core.random import reseeded
from robust_core.threats import Linf

BALL = Linf(0.1, domain=None)
TINY: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}
CARTPOLE = Task("CartPole-v1", max_steps=30)


def equal(one: SB3Policy, two: SB3Policy) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.quick
def test_training_repeats_itself_and_tells_how_far_it_is() -> None:
    told: list[int] = []
    before = torch.get_rng_state()
    task = Task("CartPole-v1", n_frames=2)
    (one, same), (two, _) = (
        train_policy(task, StateAdversarialRegulariser(BALL, generator=1), n_steps=64, n_envs=2, settings=TINY,
                     normalise=False, generator=5, on_step=lambda _, done, total: told.append(done))
        for _ in range(2)
    )  # fmt: skip
    assert told == [32, 64, 32, 64]
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one, two)
    assert same == task
    assert one.outputs(torch.zeros(3, 2, 4)).shape == (3, 2)
    with pytest.raises(ValueError, match="normaliser"):
        train_policy(task, n_steps=64)


def test_an_interrupted_training_goes_on_with_its_statistics(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"n_steps": 128, "n_envs": 2, "settings": TINY, "generator": 3, "checkpoint": tmp_path}
    told: list[int] = []

    def stop(_: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_policy(CARTPOLE, on_step=stop, **asked)
    told.append(0)
    policy, task = train_policy(CARTPOLE, on_step=stop, **asked)
    assert told == [32, 64, 0, 96, 128]
    again, same = train_policy(CARTPOLE, **asked)
    assert equal(policy, again), "what is finished is read, not trained again"
    assert task.normaliser is not None
    assert same.normaliser is not None
    assert task.normaliser.sha256 == same.normaliser.sha256
    with pytest.raises(ValueError, match="other settings"):
        train_policy(CARTPOLE, **{**asked, "generator": 4})
    (tmp_path / "training.pt").write_bytes(b"nothing")
    with pytest.raises(UntrustedFileError, match="checkpoint"):
        train_policy(CARTPOLE, **asked)


def test_turns_follow_the_ramp_and_the_rate_of_the_whole_training() -> None:
    term = StateAdversarialRegulariser(BALL, 0.5, ramp=0.5)
    env = AttackedVecEnv(vec_env(CARTPOLE, 2, 0), CARTPOLE)
    with reseeded(0):
        model = build_ppo(env, TINY, seed=0, device="cpu", regulariser=term)
        seen: list[float] = []
        reach = term.reach
        term.reach = lambda batch: seen.append(reach(batch).eps) or reach(batch)  # pyright: ignore
        for done in (0.0, 0.25, 0.5, 0.75):
            train_turn(model, 32, done, 1e-3)
            rate = model.policy.optimizer.param_groups[0]["lr"]
            assert rate == pytest.approx(1e-3 * (1 - done))
    assert np.unique(np.round(seen, 9)).tolist() == [0.0, 0.05, 0.1]


def test_blank_policies_take_the_weights_of_trained_ones_and_pictures_are_convolved() -> None:
    policy, task = train_policy(CARTPOLE, n_steps=32, n_envs=2, settings=TINY)
    blank = blank_policy(task, TINY)
    assert not equal(policy, blank)
    blank.load_state_dict(policy.state_dict(), strict=True)
    assert equal(policy, blank)
    from rl_robust.train_smoothed import atari

    pong = Task(atari, {"game": "ALE/Pong-v5", "max_steps": 4}, scale=1 / 255, n_frames=4)
    found = blank_policy(pong, TINY)
    assert found.outputs(torch.zeros(2, 4, 84, 84)).shape == (2, 6)
