"""CRMT on the command line: files with one array for each modality, or images cut into views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.evaluation import Adversarial, Certified, Clean
from robust_core.training import FastPGD, Stage, cosine, scheduled
from vision_robust.certified.crmt import (
    CRMTMargins,
    CRMTWeights,
    Fusion,
    JointFusion,
    LateFusion,
    MissingModalities,
    MultiModalCertifier,
    MultiModalClassifier,
    OrthogonalFusion,
    Packed,
    encoder_for,
)
from vision_robust.certified.crmt.data import EncoderName
from vision_robust.models.words import build_model
from vision_robust.recipes.base import Job, Proof, Recipe, Trained

__all__ = ["RECIPE", "CertifySettings", "Settings"]

_CONFIG = {"modalities", "dim", "n_classes", "fusion", "centre", "width", "encoder", "encoders"}
_HALVES = {"top-bottom": (1, ("top", "bottom")), "left-right": (2, ("left", "right"))}
_BOUNDED = 64
"""Sides from which certificates by bounds are no longer part of what is measured after training: they take minutes."""


@dataclass(frozen=True)
class Settings:
    """How modalities are told apart, the network, and both steps.

    Without ``halves`` and ``channels``, data must be an .npz file with arrays x_NAME of each modality and y.
    ``encoders`` are models in the words of --model, one for each modality, with ``width`` outputs.
    """

    halves: Literal["none", "top-bottom", "left-right"] = "none"
    channels: tuple[int, ...] | None = None
    variant: Literal["joint", "adversarial", "mixup"] = "joint"
    rho: float = 2.0
    fusion: Literal["orthogonal", "joint", "late"] = "orthogonal"
    centre: bool = False
    encoder: EncoderName = "auto"
    encoders: tuple[str, ...] | None = None
    width: int = 64
    weight_epochs: int | None = None
    weight_learning_rate: float = 1.5e-3

    def __post_init__(self) -> None:
        check_number("rho", self.rho, low=0)
        check_count("width", self.width)
        check_number("weight_learning_rate", self.weight_learning_rate, low=0, open_low=True)
        if self.weight_epochs is not None:
            check_count("weight_epochs", self.weight_epochs, low=0)
        if self.halves != "none" and self.channels is not None:
            raise ValueError("--set halves=… and channels=…: give one of them")


@dataclass(frozen=True)
class CertifySettings:
    """Modalities that are attacked together (all that are there, by default), and those that are missing.

    ``fill`` stands in the place of what is missing; none leaves its scores out. ``crown_up_to``: also search radii up
    to this one with CROWN, which takes longer.
    """

    attacked: tuple[str, ...] | None = None
    missing: tuple[str, ...] | None = None
    fill: float | None = 0.0
    crown_up_to: float | None = None


def _layout(job: Job, settings: Settings) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Return the shapes of the modalities, and the dimension along which they lie in the data."""
    shape = job.shape
    if settings.halves == "none" and settings.channels is None:
        shapes = getattr(job.train, "shapes", None)
        if shapes is None:
            raise ValueError(
                "--data: an .npz file with arrays x_NAME for each modality and y is needed; of images, --set "
                "halves=top-bottom or left-right makes two views, --set channels=3,1 two groups of channels"
            )
        return dict(shapes), None
    if len(shape) != 3:
        raise ValueError(f"--set halves, channels: inputs of shape {shape} are no images (C, H, W)")
    if settings.channels is not None:
        if sum(settings.channels) != shape[0] or min(settings.channels) < 1 or len(settings.channels) < 2:
            raise ValueError(f"--set channels={settings.channels}: two numbers or more that add up to {shape[0]}")
        return {f"channels{i}": (count, *shape[1:]) for i, count in enumerate(settings.channels)}, 0
    dim, names = _HALVES[settings.halves]
    cut = shape[dim] // 2
    lengths = (cut, shape[dim] - cut)
    return {name: (*shape[:dim], length, *shape[dim + 1 :]) for name, length in zip(names, lengths, strict=True)}, dim


