"""``robust vision harden``: any method that trains, on the user's own model and data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_core.claim import versions
from robust_core.data import Dataset
from robust_core.device import choose_device
from robust_core.evaluation import Adversarial, Clean, evaluate
from robust_core.io import save_tensors, write_json
from robust_core.models import fingerprint
from robust_core.settings import parse_settings
from robust_core.threats import parse_threat
from vision_robust import recipes
from vision_robust.cli.setting import load_data
from vision_robust.models import load_model
from vision_robust.models.saved import WEIGHTS, save_model
from vision_robust.recipes.base import Job, OnStep, Recipe, Trained

__all__ = ["HardenSettings", "harden"]

SCHEMA = "robust.harden/1"


@dataclass(frozen=True, kw_only=True)
class HardenSettings:
    """The options that every hardening method shares; see ``robust vision harden --help``."""

    out: Path
    model: str | None
    weights: Path | None
    data: str
    root: Path | None
    size: int | None
    n: int | None
    norm: str
    eps: str
    sigma: float
    epochs: int
    learning_rate: float
    precision: str
    seed: int
    device: str
    batch_size: int
    command: str


def harden(settings: HardenSettings, method: str, words: Sequence[str], *, on_step: OnStep) -> dict[str, Any]:
    """Train, save, measure on the test split, and return ``result.json``.

    Args:
        settings: the shared options.
        method: slug of a recipe.
        words: ``name=value`` of the method's own settings.
        on_step: progress.

    Raises:
        ValueError: a method that does not train, or a setting that it does not have.
    """
    started, recipe = time.perf_counter(), recipes.find(method)
    if recipe.harden is None:
        raise ValueError(f"--method {method!r} trains nothing; choose one of {', '.join(recipes.methods_of('harden'))}")
    own = parse_settings(recipe.settings, words)
    load = _loader(settings, recipe)
    job = _job(settings, load, on_step)
    settings.out.mkdir(parents=True, exist_ok=True)
    trained = recipe.harden(job, own)
    name = _save(settings.out, method, trained)
    return _measure(settings, method, trained, name, load, started, on_step)


def _loader(settings: HardenSettings, recipe: Recipe) -> Callable[[str, int | None], Dataset]:
    def load(part: str, n: int | None) -> Dataset:
        if recipe.load is not None:
            return recipe.load(settings.data, part, n)
        return load_data(settings.data, split=None, part=part, root=settings.root, size=settings.size, n=n)

    return load


def _job(settings: HardenSettings, load: Callable[[str, int | None], Dataset], on_step: OnStep) -> Job:
    device = choose_device(settings.device)
    model = None if settings.model is None else load_model(settings.model, weights=settings.weights, device=device)
    return Job(
        model=model,
        words=settings.model,
        weights=settings.weights,
        train=load("train", settings.n),
        threat=parse_threat(settings.norm, settings.eps),
        sigma=settings.sigma,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        precision=settings.precision,
        seed=settings.seed,
        device=device,
        out=settings.out,
        load=load,
        on_step=on_step,
    )


def _save(out: Path, method: str, trained: Trained) -> str:
    """Write the model and return the words of the command line that load it."""
    if trained.config is not None:
        # what restore() finds in files of its own, such as the models of a mixture, is not written twice
        save_model(out, method, trained.config, trained.model)
        return f"saved:{out}"
    save_tensors(out / WEIGHTS, trained.model.state_dict())
    return f"{trained.words} --weights {out / WEIGHTS}"


def _measure(
    settings: HardenSettings,
    method: str,
    trained: Trained,
    name: str,
    load: Callable[[str, int | None], Dataset],
    started: float,
    on_step: OnStep,
) -> dict[str, Any]:
    test = load("test", settings.n or 500)
    quick = [Clean(), Adversarial(parse_threat(settings.norm, settings.eps), version="fast")]
    report = evaluate(
        trained.model,
        test,
        quick if trained.parts is None else trained.parts,
        generator=settings.seed,
        device=choose_device(settings.device),
        on_step=on_step,
    )
    result = {
        "schema": SCHEMA,
        "method": method,
        "model": name,
        "model_sha256": fingerprint(trained.model),
        "threat": report.document["threat"],
        "data": settings.data,
        "data_sha256": test.sha256,
        "n": len(test),
        "seed": settings.seed,
        "device": report.document["device"],
        "figures": report.document["figures"],
        "flags": report.document["flags"],
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "command": settings.command,
        **({"details": dict(trained.details)} if trained.details else {}),
    }
    write_json(settings.out / "result.json", result)
    return result
