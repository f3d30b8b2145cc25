"""Both views of the state-adversarial game in batches, for trainers of stable-baselines3.

:class:`Stage` keeps what stands between environment and policy for several environments that step together. The order
(scale, normaliser, attack, stack) and the budget are those of :mod:`rl_robust.rollout`. :class:`AdversaryVecEnv` lets
an attacker train against one victim, or against several at once with a sign for each; :class:`AttackedVecEnv` lets a
victim train against an attack. One batched forward serves all environments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor, nn

from rl_robust.attacks.learned import Kind, adversary_space, propose
from rl_robust.observation import Budget, ObservationAttack, View
from rl_robust.policy import Memory, as_policy
from rl_robust.task import Task
from robust_core.checks import check_choice, check_number
from robust_core.models import model_device
from robust_core.random import SampleStreams, Seed, derive, resolve_seed

__all__ = ["AdversaryVecEnv", "AttackedVecEnv", "Reporter", "SidedPolicy", "Stage", "WithoutSide"]


class Stage:
    """What stands between ``lanes`` environments and the policy.

    Args:
        task: scale, normaliser, frames.
        lanes: environments.
        seed: of the attack's streams.
        device: of the victim; None is the CPU.
        sigma: noise on what the attack shows, for victims that are smoothed.
    """

    def __init__(
        self, task: Task, lanes: int, seed: int, device: torch.device | str | None = None, *, sigma: float = 0.0
    ) -> None:
        self.task, self.lanes, self.seed = task, lanes, derive(seed, "attack")
        self.sigma, self.noise = check_number("sigma", sigma, low=0), derive(seed, "noise")
        self.device = torch.device(device or "cpu")
        self.step = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self.episodes = torch.arange(lanes, device=self.device)
        self.spent = torch.zeros(lanes, dtype=torch.float64, device=self.device)
        self.store: dict[str, Tensor] = {}
        self.memory: Memory = None
        self.obs = self.frames = torch.zeros(0)

    def space(self, shape: tuple[int, ...]) -> spaces.Box:
        """Return the space of what the policy sees."""
        shown = self.task.show(torch.zeros(1, self.task.n_frames, *shape)).shape[1:]
        return spaces.Box(-np.inf, np.inf, tuple(shown), np.float32)

    def restart(self, begun: np.ndarray) -> None:
        """Note which lanes begin an episode."""
        where = torch.as_tensor(begun, device=self.device)
        self.step = torch.where(where, 0, self.step)
        self.spent = torch.where(where, 0.0, self.spent)
        self.episodes = torch.where(where, self.episodes + self.lanes, self.episodes)

    def advance(self) -> None:
        """Count a step on every lane."""
        self.step = self.step + 1

    def observe(self, raw: np.ndarray) -> Tensor:
        """Take in raw observations (lanes, ...) and return the true ones at the attack's place."""
        self.obs = self.task.observe(np.asarray(raw)).to(self.device)
        if not self.frames.numel():
            self.frames = self.obs.new_zeros(self.lanes, self.task.n_frames, *self.obs.shape[1:])
        return self.obs

    def view(self, policy: Any, budget: Budget, rows: Tensor | None = None, obs: Tensor | None = None) -> View:
        """Return what the attacker is shown on some lanes."""
        at = torch.arange(self.lanes, device=self.device) if rows is None else rows
        memory = self.memory
        if memory is not None:
            memory = tuple(m[at] for m in memory) if isinstance(memory, tuple) else memory[at]
        return View(
            policy=policy, obs=self.obs[at] if obs is None else obs, frames=self.frames[at].roll(-1, 1), task=self.task,
            budget=budget, spent=self.spent[at], step=self.step[at], episodes=self.episodes[at], seed=self.seed,
            sigma=self.sigma, memory=memory, start=self.step[at] == 0, store=self.store, lanes=at, n_lanes=self.lanes,
        )  # fmt: skip

    def attacked(self, policy: Any, budget: Budget, proposal: Callable[[View], Tensor]) -> Tensor:
        """Return what the policy sees when ``proposal`` stands in between; budgets are kept here."""
        view = self.view(policy, budget)
        seen = budget.project(proposal(view).detach(), self.obs, self.spent)
        self.spent = budget.account(seen, self.obs, self.spent)
        if self.sigma > 0:
            streams = SampleStreams(self.noise, self.episodes, "observation")
            seen = seen + self.sigma * streams.normal(seen.shape[1:], chunk=self.step, dtype=seen.dtype)
        return self.push(seen)

    def push(self, seen: Tensor) -> Tensor:
        """Put observations in the stack and return what the policy sees."""
        fresh = (self.step == 0).reshape(-1, *[1] * seen.ndim)
        pushed = torch.cat([self.frames[:, 1:], seen[:, None]], 1)
        self.frames = torch.where(fresh, seen[:, None].expand_as(pushed), pushed)
        return self.task.show(self.frames)

    def act(self, policy: Any, shown: Tensor, rows: slice = slice(None)) -> np.ndarray:
        """Return a victim's greedy actions on some lanes."""
        with torch.no_grad():
            memory = self.memory if rows == slice(None) else None
            actions, memory = policy.act(shown[rows], memory, self.step[rows] == 0)
        if rows == slice(None):
            self.memory = memory
        return actions.cpu().numpy()


