"""Attackers that are trained: SA-RL, and PA-AD with its director and actor.

Against a fixed policy the best attacker of observations solves a decision process of its own: it sees the true state,
its action is the change, its reward is the victim's loss (Zhang et al. 2021, arXiv 2101.08452, "SA-RL").
``train_adversary`` therefore is PPO of stable-baselines3 on an ordinary environment; nothing of PPO is written here.

- SA-RL: action ``a`` in [-1, 1]^d, shown ``s + eps * a`` (:func:`sa_rl_proposal`).
- PA-AD (Sun et al. 2022, arXiv 2106.05087): the *director* chooses a direction ``u`` in the space of the victim's
  outputs (mean action, or logits), the *actor* finds the change that moves them there (:func:`actor_step`): one signed
  step of size eps up ``J(eta) = cos(D, u) + ||D||`` with ``D = outputs(s + eta) - outputs(s)``, from ``eta`` uniform in
  a tenth of the ball.

Departures. Released code for MuJoCo steps *down* J (the loss is -J and its gradient is added); here it goes up. And the
gradient of cos(D, u) is orthogonal to D: a single step leaves a small random D sideways and seldom ends along u; with
one-dimensional actions it is 0, and the step follows the sign of the random start: the director is not heard. So the
step up ``D . u`` is tried as well, and the end with the larger J is kept (``straight``, default); ``straight=False`` is
the paper's single step.

Views of the same game, for trainers: :class:`AdversaryEnv` and :class:`ObservationAttackEnv` are gymnasium
environments; their batched forms (in :mod:`rl_robust.attacks.stage`) train faster. Test-time attackers act on the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rl_robust.attacks.gradient import step_ball
from rl_robust.observation import Budget, ObservationAttack, StepBudget, View
from rl_robust.policy import Policy, as_policy, require
from rl_robust.task import Task
from robust_core.checks import check_choice, check_count
from robust_core.models import model_device, padded
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = [
    "AdversaryEnv",
    "Kind",
    "LearnedStateAdversary",
    "ObservationAttackEnv",
    "PolicyAdversaryDirector",
    "actor_step",
    "adversary_attack",
    "adversary_space",
    "n_outputs",
    "propose",
    "sa_rl_proposal",
    "train_adversary",
]

Kind = Literal["sa-rl", "pa-ad"]
_KINDS = ("sa-rl", "pa-ad")
SETTINGS: Mapping[str, Any] = {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4}


def sa_rl_proposal(obs: Tensor, action: Tensor, eps: float) -> Tensor:
    """Return ``s + eps * hardtanh(a)``, (B, ...)."""
    return obs + eps * action.reshape(obs.shape).to(obs.dtype).clamp(-1, 1)


def _objective(moved: Tensor, clean: Tensor, direction: Tensor) -> Tensor:
    change = (moved - clean).flatten(1)
    along = torch.nn.functional.cosine_similarity(change, direction.to(change.dtype), dim=1, eps=1e-12)
    return along + (change.square().sum(1) + 1e-24).sqrt()


def actor_step(
    outputs: Callable[[Tensor], Tensor],
    obs: Tensor,
    direction: Tensor,
    *,
    budget: StepBudget,
    start: Tensor,
    straight: bool = True,
) -> Tensor:
    """Return (B, ...) observations that move ``outputs`` towards ``direction``, one steepest step of PA-AD's actor.

    Args:
        outputs: differentiable, (B, ...) -> (B, K); row by row.
        obs: (B, ...) true observations.
        direction: (B, K).
        budget: of a step.
        start: (B, ...) points near ``obs`` at which the gradient is taken.
        straight: also try the step that goes straight for ``direction``, and keep the end with the larger objective.
    """
    threat = budget.threat
    with torch.no_grad():
        clean = outputs(obs)
    x = start.detach().requires_grad_(True)
    with torch.enable_grad():
        moved = outputs(x)
        goals = [_objective(moved, clean, direction)]
        if straight:
            goals.append((moved.flatten(1) * direction.to(moved.dtype)).sum(1))
        slopes = [torch.autograd.grad(goal.sum(), x, retain_graph=True)[0] for goal in goals]
    ends = [threat.project(obs + threat.eps * threat.steepest(torch.nan_to_num(slope)), obs) for slope in slopes]
    if not straight:
        return ends[0]
    with torch.no_grad():
        values = [_objective(outputs(end), clean, direction) for end in ends]
    better = (values[1] > values[0]).reshape(-1, *[1] * (obs.ndim - 1))
    return torch.where(better, ends[1], ends[0])


def propose(kind: Kind, view: View, action: Tensor, *, straight: bool = True) -> Tensor:
    """Return what an adversary's action (B, n) shows the victim, (B, ...)."""
    threat = step_ball(view.budget, 1)
    if kind == "sa-rl":
        return sa_rl_proposal(view.obs, action, threat.eps)
    policy = require(view.policy, "outputs")
    near = threat.with_eps(threat.eps / 10)
    start = near.random_start(view.obs, view.streams("director"), draw=view.step)
    return actor_step(
        lambda seen: policy.outputs(view.shown(seen)),
        view.obs,
        action,
        budget=StepBudget(threat),
        start=start,
        straight=straight,
    )


