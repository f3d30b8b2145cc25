"""Attacks by name: the noise, the gradients and the trained attackers that a victim is measured with.

    suite = Suite(policy, task, sigma=0.0, attack_steps=100_000, folder="attackers")
    attacks = suite.build(("random", "mad", "sarsa", "sa-rl", "pa-ad"), StepBudget(Linf(0.1, domain=None)))

What has to watch the victim first (robust Sarsa) does so once for all radii; attackers that are trained are kept in a
folder, by what they were trained against, and are not trained again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rl_robust.attacks.episode import BudgetedPGD, offsets
from rl_robust.attacks.gradient import CriticAttack, MaximalActionDifference, RandomNoise
from rl_robust.attacks.learned import adversary_attack, adversary_space, train_adversary
from rl_robust.attacks.sarsa import ActionValue, RobustSarsa, fit_sarsa
from rl_robust.observation import Budget, EpisodeBudget, ObservationAttack, StepBudget
from rl_robust.policy import as_policy, require
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Task
from robust_core.checks import check_choice, check_count, check_number
from robust_core.io import save_tensors
from robust_core.loading import load_into
from robust_core.models import fingerprint, model_device
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["ATTACKS", "LEARNED", "SARSA_STEPS", "Suite", "usual_attacks"]

LEARNED = ("sa-rl", "pa-ad")
ATTACKS = ("random", "critic", "mad", "sarsa", "sarsa+mad", *LEARNED, "pgd", "offset")
SARSA_STEPS = 30 * 2048
_SARSA = {"sarsa": 1.0, "sarsa+mad": 0.5}
_PLAIN = {"random": RandomNoise, "critic": CriticAttack, "mad": MaximalActionDifference}
OnStep = Callable[[str, int, int], None]


def usual_attacks(policy: Any) -> tuple[str, ...]:
    """Return the names of the attacks of a step that a policy can be measured with: gradients where it has them."""
    gradients = hasattr(policy, "outputs")
    value = gradients and hasattr(policy, "value") and not getattr(policy, "recurrent", False)
    return ("random", *(("mad", "sarsa", "sarsa+mad") if gradients else ()), *(("critic",) if value else ()), "sa-rl",
            *(("pa-ad",) if gradients else ()))  # fmt: skip


class Suite:
    """Makes attacks against one victim.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes.
        task: the environment.
        sigma: noise of a smoothed victim: those who watch it or train against it meet it as well.
        duration: steps among which an episode's budget is shared.
        attack_steps: environment steps of the training of an attacker.
        attack_settings: of its PPO, over small defaults.
        sarsa_steps: steps for which robust Sarsa watches the victim.
        generator: seed of what is trained.
        folder: of trained attackers; None trains them anew each time.
        on_step: called with (what is done, done, in all) while something is trained.
    """

    def __init__(
        self,
        policy: Any,
        task: Task,
        *,
        sigma: float = 0.0,
        duration: int = 200,
        attack_steps: int = 100_000,
        attack_settings: Mapping[str, Any] | None = None,
        sarsa_steps: int = SARSA_STEPS,
        generator: Seed = None,
        folder: str | os.PathLike[str] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        env = task.make()
        self.policy: Any = as_policy(policy, env.action_space)
        self.shape = env.observation_space.shape or ()
        env.close()
        self.task, self.sigma = task, check_number("sigma", sigma, low=0)
        self.duration = check_count("duration", duration)
        self.attack_steps = check_count("attack_steps", attack_steps)
        self.attack_settings = dict(attack_settings or {})
        self.sarsa_steps = check_count("sarsa_steps", sarsa_steps)
        self.seed, self.folder = resolve_seed(generator), None if folder is None else Path(folder)
        self.on_step = on_step
        self._critic: ActionValue | None = None

    def build(self, names: Sequence[str], budget: Budget) -> dict[str, ObservationAttack]:
        """Return the attacks of these names, with this budget.

        Args:
            names: of :data:`ATTACKS`; ``"offset"`` is one for each element and sign.
            budget: of a step or of an episode.

        Raises:
            ValueError: no such attack, or one that does not know this kind of budget.
            TypeError: an attack that asks for more than the policy has.
        """
        found: dict[str, ObservationAttack] = {}
        for name in names:
            check_choice("attacks", name, ATTACKS)
            if name in LEARNED:
                found[name] = self.learned(name, budget)
            elif name in _SARSA:
                found[name] = RobustSarsa(budget, self.critic(budget.eps), _SARSA[name], duration=self.duration)
            elif name in _PLAIN:
                found[name] = _PLAIN[name](budget, duration=self.duration)
            else:
                found |= self._episode(name, budget)
        return found

    def _episode(self, name: str, budget: Budget) -> Mapping[str, ObservationAttack]:
        if not isinstance(budget, EpisodeBudget):
            raise ValueError(f"attacks {name}: it spends the budget of an episode; add --per episode")
        if name == "pgd":
            require(self.policy, "outputs")
            return {"pgd": BudgetedPGD(budget, n_smoothing=32)}
        size = int(np.prod(self.shape))
        if size > 64:
            raise ValueError(f"attacks offset: one for each of {size} elements both ways would take days")
        return offsets(budget, size, (self.duration,))

    @property
    def beside_certificates(self) -> tuple[str, ...]:
        """The attacks with a budget for the episode that this victim can be measured with in reasonable time."""
        small, gradients = int(np.prod(self.shape)) <= 8, hasattr(self.policy, "outputs")
        return (*(("offset",) if small else ("random",)), *(("mad",) if gradients else ()))

    def critic(self, radius: float) -> ActionValue:
        """Return Q of the victim, for robust Sarsa; one that is never random is watched under noise of ``radius``."""
        if self._critic is None:
            require(self.policy, "outputs")
            sigma = self.sigma or (0.0 if self.policy.n_draws else radius)
            self._critic = fit_sarsa(
                self.policy, self.task, n_steps=self.sarsa_steps, sigma=sigma, generator=self.seed, on_step=self.on_step
            ).to(model_device(self.policy))
        return self._critic

    def learned(self, kind: Any, budget: Budget) -> ObservationAttack:
        """Return an attacker that was trained against the victim, now or before."""
        if not isinstance(budget, StepBudget):
            raise ValueError(f"attacks {kind}: it is trained with a ball in every step; leave --per episode out")
        if kind == "pa-ad":
            require(self.policy, "outputs")
        seed, file = derive(self.seed, kind, f"{budget.eps:.9g}"), self._file(kind, budget)
        if file is not None and file.is_file():
            from stable_baselines3.common.policies import ActorCriticPolicy

            seen = spaces.Box(-np.inf, np.inf, (int(np.prod(self.shape)),), np.float32)
            kwargs = self.attack_settings.get("policy_kwargs", {})
            built = ActorCriticPolicy(seen, adversary_space(kind, self.shape, self.policy), lambda _: 0.0, **kwargs)
            adversary = SB3Policy(built)
            load_into(adversary, str(file))
            return adversary_attack(kind, budget, adversary.to(model_device(self.policy)))
        label = f"{kind} at {budget.eps:g}"
        found: Any = train_adversary(
            self.task, self.policy, budget, kind=kind, n_steps=self.attack_steps, sigma=self.sigma,
            settings=self.attack_settings, generator=seed,
            on_step=None if self.on_step is None else (lambda k, n, tell=self.on_step: tell(label, k, n)),
        )  # fmt: skip
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, found.adversary.state_dict())
        return found

    def _file(self, kind: str, budget: StepBudget) -> Path | None:
        if self.folder is None:
            return None
        parts = (fingerprint(self.policy), self.task.identity, repr(budget), kind, self.attack_steps, self.sigma,
                 self.seed, sorted(self.attack_settings.items(), key=str))  # fmt: skip
        mark = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
        return self.folder / f"{kind}-{mark}.safetensors"
