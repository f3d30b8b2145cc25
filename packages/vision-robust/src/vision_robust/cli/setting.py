"""From the words of the command line to model, data and parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from robust_core.certificates import Smoothing
from robust_core.data import Dataset, load
from robust_core.device import choose_device
from robust_core.errors import DataMissingError, ResourceError
from robust_core.evaluation import (
    Adversarial,
    Calibration,
    Certified,
    Clean,
    Corruptions,
    SecurityCurve,
    TranslationConsistency,
)
from robust_core.threats import parse_threat
from vision_robust.certified.ibp_tightness import Tightness
from vision_robust.models import load_model

__all__ = ["Setting", "choose_parts", "load_data", "prepare"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Setting:
    """What every verb needs."""

    model: nn.Module
    data: Dataset
    name: str
    seed: int
    device: torch.device
    batch_size: int


def prepare(
    model: str,
    data: str,
    *,
    weights: Path | None,
    normalise: str | None,
    split: str | None,
    root: Path | None,
    size: int | None,
    n: int | None,
    seed: int,
    device: str,
    batch_size: int,
) -> Setting:
    """Load everything, and see that model and data fit before any long work begins."""
    where = choose_device(device)
    dataset = load_data(data, split=split, root=root, size=size, n=n)
    network = load_model(model, weights=weights, normalise=parse_normalise(normalise), device=where)
    probe = dataset.batch(range(1))["x"].to(where)
    try:
        with torch.no_grad():
            network(probe.expand(16, *probe.shape[1:]))
    except Exception as error:  # the user's code: anything may be raised
        shape, why = tuple(probe.shape[1:]), " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"model {model!r} does not take inputs of shape {shape} ({data}): {why}") from error
    return Setting(network, dataset, model, seed, where, batch_size)


def load_data(
    data: str, *, split: str | None, root: Path | None, size: int | None, n: int | None, part: str | None = None
) -> Dataset:
    """Return the data set, thinned to ``n`` evenly spaced samples.

    Args:
        data: name or path.
        split: what the user asked for; None means test where the data has one, else all of it.
        root: where named data sets lie.
        size: side of the images of a folder.
        n: number of samples, or None for all.
        part: ``"train"`` or ``"test"`` for training and its judgement: data without splits is divided, every fifth
            sample being the test.
    """
    if ("/" in data or data.endswith((".npz", ".csv"))) and not Path(data).exists() and root is None:
        raise ResourceError(f"--data {data}: no such file or folder")
    read = _reader(data, root)
    try:
        dataset = read(data, split or part or "test", root, size=size)
    except (ValueError, DataMissingError):
        if split is not None or not Path(data).exists():
            raise
        dataset = read(data, "all", root, size=size)
        if part is not None:
            is_test = part == "test"
            dataset = dataset.subset([i for i in range(len(dataset)) if (i % 5 == 0) == is_test])
    if n is None or n >= len(dataset):
        return dataset
    return dataset.subset(torch.linspace(0, len(dataset) - 1, n).round().long().tolist())


def _reader(data: str, root: Path | None) -> Callable[..., Dataset]:
    """Return what reads ``data``: a file with one array for each modality is packed, all else core knows."""
    path = Path(data).expanduser() if root is None else root / data
    if path.suffix != ".npz" or not path.is_file():
        return load
    from vision_robust.certified.crmt import holds_modalities, load_modalities

    if not holds_modalities(path):
        return load
    return lambda _data, split, _root, *, size: load_modalities(path, split)


def parse_normalise(text: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return (mean, std) from ``imagenet`` or ``0.5,0.5,0.5/0.2,0.2,0.2``."""
    if text is None or text == "imagenet":
        return IMAGENET if text else None
    try:
        mean, std = (tuple(float(v) for v in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--normalise {text!r}: 'imagenet' or MEAN,…/STD,… is needed") from None
    return mean, std


def choose_parts(
    words: str, setting: Setting, *, norm: str, eps: str, version: str, profile: str | None, sigma: float
) -> list[Any]:
    """Return the parts of an evaluation from their names."""
    threat = parse_threat(norm, eps)
    height = setting.data.batch(range(1))["x"].shape[-2]
    size_profile = "imagenet" if height >= 96 else "cifar" if height == 32 else "small"
    builders = {
        "clean": lambda: Clean(),
        "calibration": lambda: Calibration(),
        "adversarial": lambda: Adversarial(threat, version=cast("Any", version)),
        "curve": lambda: SecurityCurve(threat),
        "corruptions": lambda: Corruptions(profile=profile or size_profile),
        "certified": lambda: Certified(Smoothing(setting.model, sigma, n_samples=10_000)),
        "tightness": lambda: Tightness(threat),
        "translation": lambda: TranslationConsistency(),
    }
    names = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [name for name in names if name not in builders]
    if unknown or not names:
        raise ValueError(f"--parts {words!r}: choose from {', '.join(builders)}")
    return [builders[name]() for name in names]
