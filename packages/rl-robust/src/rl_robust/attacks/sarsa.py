"""Robust Sarsa: an attack for victims whose own critic is missing, or too rough to be followed.

Zhang, Chen, Xiao, Li, Liu, Boning and Hsieh 2020, "Robust Deep Reinforcement Learning against Adversarial
Perturbations on State Observations" (arXiv 2003.08938), section 3.5 and appendix.

============================================================================  =====================================
(s, a, r, s', a') of the victim at play                                       :func:`transitions`
L_TD: smooth L1 of Q(s, a) against r + gamma Q(s', a'), none beyond an end    :func:`td_error`
L_robust: the most that Q moves while the action moves by eps_Q               :func:`deviation`
min L_TD + lambda L_robust                                                    :class:`SarsaObjective`
shown state: descend Q(s, pi(shown)) with the *true* s                        :class:`RobustSarsa`
RS+MAD: a weighted sum with the change of the action distribution             ``RobustSarsa(mixing_weight=0.5)``
============================================================================  =====================================

A successor is the victim's own next state and next action in the same episode; a step cut off by the time limit has
none and is left out. (Public code pairs each row with the next of a *shuffled* batch, which fits another function.)

A greedy victim never shows what other actions bring. Victims that can be sampled are; for others give ``sigma``: the
observations are noised while the victim plays, and Q stays a function of the true state.

Defaults: eps_Q 0.02, lambda 0.1 and 30 x 2048 steps are those of the paper's code. Ours: eps_Q also covers the state,
which is standardised; the deviation is bounded by intervals instead of linear relaxations; rewards are put on the scale
of the returns seen. Q reads vectors; images are flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from rl_robust.attacks.gradient import GradientAttack, action_difference, averaged
from rl_robust.observation import Budget, View
from rl_robust.policy import as_policy, require
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.certificates.bounds import IntervalBounds
from robust_core.checks import check_count, check_number
from robust_core.models import fingerprint
from robust_core.random import Seed, derive, reseeded, resolve_seed
from robust_core.threats import Linf
from robust_core.training import Batch, Loss, TrainState, fit

__all__ = [
    "ActionValue",
    "RobustSarsa",
    "SarsaObjective",
    "Transitions",
    "deviation",
    "encoded",
    "fit_sarsa",
    "td_error",
    "transitions",
]


@dataclass(frozen=True)
class Transitions:
    """(s, a, r, s', a') of a victim.

    Attributes:
        obs, next_obs: (N, ...) what the policy is shown when nobody interferes, frames stacked.
        action, next_action: (N, K) as :func:`encoded`.
        reward: (N,).
        ended: (N,) bool: the task ended here, so nothing follows.
        value: (N,) discounted sum of the rewards that were seen to follow; sets the scale only.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    next_action: Tensor
    ended: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def columns(self) -> dict[str, Tensor]:
        """The form that :func:`robust_core.training.fit` takes."""
        return {"x": self.obs, "y": self.reward, "action": self.action, "next_obs": self.next_obs,
                "next_action": self.next_action, "ended": self.ended}  # fmt: skip


def encoded(action: np.ndarray, space: spaces.Space) -> Tensor:
    """Return (N, K) float32: indicators of discrete actions, plain numbers of continuous ones."""
    if isinstance(space, spaces.Discrete):
        return F.one_hot(torch.as_tensor(action, dtype=torch.int64) - int(space.start), int(space.n)).float()
    return torch.as_tensor(np.asarray(action, dtype=np.float32)).reshape(len(action), -1)


