"""Dual smoothing on the command line: both halves trained from one network, saved together, certified together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.evaluation import Certified, Clean
from robust_core.training import GaussianNoise, NoiseConsistency
from vision_robust.certified.dual_randomized_smoothing import (
    DualClassifier,
    DualSmoothing,
    EachSide,
    StableCrossEntropy,
    checkerboard_partition,
)
from vision_robust.models.words import build_model
from vision_robust.recipes.base import Job, Proof, Recipe, Trained

__all__ = ["RECIPE", "CertifySettings", "Settings"]

_CONFIG = {"network", "n_classes", "size", "feed", "sigma"}


@dataclass(frozen=True)
class Settings:
    """How the halves are fed and trained; ``--sigma`` is the noise on each of them.

    ``pretrain_epochs`` train the whole-image network on clean images first (0 where it is trained already), with
    ``stability`` times the regulariser of confident right answers. Then both halves start from it. ``copies``, ``lam``
    and ``entropy`` belong to consistency training; the paper's are 4, 15 and 0.75, which small networks do not survive
    under much noise.
    """

    feed: Literal["maxpool", "zero", "half"] = "maxpool"
    objective: Literal["consistency", "gaussian"] = "consistency"
    pretrain_epochs: int = 5
    stability: float = 0.0
    copies: int = 2
    lam: float = 5.0
    entropy: float = 0.25

    def __post_init__(self) -> None:
        check_count("pretrain_epochs", self.pretrain_epochs, low=0)
        check_number("stability", self.stability, low=0)


@dataclass(frozen=True)
class CertifySettings:
    """Noise of the right half where it is not ``--sigma``, and samples that find the class."""

    sigma_right: float | None = None
    n0: int = 100


def harden(job: Job, settings: Settings) -> Trained:
    """Train one network on whole images, then a copy of it on each half, and save both."""
    if len(job.shape) != 3:
        raise ValueError(f"--data: inputs of shape {job.shape} are no images (channels, height, width)")
    network, words = job.network()
    if settings.pretrain_epochs:
        clean = StableCrossEntropy(settings.stability)
        job.fit(network, clean, name="whole", epochs=settings.pretrain_epochs)
    config = {
        "network": words,
        "n_classes": job.train.n_classes,
        "size": list(job.shape[1:]),
        "feed": settings.feed,
        "sigma": job.sigma,
    }
    dual = _dual(network, copy.deepcopy(network), config).to(job.device)
    weights = {"copies": settings.copies, "lam": settings.lam, "entropy": settings.entropy}
    noisy = GaussianNoise(job.sigma) if settings.objective == "gaussian" else NoiseConsistency(job.sigma, **weights)
    job.fit(dual, EachSide(noisy), name="halves")
    dual.eval()
    certifier = DualSmoothing(dual, job.sigma, n_samples=1000)
    return Trained(dual, config=config, parts=[Clean(), Certified(certifier)])


def _dual(left: nn.Module, right: nn.Module, config: Mapping[str, Any]) -> DualClassifier:
    height, width = config["size"]
    return DualClassifier(left, right, checkerboard_partition(height, width), feed=config["feed"])


def restore(config: Mapping[str, Any], folder: Path) -> DualClassifier:
    """Make the two halves again.

    Raises:
        ValueError: a config of another form.
    """
    size = config.get("size")
    if set(config) != _CONFIG or not isinstance(size, list) or len(size) != 2:
        raise ValueError(f"{folder}: two halves need {', '.join(sorted(_CONFIG))}")
    check_choice("feed", config["feed"], ("maxpool", "zero", "half"))
    left, right = (build_model(str(config["network"]), int(config["n_classes"])) for _ in range(2))
    return _dual(left, right, config)


def certifier(model: nn.Module, proof: Proof, settings: CertifySettings) -> DualSmoothing:
    """Certify in L2 by votes of both halves; ``--sigma`` is the noise on each, best what they were trained with."""
    if not isinstance(model, DualClassifier):
        raise TypeError(f"the model is a {type(model).__name__}, not the two halves of an image that this method makes")
    sigma = (proof.sigma, proof.sigma if settings.sigma_right is None else settings.sigma_right)
    return DualSmoothing(model, sigma, n0=settings.n0, n_samples=proof.n_samples, alpha=proof.alpha)


RECIPE = Recipe(
    slug="dual-randomized-smoothing",
    harden=harden,
    settings=Settings,
    certifier=certifier,
    certify_settings=CertifySettings,
    restore=restore,
)
