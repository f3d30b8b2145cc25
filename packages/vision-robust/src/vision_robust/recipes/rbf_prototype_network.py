"""Prototype networks on the command line: trained for their certificate, certified in L2, explained in pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import nn

from robust_core.checks import check_number
from robust_core.evaluation import Adversarial, Certified, Clean
from robust_core.threats import Threat
from vision_robust.explain.rbf_prototype_network import (
    CBC,
    CBCCertifier,
    CBCMarginLoss,
    RobustCBCLoss,
    explanation_plot,
    prototype_plot,
    reasoning_plot,
)
from vision_robust.recipes.base import Explanation, Job, Proof, Recipe, Trained

__all__ = ["RECIPE", "CertifySettings", "ExplainSettings", "Settings", "enclosing_radius"]

_UNIT = (0.0, 1.0)
_CONFIG = ("n_classes", "shape", "n_components", "concepts_per_class", "distance", "subspace_dim", "positive")


@dataclass(frozen=True)
class Settings:
    """The network and its loss; ``kappa`` is the L2 radius asked for: by default, what encloses the threat.

    ``rate_factor`` multiplies the shared learning rate: prototypes learn with 5e-3 as published.
    """

    n_components: int = 20
    concepts_per_class: int = 2
    distance: Literal["euclidean", "squared", "tangent"] = "euclidean"
    subspace_dim: int = 12
    positive: bool = False
    sigma: float | None = None
    start: Literal["kmeans++", "samples", "keep"] = "kmeans++"
    loss: Literal["robust", "margin"] = "robust"
    kappa: float | None = None
    margin: float = 0.3
    rate_factor: float = 5.0

    def __post_init__(self) -> None:
        check_number("rate_factor", self.rate_factor, low=0, open_low=True)
        if self.kappa is not None:
            check_number("kappa", self.kappa, low=0, open_low=True)


@dataclass(frozen=True)
class CertifySettings:
    """Which bound, and whether it speaks of images in [0, 1] only, which gives larger radii (tight bound)."""

    bound: Literal["tight", "closed", "published"] = "tight"
    domain: bool = True


@dataclass(frozen=True)
class ExplainSettings:
    """How many inputs get a picture, and how many components it shows."""

    plots: int = 8
    top: int = 5


def enclosing_radius(threat: Threat, size: int) -> float:
    """Return the radius of the L2 ball that holds the threat, for inputs of ``size`` elements."""
    return threat.eps * math.sqrt(size) if threat.name == "Linf" else threat.eps


def harden(job: Job, settings: Settings) -> Trained:
    """Train prototypes of the job's own data from their start."""
    if job.model is not None:
        raise ValueError(
            "--model: this method trains prototypes in input space, not a network; leave --model out (reasoning on "
            "the channels of a network: vision_robust.explain.rbf_prototype_network.DeepCBC)"
        )
    config = {
        "n_classes": job.train.n_classes,
        "shape": list(job.shape),
        **{name: getattr(settings, name) for name in _CONFIG[2:]},
    }
    model = _build(config, job.seed)
    start = job.load("train", min(len(job.train), 10_000))
    first = start.batch(range(len(start)))
    model.initialise(first["x"], first["y"], points=settings.start, sigma=settings.sigma, generator=job.seed)
    model.to(job.device)
    kappa = settings.kappa or enclosing_radius(job.threat, math.prod(job.shape)) or None
    objective = CBCMarginLoss(settings.margin) if settings.loss == "margin" else RobustCBCLoss(kappa)
    optimiser = partial(torch.optim.Adam, lr=settings.rate_factor * job.learning_rate)
    job.fit(model, objective, name="prototypes", optimiser=optimiser, schedule=None)
    model.eval()
    parts = [Clean(), Certified(CBCCertifier(model, domain=_UNIT)), Adversarial(job.threat, version="fast")]
    details = {"loss": settings.loss, "kappa": kappa, "sigma": model.components.sigma.detach().tolist()}
    return Trained(model, config=config, parts=parts, details=details)


