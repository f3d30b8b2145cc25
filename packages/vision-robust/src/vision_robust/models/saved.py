"""Compound models on disk: ``model.json`` says which method made the model and how, weights lie beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from robust_core.io import read_json, save_tensors, write_json
from robust_core.loading import load_into

__all__ = ["MODEL", "WEIGHTS", "load_saved", "save_model"]

SCHEMA = "robust.model/1"
MODEL, WEIGHTS = "model.json", "weights.safetensors"


def save_model(folder: str | os.PathLike[str], method: str, config: Mapping[str, Any], model: nn.Module | None) -> None:
    """Write a compound model; ``--model saved:FOLDER`` reads it.

    Args:
        folder: where to write.
        method: slug of the recipe that makes the model again from ``config``.
        config: JSON.
        model: whose state dict is written; None where all weights lie in files that ``config`` names.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if model is not None:
        save_tensors(path / WEIGHTS, model.state_dict())
    write_json(path / MODEL, {"schema": SCHEMA, "method": method, "config": dict(config)})


def load_saved(folder: str | os.PathLike[str]) -> nn.Module:
    """Read what :func:`save_model` wrote.

    Raises:
        ValueError: ``model.json`` is not of this form, or the weights do not fit.
    """
    from vision_robust import recipes

    path = Path(folder)
    document = read_json(path / MODEL)
    if (
        not isinstance(document, dict)
        or set(document) != {"schema", "method", "config"}
        or document["schema"] != SCHEMA
    ):
        raise ValueError(f"{path / MODEL}: not a model of schema {SCHEMA!r}")
    config, method = document["config"], document["method"]
    if method not in recipes.RECIPES or (restore := recipes.find(method).restore) is None:
        raise ValueError(f"{path / MODEL}: no method {method!r} makes saved models")
    if not isinstance(config, dict):
        raise ValueError(f"{path / MODEL}: config is no mapping")
    model = restore(config, path)
    if (path / WEIGHTS).is_file():
        load_into(model, str(path / WEIGHTS))
    return model.eval()
