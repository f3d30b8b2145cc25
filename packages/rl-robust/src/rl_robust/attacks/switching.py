"""An attacker who changes: one of several for each episode, in blocks or at random.

What a policy meets in service is seldom one attacker all the time. Liu et al. 2024 (arXiv 2402.12673) switch one on and
off in blocks of 100 episodes, or with probability 0.1 for each such block. The attacker of an episode is a function of
the seed and of the episode's number alone, so runs side by side, or in another order, meet the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl_robust.observation import Budget, ObservationAttack, View
from robust_core.checks import check_count, check_number
from robust_core.random import derive

__all__ = ["SwitchingAttack"]


@dataclass(frozen=True)
class SwitchingAttack:
    """Play one of several attackers in each episode.

    Args:
        attacks: the attackers, each with its own budget; None is no attack. One at least must be an attack.
        block: episodes of a block; within one nothing changes.
        probability: of a change at the start of a block; None takes the attackers in turn. A change goes to another
            attacker, each equally likely.
        generator: seed of the changes.
    """

    attacks: tuple[ObservationAttack | None, ...]
    block: int = 100
    probability: float | None = None
    generator: int = 0

    def __post_init__(self) -> None:
        check_count("block", self.block)
        if not isinstance(self.attacks, Sequence) or all(attack is None for attack in self.attacks):
            raise ValueError(f"attacks={self.attacks!r}: attackers (None is no attack) are needed, one at least")
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if self.probability is not None:
            check_number("probability", self.probability, low=0, high=1)

    @property
    def budget(self) -> Budget:
        """The widest budget of the attackers."""
        return max((a.budget for a in self.attacks if a is not None), key=lambda budget: budget.eps)

    def active(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return (B,) int64: which attacker plays in each episode."""
        blocks = np.asarray(episodes, dtype=np.int64) // self.block
        n = len(self.attacks)
        if self.probability is None or n == 1:
            return blocks % n
        chain = [0]
        for k in range(1, int(blocks.max(initial=0)) + 1):
            rng = np.random.default_rng(derive(self.generator, "switch", k))
            moves = int(rng.integers(1, n)) if rng.random() < self.probability else 0
            chain.append((chain[-1] + moves) % n)
        return np.array(chain, dtype=np.int64)[blocks]

    def perturb(self, view: View) -> Tensor:
        """Return (B, ...) observations to show."""
        active = torch.as_tensor(self.active(view.episodes.cpu().numpy()), device=view.obs.device)
        seen = view.obs
        for k, attack in enumerate(self.attacks):
            mine = active == k
            if attack is None or not bool(mine.any()):
                continue
            proposed = attack.budget.project(attack.perturb(view).detach(), view.obs, view.spent)
            seen = torch.where(mine.reshape(-1, *[1] * (seen.ndim - 1)), proposed, seen)
        return seen
