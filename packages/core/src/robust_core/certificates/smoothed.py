"""The smoothed classifier as attackers see it, and the state of an interrupted certification."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.checks import check_count, check_number
from robust_core.errors import CheckpointError
from robust_core.io import load_tensors, save_tensors
from robust_core.models import Classifier
from robust_core.random import stream

__all__ = ["SmoothedClassifier", "SmoothingState"]


class SmoothedClassifier(nn.Module):
    """``x -> log mean_i softmax f(x + noise_i)``: the expected-probability surrogate of the smoothed classifier.

    Differentiable, for attacks through the noise (Salman et al. 2019, arXiv 1906.04584). The ``n_samples`` draws of
    one call are shared by all rows, so that a row does not depend on its neighbours.

    Args:
        model: the base classifier.
        sigma: standard deviation of the noise.
        n_samples: draws in one call.
        fresh: new noise in every call (an attacker averages over calls); False keeps one draw, which makes the
            module a fixed function.
        seed: seed of the noise.
    """

    differentiable = True
    optimises_at_test_time = False

    def __init__(
        self, model: Classifier, sigma: float, *, n_samples: int = 32, fresh: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.sigma = check_number("sigma", sigma, low=0.0, open_low=True)
        self.n_samples = check_count("n_samples", n_samples)
        self.fresh, self.seed, self.calls = fresh, seed, 0

    @property
    def stochastic(self) -> bool:
        """Whether two calls differ."""
        return self.fresh

    def surrogate(self) -> SmoothedClassifier:
        """Return the module itself: it is its own differentiable surrogate."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) log-probabilities; memory grows with ``B * n_samples``."""
        generator = stream(self.seed, self.calls if self.fresh else 0, "smoothing/view", device=x.device)
        self.calls += 1
        shape = (self.n_samples, 1, *x.shape[1:])
        noise = torch.empty(shape, dtype=x.dtype, device=x.device).normal_(0.0, self.sigma, generator=generator)
        logits = self.model((x[None] + noise).flatten(0, 1))
        log_probabilities = logits.log_softmax(1).reshape(self.n_samples, len(x), -1)
        return log_probabilities.logsumexp(0) - math.log(self.n_samples)


_ARRAYS = ("label", "drawn", "chunk", "total", "square", "p_lower", "level", "done")


def _empty() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass
class SmoothingState:
    """Counts of a certification under way. Give an empty one to ``certify`` and keep it, or save it in ``on_step``.

    Continuing from it gives the same certificate as running through. All arrays are (B,).

    Attributes:
        key: names model, settings, inputs and seed; a state continues only the run that it is of.
        look: looks that were judged.
        label: class whose vote is bounded.
        drawn: samples counted.
        chunk: chunks counted.
        total, square, p_lower, level, done: see ``stopping.Evidence``.
    """

    key: str = ""
    look: int = 0
    label: np.ndarray = field(default_factory=_empty)
    drawn: np.ndarray = field(default_factory=_empty)
    chunk: np.ndarray = field(default_factory=_empty)
    total: np.ndarray = field(default_factory=_empty)
    square: np.ndarray = field(default_factory=_empty)
    p_lower: np.ndarray = field(default_factory=_empty)
    level: np.ndarray = field(default_factory=_empty)
    done: np.ndarray = field(default_factory=_empty)

    def begin(self, key: str, n: int) -> bool:
        """Make room for ``n`` rows; return whether the run is a new one.

        Raises:
            CheckpointError: the state is of another run.
        """
        if self.key and len(self.label) == n and self.key == key:
            return False
        if self.key and self.key != key:
            raise CheckpointError("state: it belongs to another model, input, seed or setting; start with an empty one")
        self.key, self.look = key, 0
        for name in ("label", "drawn", "chunk", "total", "square", "level"):
            setattr(self, name, np.zeros(n, dtype=np.int64))
        self.p_lower, self.done = np.zeros(n), np.zeros(n, dtype=bool)
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        key = torch.tensor(list(self.key.encode()), dtype=torch.uint8)
        save_tensors(path, {**arrays, "key": key, "look": torch.tensor(self.look)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SmoothingState:
        """Read a state.

        Raises:
            CheckpointError: the file holds something else.
            UntrustedFileError, OSError: it cannot be read.
        """
        tensors = load_tensors(path)
        fresh = cls()
        fresh.begin(bytes(tensors.pop("key", torch.zeros(0, dtype=torch.uint8)).tolist()).decode("ascii", "replace"), 1)
        look = tensors.pop("look", torch.tensor(-1))
        n = len(tensors["label"]) if tensors.get("label", look).ndim == 1 else -1
        for name in _ARRAYS:
            array = tensors.get(name, look).numpy()
            if array.shape != (n,) or array.dtype != getattr(fresh, name).dtype or look.ndim or int(look) < 0:
                raise CheckpointError(f"{path} is not the state of a certification: {name!r} is missing or damaged")
            setattr(fresh, name, array.copy())
        fresh.look = int(look)
        return fresh
