"""Discover policies that the set so far does not dominate: a new victim and an attacker, trained in turns.

Liu et al. 2024 (arXiv 2402.12673), the practical algorithm, as loops over stable-baselines3's PPO. In each update

1. the victim learns from what the attacker shows it, with the regulariser of SA-PPO (``kappa``);
2. every ``choose_every`` updates the best policy of the set under the present attacker is found;
3. the attacker is paid *+r* where the new victim plays and *-r* where that best one plays, on half the environments
   each: it maximises ``J(new, nu) - max_i J(old_i, nu)``. One actor serves both sides; its critic is told which side it
   is on (the paper: two critics).

After ``n_updates`` the victim joins the set, unless ``J(new, nu) - max_i J(old_i, nu) <= delta`` on fresh episodes.
The next victim begins from the last policy's actor; critics, attacker and optimisers begin anew, and the learning rates
fall linearly again. :func:`rl_robust.adversarial.train_policy` makes the first policy (natural, or SA-PPO) and freezes
the normaliser that all policies share.

Left out: two learning rates in one PPO, recurrent victims. The released code's "attack_exp3" choice of the best policy
(a bandit in place of step 2) is left out: here all are evaluated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_robust.adversarial.game import Game
from rl_robust.adversarial.ppo import blank_policy
from rl_robust.adversarial.sa_ppo import StateAdversarialRegulariser
from rl_robust.attacks.learned import SETTINGS, Kind
from rl_robust.nondominated.sets import ABOUT, PolicySet
from rl_robust.observation import ObservationAttack, StepBudget
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.checks import check_count, check_number
from robust_core.io import read_json
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["Discovery", "discover_policies"]

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


class _Round(Game):
    """A victim, and an attacker that is paid for what the set handles worse than the victim does."""

    def __init__(self, policies: PolicySet, *rest: Any, **more: Any) -> None:
        self.policies = policies
        super().__init__(policies.task, *rest, sides=lambda mine: [(mine, 1.0), (policies[0], -1.0)], **more)

    def best(self, n_episodes: int, update: int) -> tuple[int, list[float]]:
        """Return the best policy of the set under the present attacker."""
        seed = derive(self.seed, "choice", update)
        means = [
            collect(p, self.task, n_episodes, attack=self.attack, generator=seed).mean for p in self.policies.policies
        ]
        return max(range(len(means)), key=lambda k: means[k]), means

    def run(
        self, n_updates: int, choose_every: int, n_episodes: int, report: Callable[[int, int], None] | None
    ) -> None:
        """Train both."""
        for k in range(n_updates):
            self.victim_turn(k / n_updates)
            if k % choose_every == 0:
                self.disturbed.put(1, self.policies[self.best(n_episodes, k)[0]])
            self.attacker_turn(k / n_updates)
            if report is not None:
                report(k + 1, n_updates)

    def value(self, n_episodes: int) -> float:
        """Return J(new, nu) - max_i J(old_i, nu) on fresh episodes."""
        _, old = self.best(n_episodes, -1)
        seed = derive(self.seed, "choice", -1)
        return collect(self.policy, self.task, n_episodes, attack=self.attack, generator=seed).mean - max(old)


def _term(budget: StepBudget, kappa: float, ramp: float, seed: int) -> StateAdversarialRegulariser | None:
    if kappa == 0:
        return None
    return StateAdversarialRegulariser(budget.threat, kappa, ramp=ramp, generator=derive(seed, "state adversary"))


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
        initial: a good policy of it: natural or SA-PPO, of :func:`rl_robust.adversarial.train_policy` or your own.
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
            the discovered kind, as the initial one of ``train_policy`` is).
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
        about = read_json(folder / ABOUT)["about"]
        if about.get("stopped") and about["seed"] == str(seed) and about["value"] <= delta:
            return Discovery(policies, stopped=True)
    attackers: dict[str, ObservationAttack] = {}
    values: list[float] = []
    while len(policies) < n_policies:
        k = len(policies)
        name = f"discovered {k}"
        report = None if on_step is None else lambda done, total, name=name: on_step(name, done, total)
        inner = derive(seed, "round", k)
        with reseeded(derive(seed, "discovery", k)):
            game = _Round(
                policies, budget, victim, rival, kind=attacker, n_envs=n_envs, seed=inner, device=device,
                regulariser=_term(budget, kappa, 0.75 if ramp is None else min(1.0, ramp / n_updates), inner),
                initial=policies[k - 1],
            )  # fmt: skip
            try:
                game.run(n_updates, choose_every, n_episodes, report)
                values.append(game.value(n_episodes))
            finally:
                game.close()
        attackers[f"against {name}"] = game.attack
        _log.info("%s: gains %.3f over the set under its attacker", name, values[-1])
        stopped = values[-1] <= delta
        if not stopped:
            policies = PolicySet([*policies.policies, game.policy], task, names=[*policies.names, name])
        if folder is not None:
            policies.save(folder, about={"eps": budget.eps, "seed": str(seed), "value": values[-1], "stopped": stopped})
        if stopped:
            return Discovery(policies, attackers, tuple(values), True)
    return Discovery(policies, attackers, tuple(values))
