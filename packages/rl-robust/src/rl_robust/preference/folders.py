"""Language models in folders: what ``save_pretrained`` writes, read from the disk alone and without any code in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rl_robust.preference.collate import Templates
from rl_robust.preference.logprobs import without_dropout
from robust_core.errors import ResourceError, optional_import
from robust_core.io import read_json, write_json

__all__ = ["LanguageModel", "load_language_model", "save_language_model"]

TEMPLATES = "templates.json"


class LanguageModel(NamedTuple):
    """A causal language model, its tokenizer, and how its two roles are asked (None where it was not told)."""

    model: Any
    tokenizer: Any
    templates: Templates | None


def load_language_model(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LanguageModel:
    """Return the model of a folder, its dropout off, in eval mode.

    Args:
        folder: as ``save_pretrained`` of model and tokenizer writes it, with weights as safetensors.
        device: where it shall be.

    Raises:
        MissingExtraError: ``transformers`` is not installed.
        ResourceError: no such folder, or no model or tokenizer of ``transformers`` in it.
        ValueError: the tokenizer has no end of sequence: answers would have no end that can be learned.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ResourceError(f"{path}: no folder with a config.json, as save_pretrained of transformers writes it")
    transformers = optional_import("transformers", extra="preference", package="rl-robust")
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(transformers.utils.logging):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **offline)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **offline)
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(f"{path}: {' '.join(str(error).split())[:400]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-sequence token")
    words = read_json(path / TEMPLATES) if (path / TEMPLATES).is_file() else None
    templates = None if words is None else Templates(str(words["writer"]), str(words["reviser"]))
    without_dropout(model)
    return LanguageModel(model.to(device).eval(), tokenizer, templates)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Leave out the bars of the library, and its setting as it was."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_language_model(folder: str | os.PathLike[str], found: LanguageModel) -> Path:
    """Write model, tokenizer and templates into a folder that :func:`load_language_model` reads."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    logging = optional_import("transformers", extra="preference", package="rl-robust").utils.logging
    with _quiet(logging):
        found.model.save_pretrained(path)
    found.tokenizer.save_pretrained(path)
    if found.templates is not None:
        write_json(path / TEMPLATES, {"writer": found.templates.writer, "reviser": found.templates.reviser})
    return path
