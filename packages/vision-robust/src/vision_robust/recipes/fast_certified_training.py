"""Fast certified training: a network of the user's, or one sized to the data, whose interval bounds certify it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robust_core.certificates import Crown, IntervalBounds
from robust_core.checks import check_choice, check_count, check_number
from robust_core.data import Dataset
from robust_core.data.views import Transform, Views, flip, random_crop
from robust_core.evaluation import Adversarial, Certified, Clean
from robust_core.models import Normalize
from robust_core.threats import Linf
from robust_core.training import piecewise, scheduled
from vision_robust.certified.fast_certified_training import (
    FastCertified,
    Monitor,
    SmoothedEps,
    ibp_init_,
    plot_training,
)
from vision_robust.certified.ibp_tightness import local_tightness
from vision_robust.certified.sabr import SABR
from vision_robust.models.certifiable import cnn7, mlp, wide_resnet8
from vision_robust.recipes.base import Job, Recipe, Trained

__all__ = ["RECIPE", "Settings"]

NETWORKS = ("cnn7", "wide-resnet8", "mlp")
PUBLISHED = ("torchvision:", "timm:", "saved:")
FIGURE = "training.svg"


@dataclass(frozen=True)
class Settings:
    """What the method adds to the shared options; the paper trains with a learning rate of 5e-4.

    Attributes:
        network: what is trained where no ``--model`` is given, with batch normalisation.
        width: channels of its first layers (64 as in the paper), or units of the layers of ``"mlp"``.
        variant: ``"ibp"``, ``"crown-ibp"``, or ``"sabr"``, which bounds small boxes around adversarial points.
        ratio: of ``"sabr"``: radius of its boxes over that of the ball.
        ramp_start: epoch in which the radius begins to grow, from 1.
        ramp_length: epochs until it is full; None takes 3 of 10 epochs.
        regularisation: lambda_0; 0.2 or 0.1 for TinyImageNet.
        tolerance: tau of the regularisers.
        milestones: shares of training at which the learning rate falls to a fifth.
        clip_norm: largest gradient norm.
        initialise: draw the weights anew for interval bounds; None does so unless ``--model`` brings trained weights.
        normalise: put the training data's mean and deviation in front of ``network``.
        augment: none, crop (by a sixteenth of the side) or flip-crop.
        held_out: training images that are kept back and measured after each epoch, for ``training.svg``; 0 for none.
    """

    network: Literal["cnn7", "wide-resnet8", "mlp"] = "cnn7"
    width: int = 64
    variant: Literal["ibp", "crown-ibp", "sabr"] = "ibp"
    ratio: float = 0.4
    ramp_start: int = 1
    ramp_length: int | None = None
    regularisation: float = 0.5
    tolerance: float = 0.5
    milestones: tuple[float, ...] = (0.75, 0.875)
    clip_norm: float = 10.0
    initialise: bool | None = None
    normalise: bool = True
    augment: Literal["none", "crop", "flip-crop"] = "none"
    held_out: int = 200

    def __post_init__(self) -> None:
        check_count("width", self.width)
        check_count("held_out", self.held_out, low=0)
        check_number("ratio", self.ratio, low=0, high=1, open_low=True)
        check_number("clip_norm", self.clip_norm, low=0, open_low=True)


def _build(config: Mapping[str, Any], seed: int) -> nn.Module:
    shape, n_classes, width = tuple(config["shape"]), int(config["n_classes"]), int(config["width"])
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    kind = check_choice("network", config["network"], NETWORKS)
    if kind == "cnn7":
        network = cnn7(n_classes, size, width=width, linear=8 * width, generator=seed)
    elif kind == "wide-resnet8":
        network = wide_resnet8(n_classes, size, widen=max(width // 16, 1), linear=8 * width, generator=seed)
    else:
        network = mlp(n_classes, size, widths=(width,) * 4, generator=seed)
    if config["normalise"] is None:
        return network
    mean, std = config["normalise"]
    return nn.Sequential(Normalize(mean, std), network)


def _statistics(data: Dataset) -> list[list[float]]:
    """Return mean and standard deviation of each channel over up to 5,000 evenly spaced images."""
    rows = torch.linspace(0, len(data) - 1, min(len(data), 5000)).long().unique()
    x = data.batch(rows)["x"].double().transpose(0, 1).flatten(1)
    return [x.mean(1).tolist(), x.std(1).clamp(min=1e-3).tolist()]


def _network(job: Job, settings: Settings) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return what is trained, and the config of one of our own."""
    if job.model is not None:
        return job.model, None
    if len(job.shape) != 3:
        raise ValueError(f"--model: data of shape {job.shape} are no images; say which network to train")
    config = {
        "network": settings.network,
        "width": settings.width,
        "shape": list(job.shape),
        "n_classes": job.train.n_classes,
        "normalise": _statistics(job.train) if settings.normalise else None,
    }
    return _build(config, job.seed).to(job.device), config


