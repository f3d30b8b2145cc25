"""Adaptive smoothing of two models that the user has: the constant weight is chosen on held-out training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robust_core.attacks import PGD
from robust_core.checks import check_number
from vision_robust.inference.adaptive_smoothing import MixedClassifier, select_mixing_weight, tradeoff_curve
from vision_robust.models.words import build_model, load_model
from vision_robust.recipes.base import Job, Recipe, Trained

__all__ = ["RECIPE", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The two models, as SPEC or SPEC@WEIGHTS, and the robust accuracy that may be given up."""

    accurate: str
    robust: str
    max_robust_drop: float = 0.02

    def __post_init__(self) -> None:
        check_number("max_robust_drop", self.max_robust_drop, low=0, high=1)


def harden(job: Job, settings: Settings) -> Trained:
    """Choose the weight on up to 1,000 evenly spaced training samples."""
    accurate, accurate_words = _base(settings.accurate)
    robust, robust_words = _base(settings.robust)
    held_out = job.load("train", min(len(job.train), 1000))
    batch = held_out.batch(range(len(held_out)))
    curve = tradeoff_curve(
        accurate.to(job.device),
        robust.to(job.device),
        (batch["x"].to(job.device), batch["y"].to(job.device)),
        attacks=[PGD(job.threat, n_iter=20, loss="margin"), PGD(job.threat, n_iter=20)],
        generator=job.seed,
        on_step=lambda done, total: job.on_step("adaptive smoothing: weights tried", done, total),
    )
    chosen = select_mixing_weight(curve, max_robust_drop=settings.max_robust_drop)
    mixed = MixedClassifier(accurate, robust, mixing_weight=chosen.mixing_weight).eval()
    config = {
        "accurate": accurate_words,
        "robust": robust_words,
        "n_classes": job.train.n_classes,
        "mixing_weight": chosen.mixing_weight,
        "accurate_scale": mixed.accurate_scale,
        "robust_scale": mixed.robust_scale,
    }
    details = {"curve": [vars(point) for point in curve], "chosen": vars(chosen), "held_out": len(held_out)}
    return Trained(mixed, config=config, details=details)


def restore(config: Mapping[str, Any], folder: Path) -> MixedClassifier:
    """Make a mixture again.

    Raises:
        ValueError: a config of another form.
    """
    expected = {"accurate", "robust", "n_classes", "mixing_weight", "accurate_scale", "robust_scale"}
    if set(config) != expected:
        raise ValueError(f"{folder}: a mixture needs {', '.join(sorted(expected))}")
    return MixedClassifier(
        *(build_model(str(config[part]), int(config["n_classes"])) for part in ("accurate", "robust")),
        mixing_weight=check_number("mixing_weight", config["mixing_weight"], low=0, high=1),
        accurate_scale=config["accurate_scale"],
        robust_scale=config["robust_scale"],
    )


def _base(words: str) -> tuple[nn.Module, str]:
    """Load SPEC or SPEC@WEIGHTS, and return it with SPEC."""
    spec, _, weights = words.rpartition("@") if words.endswith((".safetensors", ".pt")) else (words, "", "")
    return load_model(spec, weights=weights or None), spec


RECIPE = Recipe(slug="adaptive-smoothing", harden=harden, settings=Settings, restore=restore)
