"""A set of policies and what each brings against each attacker.

All policies of a set see the same task: the same frozen normaliser, so that ``eps`` means the same for each of them.
Every policy plays the same episodes against an attacker (same seeds), so differences between policies are paired.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rl_robust.nondominated import tabular
from rl_robust.observation import ObservationAttack
from rl_robust.policy import Policy, as_policy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.checks import check_count
from robust_core.errors import UntrustedFileError
from robust_core.evaluation.metrics.estimate import Estimate, mean
from robust_core.io import load_weights, read_json, save_tensors, write_json
from robust_core.random import Seed, resolve_seed

__all__ = ["PayoffMatrix", "PolicySet"]

SCHEMA = "robust.policy-set/1"
WEIGHTS, ABOUT = "policies.safetensors", "policies.json"


@dataclass(frozen=True)
class PayoffMatrix:
    """Returns of every policy against every attacker.

    Attributes:
        returns: (P, N, E) float64, policies x attackers x episodes; episode e is the same for all policies.
        attackers: their names.
    """

    returns: np.ndarray
    attackers: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.returns.ndim != 3 or self.returns.shape[1] != len(self.attackers) or not self.returns.size:
            raise ValueError(f"returns {self.returns.shape}: policies x {len(self.attackers)} attackers x episodes")
        if not np.isfinite(self.returns).all():
            raise ValueError("returns: finite numbers are needed")

    @property
    def mean(self) -> np.ndarray:
        """(P, N) mean returns."""
        return self.returns.mean(2)

    def estimate(self, policy: int, attacker: str) -> Estimate:
        """Return a mean return with its 95 % interval over episodes."""
        return mean(self.returns[policy, self.attackers.index(attacker)])

    @property
    def best(self) -> dict[str, int]:
        """The best policy against each attacker."""
        return {name: int(k) for name, k in zip(self.attackers, self.mean.argmax(0), strict=True)}

    def gap(
        self, chosen: Sequence[int], *, attackers: Literal["pure", "mixed"] = "pure"
    ) -> tuple[float, int, str | np.ndarray]:
        """Return (gap, policy, attacker or mixture): what some of the policies lose to all of them.

        A point estimate, among the policies and attackers that were measured: neither a bound of the gap to all
        policies that could be, nor free of noise.
        """
        if attackers == "mixed":
            return tabular.mixed_gap(self.mean, chosen)
        value, policy, attacker = tabular.gap(self.mean, chosen)
        return value, policy, self.attackers[attacker]

    def as_json(self) -> dict[str, Any]:
        """Return the table with intervals, as plain data."""
        cells = [[mean(e).as_json() for e in row] for row in self.returns]
        return {"attackers": list(self.attackers), "return": cells}


class PolicySet:
    """Policies of one task.

    Args:
        policies: anything that acts as one; to be saved they must be modules.
        task: with the frozen normaliser that all of them share.
        names: one for each.

    Raises:
        ValueError: no policy, or action spaces that differ from the task's.
    """

    def __init__(self, policies: Sequence[Any], task: Task, *, names: Sequence[str] | None = None) -> None:
        if not len(policies):
            raise ValueError("policies: at least one is needed")
        env = task.make()
        self.policies: tuple[Policy, ...] = tuple(as_policy(policy, env.action_space) for policy in policies)
        env.close()
        for k, policy in enumerate(self.policies):
            if policy.action_space != env.action_space:
                raise ValueError(f"policies[{k}] acts in {policy.action_space}, {task.name} in {env.action_space}")
        self.task = task
        self.names = tuple(names) if names is not None else tuple(f"policy {k}" for k in range(len(policies)))
        if len(self.names) != len(self.policies):
            raise ValueError(f"{len(self.names)} names for {len(self.policies)} policies")

    def __len__(self) -> int:
        return len(self.policies)

    def __getitem__(self, k: int) -> Policy:
        return self.policies[k]

    def payoff(
        self,
        attackers: Mapping[str, ObservationAttack | None],
        n_episodes: int = 50,
        *,
        generator: Seed = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> PayoffMatrix:
        """Play every policy against every attacker.

        Args:
            attackers: name -> attack; None is no attack.
            n_episodes: for each pair.
            generator: seed of the episodes.
            on_step: called with (pairs done, pairs).
        """
        check_count("n_episodes", n_episodes)
        if not attackers:
            raise ValueError("attackers: at least one is needed, e.g. {'none': None}")
        seed, rows = resolve_seed(generator), []
        total = len(self) * len(attackers)
        for policy in self.policies:
            row = []
            for attack in attackers.values():
                row.append(collect(policy, self.task, n_episodes, attack=attack, generator=seed).returns)
                if on_step is not None:
                    on_step(len(rows) * len(attackers) + len(row), total)
            rows.append(row)
        return PayoffMatrix(np.array(rows), tuple(attackers))

    def take(self, chosen: Sequence[int]) -> PolicySet:
        """Return the set of some of the policies."""
        return PolicySet([self.policies[k] for k in chosen], self.task, names=[self.names[k] for k in chosen])

    def prune(
        self, payoff: PayoffMatrix, delta: float = 0.0, *, attackers: Literal["pure", "mixed"] = "pure"
    ) -> PolicySet:
        """Return the set without policies whose leaving costs at most ``delta`` against the attackers measured."""
        if len(payoff.returns) != len(self):
            raise ValueError(f"payoff of {len(payoff.returns)} policies, the set has {len(self)}")
        return self.take(tabular.prune(payoff.mean, range(len(self)), delta=delta, attackers=attackers))

    def save(self, directory: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> Path:
        """Write weights (safetensors) and what they are (JSON) into a folder.

        Raises:
            TypeError: a policy has no weights.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for k, policy in enumerate(self.policies):
            if not isinstance(policy, nn.Module):
                raise TypeError(f"policies[{k}] is a {type(policy).__name__}; only torch modules have weights to save")
            tensors.update({f"{k}/{name}": value for name, value in policy.state_dict().items()})
        save_tensors(folder / WEIGHTS, tensors)
        normaliser = self.task.normaliser
        document = {
            "schema": SCHEMA,
            "names": list(self.names),
            "env": self.task.name,
            "normaliser_sha256": None if normaliser is None else normaliser.sha256,
            "about": dict(about or {}),
        }
        write_json(folder / ABOUT, document)
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str], task: Task, build: Callable[[], Any]) -> PolicySet:
        """Read what :meth:`save` wrote; nothing in the files is run.

        Args:
            directory: the folder.
            task: the task that the policies were trained on.
            build: makes one policy with fresh weights.

        Raises:
            UntrustedFileError: damaged files.
            ValueError: weights that do not fit what ``build`` makes, or another normaliser.
        """
        folder = Path(directory)
        told = read_json(folder / ABOUT)
        if not isinstance(told, dict) or told.get("schema") != SCHEMA or not isinstance(told.get("names"), list):
            raise UntrustedFileError(f"{folder / ABOUT} describes no set of policies")
        mine = None if task.normaliser is None else task.normaliser.sha256
        if told.get("normaliser_sha256") != mine:
            raise ValueError(f"{folder}: saved with another normaliser; eps would mean something else on this task")
        tensors, policies = load_weights(folder / WEIGHTS), []
        for k in range(len(told["names"])):
            policy, prefix = build(), f"{k}/"
            state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            try:
                policy.load_state_dict(state, strict=True)
            except RuntimeError as error:
                why = " ".join(str(error).split())[:300]
                raise ValueError(f"{folder}: policy {k} does not fit what build() makes: {why}") from error
            policies.append(policy)
        return cls(policies, task, names=[str(name) for name in told["names"]])