def n_outputs(policy: Policy) -> int:
    """Return K, the number of outputs that a direction of PA-AD points in."""
    space = policy.action_space
    return int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape or ()))


def adversary_space(kind: str, observation: tuple[int, ...], policy: Policy) -> spaces.Box:
    """Return the action space of an adversary: of changes (SA-RL), or of directions (PA-AD)."""
    check_choice("kind", kind, _KINDS)
    size = int(np.prod(observation)) if kind == "sa-rl" else n_outputs(policy)
    return spaces.Box(-1.0, 1.0, (size,), np.float32)


def _adversary_action(adversary: Any, view: View) -> Tensor:
    flat = view.obs.flatten(1)
    with torch.no_grad():
        return adversary.act(padded(flat))[0][: len(flat)]


@dataclass(frozen=True)
class LearnedStateAdversary:
    """SA-RL's attacker: a policy over changes of the observation.

    Args:
        budget: of a step, as in training.
        adversary: maps flattened true observations to [-1, 1]^d; see :func:`train_adversary`.
    """

    budget: StepBudget
    adversary: Any

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        return propose("sa-rl", view, _adversary_action(self.adversary, view))


@dataclass(frozen=True)
class PolicyAdversaryDirector:
    """PA-AD's attacker: a policy over directions of the victim's outputs, and a gradient step that goes there.

    Args:
        budget: of a step, as in training.
        adversary: maps flattened true observations to [-1, 1]^K; see :func:`train_adversary`.
        straight: see :func:`actor_step`.
    """

    budget: StepBudget
    adversary: Any
    straight: bool = True

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        return propose("pa-ad", view, _adversary_action(self.adversary, view), straight=self.straight)


def adversary_attack(kind: Kind, budget: StepBudget, adversary: Any) -> ObservationAttack:
    """Return the attack of a trained adversary."""
    check_choice("kind", kind, _KINDS)
    return (LearnedStateAdversary if kind == "sa-rl" else PolicyAdversaryDirector)(budget, adversary)


