"""rRCM: pre-train an encoder without labels, fine-tune it for one ``sigma``, and certify it by smoothing there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robust_core.certificates import Smoothing
from robust_core.checks import check_count, check_number
from robust_core.data.views import Transform, Views, flip, random_crop
from robust_core.evaluation import Certified
from robust_core.io import save_tensors
from robust_core.loading import load_into
from robust_core.models import predict_logits
from robust_core.settings import NoSettings
from robust_core.training import cosine, scheduled
from vision_robust.certified.rrcm import (
    RRCM,
    NoiseConditionedClassifier,
    ProjectedEncoder,
    SmoothedFineTuning,
    TargetEmaSchedule,
    TimeConditionedEncoder,
    TimeModulated,
    layerwise_adamw,
    noise_vit,
    projection_head,
    strong_crop,
)
from vision_robust.models.words import build_model
from vision_robust.recipes.base import Job, Proof, Recipe, Trained

__all__ = ["RECIPE", "Settings"]

ENCODER = "encoder.safetensors"
MOST_PATCHES = 200


@dataclass(frozen=True)
class Settings:
    """Pre-training and what fine-tuning adds to the shared options, which speak of fine-tuning.

    Attributes:
        encoder: size of the transformer where no ``--model`` is given; "auto" is "tiny" for images below 32 pixels,
            else the paper's "base". A ``--model`` is taken as a backbone: its outputs are the features.
        patch: side of a patch; None takes the smallest of at least 2 that makes 200 patches or fewer.
        pretraining_epochs: passes without labels; 0 trains from scratch.
        pretraining_learning_rate: of AdamW.
        pretraining_batch_size: negatives are the other images of a batch.
        pretrained: an ``encoder.safetensors`` of an earlier run, for another ``sigma``, instead of pre-training.
        hidden: width of the projector.
        sharpness: of the teacher's decay; 15 for small images, 10 for ImageNet.
        lam: weight of the divergence between noisy copies; None is the paper's for ``sigma``.
        entropy: weight of the entropy of their mean.
        copies: noisy copies of each image.
        layer_decay: factor of the learning rate for each layer further from the head.
        mixup: Beta parameter, 0 for none; ImageNet: 0.8.
        cutmix: Beta parameter, 0 for none; ImageNet: 1.
        final_norm: keep the transformer's last norm; the paper drops it on CIFAR-10.
        mirror: whether mirrored images keep their class (digits and text do not).
    """

    encoder: Literal["auto", "tiny", "small", "base"] = "auto"
    patch: int | None = None
    pretraining_epochs: int = 200
    pretraining_learning_rate: float = 1e-4
    pretraining_batch_size: int = 512
    pretrained: str | None = None
    hidden: int = 2048
    sharpness: float = 15.0
    lam: float | None = None
    entropy: float = 0.5
    copies: int = 2
    layer_decay: float = 0.75
    mixup: float = 0.0
    cutmix: float = 0.0
    final_norm: bool = True
    mirror: bool = True

    def __post_init__(self) -> None:
        check_count("pretraining_epochs", self.pretraining_epochs, low=0)
        check_count("pretraining_batch_size", self.pretraining_batch_size, low=2)
        check_number("pretraining_learning_rate", self.pretraining_learning_rate, low=0, open_low=True)
        if self.pretrained is not None and not Path(self.pretrained).is_file():
            raise ValueError(f"pretrained={self.pretrained}: no such file; an earlier run wrote its {ENCODER}")


def _encoder(config: Mapping[str, Any], backbone: nn.Module | None, seed: int) -> TimeConditionedEncoder:
    """Make the encoder that a config describes, around the user's backbone if there is one."""
    if config["backbone"] is None:
        channels, height, width = config["shape"]
        vit = noise_vit(config["size"], (height, width), config["patch"], channels=channels, generator=seed)
        return TimeConditionedEncoder(vit)
    backbone = build_model(config["backbone"], config["n_features"]) if backbone is None else backbone
    return TimeConditionedEncoder(TimeModulated(backbone, config["n_features"], generator=seed))


