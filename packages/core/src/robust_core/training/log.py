"""Where the figures of a run go: a JSON-lines file, TensorBoard, or any callable.

A sink is a callable ``record -> None``; a record is a flat mapping of names to numbers with ``step`` and ``epoch``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robust_core.errors import optional_import
from robust_core.io import write_atomic

__all__ = ["JsonLines", "Record", "Sink", "TensorBoardLog", "sink_of"]

Record = Mapping[str, Any]
Sink = Callable[[Record], None]
_LOGGER = logging.getLogger("robust_core.training")


class JsonLines:
    """Append each record as one line of JSON; NaN and infinity are written as null.

    Args:
        path: the file; its folder is made if needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Forget what was written after ``step`` (a resumed run writes it again), and a line cut by a crash."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))

    def __call__(self, record: Record) -> None:
        """Write one record."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class TensorBoardLog:
    """Write each number of a record as a scalar of TensorBoard (extra ``tensorboard``).

    Args:
        directory: where the event files go.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        optional_import("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory))

    def __call__(self, record: Record) -> None:
        """Write one record at its step."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, int(record["step"]))
        self.writer.flush()


def sink_of(log: str | os.PathLike[str] | Sink | None) -> Sink:
    """Return ``log`` as a sink that also tells the library's logger (level INFO).

    Raises:
        TypeError: neither a path nor a callable.
    """
    if log is not None and not callable(log) and not isinstance(log, str | os.PathLike):
        raise TypeError(f"log is a {type(log).__name__}; a path of a .jsonl file, a callable or None is needed")
    return _Tee(JsonLines(log) if isinstance(log, str | os.PathLike) else log)


class _Tee:
    def __init__(self, sink: Sink | None) -> None:
        self.sink = sink

    def rewind(self, step: int) -> None:
        if isinstance(self.sink, JsonLines):
            self.sink.rewind(step)

    def __call__(self, record: Record) -> None:
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        _LOGGER.info("%s", ", ".join(words))
        if self.sink is not None:
            self.sink(record)
