"""Rankers on Hugging Face models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from robust_core.errors import DataMissingError

__all__ = ["load_encoder"]


def load_encoder(folder: str | os.PathLike[str], kind: str = "AutoModel") -> tuple[Any, Any]:
    """Return (fast tokenizer, model in eval mode) of a local folder; safetensors only, nothing is downloaded.

    Args:
        folder: of a Hugging Face model.
        kind: which of transformers' automatic classes reads it.

    Raises:
        DataMissingError: no such folder, or one without model or tokenizer.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise DataMissingError(f"{place}: no folder of a Hugging Face model (config.json is missing)")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(place), local_files_only=True, use_fast=True)
        model = getattr(transformers, kind).from_pretrained(str(place), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataMissingError(f"{place}: {' '.join(str(error).split())[:400]}") from error
    return tokenizer, model.eval()
