"""Prompts with their seeds: what an erasure is tried on, read from the user's own files.

A picture belongs to a prompt *and* a seed, so a set of prompts carries both; published sets carry the guidance too.

* ``.txt``: a prompt a line; blank lines are left out. The seed is the number of the prompt, from 0.
* ``.csv``: a header with ``prompt``, and as far as known ``seed`` (also ``evaluation_seed``, ``sd_seed``), ``guidance``
  (also ``evaluation_guidance``, ``sd_guidance_scale``) and ``label`` (the class that a classifier should see, for
  figures of retention). Other columns are not looked at: the CSV files of published sets go in as they are.

No prompts are shipped. A line that cannot be meant is refused with its file and number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import overload

from robust_core.checks import check_count
from robust_core.errors import DataMissingError, MalformedFileError
from robust_core.io import read_bytes, write_atomic

__all__ = ["Prompt", "PromptSet", "read_prompts", "write_prompts"]

LIMIT = 1 << 28
SEEDS = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
LABELS = ("label",)
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Prompt:
    """One picture to be drawn.

    Attributes:
        text: the prompt.
        seed: of its noise.
        guidance: scale; None takes that of the run.
        label: class that a classifier should see, where it is known.
    """

    text: str
    seed: int
    guidance: float | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text: the prompt is empty")
        if "\0" in self.text:
            raise ValueError("text: the prompt holds a NUL character")
        if check_count("seed", self.seed, low=0) > MAX_SEED:
            raise ValueError(f"seed={self.seed}: below 2**63 is needed")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance={self.guidance}: a finite number of at least 0 is needed")
        if self.label is not None:
            check_count("label", self.label, low=0)


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in their order.

    Attributes:
        prompts: at least one.
        name: for reports.
    """

    prompts: tuple[Prompt, ...]
    name: str = "prompts"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: at least one is needed")

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        *,
        seeds: Iterable[int] | None = None,
        guidance: float | None = None,
        labels: Iterable[int] | None = None,
        name: str = "prompts",
    ) -> PromptSet:
        """Return prompts from texts.

        Args:
            texts: B of them.
            seeds: B numbers; 0, 1, 2 … if None.
            guidance: of all.
            labels: B classes.
            name: for reports.
        """
        rows = list(texts)
        numbers = list(range(len(rows))) if seeds is None else list(seeds)
        classes = [None] * len(rows) if labels is None else list(labels)
        for argument, values in (("seeds", numbers), ("labels", classes)):
            if len(values) != len(rows):
                raise ValueError(f"{argument}: {len(values)} for {len(rows)} prompts; one each is needed")
        found = [Prompt(text, seed, guidance, k) for text, seed, k in zip(rows, numbers, classes, strict=True)]
        return cls(tuple(found), name)

    @property
    def texts(self) -> list[str]:
        """B texts."""
        return [prompt.text for prompt in self.prompts]

    @property
    def seeds(self) -> list[int]:
        """B seeds."""
        return [prompt.seed for prompt in self.prompts]

    @property
    def labels(self) -> list[int] | None:
        """B classes, or None where one is not known."""
        found = [prompt.label for prompt in self.prompts if prompt.label is not None]
        return found if len(found) == len(self.prompts) else None

    @property
    def sha256(self) -> str:
        """Of texts, seeds, guidance and labels."""
        return hashlib.sha256(json.dumps([list(asdict(p).values()) for p in self.prompts]).encode()).hexdigest()

    def repeated(self, n_seeds: int) -> PromptSet:
        """Return every prompt with ``n_seeds`` seeds: its own and those after it by steps of the set's size.

        Sets without seeds of their own so get seeds that all differ.
        """
        step = len(self.prompts)
        turns = range(check_count("n_seeds", n_seeds))
        return replace(self, prompts=tuple(replace(p, seed=p.seed + k * step) for k in turns for p in self.prompts))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        """Return one prompt, or a part of the set."""
        return replace(self, prompts=self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        """Return B."""
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        """Return the prompts one by one."""
        return iter(self.prompts)


def read_prompts(path: str | os.PathLike[str]) -> PromptSet:
    """Read a ``.txt`` or ``.csv`` file of prompts; the formats stand at the top of this module.

    Raises:
        DataMissingError: no such file.
        MalformedFileError: the file breaks its format; it and the line are named.
    """
    file = Path(path)
    if not file.is_file():
        raise DataMissingError(f"{file}: no such file of prompts")
    try:
        text = read_bytes(file, max_bytes=LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedFileError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if file.suffix.lower() == ".csv":
        found = _rows(text, file)
    elif file.suffix.lower() == ".txt":
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [_prompt(file, number, line, seed) for seed, (number, line) in enumerate(lines)]
    else:
        raise MalformedFileError(f"{file}: .txt (a prompt a line) or .csv (a column 'prompt') is needed")
    if not found:
        raise MalformedFileError(f"{file}: holds no prompts")
    return PromptSet(tuple(found), file.stem)


def _prompt(
    file: Path, line: int, text: str, seed: int, guidance: float | None = None, label: int | None = None
) -> Prompt:
    try:
        return Prompt(text, seed, guidance, label)
    except ValueError as error:
        raise MalformedFileError(f"{file}, line {line}: {error}") from None


def _column(file: Path, header: Sequence[str], names: Sequence[str]) -> int | None:
    here = [name for name in names if name in header]
    if len(here) > 1:
        raise MalformedFileError(f"{file}, line 1: columns {here[0]!r} and {here[1]!r} mean the same; remove one")
    return header.index(here[0]) if here else None


def _rows(text: str, file: Path) -> list[Prompt]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if header.count("prompt") != 1:
            raise MalformedFileError(f"{file}, line 1: one column 'prompt' is needed; there are {', '.join(header)}")
        columns = [_column(file, header, names) for names in (SEEDS, GUIDANCE, LABELS)]
        found: list[Prompt] = []
        for row in reader:
            if not row:
                continue
            line = reader.line_num
            if len(row) != len(header):
                raise MalformedFileError(
                    f"{file}, line {line}: {len(row)} fields, the header has {len(header)}; texts with commas stand in "
                    "double quotes"
                )
            seed, guidance, label = (None if k is None else row[k].strip() or None for k in columns)
            found.append(
                _prompt(
                    file, line, row[header.index("prompt")].strip(),
                    len(found) if seed is None else _whole(file, line, "seed", seed),
                    None if guidance is None else _number(file, line, "guidance", guidance),
                    None if label is None else _whole(file, line, "label", label),
                )
            )  # fmt: skip
    except csv.Error as error:
        raise MalformedFileError(f"{file}, line {reader.line_num}: {error}") from None
    return found


def _number(file: Path, line: int, name: str, field: str) -> float:
    try:
        return float(field)
    except ValueError:
        raise MalformedFileError(f"{file}, line {line}: {name} {field[:40]!r} is not a number") from None


def _whole(file: Path, line: int, name: str, field: str) -> int:
    # published files hold whole numbers as "123.0"; a float has not the digits for larger seeds
    whole, dot, zeros = field.partition(".")
    if not (whole.isascii() and whole.isdigit() and (not dot or not zeros.strip("0"))):
        raise MalformedFileError(f"{file}, line {line}: {name} {field[:40]!r} is not a whole number of at least 0")
    return int(whole)


def write_prompts(path: str | os.PathLike[str], prompts: PromptSet) -> None:
    """Write a ``.csv`` file that :func:`read_prompts` reads back as it was."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["prompt", "seed", "guidance", "label"])
    for p in prompts:
        table.writerow(
            [p.text, p.seed, "" if p.guidance is None else repr(p.guidance), "" if p.label is None else p.label]
        )
    write_atomic(path, buffer.getvalue())
