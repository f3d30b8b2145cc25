"""Discover policies that the set so far does not dominate: a new victim and an attacker, trained in turns.

Liu et al. 2024 (arXiv 2402.12673), the practical algorithm, as loops over stable-baselines3's PPO. In each update

1. the victim learns from what the attacker shows it, with the regulariser of SA-PPO (``kappa``);
2. every ``choose_every`` updates the best policy of the set under the present attacker is found;
3. the attacker is paid *+r* where the new victim plays and *-r* where that best one plays, on half the environments
   each: it maximises ``J(new, nu) - max_i J(old_i, nu)``. One actor serves both sides; its critic is told which side it
   is on (the paper: two critics).

After ``n_updates`` the victim joins the set, unless ``J(new, nu) - max_i J(old_i, nu) <= delta`` on fresh episodes.
The next victim begins from the last policy's actor; critics, attacker and optimisers begin anew, and the learning rates
fall linearly again. :func:`train_policy` makes the first policy (natural, or SA-PPO with ``kappa``) and freezes the
normaliser that all policies share.

Left out: two learning rates in one PPO, recurrent victims. The released code's "attack_exp3" choice of the best policy
(a bandit in place of step 2) is left out: here all are evaluated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rl_robust.attacks.learned import SETTINGS, Kind, adversary_attack
from rl_robust.attacks.stage import AdversaryVecEnv, AttackedVecEnv, SidedPolicy, WithoutSide
from rl_robust.nondominated.sets import ABOUT, PolicySet
from rl_robust.nondominated.smooth import SmoothPolicy, smooth_settings
from rl_robust.observation import ObservationAttack, StepBudget
from rl_robust.rollout import collect
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Normaliser, Task
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["Discovery", "blank_policy", "discover_policies", "train_policy"]

OnStep = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Discovery:
    """What a discovery brought.

    Attributes:
        policies: the set, the initial policy first.
        attackers: the last attacker of each round of this run.
        values: of each round of this run: J(new, nu) - max_i J(old_i, nu).
        stopped: whether the last round found nothing above ``delta`` (its victim is not in the set).
    """

    policies: PolicySet
    attackers: dict[str, ObservationAttack] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    stopped: bool = False


def _vec(task: Task, n_envs: int, seed: int) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([task.make] * n_envs)
    env.seed(seed & 0x7FFFFFFF)
    return env


def _model(policy: Any, env: Any, settings: Mapping[str, Any], seed: int, device: str) -> Any:
    from stable_baselines3 import PPO

    return PPO(policy, env, seed=seed & 0x7FFFFFFF, device=device, verbose=0, **dict(settings))


def blank_policy(task: Task, settings: Mapping[str, Any] | None = None, *, device: str = "cpu") -> SB3Policy:
    """Return a policy of the discovered kind with fresh weights: what :meth:`PolicySet.load` is to be given."""
    env = _vec(task, 1, 0)
    with reseeded(0):
        built = smooth_settings({**SETTINGS, **dict(settings or {})}, kappa=0.0, eps=0.0)
        policy = SB3Policy(_model(SmoothPolicy, AttackedVecEnv(env, task), built, 0, device).policy)
    env.close()
    return policy


def _turn(model: Any, n_steps: int, share: float, base: float) -> None:
    """Train for some steps at ``share`` of the learning rate; SB3's own decay knows one call only."""
    model.lr_schedule = lambda _: base * share
    model.learn(n_steps, reset_num_timesteps=False)


def _rate(settings: Mapping[str, Any]) -> float:
    return float(settings.get("learning_rate", SETTINGS["learning_rate"]))


