"""Where an interrupted training of stable-baselines3 goes on: weights, optimisers, running statistics.

One file, written atomically; reading it runs nothing. Replay buffers and the states of environments are not kept: a run
that goes on begins new episodes, so it is as good as one that was never interrupted, not equal to it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robust_core.errors import UntrustedFileError
from robust_core.io import write_atomic

__all__ = ["Checkpoint", "running", "set_running"]

FILE = "training.pt"
_STATISTICS = ("mean", "var", "count")


class Checkpoint:
    """The checkpoint of one training.

    Args:
        folder: where it stands; None keeps nothing.
        asked: everything that makes this training this one; of another, nothing is taken.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, asked: Mapping[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.mark = hashlib.sha256(json.dumps(dict(asked), sort_keys=True, default=repr).encode()).hexdigest()

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep tensors, numbers and mappings of them."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"mark": self.mark, "state": dict(state)}, buffer)
        write_atomic(self.path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """Return what was kept, or None.

        Raises:
            UntrustedFileError: no such checkpoint, or a damaged one.
            ValueError: one of a training with other settings.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            mark, state = kept["mark"], dict(kept["state"])
        except Exception as error:  # anything may be raised by what is no checkpoint
            raise UntrustedFileError(f"{self.path} cannot be read as a checkpoint: {error}") from error
        if mark != self.mark:
            raise ValueError(f"{self.path} is of a training with other settings; repeat those, or take a new folder")
        return state


def running(wrapper: Any) -> dict[str, Any]:
    """Return the running statistics of an SB3 ``VecNormalize``."""
    found = {}
    for name in ("obs_rms", "ret_rms"):
        kept = getattr(wrapper, name, None)
        if kept is not None:
            found[name] = {part: torch.as_tensor(getattr(kept, part), dtype=torch.float64) for part in _STATISTICS}
    return found


def set_running(wrapper: Any, state: Mapping[str, Any]) -> None:
    """Give a ``VecNormalize`` what :func:`running` returned."""
    for name, kept in state.items():
        target = getattr(wrapper, name)
        for part in _STATISTICS:
            value = kept[part].numpy()
            setattr(target, part, float(value) if part == "count" else value.copy())