class AdversaryVecEnv(VecEnvWrapper):
    """The attacker's view of several environments, against one victim or several.

    Args:
        venv: the environments, without wrappers.
        task: what they are.
        sides: (victim, sign) pairs that share the environments evenly; the attacker is paid sign * reward. Where there
            are several, the observation ends with the number of the side: for critics only, see :class:`SidedPolicy`.
        budget: of a step.
        kind: what an action means.
        generator: seed of the actor's start, and of the noise.
        sigma: noise on what the attacker shows, for victims that are smoothed.
    """

    def __init__(
        self,
        venv: VecEnv,
        task: Task,
        sides: Sequence[tuple[Any, float]],
        budget: Budget,
        *,
        kind: Kind = "sa-rl",
        generator: Seed = None,
        sigma: float = 0.0,
    ) -> None:
        if not sides or venv.num_envs % len(sides):
            raise ValueError(f"{len(sides)} sides on {venv.num_envs} environments: as many for each are needed")
        check_choice("kind", kind, ("sa-rl", "pa-ad"))
        self.task, self.budget = task, budget
        self.kind: Kind = kind
        self.sides = [(as_policy(policy, venv.action_space), float(sign)) for policy, sign in sides]
        shape = venv.observation_space.shape or ()
        size = int(np.prod(shape)) + (len(sides) > 1)
        super().__init__(
            venv, spaces.Box(-np.inf, np.inf, (size,), np.float32), adversary_space(kind, shape, self.sides[0][0])
        )
        device = model_device(cast(Any, self.sides[0][0]))
        self.stage = Stage(task, venv.num_envs, resolve_seed(generator), device, sigma=sigma)
        self.share = venv.num_envs // len(sides)
        self.side = np.repeat(np.arange(len(sides)), self.share)

    def put(self, side: int, policy: Any) -> None:
        """Let another policy play a side."""
        self.sides[side] = (as_policy(policy, self.venv.action_space), self.sides[side][1])

    def _flat(self, obs: Tensor, side: np.ndarray) -> np.ndarray:
        flat = obs.flatten(1).cpu().numpy()
        return flat if len(self.sides) == 1 else np.concatenate([flat, side[:, None].astype(np.float32)], 1)

    def reset(self) -> np.ndarray:
        """Begin."""
        self.stage.restart(np.ones(self.num_envs, dtype=bool))
        return self._flat(self.stage.observe(np.asarray(self.venv.reset())), self.side)

    def step_async(self, actions: np.ndarray) -> None:
        """Show the victims something, and let them act."""
        stage, parts = self.stage, []
        told = torch.as_tensor(np.asarray(actions, dtype=np.float32), device=stage.device)
        for k, (policy, _) in enumerate(self.sides):
            rows = torch.arange(k * self.share, (k + 1) * self.share, device=stage.device)
            parts.append(propose(self.kind, stage.view(policy, self.budget, rows, stage.obs[rows]), told[rows]))
        shown = stage.attacked(self.sides[0][0], self.budget, lambda _: torch.cat(parts))
        if len(self.sides) == 1:
            chosen = stage.act(self.sides[0][0], shown)
        else:
            cuts = [slice(k * self.share, (k + 1) * self.share) for k in range(len(self.sides))]
            chosen = np.concatenate([stage.act(p, shown, c) for (p, _), c in zip(self.sides, cuts, strict=True)])
        self.venv.step_async(chosen)

    def step_wait(self) -> Any:
        """Return the true observations and the attacker's rewards."""
        raw, rewards, dones, infos = self.venv.step_wait()
        self.stage.advance()
        self.stage.restart(dones)
        for k in np.flatnonzero(dones):
            last = self.task.observe(np.asarray(infos[k]["terminal_observation"])[None])
            infos[k]["terminal_observation"] = self._flat(last, self.side[k : k + 1])[0]
        signs = np.array([self.sides[s][1] for s in self.side], dtype=np.float32)
        return self._flat(self.stage.observe(np.asarray(raw)), self.side), signs * rewards, dones, infos


