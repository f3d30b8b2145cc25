"""The state of one evaluation: streaming passes over data sets, each batch kept on disk if asked.

A part of the suite asks for a table (:meth:`Run.collect`): some tensors for each sample, measured batch by batch. With
``resume`` every finished batch is written at once to a folder whose name is a hash of all that the numbers depend on
(model, data, seed, part, settings, batch size, versions): an interrupted evaluation goes on where it stopped, another
model never picks up its numbers, and a finished one gives the same figures again without a pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.claim import versions
from robust_core.data import Dataset
from robust_core.errors import UntrustedFileError
from robust_core.evaluation.model_checks import ModelChecks
from robust_core.io import load_tensors, parse_json, save_tensors, sweep
from robust_core.models import Classifier, fingerprint, predict_logits
from robust_core.random import derive, reseeded
from robust_core.threats import Threat

__all__ = ["Batch", "Measured", "Run", "Table", "describe"]

logger = logging.getLogger(__name__)
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Batch:
    """Some rows of a data set, on the device of the run."""

    x: Tensor
    y: Tensor
    index: Tensor


@dataclass(frozen=True)
class Measured:
    """What a part measured on a batch: tensors whose first axis is the sample, and remarks as JSON.

    Tensors whose name starts with ``_`` may have another number of rows.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """All batches of one measurement: arrays (N, ...), and the remarks of each batch."""

    arrays: dict[str, np.ndarray]
    infos: list[dict[str, Any]]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def total(self, key: str) -> float:
        """Return the sum of a numeric remark over batches."""
        return float(sum(info.get(key, 0) for info in self.infos))

    def notes(self) -> list[str]:
        """Return the distinct sentences of the remark ``notes``, in order."""
        return list(dict.fromkeys(note for info in self.infos for note in info.get("notes", ())))


