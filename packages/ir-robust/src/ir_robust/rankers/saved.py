"""Rankers in folders: JSON and safetensors, nothing that could run code.

    save_ranker("ranker/", model, {"epochs": 5})
    model = load_saved("ranker/")

A small ranker is ``ranker.json`` (its kind and settings), ``vocabulary.json`` and ``weights.safetensors``. An adapter
of a Hugging Face model is that library's own folder with a ``ranker.json`` beside, so that either side reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.rankers.word_model import WordModel
from robust_core.errors import DataMissingError, UntrustedFileError
from robust_core.io import load_weights, read_json, save_tensors, write_json
from robust_core.methods import load

__all__ = ["WORD_MODELS", "load_saved", "save_ranker"]

SCHEMA = "robust.ranker/1"
WORD_MODELS = {
    "bag": "ir_robust.rankers.bag:BagRanker",
    "drmm": "ir_robust.rankers.drmm:DRMM",
    "duet": "ir_robust.rankers.duet:Duet",
    "knrm": "ir_robust.rankers.knrm:KNRM",
}
ADAPTERS = {
    "bi": "ir_robust.rankers.encoders:load_bi",
    "colbert": "ir_robust.rankers.encoders:load_colbert",
    "cross": "ir_robust.rankers.cross:load_cross",
}


def save_ranker(folder: str | os.PathLike[str], ranker: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write a ranker of this package to a folder, which is made if need be.

    Args:
        folder: where.
        ranker: a small ranker, or an adapter of a Hugging Face model.
        about: what to remember of its training, as JSON values.

    Raises:
        TypeError: a ranker of another kind.
    """
    place, kind = Path(folder), getattr(ranker, "kind", None)
    if kind not in {*WORD_MODELS, *ADAPTERS}:
        raise TypeError(f"ranker is {type(ranker).__name__}; only those of this package can be saved")
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(ranker, WordModel):
        save_tensors(place / "weights.safetensors", ranker.state_dict())
        write_json(place / "vocabulary.json", list(ranker.vocabulary.words[2:]), indent=None)
    else:
        ranker.save_pretrained(place)
    found = {"schema": SCHEMA, "kind": kind, "config": dict(ranker.config), "about": dict(about or {})}
    write_json(place / "ranker.json", found)  # last: a folder with this file is whole


def load_saved(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Return the ranker in a folder, in eval mode.

    Args:
        folder: that :func:`save_ranker` wrote.
        device: where to put it.

    Raises:
        DataMissingError: no such folder.
        UntrustedFileError: a file that could run code, or that is not what was written.
    """
    place = Path(folder).expanduser()
    if not (place / "ranker.json").is_file():
        raise DataMissingError(f"{place}: no folder of a saved ranker (ranker.json is missing)")
    found = read_json(place / "ranker.json")
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("config"), dict):
        raise UntrustedFileError(f"{place / 'ranker.json'} does not describe a ranker ({SCHEMA})")
    kind, config = str(found.get("kind")), {str(k): v for k, v in found["config"].items()}
    if kind in ADAPTERS:
        return load(ADAPTERS[kind])(place, **config).to(device).eval()
    if kind not in WORD_MODELS:
        raise UntrustedFileError(f"{place / 'ranker.json'}: kind {kind!r} is none of {', '.join(WORD_MODELS)}")
    return _word_model(place, load(WORD_MODELS[kind]), config).to(device).eval()


def _word_model(place: Path, made_by: Any, config: dict[str, Any]) -> WordModel:
    words = read_json(place / "vocabulary.json")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
        raise UntrustedFileError(f"{place / 'vocabulary.json'} is no list of distinct words")
    state, vocabulary = load_weights(place / "weights.safetensors"), Vocabulary(words)
    table = state.get("vectors", torch.zeros(0))
    if table.ndim != 2 or len(table) != len(vocabulary):
        raise UntrustedFileError(f"{place}: vectors of shape {tuple(table.shape)} for {len(vocabulary)} words")
    try:
        model: WordModel = made_by(WordVectors(vocabulary, torch.zeros_like(table)), **config).to(table.dtype)
        model.load_state_dict(_finite(place, state))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UntrustedFileError(f"{place}: settings and weights do not fit: {' '.join(str(error).split())}") from error
    return model


def _finite(place: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{place}: {name!r} holds NaN or infinity")
    return state
