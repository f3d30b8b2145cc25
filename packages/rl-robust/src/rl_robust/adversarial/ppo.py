"""PPO of stable-baselines3 in turns: what every training loop of policies here is made of.

:func:`train_policy` trains in peace: naturally, or as SA-PPO with a regulariser. It learns statistics of observations
on the way and freezes them, so that policies which are to be compared, attacked or set against each other see one and
the same task. Rewards are divided by the running deviation of the return while policies train, as in the papers' code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rl_robust.adversarial.sa_ppo import SAPPO, StateAdversarialRegulariser
from rl_robust.attacks.learned import SETTINGS
from rl_robust.attacks.stage import AttackedVecEnv
from rl_robust.checkpoints import Checkpoint, running, set_running
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Normaliser, Task
from robust_core.checks import check_count
from robust_core.errors import optional_import
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["blank_policy", "build_ppo", "learning_rate", "scaled_rewards", "train_policy", "train_turn", "vec_env"]

OnStep = Callable[[str, int, int], None]


def vec_env(task: Task, n_envs: int, seed: int) -> DummyVecEnv:
    """Return environments of a task side by side, as they are."""
    env = DummyVecEnv([task.make] * n_envs)
    env.seed(seed & 0x7FFFFFFF)
    return env


def scaled_rewards(env: Any, settings: Mapping[str, Any]) -> VecNormalize:
    """Return the environments with rewards in units of the running deviation of the discounted return."""
    return VecNormalize(env, norm_obs=False, gamma=float(settings.get("gamma", 0.99)))


def learning_rate(settings: Mapping[str, Any]) -> float:
    """Return the rate at which training begins."""
    return float(settings.get("learning_rate", SETTINGS["learning_rate"]))


def build_ppo(
    env: Any,
    settings: Mapping[str, Any],
    *,
    seed: int,
    device: str,
    policy: Any = None,
    regulariser: StateAdversarialRegulariser | None = None,
    recurrent: bool = False,
) -> Any:
    """Return an untrained PPO, SA-PPO (with a regulariser) or recurrent PPO (of sb3-contrib).

    Args:
        env: vectorised; observations (C, H, W) get SB3's convolutional network, all others 64-64 tanh.
        settings: of the algorithm.
        seed: of the algorithm.
        device: where it trains.
        policy: class of the policy, where it is none of SB3's.
        regulariser: of SA-PPO; not for recurrent policies.
        recurrent: an LSTM of SB3's.
    """
    more, image = dict(settings), len(env.observation_space.shape or ()) == 3
    if image:
        more["policy_kwargs"] = {"normalize_images": False, **dict(more.get("policy_kwargs", {}))}
    shared = {"seed": seed & 0x7FFFFFFF, "device": device, "verbose": 0, **more}
    if recurrent:
        if regulariser is not None:
            raise ValueError("regulariser: it looks at single observations; recurrent=True takes none")
        kind = optional_import("sb3_contrib", extra="contrib", package="rl-robust").RecurrentPPO
        return kind(policy or ("CnnLstmPolicy" if image else "MlpLstmPolicy"), env, **shared)
    name = policy or ("CnnPolicy" if image else "MlpPolicy")
    if regulariser is None:
        return PPO(name, env, **shared)
    return SAPPO(name, env, regulariser=regulariser, **shared)


def train_turn(model: Any, n_steps: int, done: float, rate: float) -> None:
    """Train for some steps when ``done`` of the training is over; SB3's own decay knows one call only.

    Args:
        model: PPO of any kind.
        n_steps: environment steps.
        done: in [0, 1): what is left of the learning rate is ``1 - done``; the ramp of SA-PPO follows it.
        rate: at the start of training.
    """
    model.lr_schedule = lambda _: rate * (1.0 - done)
    if isinstance(model, SAPPO):
        model.share = done
    model.learn(n_steps, reset_num_timesteps=False)
    model.policy.set_training_mode(False)


def blank_policy(
    task: Task, settings: Mapping[str, Any] | None = None, *, device: str = "cpu", recurrent: bool = False
) -> SB3Policy:
    """Return a policy with fresh weights, of the kind that is trained here: what loaders of weights are given."""
    env = AttackedVecEnv(vec_env(task, 1, 0), task)
    with reseeded(0):
        built = build_ppo(env, {**SETTINGS, **dict(settings or {})}, seed=0, device=device, recurrent=recurrent)
    env.close()
    return SB3Policy(built.policy)


def train_policy(
    task: Task,
    regulariser: StateAdversarialRegulariser | None = None,
    *,
    n_steps: int = 100_000,
    normalise: bool = True,
    n_envs: int = 8,
    settings: Mapping[str, Any] | None = None,
    generator: Seed = None,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> tuple[SB3Policy, Task]:
    """Train a policy without an attacker: natural, or SA-PPO.

    Args:
        task: the environment.
        regulariser: of SA-PPO; its ball covers all frames that the policy is shown, its ramp follows the training.
        n_steps: environment steps.
        normalise: learn statistics of observations on the way, where the task has none, and freeze them at the end.
        n_envs: environments side by side.
        settings: of PPO, over small defaults.
        generator: seed; the global generators are left as found.
        device: where PPO trains.
        checkpoint: folder; an interrupted run goes on from its last rollout.
        file: where SB3's own zip is written at the end.
        on_step: called with ("policy", steps done, steps).

    Returns:
        The policy (``policy.policy`` is SB3's own), and the task with the frozen normaliser.
    """
    check_count("n_steps", n_steps)
    check_count("n_envs", n_envs)
    seed, chosen = resolve_seed(generator), {**SETTINGS, **dict(settings or {})}
    learn = normalise and task.normaliser is None
    if learn and (task.scale != 1.0 or task.n_frames != 1):
        raise ValueError("normalise=True learns statistics of single unscaled observations; give the task a normaliser")
    asked = {"task": task.identity, "steps": n_steps, "normalise": learn, "n_envs": n_envs, "settings": chosen,
             "seed": seed, "term": None if regulariser is None else regulariser.identity}  # fmt: skip
    kept = Checkpoint(checkpoint, asked)
    state = kept.load()
    done = 0 if state is None else int(state["steps"])
    with reseeded(derive(seed, "policy", done)):
        raw = vec_env(task, n_envs, derive(seed, "policy", "env", done))
        gamma = float(chosen.get("gamma", 0.99))
        env = VecNormalize(raw, gamma=gamma) if learn else scaled_rewards(AttackedVecEnv(raw, task), chosen)
        model = build_ppo(env, chosen, seed=derive(seed, "policy", done), device=device, regulariser=regulariser)
        if state is not None:
            model.set_parameters(state["model"])
            set_running(env, state["running"])
        chunk = n_envs * int(chosen["n_steps"])
        while done < n_steps:
            train_turn(model, chunk, done / n_steps, learning_rate(chosen))
            done += chunk
            kept.save({"steps": done, "model": model.get_parameters(), "running": running(env)})
            if on_step is not None:
                on_step("policy", min(done, n_steps), n_steps)
        env.close()
    if file is not None:
        model.save(file)
    found = SB3Policy(model.policy)
    return found, replace(task, normaliser=Normaliser.of_vec_normalize(env)) if learn else task
