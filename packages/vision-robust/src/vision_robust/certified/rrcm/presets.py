"""The paper's settings at full scale, as data that :func:`robust_core.training.fit` takes.

::

    preset = PRESETS["cifar10-base"]
    model = preset.model()
    fit(model, data, **preset.pretraining(len(data)), precision="bf16", checkpoint="pretrained/")
    classifier = preset.classifier(model.encoder, 10, sigma=0.25)
    fit(classifier, data, **preset.tuning(classifier, len(data)), checkpoint="tuned/")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from robust_core.checks import check_count
from robust_core.random import Seed
from robust_core.training import cosine, scheduled
from vision_robust.certified.rrcm.classifier import NoiseConditionedClassifier
from vision_robust.certified.rrcm.encoder import (
    NoiseViT,
    ProjectedEncoder,
    TimeConditionedEncoder,
    noise_vit,
    projection_head,
)
from vision_robust.certified.rrcm.objective import RRCM
from vision_robust.certified.rrcm.schedule import ConsistencySchedule, TargetEmaSchedule
from vision_robust.certified.rrcm.tuning import SmoothedFineTuning, layerwise_adamw

__all__ = ["PRESETS", "Preset", "Tuning"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Fine-tuning at one ``sigma``.

    Attributes:
        epochs: passes over the data.
        batch_size: over all processes.
        learning_rate: of the head; earlier layers have less.
        lam: weight of the divergence between noisy copies.
        warmup_epochs: linear rise of the learning rate.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    lam: float
    warmup_epochs: int = 5


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One column of the paper's tables.

    Attributes:
        size: of the transformer, a key of :func:`noise_vit`.
        image_size: side of the images.
        patch: side of a patch.
        hidden: width of the projector.
        steps: of pre-training.
        batch_size: of pre-training.
        learning_rate: of pre-training.
        weight_decay: of pre-training.
        warmup_steps: of pre-training.
        sharpness: of the teacher's decay.
        frozen_patches: whether the patch embedding stays random.
        final_norm: whether the classifier keeps the last norm.
        mixup: of fine-tuning, 0 for none.
        cutmix: of fine-tuning, 0 for none.
        by_sigma: ``sigma`` -> its fine-tuning.
        clip_norm: largest gradient norm in pre-training.
        layer_decay: of the learning rate in fine-tuning, the middle of the paper's range.
    """

    size: str
    image_size: int
    patch: int
    hidden: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    sharpness: float
    frozen_patches: bool
    final_norm: bool
    mixup: float
    cutmix: float
    by_sigma: Mapping[float, Tuning]
    clip_norm: float = 2.0
    layer_decay: float = 0.75

    def encoder(self, *, generator: Seed = None) -> TimeConditionedEncoder:
        """Return the encoder, untrained."""
        backbone: NoiseViT = noise_vit(
            self.size, self.image_size, self.patch, frozen_patches=self.frozen_patches, generator=generator
        )
        return TimeConditionedEncoder(backbone)

    def model(self, *, generator: Seed = None) -> ProjectedEncoder:
        """Return what pre-training trains."""
        encoder = self.encoder(generator=generator)
        return ProjectedEncoder(encoder, projection_head(encoder.n_features, hidden=self.hidden, generator=generator))

    def pretraining(self, n: int, *, generator: Seed = None) -> dict[str, Any]:
        """Return the arguments of ``fit`` beside model and data, for ``n`` images."""
        per_epoch = -(-check_count("n", n) // self.batch_size)
        epochs = -(-self.steps // per_epoch)
        total = epochs * per_epoch
        objective = RRCM(
            sizes=ConsistencySchedule(total), decay=TargetEmaSchedule(sharpness=self.sharpness), generator=generator
        )
        optimiser = partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = scheduled(cosine(warmup=self.warmup_steps / max(total, self.warmup_steps + 1)))
        return {
            "objective": objective,
            "epochs": epochs,
            "optimiser": optimiser,
            "schedule": schedule,
            "batch_size": self.batch_size,
            "clip_norm": self.clip_norm,
        }

    def classifier(
        self, encoder: TimeConditionedEncoder, n_classes: int, sigma: float, *, generator: Seed = None
    ) -> NoiseConditionedClassifier:
        """Return the classifier to fine-tune, on a copy of ``encoder``."""
        return NoiseConditionedClassifier.build(
            encoder, n_classes, sigma, final_norm=self.final_norm, generator=generator
        )

    def tuning(self, classifier: NoiseConditionedClassifier, n: int, *, generator: Seed = None) -> dict[str, Any]:
        """Return the arguments of ``fit`` beside model and data, for ``n`` images.

        Raises:
            ValueError: the paper has no setting for the classifier's ``sigma``.
        """
        check_count("n", n)
        if classifier.sigma not in self.by_sigma:
            raise ValueError(f"sigma={classifier.sigma:g}: the paper has {', '.join(f'{s:g}' for s in self.by_sigma)}")
        found = self.by_sigma[classifier.sigma]
        objective = SmoothedFineTuning(
            classifier.sigma, lam=found.lam, mixup=self.mixup, cutmix=self.cutmix, generator=generator
        )
        return {
            "objective": objective,
            "epochs": found.epochs,
            "optimiser": layerwise_adamw(classifier, found.learning_rate, decay=self.layer_decay),
            "schedule": scheduled(cosine(warmup=found.warmup_epochs / found.epochs)),
            "batch_size": found.batch_size,
        }


_CIFAR = {
    s: Tuning(epochs=100, batch_size=1024, learning_rate=2e-4, lam=v) for s, v in ((0.25, 10), (0.5, 20), (1, 20))
}
_IMAGENET = {
    0.25: Tuning(epochs=150, batch_size=1024, learning_rate=2e-4, lam=10),
    0.5: Tuning(epochs=50, batch_size=2048, learning_rate=2e-4, lam=20),
    1.0: Tuning(epochs=150, batch_size=256, learning_rate=1e-4, lam=20),
}
_ON_IMAGENET: dict[str, Any] = {
    "image_size": 224,
    "patch": 16,
    "hidden": 4096,
    "steps": 600_000,
    "batch_size": 4096,
    "sharpness": 10.0,
    "final_norm": True,
    "mixup": 0.8,
    "cutmix": 1.0,
    "by_sigma": _IMAGENET,
}

PRESETS: dict[str, Preset] = {
    "cifar10-base": Preset(
        size="base",
        image_size=32,
        patch=4,
        hidden=2048,
        steps=300_000,
        batch_size=2048,
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup_steps=10_000,
        sharpness=15.0,
        frozen_patches=False,
        final_norm=False,
        mixup=0.0,
        cutmix=0.0,
        by_sigma=_CIFAR,
    ),
    "imagenet-base": Preset(
        size="base", learning_rate=2e-4, weight_decay=0.03, warmup_steps=15_000, frozen_patches=True, **_ON_IMAGENET
    ),
    "imagenet-small": Preset(
        size="small", learning_rate=1e-4, weight_decay=0.01, warmup_steps=10_000, frozen_patches=False, **_ON_IMAGENET
    ),
}
"""The paper's columns; which projector width goes with which data set is reconstructed."""