def transitions(
    policy: Any,
    task: Task,
    n_steps: int = 30 * 2048,
    *,
    sigma: float = 0.0,
    gamma: float = 0.99,
    generator: Seed = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Transitions:
    """Let the victim play whole episodes until there are ``n_steps`` transitions.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes; sampled where it can be.
        task: the environment.
        n_steps: at least so many.
        sigma: noise on its observations, for victims that are never random.
        gamma: discount.
        generator: seed.
        on_step: called with (steps so far, steps in all).

    Raises:
        ValueError: episodes of one step that the time limit cuts: nothing follows anything.
    """
    check_count("n_steps", n_steps)
    check_number("gamma", gamma, low=0, high=1)
    seed, first, done, parts = resolve_seed(generator), 0, 0, []
    probe = task.make()
    victim = as_policy(policy, probe.action_space)
    probe.close()
    while done < n_steps:
        wanted = 16
        sample = collect(victim, task, wanted, sigma=sigma, stochastic=True, generator=seed, first=first,
                         trace=range(first, first + wanted))  # fmt: skip
        for trace, cut in zip(sample.traces, sample.truncated, strict=True):
            obs = _stacked(torch.as_tensor(trace.obs), task)
            parts.append(_pairs(obs, encoded(trace.action, victim.action_space), trace.reward, bool(cut), gamma))
        first, done = first + wanted, sum(len(part[0]) for part in parts)
        if not done:
            raise ValueError(f"{task.name}: the time limit cuts episodes after one step; raise max_steps")
        if on_step is not None:
            on_step(min(done, n_steps), n_steps)
    return Transitions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _stacked(obs: Tensor, task: Task) -> Tensor:
    """Return what the policy sees of the (T, ...) observations of one episode."""
    steps = torch.arange(len(obs))[:, None] + torch.arange(1 - task.n_frames, 1)
    return task.show(obs[steps.clamp(min=0)])


def _pairs(obs: Tensor, action: Tensor, reward: np.ndarray, cut: bool, gamma: float) -> tuple[Tensor, ...]:
    """Return the columns of one episode; what follows the last step is itself, masked, or the step is left out."""
    n = len(obs) - cut
    follows = torch.arange(1, n + 1).clamp(max=len(obs) - 1)
    ended = torch.zeros(n, dtype=torch.bool)
    ended[len(obs) - 1 :] = True
    value, total = np.zeros(len(reward)), 0.0
    for t in reversed(range(len(reward))):
        total = reward[t] + gamma * total
        value[t] = total
    rewards, values = (torch.as_tensor(v[:n], dtype=torch.float32) for v in (reward, value))
    return obs[:n], action[:n], rewards, obs[follows], action[follows], ended, values


class ActionValue(nn.Module):
    """Q(s, a) of vectors: a small network on standardised states.

    Args:
        data: sets sizes, centre and scale.
        discrete: one output for each action, of which ``action`` takes a mean; else the action is an input.
        hidden: width of its two layers.
    """

    centre: Tensor
    spread: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, data: Transitions, *, discrete: bool, hidden: int = 64) -> None:
        super().__init__()
        self.discrete, self.n_actions = discrete, data.action.shape[1]
        flat = data.obs.flatten(1).double()
        self.register_buffer("centre", flat.mean(0).float())
        self.register_buffer("spread", flat.std(0, correction=0).clamp(min=1e-3).float())
        self.register_buffer("offset", data.value.mean())
        self.register_buffer("scale", data.value.std(correction=0).clamp(min=1e-3))
        inputs = flat.shape[1] + (0 if discrete else self.n_actions)
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, self.n_actions if discrete else 1),
        )  # fmt: skip

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return (B, d) what the network reads."""
        state = (obs.flatten(1) - self.centre) / self.spread
        return state if self.discrete else torch.cat([state, action], 1)

    def chosen(self, outputs: Tensor, action: Tensor) -> Tensor:
        """Return (B,) of (B, K) outputs: the mean over actions, or the only one."""
        return (outputs * action).sum(1) if self.discrete else outputs[:, 0]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return (B,) values in the units of the return.

        Args:
            obs: (B, ...) states.
            action: (B, K) indicators or probabilities of discrete actions, or continuous actions.
        """
        return self.offset + self.scale * self.chosen(self.body(self.inputs(obs, action)), action)


def td_error(critic: ActionValue, batch: Batch, gamma: float) -> Tensor:
    """Return (B,) ``(Q(s, a) - r - gamma Q(s', a')) / scale``; the successor's value carries no gradient."""
    with torch.no_grad():
        after = torch.where(batch["ended"], 0.0, critic(batch["next_obs"], batch["next_action"]))
        target = batch["y"] + gamma * after
    return (critic(batch["x"], batch["action"]) - target) / critic.scale


def deviation(critic: ActionValue, bounds: IntervalBounds, obs: Tensor, action: Tensor) -> Tensor:
    """Return (B,) a bound of ``max |Q(s', a') - Q(s, a)| / scale`` over the ball around what the network reads."""
    inputs = critic.inputs(obs, action)
    lower, upper = bounds.bounds(inputs)
    middle = critic.body(inputs)
    return critic.chosen(torch.maximum(upper - middle, middle - lower), action)