class AttackedVecEnv(VecEnvWrapper):
    """The victim's view of several environments under an attack, which may be exchanged (:attr:`attack`).

    Args:
        venv: the environments, without wrappers.
        task: what they are.
        attack: who changes observations, or None.
        policy: the victim that the attacker looks at; may be set later (:attr:`policy`).
        generator: seed of the attack's streams.
        device: of the victim, where that is set later.
    """

    def __init__(
        self,
        venv: VecEnv,
        task: Task,
        attack: ObservationAttack | None = None,
        policy: Any = None,
        *,
        generator: Seed = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.task, self.attack, self.policy = task, attack, policy
        self.stage = Stage(task, venv.num_envs, resolve_seed(generator), device or model_device(policy))
        super().__init__(venv, self.stage.space(venv.observation_space.shape or ()))

    def _shown(self, raw: np.ndarray) -> np.ndarray:
        self.stage.observe(np.asarray(raw))
        if self.attack is None:
            return self.stage.push(self.stage.obs).cpu().numpy()
        return self.stage.attacked(self.policy, self.attack.budget, self.attack.perturb).cpu().numpy()

    def reset(self) -> np.ndarray:
        """Begin."""
        self.stage.restart(np.ones(self.num_envs, dtype=bool))
        return self._shown(np.asarray(self.venv.reset()))

    def step_wait(self) -> Any:
        """Return what the victim sees."""
        raw, rewards, dones, infos = self.venv.step_wait()
        self.stage.advance()
        for k in np.flatnonzero(dones):
            infos[k]["terminal_observation"] = self._last(int(k), infos[k]["terminal_observation"])
        self.stage.restart(dones)
        return self._shown(np.asarray(raw)), rewards, dones, infos

    def _last(self, lane: int, raw: np.ndarray) -> np.ndarray:
        """Return the last observation as the victim would see it: its value there is what PPO bootstraps from."""
        device = self.stage.device
        rows, obs = torch.tensor([lane], device=device), self.task.observe(np.asarray(raw)[None]).to(device)
        seen = obs
        if self.attack is not None:
            view = self.stage.view(self.policy, self.attack.budget, rows, obs)
            seen = self.attack.budget.project(self.attack.perturb(view).detach(), obs, view.spent)
        return self.task.show(torch.cat([self.stage.frames[rows][:, 1:], seen[:, None]], 1))[0].cpu().numpy()


class _Blindfold(nn.Module):
    """Hide the number of the side from the actor; the critic sees it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.latent_dim_pi, self.latent_dim_vf = inner.latent_dim_pi, inner.latent_dim_vf

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        hidden = torch.cat([features[:, :-1], torch.zeros_like(features[:, -1:])], 1)
        return self.inner.forward_actor(hidden)

    def forward_critic(self, features: Tensor) -> Tensor:
        return self.inner.forward_critic(features)


class SidedPolicy(ActorCriticPolicy):
    """An attacker of several victims at once: one actor for all, a critic that knows whom it plays."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor = _Blindfold(self.mlp_extractor).to(self.device)


class WithoutSide(nn.Module):
    """The policy of a :class:`SidedPolicy`, as one of plain observations."""

    n_draws = 0

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.action_space = policy.action_space

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions; see :class:`rl_robust.policy.Policy`."""
        return self.policy.act(torch.cat([obs, obs.new_zeros(len(obs), 1)], 1), memory, start, draws=draws)


class Reporter(BaseCallback):
    """Report steps of training."""

    def __init__(self, on_step: Callable[[int, int], None], total: int) -> None:
        super().__init__()
        self.report, self.total = on_step, total

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.report(min(self.num_timesteps, self.total), self.total)