def _build(config: Mapping[str, Any], seed: int = 0) -> Packed:
    shapes = {str(name): tuple(int(n) for n in shape) for name, shape in config["modalities"]}
    width, n_classes = int(config["width"]), int(config["n_classes"])
    words = config["encoders"]
    if words is not None and len(words) != len(shapes):
        raise ValueError(f"--set encoders: {len(words)} were given for the modalities {', '.join(shapes)}")
    encoders: dict[str, nn.Module] = {}
    for place, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed + place)
        if words is not None:
            encoders[name] = build_model(str(words[place]), width, generator=generator)
        else:
            encoders[name] = encoder_for(shape, width, kind=config["encoder"], generator=generator)
    kinds: dict[str, Any] = {
        "orthogonal": partial(OrthogonalFusion, centre=bool(config["centre"])),
        "joint": JointFusion,
        "late": LateFusion,
    }
    fusion: Fusion = kinds[check_choice("fusion", config["fusion"], tuple(kinds))](
        [width] * len(shapes), n_classes, generator=seed
    )
    return Packed(MultiModalClassifier(encoders, fusion), shapes, dim=config["dim"])


def _stages(job: Job, settings: Settings) -> list[Stage]:
    attack = FastPGD(job.threat, n_iter=5, step_size=job.threat.eps / 5 or None, random_start=False)
    margins = CRMTMargins(settings.variant, settings.rho, attack=attack, generator=job.seed)
    first = partial(torch.optim.AdamW, lr=job.learning_rate, weight_decay=5e-4)
    stages = [Stage(margins, first, job.epochs, scheduled(cosine()))]
    wanted = max(job.epochs // 3 - 1, 1) if settings.weight_epochs is None else settings.weight_epochs
    if settings.fusion == "orthogonal" and wanted:
        second = partial(torch.optim.SGD, lr=settings.weight_learning_rate, momentum=0.9, weight_decay=1e-2)
        stages.append(Stage(CRMTWeights(), second, wanted))
    return stages


def harden(job: Job, settings: Settings) -> Trained:
    """Train both steps, and measure accuracy, missing modalities, attacks, and radii for all modalities and each."""
    if job.model is not None:
        raise ValueError("--model: this method trains an encoder for each modality; name them by --set encoders=…")
    shapes, dim = _layout(job, settings)
    config = {
        "modalities": [[name, list(shape)] for name, shape in shapes.items()],
        "dim": dim,
        "n_classes": job.train.n_classes,
        "fusion": settings.fusion,
        "centre": settings.centre,
        "width": settings.width,
        "encoder": settings.encoder,
        "encoders": None if settings.encoders is None else list(settings.encoders),
    }
    view = _build(config, job.seed).to(job.device)
    job.fit(view, _stages(job, settings), name="crmt")
    view.eval()
    missing = [MissingModalities(), MissingModalities(fill=None, name="left-out")]
    parts = [Clean(), *missing, Adversarial(job.threat, version="fast")]
    if settings.encoders is None and all(max((0, *shape[1:])) < _BOUNDED for shape in shapes.values()):
        parts.append(Certified(MultiModalCertifier(view)))
        parts += [Certified(MultiModalCertifier(view, [name]), name=f"certified-{name}") for name in view.names]
    details = {"modalities": {name: list(shape) for name, shape in shapes.items()}}
    return Trained(view, config=config, parts=parts, details=details)


def restore(config: Mapping[str, Any], folder: Path) -> Packed:
    """Make the network again.

    Raises:
        ValueError: a config of another form.
    """
    if set(config) != _CONFIG:
        raise ValueError(f"{folder}: a classifier of several modalities needs {', '.join(sorted(_CONFIG))}")
    try:
        return _build(config)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder}: its config makes no classifier of several modalities: {error}") from error


def certifier(model: nn.Module, proof: Proof, settings: CertifySettings) -> MultiModalCertifier:
    """Certify L2 radii of a packed classifier.

    Raises:
        TypeError: another kind of model.
    """
    del proof
    if not isinstance(model, Packed):
        raise TypeError(f"model is a {type(model).__name__}; CRMT certifies classifiers of several modalities")
    view = model if settings.missing is None else model.without(settings.missing, settings.fill)
    return MultiModalCertifier(view, settings.attacked, crown_up_to=settings.crown_up_to)


RECIPE = Recipe(
    slug="crmt",
    harden=harden,
    settings=Settings,
    certifier=certifier,
    certify_settings=CertifySettings,
    restore=restore,
)