class SarsaObjective(nn.Module):
    """``smooth L1(TD error) + lambda * deviation``: fits Q of the victim so that an attacker can follow it.

    Args:
        gamma: discount.
        weight: lambda of the deviation.
        radius: eps_Q, of standardised states and of actions.
    """

    def __init__(self, gamma: float = 0.99, *, weight: float = 0.1, radius: float = 0.02) -> None:
        super().__init__()
        self.gamma = check_number("gamma", gamma, low=0, high=1)
        self.weight = check_number("weight", weight, low=0)
        self.radius = check_number("radius", radius, low=0)
        self._bounds: IntervalBounds | None = None

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of ``{x, y, action, next_obs, next_action, ended}``, see :attr:`Transitions.columns`."""
        if not isinstance(model, ActionValue):
            raise TypeError(f"model is a {type(model).__name__}; an ActionValue is needed")
        error = td_error(model, batch, self.gamma)
        fit_part = F.smooth_l1_loss(error, torch.zeros_like(error))
        if not self.weight:
            return Loss(fit_part, {"td": fit_part.detach()})
        if self._bounds is None or self._bounds.model is not model.body:
            self._bounds = IntervalBounds(model.body, Linf(self.radius, domain=None))
        robust = deviation(model, self._bounds, batch["x"], batch["action"]).mean()
        return Loss(fit_part + self.weight * robust, {"td": fit_part.detach(), "deviation": robust.detach()})


def fit_sarsa(
    policy: Any,
    task: Task,
    *,
    n_steps: int = 30 * 2048,
    epochs: int = 10,
    sigma: float = 0.0,
    gamma: float = 0.99,
    weight: float = 0.1,
    radius: float = 0.02,
    hidden: int = 64,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    generator: Seed = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> ActionValue:
    """Return Q of a victim, fitted on its own transitions.

    Args:
        policy: the victim.
        task: the environment.
        n_steps: transitions.
        epochs: passes over them.
        sigma: noise on observations while it plays, for victims that are never random.
        gamma: discount.
        weight: lambda of the deviation.
        radius: eps_Q.
        hidden: width of the network.
        learning_rate: of Adam.
        batch_size: of the fit.
        generator: seed.
        on_step: called with (``"playing"`` or ``"fitting"``, done, in all).
    """
    seed = resolve_seed(generator)
    check_count("epochs", epochs)
    told = None if on_step is None else (lambda done, total: on_step("playing", done, total))
    data = transitions(policy, task, n_steps, sigma=sigma, gamma=gamma, generator=derive(seed, "sarsa"), on_step=told)
    probe = task.make()
    discrete = isinstance(probe.action_space, spaces.Discrete)
    probe.close()
    with reseeded(derive(seed, "critic")):
        critic = ActionValue(data, discrete=discrete, hidden=hidden)

    def step(state: TrainState, loss: Loss) -> None:
        if on_step is not None:
            on_step("fitting", state.step, epochs * -(-len(data) // batch_size))

    fit(
        critic, data.columns, SarsaObjective(gamma, weight=weight, radius=radius), epochs=epochs, generator=seed,
        batch_size=batch_size, optimiser=lambda p: torch.optim.Adam(p, lr=learning_rate), on_step=step,
    )  # fmt: skip
    return critic.eval()


@dataclass(frozen=True, repr=False)
class RobustSarsa(GradientAttack):
    """Show the observation in the ball that makes the victim choose what is worst in the true state.

    Args:
        budget: of a step or an episode.
        critic: of :func:`fit_sarsa`, for this victim and task.
        mixing_weight: 1 descends the value alone; below, the rest is the change of the action distribution (RS+MAD).
        n_iter: steps of the descent.
        step_size: in units of the observation; ``2.5 * radius / n_iter`` by default.
        duration: steps among which an episode's budget is shared.
        n_smoothing: noises over which the outputs of a smoothed policy are averaged.
    """

    budget: Budget
    critic: ActionValue
    mixing_weight: float = 1.0
    n_iter: int = 10
    step_size: float | None = None
    duration: int = 200
    n_smoothing: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mixing_weight", self.mixing_weight, low=0, high=1)
        if not isinstance(self.critic, ActionValue):
            raise TypeError(f"critic is a {type(self.critic).__name__}; take it from fit_sarsa(policy, task)")

    def __repr__(self) -> str:
        # names the weights: finished episodes of another critic are not those of this one
        rest = (self.mixing_weight, self.n_iter, self.step_size, self.duration, self.n_smoothing)
        return f"RobustSarsa({self.budget!r}, {fingerprint(self.critic)}, {', '.join(map(str, rest))})"

    def objective(self, view: View) -> Callable[[Tensor, int], Tensor]:
        """Return minus the critic's value of the true state, in its units, mixed with the change of the actions."""
        policy = require(view.policy, "outputs")
        true, critic = view.shown(view.obs), self.critic
        with torch.no_grad():
            clean = averaged(view, policy.outputs, view.obs, self.n_smoothing, self.n_iter)
        if clean.shape[1] != critic.n_actions or true.flatten(1).shape[1] != len(critic.centre):
            raise ValueError(
                f"the critic is for {len(critic.centre)} numbers and {critic.n_actions} actions, the victim sees "
                f"{tuple(true.shape[1:])} and has {clean.shape[1]} outputs; fit it on this victim and task"
            )

        def harmful(seen: Tensor, k: int) -> Tensor:
            outputs = averaged(view, policy.outputs, seen, self.n_smoothing, k)
            harm = -(critic(true, _likely(outputs, policy.action_space)) - critic.offset) / critic.scale
            if self.mixing_weight == 1:
                return harm
            moved = action_difference(policy, clean, outputs)
            return self.mixing_weight * harm + (1 - self.mixing_weight) * moved

        return harmful


def _likely(outputs: Tensor, space: spaces.Space) -> Tensor:
    """Return (B, K) probabilities of discrete actions, or continuous ones as the environment takes them."""
    if isinstance(space, spaces.Discrete):
        return outputs.softmax(1)
    box: Any = space
    low, high = (torch.as_tensor(b, dtype=outputs.dtype, device=outputs.device).flatten() for b in (box.low, box.high))
    return torch.minimum(torch.maximum(outputs.flatten(1), low), high)