@dataclass
class Run:
    """One model under test.

    Attributes:
        model: the classifier, on ``device``.
        data: the main data set.
        seed: seed of every stream.
        batch_size: rows in a pass.
        device: where the model is.
        checks: findings about the model.
        resume: folder of finished batches, or None.
        on_step: called with (part, samples done, samples in all).
    """

    model: Classifier
    data: Dataset
    seed: int
    batch_size: int
    device: torch.device
    checks: ModelChecks
    resume: Path | None = None
    on_step: OnStep | None = None
    label: str = ""

    def __post_init__(self) -> None:
        self.model_sha256 = fingerprint(self.model)
        self._tables: dict[str, Table] = {}
        self._nearest: dict[str, dict[int, float]] = {}

    @property
    def n_classes(self) -> int:
        """Classes of the model."""
        return self.checks.n_classes

    def subset(self, data: Dataset, size: int | None) -> Dataset:
        """Return ``size`` evenly spaced samples, or all."""
        if size is None or size >= len(data):
            return data
        return data.subset([i * len(data) // size for i in range(size)])

    def _load(self, data: Dataset, rows: Tensor) -> Batch:
        batch = data.batch(rows)
        return Batch(*(batch[key].to(self.device) for key in ("x", "y", "index")))

    def pool(self, norm: str, index: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Add the distances of adversarial examples found, and return the least known to *any* part so far.

        Args:
            norm: of the distances.
            index: (N,) original positions.
            distance: (N,) distance of the nearest adversarial example, infinite where there is none.
        """
        known = self._nearest.setdefault(norm, {})
        for row, value in zip(index.tolist(), distance.tolist(), strict=True):
            known[row] = min(value, known.get(row, np.inf))
        return np.array([known[row] for row in index.tolist()])

    def collect(
        self,
        key: str,
        data: Dataset,
        measure: Callable[[Batch], Measured],
        *,
        settings: Any = None,
        rows: int | None = None,
    ) -> Table:
        """Measure ``data`` batch by batch, or read what was measured before.

        Args:
            key: names the measurement.
            data: the samples.
            measure: maps a batch to per-sample tensors.
            settings: all else that the numbers depend on.
            rows: samples measured, and stored, at a time; the batch size by default.
        """
        rows = rows or self.batch_size
        identity = self._identity(key, data, (settings, rows))
        if identity not in self._tables:
            self._tables[identity] = self._stream(key, identity, data, measure, rows)
        return self._tables[identity]

    def _identity(self, key: str, data: Dataset, settings: Any) -> str:
        found = versions()
        parts = [key, self.model_sha256, data.sha256, self.seed, self.batch_size, str(self.device), describe(settings)]
        kept = {name: found[name] for name in ("torch", "robust-core") if name in found}
        text = json.dumps([*parts, kept], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _stream(self, key: str, identity: str, data: Dataset, measure: Callable[[Batch], Measured], size: int) -> Table:
        folder = None
        if self.resume is not None:
            folder = self.resume / f"{''.join(c if c.isalnum() else '-' for c in key)[:60]}-{identity[:16]}"
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        found: list[Measured] = []
        done = 0
        for number, rows in enumerate(torch.arange(len(data)).split(size)):
            path = None if folder is None else folder / f"{number:06d}.safetensors"
            measured = None if path is None else _read(path, identity)
            if measured is None:
                with reseeded(derive(self.seed, key, number), self.device):  # random models repeat themselves
                    measured = measure(self._load(data, rows))
                measured = Measured({k: v.detach().cpu() for k, v in measured.tensors.items()}, measured.info)
                if path is not None:
                    _write(path, identity, measured)
            found.append(measured)
            done += len(rows)
            if self.on_step is not None:
                self.on_step(self.label or key, done, len(data))
        names = found[0].tensors
        arrays = {name: torch.cat([m.tensors[name] for m in found]).numpy() for name in names}
        return Table(arrays, [dict(m.info) for m in found])

    def logits(self, data: Dataset) -> np.ndarray:
        """Return (N, C) logits; measured once for each data set, whichever parts ask."""

        def measure(batch: Batch) -> Measured:
            logits = predict_logits(self.model, batch.x, batch_size=self.batch_size)
            return Measured({"logits": logits if logits.dtype == torch.float64 else logits.float()})

        return self.collect("logits", data, measure)["logits"]

    def seed_of(self, *purpose: str) -> int:
        """Return a seed of its own for one purpose."""
        return derive(self.seed, *purpose)


def _read(path: Path, identity: str) -> Measured | None:
    if not path.exists():
        return None
    try:
        tensors = load_tensors(path)
        info = tensors.pop("info")
        content = parse_json(info.numpy().tobytes(), source=str(path))
    except (UntrustedFileError, KeyError) as error:
        logger.warning("%s is damaged (%s); its batch is measured again", path, error)
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        logger.warning("%s is of another evaluation; its batch is measured again", path)
        return None
    return Measured(tensors, content["info"])


def _write(path: Path, identity: str, measured: Measured) -> None:
    # remarks travel as bytes inside the same file, so that a batch is one atomic write
    text = json.dumps({"identity": identity, "info": measured.info}, allow_nan=False).encode()
    remarks = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    save_tensors(path, {**measured.tensors, "info": remarks})


def describe(value: Any, depth: int = 8) -> Any:
    """Return JSON that identifies settings: dataclasses field by field, networks and tensors by their hash."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Threat | Enum):
        return str(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(k): describe(v, depth - 1) for k, v in value.items()}
    if isinstance(value, tuple | list | set | frozenset | range):
        return [describe(v, depth - 1) for v in value]
    return _identify(value, depth)


def _identify(value: Any, depth: int) -> Any:
    if isinstance(value, Dataset):
        return {"data": value.name, "sha256": value.sha256, "n": len(value)}
    if isinstance(value, nn.Module):
        return {"model": type(value).__name__, "sha256": fingerprint(value)}
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        digest = hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).hexdigest()
        return {"array": list(array.shape), "sha256": digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    else:
        public = vars(value) if hasattr(value, "__dict__") else {}
        fields = {k: v for k, v in sorted(public.items()) if not k.startswith("_")}
    return {"type": type(value).__qualname__, **{k: describe(v, depth - 1) for k, v in fields.items()}}
