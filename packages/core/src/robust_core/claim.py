"""Claims: what a paper says, measured here and reported whichever way it falls.

A claim is a module with ``STATEMENTS`` (written before anything is run) and
``run(seed, scale) -> Figures``. Gates are checks of exactness and soundness that must pass; statements are the
paper's own sentences, judged from the interval of the paired differences over seeds.
"""

from __future__ import annotations

import importlib
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from robust_core.errors import RobustError
from robust_core.methods import find

__all__ = ["SCHEMA", "Figures", "Gate", "Statement", "judge", "paired_interval", "reproduce"]

SCHEMA = "robust.claim/1"
Scale = Literal["quick", "full"]


@dataclass(frozen=True)
class Gate:
    """A check that must pass in every run."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A sentence of the paper with the measurement that judges it, fixed beforehand.

    The measured figure is compared with the baseline's, seed by seed. The statement holds if the whole 95 %
    interval of ``sign * (measured - baseline)`` lies at ``margin`` or above, fails if it lies below, and is
    inconclusive otherwise. A statement on several figures ("better than each of ...") holds if it does for all of
    them and fails if it does for one.

    Attributes:
        text: the sentence.
        metric: what is measured, on which data, against which named baseline or control.
        figure: key of the figure in :attr:`Figures.measured` and :attr:`Figures.baseline`, or several keys.
        unit: unit of the figure.
        margin: least difference, in that unit; negative where "not worse by more than" is stated.
        higher_is_better: False turns the sign.
        paper: the paper's own value at full scale, or None with a ``reason``.
        reason: why there is no comparable value of the paper.
        scales: the scales at which the statement is judged; elsewhere it is not reported.
    """

    text: str
    metric: str
    figure: str | tuple[str, ...]
    unit: str
    margin: float
    higher_is_better: bool = True
    paper: float | None = None
    reason: str = ""
    scales: tuple[Scale, ...] = ("quick", "full")


@dataclass(frozen=True)
class Figures:
    """What one seed gave.

    Attributes:
        measured: figure -> value.
        baseline: figure -> value of the named baseline (0 where the figure is itself a difference).
        gates: checks of this run.
        data_sha256: name of data set -> hash of the arrays used.
    """

    measured: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    data_sha256: dict[str, str] = field(default_factory=dict)