def _describe(job: Job, settings: Settings) -> dict[str, Any]:
    common = {"n_classes": job.train.n_classes, "sigma": job.sigma, "final_norm": settings.final_norm}
    if job.model is not None:
        probe = job.train.batch(range(1))["x"].to(job.device)
        width = predict_logits(job.model, probe).shape[1]
        return {**common, "backbone": job.words, "n_features": width, "size": None, "patch": None, "shape": None}
    if len(job.shape) != 3:
        raise ValueError(f"--model: data of shape {job.shape} are no images; say which backbone to train")
    size = settings.encoder
    if size == "auto":
        size = "tiny" if max(job.shape[1:]) < 32 else "base"
    patch = _patch(job.shape[1], job.shape[2]) if settings.patch is None else settings.patch
    return {**common, "backbone": None, "n_features": None, "size": size, "patch": patch, "shape": list(job.shape)}


def _patch(height: int, width: int) -> int:
    fitting = [p for p in range(2, min(height, width) + 1) if not (height % p or width % p)]
    good = [p for p in fitting if (height // p) * (width // p) <= MOST_PATCHES]
    if not good:
        raise ValueError(f"images of {height} x {width}: no patch of equal sides fits both; set patch, or --size")
    return good[0]


def harden(job: Job, settings: Settings) -> Trained:
    """Pre-train (or read an encoder that was), then fine-tune on noisy copies."""
    config = _describe(job, settings)
    encoder = _encoder(config, job.model, job.seed).to(job.device)
    if settings.pretrained is not None:
        load_into(encoder, settings.pretrained)
    elif settings.pretraining_epochs:
        _pretrain(job, settings, encoder)
    save_tensors(job.out / ENCODER, encoder.state_dict())
    keep = bool(settings.final_norm or config["backbone"])
    classifier = NoiseConditionedClassifier.build(
        encoder, config["n_classes"], job.sigma, final_norm=keep, generator=job.seed
    )
    objective = SmoothedFineTuning(
        job.sigma,
        settings.copies,
        settings.lam,
        entropy=settings.entropy,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        generator=job.seed,
    )
    job.fit(
        classifier,
        objective,
        name="tuning",
        optimiser=layerwise_adamw(classifier, job.learning_rate, decay=settings.layer_decay),
        schedule=scheduled(cosine(warmup=0.05)),
        transform=Views(x=(flip, random_crop) if settings.mirror else (random_crop,)),
        n_classes=config["n_classes"],
    )
    classifier.eval()
    parts = [Certified(classifier.smoothing(n_samples=1000))]
    return Trained(classifier, config={**config, "final_norm": keep}, parts=parts, details={"level": classifier.t})


def _pretrain(job: Job, settings: Settings, encoder: TimeConditionedEncoder) -> None:
    head = projection_head(encoder.n_features, hidden=settings.hidden, generator=job.seed)
    model = ProjectedEncoder(encoder, head).to(job.device)
    views: tuple[Transform, ...] = (strong_crop, flip) if settings.mirror else (strong_crop,)
    objective = RRCM(decay=TargetEmaSchedule(sharpness=settings.sharpness), views=views, generator=job.seed)
    job.fit(
        model,
        objective,
        name="pretraining",
        epochs=settings.pretraining_epochs,
        optimiser=partial(torch.optim.AdamW, lr=settings.pretraining_learning_rate, weight_decay=0.0),
        schedule=scheduled(cosine(warmup=0.03)),
        batch_size=settings.pretraining_batch_size,
        clip_norm=2.0,
        n_classes=job.train.n_classes,
    )


def restore(config: Mapping[str, Any], folder: Path) -> NoiseConditionedClassifier:
    """Make the classifier again, for weights that are loaded afterwards.

    Raises:
        ValueError: a config of another form.
    """
    expected = {"backbone", "n_features", "size", "patch", "shape", "n_classes", "sigma", "final_norm"}
    if set(config) != expected:
        raise ValueError(f"{folder}: an rRCM classifier needs {', '.join(sorted(expected))}")
    encoder = _encoder(config, None, 0)
    return NoiseConditionedClassifier.build(
        encoder, int(config["n_classes"]), float(config["sigma"]), final_norm=bool(config["final_norm"])
    )


def certifier(model: nn.Module, proof: Proof, settings: NoSettings) -> Smoothing:
    """Return the smoothing of the classifier at its own ``sigma``, whatever ``--sigma`` says.

    Raises:
        TypeError: the model was not made by this method.
    """
    if not isinstance(model, NoiseConditionedClassifier):
        raise TypeError(f"rrcm certifies what it trained (--model saved:FOLDER), not a {type(model).__name__}")
    return model.smoothing(n_samples=proof.n_samples, alpha=proof.alpha)


RECIPE = Recipe(slug="rrcm", harden=harden, settings=Settings, certifier=certifier, restore=restore)