class AdversaryEnv(gym.Env):
    """The attacker's view: it sees the true observation, acts on what the victim sees, and is paid the victim's loss.

    Args:
        task: the environment.
        policy: the victim, held fixed.
        budget: of a step; the environment projects.
        kind: ``"sa-rl"`` or ``"pa-ad"``: what an action means.
        generator: seed of the actor's start.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self, task: Task, policy: Any, budget: Budget, *, kind: Kind = "sa-rl", generator: Seed = None
    ) -> None:
        from rl_robust.attacks.stage import Stage

        check_choice("kind", kind, _KINDS)
        self.env = task.make()
        self.kind: Kind = kind
        self.policy = as_policy(policy, self.env.action_space)
        step_ball(budget, 1)
        self.budget = budget
        self._stage = Stage(task, 1, resolve_seed(generator), model_device(cast(Any, self.policy)))
        shape = self.env.observation_space.shape or ()
        self.action_space = adversary_space(kind, shape, self.policy)
        self.observation_space = spaces.Box(-np.inf, np.inf, (int(np.prod(shape)),), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode."""
        super().reset(seed=seed)
        raw, info = self.env.reset(seed=seed, options=options)
        self._stage.restart(np.array([True]))
        return self._flat(self._stage.observe(np.asarray(raw)[None])), info

    def _flat(self, obs: Tensor) -> np.ndarray:
        return obs.flatten(1)[0].cpu().numpy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Show the victim something, and let it act."""
        tensor = torch.as_tensor(np.asarray(action, dtype=np.float32))[None]
        shown, stage = (
            self._stage.attacked(self.policy, self.budget, lambda v: propose(self.kind, v, tensor)),
            self._stage,
        )
        chosen = stage.act(self.policy, shown)[0]
        raw, reward, ended, cut, info = self.env.step(chosen)
        stage.advance()
        return self._flat(stage.observe(np.asarray(raw)[None])), -float(reward), ended, cut, {**info, "reward": reward}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


class ObservationAttackEnv(gym.Env):
    """The victim's view: an attacker stands between it and the environment. To train or to test against one.

    Args:
        task: the environment; frames are stacked after the attack.
        attack: who changes observations, or None.
        policy: the victim that the attacker looks at; needed by attacks that do.
        generator: seed of the attack's streams.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, task: Task, attack: ObservationAttack | None, policy: Any = None, *, generator: Seed = None
    ) -> None:
        from rl_robust.attacks.stage import Stage

        self.env, self.attack = task.make(), attack
        self.policy = None if policy is None else as_policy(policy, self.env.action_space)
        self.action_space = self.env.action_space
        self._stage = Stage(task, 1, resolve_seed(generator), model_device(cast(Any, self.policy)))
        self.observation_space = self._stage.space(self.env.observation_space.shape or ())

    def _shown(self, raw: np.ndarray) -> np.ndarray:
        stage = self._stage
        stage.observe(np.asarray(raw)[None])
        if self.attack is None:
            return stage.push(stage.obs)[0].cpu().numpy()
        return stage.attacked(self.policy, self.attack.budget, self.attack.perturb)[0].cpu().numpy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode."""
        super().reset(seed=seed)
        raw, info = self.env.reset(seed=seed, options=options)
        self._stage.restart(np.array([True]))
        return self._shown(raw), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step the environment."""
        raw, reward, ended, cut, info = self.env.step(action)
        self._stage.advance()
        return self._shown(raw), float(reward), ended, cut, info

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def train_adversary(
    task: Task,
    policy: Any,
    budget: StepBudget,
    *,
    kind: Kind = "pa-ad",
    n_steps: int = 100_000,
    sigma: float = 0.0,
    n_envs: int = 8,
    settings: Mapping[str, Any] | None = None,
    generator: Seed = None,
    device: str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> ObservationAttack:
    """Train an attacker of a fixed policy by PPO, and return it as an attack.

    Rewards are in units of the running deviation of the return while it trains.

    Args:
        task: the environment.
        policy: the victim.
        budget: of a step.
        kind: ``"sa-rl"`` or ``"pa-ad"``.
        n_steps: environment steps.
        sigma: noise of a smoothed victim.
        n_envs: environments side by side.
        settings: of ``stable_baselines3.PPO``, over the defaults here (64-64 tanh).
        generator: seed; the global generators are left as found.
        device: where PPO trains; the attacker comes back on the victim's.
        on_step: called with (steps done, steps in all) after each rollout.
    """
    import stable_baselines3
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from rl_robust.attacks.stage import AdversaryVecEnv, Reporter
    from rl_robust.sb3 import SB3Policy

    check_count("n_steps", n_steps)
    check_count("n_envs", n_envs)
    seed = resolve_seed(generator)
    rollout = max(2, min(int(SETTINGS["n_steps"]), n_steps // n_envs))  # no longer than the whole training
    chosen = {**SETTINGS, "n_steps": rollout, **dict(settings or {})}
    if "batch_size" not in (settings or {}):
        collected = chosen["n_steps"] * n_envs
        chosen["batch_size"] = next(b for b in range(chosen["batch_size"], 0, -1) if collected % b == 0)
    with reseeded(derive(seed, "adversary")):
        makers: Sequence[Callable[[], gym.Env]] = [task.make] * n_envs
        env = AdversaryVecEnv(
            DummyVecEnv(list(makers)), task, [(policy, -1.0)], budget, kind=kind, generator=seed, sigma=sigma
        )
        scaled = VecNormalize(env, norm_obs=False, gamma=float(chosen.get("gamma", 0.99)))
        model = stable_baselines3.PPO("MlpPolicy", scaled, seed=seed & 0x7FFFFFFF, device=device, verbose=0, **chosen)
        model.learn(n_steps, callback=None if on_step is None else Reporter(on_step, n_steps))
        env.close()
    return adversary_attack(kind, budget, SB3Policy(model.policy).to(env.stage.device))
