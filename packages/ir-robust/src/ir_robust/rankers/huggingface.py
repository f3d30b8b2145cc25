"""What rankers on Hugging Face models share: loading without downloads, and from tokens back to words.

Everything is read from local folders (``local_files_only``) and from safetensors alone; pickled weights are refused. A
checkpoint that lacks weights which its task needs is refused too: the library would fill them with random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ir_robust.text import Words
from robust_core.checks import check_count
from robust_core.errors import DataMissingError, UntrustedFileError
from robust_core.models import frozen

__all__ = ["HuggingFaceRanker", "load_encoder", "longest", "word_places"]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and the advice of transformers off the user's screen; on exit both are as before."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def refuse_pickles(place: Path) -> None:
    """Refuse a folder in which weights are pickled and stand nowhere else.

    Raises:
        UntrustedFileError: so it is, in the folder or in one below.
    """
    for file in sorted(place.rglob("*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            raise UntrustedFileError(
                f"{file}: pickled weights can run code; they were not loaded. To convert a model that you trust: "
                "model.save_pretrained(folder), which writes safetensors"
            )


def load_encoder(
    folder: str | os.PathLike[str], kind: str = "AutoModel", *, complete: bool = True, **settings: Any
) -> tuple[Any, Any]:
    """Return (fast tokenizer, model in eval mode) of a local folder.

    Args:
        folder: of a Hugging Face model.
        kind: which of transformers' automatic classes reads it.
        complete: refuse a checkpoint in which weights are missing.
        settings: of the configuration, such as ``num_labels``.

    Raises:
        DataMissingError: no such folder, or one without model or tokenizer.
        UntrustedFileError: its weights are pickled.
        ValueError: weights that the task needs are missing, or the tokenizer is a slow one.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise DataMissingError(f"{place}: no folder of a Hugging Face model (config.json is missing)")
    refuse_pickles(place)
    import transformers

    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(place), local_files_only=True, use_fast=True)
            model, found = getattr(transformers, kind).from_pretrained(
                str(place), local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
            )
    except (OSError, ValueError) as error:
        raise DataMissingError(f"{place}: {' '.join(str(error).split())[:400]}") from error
    missing = sorted(name for name in found["missing_keys"] if "position_ids" not in name and "pooler" not in name)
    if complete and missing:
        raise ValueError(
            f"{place}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, {missing[0]!r} first; "
            "they would be random. Train it first (new_cross_encoder), or name the kind of ranker that it is"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{place}: a fast tokenizer is needed, for it knows which letters a token stands for")
    return tokenizer, model.eval()


def longest(tokenizer: Any, model: Any, max_length: int | None) -> int:
    """Return how many tokens the model takes, or ``max_length`` if that is given and no more.

    Raises:
        ValueError: ``max_length`` is beyond what the model takes, or below 8.
    """
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limit = min([value for value in limits if isinstance(value, int) and 0 < value < 1 << 20], default=512)
    if max_length is None:
        return min(limit, 512)
    if check_count("max_length", max_length, low=8) > limit:
        raise ValueError(f"max_length={max_length}: this model takes {limit} tokens")
    return max_length


def word_places(doc: str, offsets: Any, of_doc: Sequence[bool]) -> list[int]:
    """Return for each token the place of its word in :class:`~ir_robust.text.Words`, or -1.

    Args:
        doc: the text.
        offsets: (T, 2) first letter of each token and the one behind its last.
        of_doc: whether the token is of the document at all.
    """
    spans = np.array(Words.of(doc).spans, dtype=np.int64).reshape(-1, 2)
    letters = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    if not len(spans):
        return [-1] * len(letters)
    at = np.searchsorted(spans[:, 1], letters[:, 0], side="right")  # the first word that ends behind the token's start
    inside = (at < len(spans)) & (letters[:, 0] < letters[:, 1]) & np.asarray(of_doc, dtype=bool)
    inside &= spans[np.minimum(at, len(spans) - 1), 0] < letters[:, 1]
    return np.where(inside, at, -1).tolist()


class HuggingFaceRanker(nn.Module):
    """Base of the adapters: a tokenizer, a network, and scores in batches of like length.

    Args:
        tokenizer: a fast one.
        model: the network.
        max_length: tokens that are read; what the model takes if None, 512 at most.
        batch_size: texts that go through the network together.
    """

    kind = ""

    def __init__(self, tokenizer: Any, model: Any, *, max_length: int | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.tokenizer, self.model = tokenizer, model
        self.max_length = longest(tokenizer, model, max_length)
        self.batch_size = check_count("batch_size", batch_size)
        self.eval()

    @property
    def config(self) -> Mapping[str, Any]:
        """What the constructor needs beside tokenizer and model, as plain JSON values."""
        return {"max_length": self.max_length, "batch_size": self.batch_size}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def token_embeddings(self) -> Tensor:
        """(V, D) input table."""
        return self.model.get_input_embeddings().weight

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer and network as the library does."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def prepare(self, text: str) -> str:
        """Return the text: tokenizers are fast, and truncation depends on the pair."""
        return text

    def _tokens(self, texts: Sequence[str], max_length: int, **more: Any) -> Any:
        """Padded tokens with offsets, on the network's device."""
        found = self.tokenizer(
            list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt",
            return_offsets_mapping=True, **more,
        )  # fmt: skip
        return found.to(self.device)

    def _many(self, query: str, docs: Sequence[str]) -> Tensor:
        """(N,) scores of one batch."""
        raise TypeError(f"{type(self).__name__} states no _many()")

    def score(self, query: str, docs: Sequence[str]) -> Tensor:
        """Return (N,) float32 scores, in eval mode and without gradients."""
        order = sorted(range(len(docs)), key=lambda i: len(docs[i]))  # little padding
        found = torch.zeros(len(docs), device=self.device)
        with frozen(self), torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                found[part] = self._many(query, [docs[i] for i in part]).float()
        return found