def train_policy(
    task: Task,
    *,
    n_steps: int = 100_000,
    kappa: float = 0.0,
    eps: float = 0.0,
    ramp: float = 0.5,
    normalise: bool = True,
    n_envs: int = 8,
    settings: Mapping[str, Any] | None = None,
    generator: Seed = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> tuple[SB3Policy, Task]:
    """Train a policy without an attacker: natural, or SA-PPO (``kappa`` > 0).

    Args:
        task: the environment.
        n_steps: environment steps.
        kappa: weight of the SA regulariser.
        eps: its l-infinity radius, in the observation's units after normalising.
        ramp: share of the training over which ``eps`` grows from 0.
        normalise: learn statistics of observations (and of returns) on the way, where the task has none, and freeze
            them at the end.
        n_envs: environments side by side.
        settings: of PPO, over small defaults.
        generator: seed; the global generators are left as found.
        device: where PPO trains.
        on_step: called with ("policy", steps done, steps).

    Returns:
        The policy, and the task with the frozen normaliser.
    """
    from stable_baselines3.common.vec_env import VecNormalize

    check_count("n_steps", n_steps)
    seed = resolve_seed(generator)
    chosen = {**SETTINGS, **dict(settings or {})}
    learn = normalise and task.normaliser is None
    if learn and (task.scale != 1.0 or task.n_frames != 1):
        raise ValueError("normalise=True learns statistics of single unscaled observations; give the task a normaliser")
    with reseeded(derive(seed, "policy")):
        env: Any = _vec(task, n_envs, derive(seed, "policy", "env"))
        env = VecNormalize(env, gamma=float(chosen.get("gamma", 0.99))) if learn else AttackedVecEnv(env, task)
        model = _model(SmoothPolicy, env, smooth_settings(chosen, kappa=kappa, eps=eps), derive(seed, "policy"), device)
        chunk, done = n_envs * int(chosen["n_steps"]), 0
        while done < n_steps:
            model.policy.smooth_eps = eps * min(1.0, (done + 1) / max(ramp * n_steps, 1.0))
            _turn(model, chunk, max(1 - done / n_steps, 0.0), _rate(chosen))
            done += chunk
            if on_step is not None:
                on_step("policy", min(done, n_steps), n_steps)
        env.close()
    found = SB3Policy(model.policy)
    return found, replace(task, normaliser=Normaliser.of_vec_normalize(env)) if learn else task


class _Round:
    """A victim and an attacker, trained in turns."""

    def __init__(
        self, policies: PolicySet, budget: StepBudget, kind: Kind, victim: Mapping[str, Any],
        attacker: Mapping[str, Any], kappa: float, n_envs: int, seed: int, device: str,
    ) -> None:  # fmt: skip
        task = policies.task
        self.policies, self.budget, self.kind, self.seed = policies, budget, kind, seed
        self.rates = _rate(victim), _rate(attacker)
        self.victim_env = AttackedVecEnv(
            _vec(task, n_envs, derive(seed, "victim env")), task, generator=seed, device=device
        )
        settings = smooth_settings(victim, kappa=kappa, eps=budget.eps)
        self.victim = _model(SmoothPolicy, self.victim_env, settings, derive(seed, "victim"), device)
        self._warm(policies[len(policies) - 1])
        self.mine = SB3Policy(self.victim.policy)
        sides = [(self.mine, 1.0), (policies[0], -1.0)]
        raw = _vec(task, 2 * n_envs, derive(seed, "attacker env"))
        self.attacker_env = AdversaryVecEnv(raw, task, sides, budget, kind=kind, generator=seed)
        self.attacker = _model(SidedPolicy, self.attacker_env, attacker, derive(seed, "attacker"), device)
        self.attack = adversary_attack(kind, budget, WithoutSide(SB3Policy(self.attacker.policy)))
        self.victim_env.attack, self.victim_env.policy = self.attack, self.mine
        self.steps = n_envs * int(victim["n_steps"]), 2 * n_envs * int(attacker["n_steps"])

    def _warm(self, last: Any) -> None:
        """Begin from the last policy's actor, where it has the same shape; the critic is new."""
        if not isinstance(last, SB3Policy):
            return
        mine, old = self.victim.policy.state_dict(), last.policy.state_dict()
        actor = {k: v for k, v in old.items() if "value_net" not in k and k in mine and v.shape == mine[k].shape}
        self.victim.policy.load_state_dict({**mine, **{k: v.clone() for k, v in actor.items()}})

    def best(self, n_episodes: int, update: int) -> tuple[int, list[float]]:
        """Return the best policy of the set under the present attacker."""
        seed = derive(self.seed, "choice", update)
        task = self.policies.task
        means = [collect(p, task, n_episodes, attack=self.attack, generator=seed).mean for p in self.policies.policies]
        return max(range(len(means)), key=lambda k: means[k]), means

    def run(
        self, n_updates: int, ramp: int, choose_every: int, n_episodes: int, report: Callable[[int, int], None] | None
    ) -> None:
        """Train both."""
        for k in range(n_updates):
            share = 1 - k / n_updates
            self.victim.policy.smooth_eps = self.budget.eps * min(1.0, (k + 1) / max(ramp, 1))
            _turn(self.victim, self.steps[0], share, self.rates[0])
            self.victim.policy.set_training_mode(False)
            if k % choose_every == 0:
                self.attacker_env.put(1, self.policies[self.best(n_episodes, k)[0]])
            _turn(self.attacker, self.steps[1], share, self.rates[1])
            self.attacker.policy.set_training_mode(False)
            if report is not None:
                report(k + 1, n_updates)

    def value(self, n_episodes: int) -> float:
        """Return J(new, nu) - max_i J(old_i, nu) on fresh episodes."""
        _, old = self.best(n_episodes, -1)
        seed = derive(self.seed, "choice", -1)
        new = collect(self.mine, self.policies.task, n_episodes, attack=self.attack, generator=seed).mean
        return new - max(old)

    def close(self) -> None:
        """Close the environments."""
        self.victim_env.close()
        self.attacker_env.close()


def discover_policies(
    task: Task,
    initial: Any,
    *,
    budget: StepBudget,
    n_policies: int = 5,
    delta: float = 0.0,
    attacker: Kind = "pa-ad",
    n_updates: int = 50,
    ramp: int | None = None,
    choose_every: int = 10,
    n_episodes: int = 10,
    n_envs: int = 8,
    kappa: float = 0.0,
    victim_settings: Mapping[str, Any] | None = None,
    attacker_settings: Mapping[str, Any] | None = None,
    generator: Seed = None,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Discovery:
    """Return a set of policies, each the best answer to an attack that those before it handle worse.

    Args:
        task: the environment with its frozen normaliser.
        initial: a good policy of it: natural or SA-PPO, of :func:`train_policy` or your own.
        budget: of a step, e.g. ``StepBudget(Linf(0.075, domain=None))``.
        n_policies: in the end, the initial one included.
        delta: a round whose new policy gains no more than this over the set ends the discovery.
        attacker: ``"pa-ad"`` or ``"sa-rl"``.
        n_updates: of victim and attacker for each policy; one is ``n_envs * n_steps`` steps of PPO.
        ramp: updates over which the regulariser's radius grows; three quarters of them by default.
        choose_every: updates between choices of the best policy of the set.
        n_episodes: for each of these evaluations.
        n_envs: environments side by side; the attacker has twice as many, half for each side.
        kappa: weight of the SA regulariser.
        victim_settings: of its PPO, over small defaults; :mod:`.recipes` has the paper's.
        attacker_settings: likewise.
        generator: seed; the global generators are left as found.
        device: where PPO trains; ``initial`` must stand there.
        checkpoint: folder; an interrupted discovery goes on after its last finished policy (which must be of
            the discovered kind, as the initial one of :func:`train_policy` is).
        on_step: called with (name of the round, updates done, updates).
    """
    for name, value in (("n_updates", n_updates), ("choose_every", choose_every), ("n_episodes", n_episodes)):
        check_count(name, value)
    check_count("n_policies", n_policies)
    check_count("n_envs", n_envs)
    check_number("kappa", kappa, low=0)
    check_number("delta", delta)
    seed = resolve_seed(generator)
    victim = {**SETTINGS, **dict(victim_settings or {})}
    rival = {**SETTINGS, **dict(attacker_settings or {})}
    folder = None if checkpoint is None else Path(checkpoint)
    policies = PolicySet([initial], task, names=["initial"])
    if folder is not None and (folder / ABOUT).is_file():
        policies = PolicySet.load(folder, task, lambda: blank_policy(task, victim, device=device))
    attackers: dict[str, ObservationAttack] = {}
    values: list[float] = []
    while len(policies) < n_policies:
        k = len(policies)
        name = f"discovered {k}"
        report = None if on_step is None else lambda done, total, name=name: on_step(name, done, total)
        with reseeded(derive(seed, "discovery", k)):
            game = _Round(policies, budget, attacker, victim, rival, kappa, n_envs, derive(seed, "round", k), device)
            try:
                game.run(n_updates, round(0.75 * n_updates) if ramp is None else ramp, choose_every, n_episodes, report)
                values.append(game.value(n_episodes))
            finally:
                game.close()
        attackers[f"against {name}"] = game.attack
        _log.info("%s: gains %.3f over the set under its attacker", name, values[-1])
        if values[-1] <= delta:
            return Discovery(policies, attackers, tuple(values), True)
        policies = PolicySet([*policies.policies, game.mine], task, names=[*policies.names, name])
        if folder is not None:
            policies.save(folder, about={"eps": budget.eps, "seed": str(seed), "value": values[-1]})
    return Discovery(policies, attackers, tuple(values))
