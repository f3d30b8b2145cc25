"""Global random generators, borrowed and given back.

Dropout and other people's augmentations draw from the global generators of torch, numpy and Python. Training lends
them streams of its own, seeded anew for each step or sample, and puts the old states back afterwards: what is
drawn is a pure function of the seed, and a resumed run needs no generator state at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["borrowed_generators", "seed_generators"]


@contextmanager
def borrowed_generators(device: torch.device | None = None) -> Iterator[None]:
    """Put the states of the global generators (torch on CPU and ``device``, numpy, Python) back on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - other people's code draws from it
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators; only inside :func:`borrowed_generators`."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002, TID251
