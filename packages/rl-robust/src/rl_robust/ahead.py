"""Normal numbers that belong to (episode, step), drawn for many steps at once.

The same bits as drawing them step by step from :class:`robust_core.random.SampleStreams`: only the calls are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robust_core.random import SampleStreams

__all__ = ["NoiseAhead"]

_FEWEST, _MOST, _NUMBERS = 16, 64, 2**14
"""Steps drawn ahead, fewer where an episode is young and may be short; numbers drawn in one call, as many as the caches
of a core hold."""


class NoiseAhead:
    """Noise of the episodes that are being played on some lanes.

    Args:
        seed: of the streams.
        purpose: likewise.
        lanes: episodes side by side.
        shape: of the noise of one step.
        device: where it is needed.
    """

    def __init__(self, seed: int, purpose: str, lanes: int, shape: Sequence[int], device: torch.device) -> None:
        self.seed, self.purpose, self.shape = seed, purpose, tuple(shape)
        self.steps = max(1, min(_MOST, _NUMBERS // max(1, math.prod(self.shape))))
        self.buffer = torch.empty(lanes, self.steps, *self.shape, device=device)
        # on the CPU, numpy picks the rows: it takes a third of torch's time
        self.picked = self.buffer.numpy() if device.type == "cpu" else None
        self.episode = np.full(lanes, -1)
        self.first, self.end = np.zeros(lanes, dtype=np.int64), np.zeros(lanes, dtype=np.int64)

    def take(self, rows: np.ndarray, episodes: np.ndarray, steps: np.ndarray) -> Tensor:
        """Return (B, ...) float32 noise of these lanes, which are at ``steps`` of ``episodes``."""
        first, end = self.first[rows], self.end[rows]
        stale = (self.episode[rows] != episodes) | (steps < first) | (steps >= end)
        if stale.any():
            # whoever runs out soon is served in the same call
            stale |= 2 * steps >= first + end
            self._draw(rows[stale], episodes[stale], steps[stale])
            first = self.first[rows]
        place = steps - first
        if len(rows) == len(self.buffer) and bool((place == place[0]).all()):  # all lanes, all at the same step
            return self.buffer[:, int(place[0])]
        if self.picked is not None:
            return torch.from_numpy(self.picked[rows, place])
        return self.buffer[torch.as_tensor(rows), torch.as_tensor(place)]

    def _draw(self, rows: np.ndarray, episodes: np.ndarray, steps: np.ndarray) -> None:
        device, n = self.buffer.device, min(self.steps, max(_FEWEST, int(steps.min())))
        ahead, size = np.arange(n), max(1, _NUMBERS // max(1, math.prod(self.shape) * n))
        for k in range(0, len(rows), size):
            part = slice(k, k + size)
            index = torch.as_tensor(np.repeat(episodes[part], n), device=device)
            chunk = torch.as_tensor((steps[part, None] + ahead).ravel(), device=device)
            drawn = SampleStreams(self.seed, index, self.purpose).normal(self.shape, chunk=chunk)
            self.buffer[torch.as_tensor(rows[part], device=device), :n] = drawn.reshape(-1, n, *self.shape)
        self.episode[rows], self.first[rows], self.end[rows] = episodes, steps, steps + n
