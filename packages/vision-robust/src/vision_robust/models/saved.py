"""Mixtures on disk: a folder with ``mixed.json`` that names the two base models and the weight between them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from robust_core.checks import check_number
from robust_core.io import inside, read_json, write_json
from vision_robust.inference.adaptive_smoothing.mixed import MixedClassifier

__all__ = ["load_mixed", "save_mixed"]

SCHEMA = "robust.mixed/1"


def save_mixed(
    folder: str | os.PathLike[str], mixed: MixedClassifier, bases: Sequence[tuple[str, Path | None]]
) -> None:
    """Write a mixture of constant weight; weights files of the base models are copied beside it.

    Args:
        folder: where to write.
        mixed: the mixture.
        bases: (words, weights file or None) of the accurate and the robust model.

    Raises:
        ValueError: the mixture has a mixing network: save its ``state_dict`` with your own factory.
    """
    if mixed.constant_weight is None:
        raise ValueError("mixed: only mixtures of constant weight can be named by words")
    folder, models = Path(folder), []
    for part, (words, weights) in zip(("accurate", "robust"), bases, strict=True):
        name = None if weights is None else f"{part}{weights.suffix}"
        if weights is not None and name is not None:
            shutil.copyfile(weights, folder / name)
        models.append({"model": words, "weights": name})
    scales = {"accurate_scale": mixed.accurate_scale, "robust_scale": mixed.robust_scale}
    document = {"schema": SCHEMA, "accurate": models[0], "robust": models[1], "mixing_weight": mixed.constant_weight}
    write_json(folder / "mixed.json", {**document, **scales})


def load_mixed(folder: str) -> MixedClassifier:
    """Read a mixture written by :func:`save_mixed`.

    Raises:
        ValueError: ``mixed.json`` is not of this form.
    """
    from vision_robust.models.words import load_model

    path = Path(folder)
    document = read_json(path / "mixed.json")
    expected = {"schema", "accurate", "robust", "mixing_weight", "accurate_scale", "robust_scale"}
    if not isinstance(document, dict) or set(document) != expected or document["schema"] != SCHEMA:
        raise ValueError(f"{path / 'mixed.json'}: not a mixture of schema {SCHEMA!r}")
    bases = []
    for part in ("accurate", "robust"):
        entry = document[part]
        if not isinstance(entry, dict) or set(entry) != {"model", "weights"}:
            raise ValueError(f"{path / 'mixed.json'}: {part!r} needs 'model' and 'weights'")
        if str(entry["model"]).startswith("mixed:"):
            raise ValueError(f"{path / 'mixed.json'}: a mixture of mixtures is not supported")
        weights = None if entry["weights"] is None else inside(path, entry["weights"])
        bases.append(load_model(str(entry["model"]), weights=weights))
    return MixedClassifier(
        *bases,
        mixing_weight=check_number("mixing_weight", document["mixing_weight"], low=0, high=1),
        accurate_scale=document["accurate_scale"],
        robust_scale=document["robust_scale"],
    )