def _split(data: Dataset, held_out: int, batch_size: int) -> tuple[Dataset, Dataset | None]:
    """Keep evenly spaced images back, at most a tenth of them; never leave a last batch of one, without a variance."""
    count = min(held_out, len(data) // 10)
    kept = set(torch.linspace(0, len(data) - 1, count).long().tolist())
    rest = [i for i in range(len(data)) if i not in kept]
    if len(rest) % batch_size == 1 and len(rest) > 1:
        rest.pop()
    return data.subset(rest), data.subset(sorted(kept)) if kept else None


def _objective(job: Job, settings: Settings, schedule: SmoothedEps) -> FastCertified:
    weight, tolerance = settings.regularisation, settings.tolerance
    if settings.variant != "sabr":
        return FastCertified(job.threat, schedule, variant=settings.variant, regularisation=weight, tolerance=tolerance)
    if not isinstance(job.threat, Linf):
        raise ValueError(f"--norm {job.threat.name.lower()}: variant=sabr trains on boxes; choose --norm linf")
    return SABR(job.threat, settings.ratio, schedule, regularisation=weight, tolerance=tolerance, generator=job.seed)


def harden(job: Job, settings: Settings) -> Trained:
    """Initialise, train while the radius grows, draw what happened, and certify."""
    network, config = _network(job, settings)
    fresh = job.weights is None and not str(job.words).startswith(PUBLISHED)
    if fresh if settings.initialise is None else settings.initialise:
        ibp_init_(network, job.train.batch(range(1))["x"].to(job.device), generator=job.seed)
    length = max(1, round(0.3 * job.epochs)) if settings.ramp_length is None else settings.ramp_length
    eps = job.threat.eps
    schedule = SmoothedEps.of_epochs(eps, start=settings.ramp_start, length=length, epochs=job.epochs)
    objective = _objective(job, settings, schedule)
    train, held_out = _split(job.train, settings.held_out, job.batch_size)
    crop: tuple[Transform, ...] = (partial(random_crop, share=1 / 16),)
    views = {"none": None, "crop": Views(x=crop), "flip-crop": Views(x=(flip, *crop))}
    job.fit(
        network,
        objective,
        name="training",
        data=train,
        optimiser=partial(torch.optim.Adam, lr=job.learning_rate),
        schedule=scheduled(piecewise(settings.milestones, factor=0.2)),
        clip_norm=settings.clip_norm,
        transform=views[settings.augment],
        on_epoch=None if held_out is None else _monitor(job, objective, held_out),
        n_classes=job.train.n_classes,
    )
    if held_out is not None:
        plot_training(job.out / "training.jsonl", job.out / FIGURE)
    network.eval()
    parts = [
        Clean(),
        Adversarial(job.threat, version="fast"),
        Certified(IntervalBounds(network, job.threat), name="interval"),
        Certified(Crown(network, job.threat, "crown-ibp"), subset=100, name="crown-ibp"),
    ]
    return Trained(
        network, config=config, words=job.words, parts=parts, details={"ramp": [settings.ramp_start, length]}
    )


def _monitor(job: Job, objective: FastCertified, held_out: Dataset) -> Monitor:
    batch = held_out.batch(range(len(held_out)))
    x, y = batch["x"].to(job.device), batch["y"].to(job.device)

    def tightness(model: nn.Module) -> float:
        return float(local_tightness(model, x[:64], y[:64], threat=job.threat).nanmean())

    return Monitor(objective, x, y, measures={"tightness": tightness} if job.threat.name == "Linf" else {})


def restore(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """Make a network of this method again, for weights that are loaded afterwards.

    Raises:
        ValueError: a config of another form.
    """
    expected = {"network", "width", "shape", "n_classes", "normalise"}
    if set(config) != expected or len(config["shape"]) != 3:
        raise ValueError(f"{folder}: a certified network needs {', '.join(sorted(expected))}")
    return _build(config, 0)


RECIPE = Recipe(slug="fast-certified-training", harden=harden, settings=Settings, restore=restore)
