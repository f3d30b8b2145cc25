"""``robust demo``: from nothing to a robustness report on real data, in minutes, on two cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core.attacks import PGD
from robust_core.certificates import Crown, Smoothing
from robust_core.data import Dataset, load
from robust_core.evaluation import (
    Adversarial,
    Calibration,
    Certified,
    Clean,
    Corruptions,
    Report,
    SecurityCurve,
    evaluate,
)
from robust_core.random import derive
from robust_core.threats import Linf
from robust_core.training import Adversarial as AdversarialTraining
from robust_core.training import FastPGD, Standard, cosine, fit, scheduled
from vision_robust.inference.adaptive_smoothing import (
    MixedClassifier,
    MixedSmoothing,
    select_mixing_weight,
    tradeoff_curve,
)
from vision_robust.models import SmallCNN

__all__ = ["run"]

OnStep = Callable[[str, int, int], None]
THREAT = Linf(0.15)
PROVEN = Linf(0.02)
SIGMA = 0.25
RADII = (0.1, 0.25, 0.5)


def run(
    out: str | os.PathLike[str], *, seed: int = 0, on_step: OnStep = lambda task, done, total: None
) -> dict[str, Any]:
    """Train, break, mix, certify and report; return what the command line prints.

    Args:
        out: folder for the reports; ``report.html`` in it is that of the mixture, beside the two others.
        seed: of everything random.
        on_step: called with (task, done, total).
    """
    started = time.perf_counter()
    train, test = load("digits", split="train"), load("digits", split="test")
    # every fifth sample: the digits are sorted by writer, so that a tail would be other people's hands
    held_out = train.subset(range(0, len(train), 5))
    rest = train.subset([i for i in range(len(train)) if i % 5])
    accurate = _train(rest, Standard(), 40, derive(seed, "standard"), "train a standard network", on_step)
    attack = FastPGD(THREAT.with_eps(1.3 * THREAT.eps), n_iter=7)
    objective = AdversarialTraining(attack, generator=seed)
    robust = _train(rest, objective, 40, derive(seed, "robust"), "train against an attacker", on_step)
    mixed, weight = _mix(accurate, robust, held_out, seed, on_step)
    models: dict[str, nn.Module] = {"standard": accurate, "adversarially trained": robust, "mixture": mixed}
    reports: dict[str, Report] = {}
    for name, model in models.items():
        reports[name] = evaluate(
            model,
            test,
            _parts(model, mixed, weight),
            generator=seed,
            name=name,
            command=f"robust demo --seed {seed}",
            on_step=lambda part, done, total, name=name: on_step(f"{name}: {part}", done, total),
        )
    folder = Path(out)
    for name, report in reports.items():
        if name != "mixture":
            report.save(folder / name.replace(" ", "-"))
    reports["mixture"].save(folder, beside=[reports["standard"], reports["adversarially trained"]])
    return _summary(reports, weight, folder, time.perf_counter() - started)


def _train(data: Dataset, objective: nn.Module, epochs: int, seed: int, task: str, on_step: OnStep) -> SmallCNN:
    channels, height, width = data.x.shape[1:]
    network = SmallCNN(data.n_classes, (channels, height, width), generator=seed)
    steps = epochs * -(-len(data) // 64)

    def report(state: Any, loss: Any) -> None:
        on_step(task, state.step, steps)

    optimiser = partial(torch.optim.AdamW, lr=5e-3, weight_decay=1e-4)
    fit(network, data, objective, epochs=epochs, batch_size=64, generator=seed, optimiser=optimiser,
        schedule=scheduled(cosine()), on_step=report)  # fmt: skip
    return network.eval()


def _mix(
    accurate: nn.Module, robust: nn.Module, held_out: Dataset, seed: int, on_step: OnStep
) -> tuple[MixedClassifier, float]:
    """Choose the weight on data that neither network was trained on and that is not the test set."""
    curve = tradeoff_curve(
        accurate,
        robust,
        (held_out.x, held_out.y),
        attacks=[PGD(THREAT, n_iter=20), PGD(THREAT, n_iter=20, loss="margin")],
        weights=(0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
        generator=seed,
        on_step=partial(on_step, "choose the mixing weight"),
    )
    weight = select_mixing_weight(curve, max_robust_drop=0.03).mixing_weight
    return MixedClassifier(accurate, robust, mixing_weight=weight).eval(), weight


def _parts(model: nn.Module, mixed: MixedClassifier, weight: float) -> list[Any]:
    parts: list[Any] = [
        Clean(),
        Calibration(),
        Adversarial(THREAT),
        SecurityCurve(THREAT, subset=128),
        Corruptions(profile="small", severities=(1, 3, 5), subset=128),
    ]
    if model is mixed:
        smoothing = Smoothing(mixed.robust, SIGMA, n_samples=2000)
        certifier = MixedSmoothing(mixed.accurate, smoothing, mixing_weight=weight)
        return [*parts, Certified(certifier, radii=RADII, subset=128)]
    voted = Certified(Smoothing(model, SIGMA, n_samples=2000), radii=RADII, subset=128)
    return [*parts, voted, Certified(Crown(model, PROVEN), subset=128, name="crown")]


def _percent(report: Report, figure: str) -> str:
    if figure not in report.figures:
        return "–"
    estimate = report[figure]
    spread = (
        "" if estimate.interval is None else f" [{100 * estimate.interval[0]:.0f}, {100 * estimate.interval[1]:.0f}]"
    )
    return f"{100 * estimate.value:.1f}{spread}"


def _summary(reports: dict[str, Report], weight: float, folder: Path, seconds: float) -> dict[str, Any]:
    columns = {
        "clean": "clean/accuracy",
        f"AutoAttack {THREAT}": "adversarial/accuracy",
        "corruptions": "corruptions/accuracy",
        f"proved {PROVEN}": f"crown/accuracy@{PROVEN.eps:g}",
        "certified L2 0.25": "certified/accuracy@0.25",
    }
    rows = [[name, *(_percent(report, figure) for figure in columns.values())] for name, report in reports.items()]
    return {
        "title": "digits 8 x 8, accuracy in % with 95 % intervals",
        "columns": ["model", *columns],
        "rows": rows,
        "story": _story(reports, weight),
        "mixing_weight": weight,
        "seconds": round(seconds, 1),
        "report": str(folder / "report.html"),
        "figures": {name: report.document["figures"] for name, report in reports.items()},
        "flags": {name: report.document["flags"] for name, report in reports.items()},
    }


def _story(reports: dict[str, Report], weight: float) -> list[str]:
    """Sentences that the figures support, and none that they do not."""

    def value(name: str, figure: str) -> float:
        return 100 * reports[name][figure].value

    clean = {name: value(name, "clean/accuracy") for name in reports}
    attacked = {name: value(name, "adversarial/accuracy") for name in reports}
    plain, hard, mix = "standard", "adversarially trained", "mixture"
    regained = "more" if clean[mix] > clean[hard] else "no more"
    lines = [
        f"The standard network is right on {clean[plain]:.1f} % of the images; within {THREAT} an attacker leaves "
        f"{attacked[plain]:.1f} %.",
        f"Adversarial training leaves {attacked[hard]:.1f} % under attack, at {clean[hard]:.1f} % clean.",
        f"Their mixture (weight {weight:g} on the robust one, chosen on held-out data) is {regained} accurate than the "
        f"robust network: {clean[mix]:.1f} % clean, {attacked[mix]:.1f} % under attack.",
        "Certificates promise less than attacks leave, and each speaks of its own function: the network for CROWN, the "
        "network under noise for smoothing, the mixture with it for adaptive smoothing.",
    ]
    flagged = [name for name, report in reports.items() if report.flags]
    if flagged:
        lines.append(f"Flags were raised for: {', '.join(flagged)}; the reports say which.")
    return lines