def paired_interval(differences: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Student interval of the mean of paired differences over seeds.

    One seed gives (-inf, inf): it proves nothing. Equal differences give an interval of width 0.
    """
    n = len(differences)
    if n < 2 or not all(math.isfinite(d) for d in differences):
        return -math.inf, math.inf
    from scipy.stats import t

    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(variance / n)
    return mean - half, mean + half


def judge(interval: tuple[float, float], margin: float) -> Literal["holds", "fails", "inconclusive"]:
    """Return the verdict on "the difference is at least ``margin``"."""
    low, high = interval
    if low >= margin:
        return "holds"
    return "fails" if high < margin else "inconclusive"


def reproduce(
    slug: str,
    *,
    seeds: int = 3,
    first_seed: int = 0,
    scale: Scale = "quick",
    workers: int = 1,
    on_seed: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the claim of ``slug`` over seeds and return the result document.

    Args:
        slug: a method with a claim.
        seeds: number of seeds, at least 1 (fewer than 2 leave every statement inconclusive).
        first_seed: first seed; the others follow.
        scale: ``"quick"`` for two cores, ``"full"`` for a machine with accelerators.
        workers: processes that share the seeds; the figures do not depend on it.
        on_seed: called with (seeds done, seeds).

    Raises:
        ValueError: unknown slug, or one without a claim; bad ``seeds`` or ``scale``.
    """
    if seeds < 1 or first_seed < 0:
        raise ValueError(f"seeds={seeds}, first_seed={first_seed}: at least 1 and 0 are needed")
    if scale not in ("quick", "full"):
        raise ValueError(f"scale={scale!r}: choose 'quick' or 'full'")
    _, card = find(slug)
    if card.claim is None:
        raise ValueError(f"slug={slug!r} has no claim")
    if workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is needed")
    claim = importlib.import_module(card.claim)
    started = time.perf_counter()
    runs = _run_seeds(card.claim, list(range(first_seed, first_seed + seeds)), scale, workers, on_seed)
    return {
        "schema": SCHEMA,
        "slug": slug,
        "gates": _merge_gates(runs),
        "statements": [_report(s, runs) for s in claim.STATEMENTS if scale in s.scales],
        "seeds": list(range(first_seed, first_seed + seeds)),
        "scale": scale,
        "device": _device(),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "data_sha256": {name: value for run in runs for name, value in run.data_sha256.items()},
    }


def _run_seed(seed: int, *, module: str, scale: Scale) -> Figures:
    """Run one seed. Small networks are fastest on one thread each, and seeds share the cores."""
    import torch

    threads = torch.get_num_threads()
    if scale == "quick":
        torch.set_num_threads(1)
    try:
        return importlib.import_module(module).run(seed, scale)
    finally:
        torch.set_num_threads(threads)


def _run_seeds(
    module: str, seeds: list[int], scale: Scale, workers: int, on_seed: Callable[[int, int], None] | None
) -> list[Figures]:
    from robust_core.execution import ShardError, run_shards

    if on_seed is not None:
        on_seed(0, len(seeds))
    backend = "here" if workers == 1 else "processes"
    run = partial(_run_seed, module=module, scale=scale)
    try:
        return run_shards(run, seeds, backend=backend, workers=workers, on_step=on_seed)
    except ShardError as error:
        if isinstance(error.__cause__, RobustError):
            raise error.__cause__ from error
        raise


def _merge_gates(runs: Sequence[Figures]) -> list[dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for run in runs:
        for gate in run.gates:
            known = merged.setdefault(gate.name, {"name": gate.name, "pass": True, "detail": gate.detail})
            if known["pass"] and not gate.passed:
                known.update({"pass": False, "detail": gate.detail})
    if not merged:
        raise RobustError("the claim checked nothing: it must report at least one gate")
    return list(merged.values())


def _report(statement: Statement, runs: Sequence[Figures]) -> dict[str, Any]:
    names = (statement.figure,) if isinstance(statement.figure, str) else statement.figure
    judged = [_figure(name, statement, runs) for name in names]
    verdicts = {verdict for verdict, _ in judged}
    return {
        "text": statement.text,
        "metric": statement.metric,
        "margin": statement.margin,
        "verdict": "fails" if "fails" in verdicts else "inconclusive" if "inconclusive" in verdicts else "holds",
        "figures": [figure for _, figure in judged],
    }


def _figure(name: str, statement: Statement, runs: Sequence[Figures]) -> tuple[str, dict[str, Any]]:
    """Return the verdict on one figure and its report; what is not finite is null in JSON, and proves nothing."""
    if any(name not in run.measured for run in runs):
        raise RobustError(f"the claim states something on figure {name!r} but a run did not measure it")
    measured = [run.measured[name] for run in runs]
    baseline = [run.baseline.get(name, 0.0) for run in runs]
    sign = 1.0 if statement.higher_is_better else -1.0
    interval = paired_interval([sign * (m - b) for m, b in zip(measured, baseline, strict=True)])
    return judge(interval, statement.margin), {
        "name": name,
        "unit": statement.unit,
        "paper": statement.paper,
        "reason": statement.reason,
        "measured": [_finite(value) for value in measured],
        "baseline": [_finite(value) for value in baseline],
        "interval": [_finite(end) for end in interval],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"


def versions(*more: str) -> dict[str, str]:
    """Return the versions that a result depends on: Python, the suite's packages, torch's kin and ``more``, if there.

    Args:
        more: names of further distributions, in small letters with dashes, such as ``"scikit-image"``.
    """
    from importlib.metadata import distributions

    wanted = {"torch", "torchvision", "numpy", "scipy", "scikit-learn", *more}
    found = {"python": platform.python_version()}
    for dist in distributions():
        name = (dist.metadata["Name"] or "").lower().replace("_", "-")
        if name in wanted or name.endswith("-robust") or name in ("robust-core", "diffusion-unlearn"):
            found[name] = dist.version
    return dict(sorted(found.items()))
