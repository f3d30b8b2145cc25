"""The model changes that happen: many honest retrainings, by new seeds, left-out data, or both.

Each model is one call of :func:`robust_core.training.fit`, a pure function of (data, settings, seed, number); they are
spread over processes or machines by :func:`robust_core.execution.run_shards`, and with ``folder`` a run that was
interrupted goes on from the models, and the epochs, that are finished.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.data import Dataset, as_dataset
from robust_core.errors import CheckpointError
from robust_core.execution import run_shards
from robust_core.io import load_tensors, read_json, save_tensors, write_json
from robust_core.random import Seed, derive, reseeded, resolve_seed
from robust_core.training import Objective, Standard, fit

__all__ = ["MODES", "Retraining", "retrain_models"]

log = logging.getLogger(__name__)
MODES = ("seed", "leave_out", "both")


@dataclass(frozen=True)
class Retraining:
    """How the model is trained, each time anew.

    Args:
        factory: builds an untrained network; it draws from torch's global generator, which is seeded for it. For
            several processes it must be importable.
        objective: what is minimised.
        epochs: passes over the data.
        learning_rate: of Adam (AdamW without decay).
        batch_size: samples for each step.
        mode: ``"seed"``: new initial weights and order; ``"leave_out"``: a new random part of the data, with weights
            and order of one seed; ``"both"``.
        fraction: share of the data that is kept where some is left out.
        device: where to train.
        keep_epochs: with a folder, also keep a checkpoint of each epoch, for models that train for long.
    """

    factory: Callable[[], nn.Module]
    objective: Objective | None = None
    epochs: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 32
    mode: str = "seed"
    fraction: float = 0.99
    device: str = "cpu"
    keep_epochs: bool = False

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_choice("mode", self.mode, MODES)
        check_number("fraction", self.fraction, low=0, high=1, open_low=True)

    def settings(self) -> dict[str, Any]:
        """Return what a finished model depends on, as JSON."""
        names = ("epochs", "learning_rate", "batch_size", "mode", "fraction")
        objective = "Standard" if self.objective is None else type(self.objective).__name__
        return {name: getattr(self, name) for name in names} | {"objective": objective}

    def rows(self, n: int, seed: int, number: int) -> torch.Tensor:
        """Return the positions of the data that model ``number`` is trained on, in rising order."""
        if self.mode == "seed":
            return torch.arange(n)
        generator = torch.Generator().manual_seed(derive(seed, "left out", number))
        kept = max(1, min(n, round(n * self.fraction)))
        return torch.randperm(n, generator=generator)[:kept].sort().values

    def train(self, data: Dataset, seed: int, number: int, *, checkpoint: Path | None = None) -> nn.Module:
        """Return model ``number``, trained and in eval mode."""
        own = derive(seed, "model", 0 if self.mode == "leave_out" else number)
        with reseeded(derive(own, "weights")):
            network = self.factory()
        network = network.to(self.device)
        fit(
            network,
            data.subset(self.rows(len(data), seed, number)),
            Standard() if self.objective is None else self.objective,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimiser=partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0),
            generator=derive(own, "order"),
            checkpoint=checkpoint,
            keep=1,
        )
        return network.eval()


def _one(number: int, *, plan: Retraining, data: Dataset, seed: int, folder: Path | None) -> nn.Module:
    """Return one model: read it where it is finished, else train and keep it."""
    if folder is None:
        return plan.train(data, seed, number)
    path = folder / f"model-{number:04d}.safetensors"
    if path.is_file():
        with reseeded(0):
            network = plan.factory()
        network.load_state_dict(load_tensors(path, finite=True))
        return network.to(plan.device).eval()
    checkpoint = folder / f"epochs-{number:04d}" if plan.keep_epochs else None
    network = plan.train(data, seed, number, checkpoint=checkpoint)
    save_tensors(path, {name: value.cpu() for name, value in network.state_dict().items()})
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return network


def _claim(folder: Path, document: dict[str, Any]) -> None:
    """Refuse a folder that holds models of another run."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "retraining.json"
    if not known.is_file():
        write_json(known, document)
        return
    found = read_json(known)
    there = found if isinstance(found, dict) else {}
    differing = [f"{k}: {there.get(k)!r} there, {document[k]!r} here" for k in document if there.get(k) != document[k]]
    if differing:
        raise CheckpointError(f"{folder} holds models of another run ({'; '.join(differing)}); use another folder")


def retrain_models(
    plan: Retraining,
    data: Any,
    n: int = 50,
    *,
    generator: Seed = None,
    first: int = 1,
    folder: Path | str | None = None,
    backend: str = "here",
    workers: int = 2,
    on_step: Callable[[int, int], None] | None = None,
) -> list[nn.Module]:
    """Return ``n`` models trained anew, in eval mode, on the device of the plan.

    Model number 0 is, by convention, the one that stands now (``plan.train(data, seed, 0)``): the others are drawn
    from the same distribution, independently given the data.

    Args:
        plan: how to train.
        data: what :func:`robust_core.data.as_dataset` takes.
        n: number of models.
        generator: seed of all of them.
        first: number of the first model.
        folder: keep finished models here, and go on from them.
        backend: ``"here"``, ``"processes"`` or ``"ray"``; the models do not depend on it.
        workers: processes.
        on_step: called with (models done, models).

    Raises:
        CheckpointError: the folder is of another run.
        ShardError: a training failed; the cause is chained.
    """
    check_count("n", n)
    dataset, seed = as_dataset(data), resolve_seed(generator)
    where = None if folder is None else Path(folder)
    if where is not None:
        with reseeded(0):
            shape = hashlib.sha256(str(plan.factory()).encode()).hexdigest()
        document = {**plan.settings(), "seed": seed, "data_sha256": dataset.sha256, "network_sha256": shape}
        _claim(where, document)
    work = partial(_one, plan=plan, data=dataset, seed=seed, folder=where)
    numbers: Sequence[int] = range(check_count("first", first, low=0), first + n)
    return run_shards(work, numbers, backend=backend, workers=workers, on_step=on_step)