def _build(config: Mapping[str, Any], seed: int = 0) -> CBC:
    options = {name: config[name] for name in _CONFIG[2:] if name != "n_components"}
    shape = tuple(int(size) for size in config["shape"])
    return CBC(int(config["n_classes"]), shape, int(config["n_components"]), **options, generator=seed)


def restore(config: Mapping[str, Any], folder: Path) -> CBC:
    """Make the network again.

    Raises:
        ValueError: a config of another form.
    """
    if set(config) != set(_CONFIG):
        raise ValueError(f"{folder}: a prototype network needs {', '.join(_CONFIG)}")
    return _build(config)


def certifier(model: nn.Module, proof: Proof, settings: CertifySettings) -> CBCCertifier:
    """Certify in L2, whatever the threat: the radius of each input is found, not asked for."""
    del proof
    walls = settings.domain and settings.bound == "tight"
    return CBCCertifier(_prototypes(model), settings.bound, domain=_UNIT if walls else None)


def _prototypes(model: nn.Module) -> CBC:
    if not isinstance(model, CBC):
        raise TypeError(f"the model is a {type(model).__name__}, not a prototype network of this method")
    return model


def explain(asked: Explanation, settings: ExplainSettings) -> dict[str, Any]:
    """Write prototypes, reasoning, and an account of each input, with its certified radius.

    ``explanations.csv`` holds, for each input, label, prediction, scores, radius, and what each component contributes
    (``d r_plus`` by presence, ``(1 - d) r_minus`` by absence); pictures of the first ones are ``explained-*.png``.
    """
    model = _prototypes(asked.model)
    classes = list(asked.data.classes or map(str, range(model.reasoning.n_classes)))
    _save(prototype_plot(model), asked.out / "prototypes.png")
    _save(reasoning_plot(model, classes), asked.out / "reasoning.png")
    batch = asked.data.batch(range(len(asked.data)))
    x, y = (batch[name].to(model.components.points.device) for name in ("x", "y"))
    certificate = CBCCertifier(model, domain=_UNIT).certify(x)
    given = None if asked.target is None else torch.full_like(y, asked.target)
    account = model.explain(x, given)
    with (asked.out / "explanations.csv").open("w", newline="") as file:
        table = csv.writer(file)
        names = [f"{how}_{k}" for k in range(account.present.shape[1]) for how in ("present", "absent")]
        table.writerow(["index", "label", "predicted", "explained", "score", "radius", *names])
        for row in range(len(x)):
            both = torch.stack([account.present[row], account.absent[row]], 1).flatten().tolist()
            head = [int(batch["index"][row]), int(y[row]), int(certificate.prediction[row]), int(account.target[row])]
            table.writerow([*head, float(account.score[row]), float(certificate.radius[row]), *both])
    shown = min(settings.plots, len(x))
    for row in range(shown):
        radius = float(certificate.radius[row])
        figure = explanation_plot(model, x[row : row + 1], classes=classes, top=settings.top, radius=radius)
        _save(figure, asked.out / f"explained-{int(batch['index'][row])}.png")
        asked.on_step("explanations drawn", row + 1, shown)
    evidence = account.present.sum(1) + account.absent.sum(1)
    figures = {
        "accuracy": float((certificate.prediction == y).double().mean()),
        "mean certified radius": float(certificate.radius.mean()),
        "share of the evidence by absence": float((account.absent.sum(1) / evidence).mean()),
    }
    return {"figures": {name: {"value": value, "interval": None, "n": len(x)} for name, value in figures.items()}}


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


RECIPE = Recipe(
    slug="rbf-prototype-network",
    harden=harden,
    settings=Settings,
    certifier=certifier,
    certify_settings=CertifySettings,
    restore=restore,
    explain=explain,
    explain_settings=ExplainSettings,
)
