"""A certifiable model from one that only answers queries (or from an open one): denoiser, auto-encoder, the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robust_core.certificates import Smoothing
from robust_core.checks import check_count
from robust_core.evaluation import Certified, Clean
from robust_core.io import inside
from vision_robust.certified.zo_ae_ds import (
    AutoencodedDenoised,
    Autoencoder,
    BlackBox,
    Denoised,
    DenoisingMSE,
    DnCNN,
    FrontStability,
    QueryStability,
    conv_autoencoder,
    paper_autoencoder,
)
from vision_robust.models.queries import BLACK_BOXES
from vision_robust.models.words import build_model
from vision_robust.recipes.base import Job, Recipe, Trained

__all__ = ["RECIPE", "Settings"]

ONNX = "black_box.onnx"


@dataclass(frozen=True)
class Settings:
    """How gradients are found, what stands before the model, and what may be spent.

    Attributes:
        estimator: ``coordinates`` or ``random`` directions, by queries; ``gradients`` for a model that is open.
        n_directions: random directions for each image and step.
        spread: distance of the probes.
        central: coordinates: look to both sides, at twice the queries.
        latent: numbers that reach the model; 0 leaves the auto-encoder out. None: the paper's 192 for 3 x 32 x 32
            images, else a 32nd of the pixels, 16 at least.
        autoencoder_epochs: passes of its training, which asks no queries.
        depth: layers of the denoiser.
        width: its channels.
        max_queries: that training may make; the command goes on from there with a higher one.
        queries_per_call: images in one call of the black box.
        n_samples: noisy samples for each image of the measurement at the end; 0 leaves it out.
    """

    estimator: Literal["coordinates", "random", "gradients"] = "coordinates"
    n_directions: int = 192
    spread: float = 0.005
    central: bool = True
    latent: int | None = None
    autoencoder_epochs: int = 40
    depth: int = 17
    width: int = 64
    max_queries: int | None = None
    queries_per_call: int = 1024
    n_samples: int = 200

    def __post_init__(self) -> None:
        check_count("autoencoder_epochs", self.autoencoder_epochs)
        check_count("queries_per_call", self.queries_per_call)
        check_count("n_samples", self.n_samples, low=0)
        for name in ("latent", "max_queries"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low=0)


def harden(job: Job, settings: Settings) -> Trained:
    """Train the auto-encoder on clean images, then the front by queries; f itself is never touched."""
    if job.model is None or job.words is None:
        raise ValueError("--model: say which model to defend, such as onnx:FILE, http://… or torchvision:resnet18")
    closed = isinstance(job.model, BlackBox)
    if closed and settings.estimator == "gradients":
        raise ValueError(f"--set estimator=gradients: {job.words} only answers queries; coordinates or random do")
    box = job.model if isinstance(job.model, BlackBox) or settings.estimator == "gradients" else BlackBox(job.model)
    autoencoder = _autoencoder(job.shape, _latent(job.shape, settings.latent), job.seed)
    adam = partial(torch.optim.Adam, lr=job.learning_rate, weight_decay=1e-4)
    if autoencoder is not None:
        autoencoder.to(job.device)
        epochs = settings.autoencoder_epochs
        job.fit(autoencoder, DenoisingMSE(0.0), name="autoencoder", epochs=epochs, optimiser=adam)
    model = _compound(job.shape, settings.depth, settings.width, autoencoder, box, job.seed).to(job.device)
    objective = _objective(job, settings)
    if isinstance(box, BlackBox):
        box.max_queries = settings.max_queries
    job.fit(model, objective, name="defence", optimiser=adam)
    details: dict[str, Any] = {"latent": _latent(job.shape, settings.latent), "estimator": settings.estimator}
    if isinstance(objective, QueryStability):
        details["training_queries"] = objective.queries
    if isinstance(box, BlackBox):
        box.max_queries = None  # the budget is that of training; what follows is asked for by n_samples
        if box.resolved_scores != "auto":
            details["scores"] = box.resolved_scores
    config = {
        "model": _kept(job),
        "boxed": not closed and isinstance(box, BlackBox),
        "n_classes": job.train.n_classes,
        "shape": list(job.shape),
        "latent": details["latent"],
        "depth": settings.depth,
        "width": settings.width,
    }
    parts: list[Any] = [Clean()]
    if settings.n_samples:
        parts.append(Certified(Smoothing(model.eval(), job.sigma, n_samples=settings.n_samples)))
    return Trained(model.eval(), config=config, parts=parts, details=details)


def _objective(job: Job, settings: Settings) -> nn.Module:
    if settings.estimator == "gradients":
        return FrontStability(job.sigma, generator=job.seed)
    return QueryStability(
        job.sigma,
        estimator=settings.estimator,
        n_directions=settings.n_directions,
        spread=settings.spread,
        central=settings.central,
        batch_size=settings.queries_per_call,
        generator=job.seed,
    )


def _kept(job: Job) -> str:
    """Return words that name the model from the saved folder; an ONNX file is copied into it."""
    words = str(job.words)
    kind, _, name = words.partition(":")
    if kind != "onnx":
        return words
    path, sign, options = name.partition("#")
    shutil.copyfile(path, job.out / ONNX)
    return f"onnx:{ONNX}{sign}{options}"


def _latent(shape: tuple[int, ...], wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    pixels = shape[0] * shape[1] * shape[2]
    return 192 if shape == (3, 32, 32) else max(16, pixels // 32)


def _autoencoder(shape: tuple[int, ...], latent: int, seed: int) -> Autoencoder | None:
    if len(shape) != 3:
        raise ValueError(f"--data: inputs of shape {shape} are no images (C, H, W)")
    if not latent:
        return None
    if shape == (3, 32, 32) and latent == 192:
        return paper_autoencoder("cifar10", generator=seed)
    return conv_autoencoder((shape[0], shape[1], shape[2]), latent, width=32, generator=seed)


def _compound(
    shape: tuple[int, ...], depth: int, width: int, autoencoder: Autoencoder | None, classifier: Any, seed: int
) -> Denoised:
    denoiser = DnCNN(shape[0], depth=depth, width=width, generator=seed)
    if autoencoder is None:
        return Denoised(denoiser, classifier)
    return AutoencodedDenoised(denoiser, autoencoder, classifier)


def restore(config: Mapping[str, Any], folder: Path) -> Denoised:
    """Make a saved defence again, with the black box that its words name.

    Raises:
        ValueError: a config of another form.
    """
    expected = {"model", "boxed", "n_classes", "shape", "latent", "depth", "width"}
    if set(config) != expected:
        raise ValueError(f"{folder}: a denoised model needs {', '.join(sorted(expected))}")
    words = str(config["model"])
    kind, _, name = words.partition(":")
    if kind == "onnx":
        path, sign, options = name.partition("#")
        words = f"onnx:{inside(folder, path)}{sign}{options}"
    model: Any = build_model(words, check_count("n_classes", config["n_classes"], low=2))
    if kind not in BLACK_BOXES and config["boxed"] is True:
        model = BlackBox(model)
    shape = tuple(check_count("shape", side) for side in config["shape"])
    autoencoder = _autoencoder(shape, check_count("latent", config["latent"], low=0), 0)
    return _compound(shape, int(config["depth"]), int(config["width"]), autoencoder, model, 0)


RECIPE = Recipe(slug="zo-ae-ds", harden=harden, settings=Settings, restore=restore)
"""``--set estimator=gradients --set latent=0`` is plain denoised smoothing of an open model."""
