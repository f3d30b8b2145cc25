"""What episodes bring: their returns in order, and what happened in those that were watched."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["ReturnSample", "Trace"]


@dataclass(frozen=True)
class Trace:
    """One episode, step by step.

    Attributes:
        episode: its number.
        obs, seen: (T, ...) true and shown observations (with noise).
        distance: (T,) length of the attack in each step.
        reward: (T,).
        action: (T, ...) as the environment took them.
        frames: rendered images, uint8 (H, W, 3), where asked for.
    """

    episode: int
    obs: np.ndarray
    seen: np.ndarray
    distance: np.ndarray
    reward: np.ndarray
    action: np.ndarray
    frames: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class ReturnSample:
    """The returns of independent episodes, in order of their numbers.

    Attributes:
        returns: (N,) float64, discounted as the task says.
        lengths: (N,) int64 steps.
        truncated: (N,) bool: cut by the time limit, not ended by the task.
        spent: (N,) float64 of the attack's budget.
        episodes: (N,) int64 numbers, which name their seeds.
        seed: of the run.
        sigma: noise.
    """

    returns: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    spent: np.ndarray
    episodes: np.ndarray
    seed: int
    sigma: float
    traces: tuple[Trace, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())
