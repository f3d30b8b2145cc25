"""Evaluate a model: choose parts, run them in a stream, get a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.checks import check_count, check_finite
from robust_core.claim import versions
from robust_core.data import Dataset, as_dataset
from robust_core.evaluation.cost import cost_of
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.model_checks import check_model
from robust_core.evaluation.parts import Adversarial, Calibration, Clean, Part, SecurityCurve, Summary
from robust_core.evaluation.report import Report
from robust_core.evaluation.run import Run
from robust_core.evaluation.schema import SCHEMA, threat_json
from robust_core.models import Classifier, model_device
from robust_core.random import Seed, reseeded, resolve_seed
from robust_core.threats import Threat

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)
CHECK_ROWS = 16


def evaluate(
    model: Classifier,
    data: Dataset | tuple[Tensor, Tensor] | Any,
    parts: Sequence[Part] | None = None,
    *,
    threat: Threat | None = None,
    generator: Seed = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    name: str | None = None,
    command: str = "",
    on_step: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure a classifier and doubt the measurement.

    Args:
        model: maps (B, ...) inputs in their natural domain to logits (B, C), in eval mode, normalisation inside.
        data: a ``Dataset``, a pair ``(x, y)``, or a map-style data set of pairs or mappings.
        parts: what to measure; None means clean accuracy and calibration and, with a ``threat``, the standard attacks
            and the security curve.
        threat: what the attacker may do, for the default parts.
        generator: seed of every random stream; None means 0.
        batch_size: rows in a pass; the figures do not depend on it.
        device: where to compute; None means where the model is. The model is moved back afterwards.
        resume: folder for finished batches: the same call goes on there after an interruption.
        name: name of the model in the report; its class by default.
        command: how to run this again, for the report.
        on_step: called with (part, samples done, samples in all).

    Returns:
        the report; ``report.save("folder")`` writes ``result.json``, ``per_sample.npz`` and ``report.html``.

    Raises:
        TypeError, ValueError: bad arguments; a model in train mode, or one whose rows depend on the batch.
        InvariantError: an attack broke what a certificate of the same function protects.
    """
    chosen = _parts(parts, threat)
    data = as_dataset(data)
    if not len(data):
        raise ValueError("data is empty: nothing can be measured")
    check_count("batch_size", batch_size)
    seed = resolve_seed(generator)
    origin = model_device(model)
    target = torch.device(device) if device is not None else (origin or torch.device("cpu"))
    if isinstance(model, nn.Module) and target != origin:
        model.to(target)
    try:
        started = time.perf_counter()
        first = data.batch(range(min(len(data), CHECK_ROWS)))
        x, y = check_finite("x", first["x"]).to(target), first["y"].to(target)
        checks = check_model(model, x, y)
        if data.n_classes > checks.n_classes:
            raise ValueError(f"the model has {checks.n_classes} outputs, the data {data.n_classes} classes")
        folder = None if resume is None else Path(resume)
        run = Run(model, data, seed, batch_size, target, checks, folder, on_step)
        found, described = _run_parts(run, chosen)
        document = _document(run, chosen, found, described, name=name, command=command, x=x)
        document["seconds"] = round(time.perf_counter() - started, 3)
        per_sample = {f"{p.name}/{k}": v for p, s in zip(chosen, found, strict=True) for k, v in s.arrays.items()}
        return Report(document, per_sample)
    finally:
        if isinstance(model, nn.Module) and origin is not None and target != origin:
            model.to(origin)


def _parts(parts: Sequence[Part] | None, threat: Threat | None) -> list[Part]:
    if parts is None:
        attacks: list[Part] = [] if threat is None else [Adversarial(threat), SecurityCurve(threat)]
        return [Clean(), Calibration(), *attacks]
    if threat is not None:
        raise ValueError("give parts or threat, not both: a threat belongs to parts such as Adversarial(threat)")
    chosen = list(parts)
    for part in chosen:
        if not isinstance(part, Part):
            raise TypeError(f"parts holds {part!r}; parts are objects such as Clean() or Adversarial(Linf(8 / 255))")
    names = [part.name for part in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"parts have the names {names}: at least one is needed, and each name once (name=...)")
    return chosen


def _run_parts(run: Run, parts: Sequence[Part]) -> tuple[list[Summary], list[dict[str, Any]]]:
    found, seconds = [], []
    for part in parts:
        run.label = part.name
        started = time.perf_counter()
        found.append(part.run(run))
        seconds.append(round(time.perf_counter() - started, 3))
        logger.info("%s: done in %.1f s", part.name, seconds[-1])
    # measurements are kept, so a second look costs nothing: an adversarial example that a later part found counts
    found = [part.run(run) if part.pools else summary for part, summary in zip(parts, found, strict=True)]
    described = [
        {
            "kind": part.kind,
            "name": part.name,
            "settings": part.settings(),
            "n": summary.n,
            "seconds": spent,
            "notes": list(summary.notes),
            "data": dict(summary.data),
        }
        for part, summary, spent in zip(parts, found, seconds, strict=True)
    ]
    return found, described


def _document(
    run: Run,
    parts: Sequence[Part],
    found: Sequence[Summary],
    described: list[dict[str, Any]],
    *,
    name: str | None,
    command: str,
    x: Tensor,
) -> dict[str, Any]:
    figures = {f"{p.name}/{k}": e for p, s in zip(parts, found, strict=True) for k, e in s.figures.items()}
    figures |= _mean_shift(figures)
    flags = [*run.checks.flags, *(flag for summary in found for flag in summary.flags)]
    threats = [threat for part in parts if (threat := getattr(part, "threat", None)) is not None]
    model = run.model
    with reseeded(run.seed, run.device):
        cost = cost_of(model, x)
    return {
        "schema": SCHEMA,
        "threat": threat_json(threats[0] if threats else None),
        "model": name or getattr(model, "__qualname__", type(model).__name__),
        "model_sha256": run.model_sha256,
        "data": run.data.name,
        "data_sha256": run.data.sha256,
        "n": len(run.data),
        "seed": run.seed,
        "device": _device(run.device),
        "figures": {label: figure.as_json() for label, figure in figures.items()},
        "flags": list(dict.fromkeys(flags)),
        "seconds": 0.0,
        "versions": versions(),
        "command": command,
        "details": {
            "preprocessing": run.data.preprocessing,
            "classes": [str(c) for c in run.data.classes],
            "n_classes": run.n_classes,
            "input_shape": list(x.shape[1:]),
            "cost": cost,
            "checks": run.checks.as_json(),
            "batch_size": run.batch_size,
            "notes": list(run.checks.notes),
            "parts": described,
        },
    }


def _mean_shift(figures: dict[str, Estimate]) -> dict[str, Estimate]:
    found = [e for name, e in figures.items() if name.endswith("/effective_robustness")]
    if len(found) < 2:
        return {}
    value = sum(e.value for e in found) / len(found)
    return {"mean_effective_robustness": Estimate(value, None, sum(e.n for e in found))}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"
