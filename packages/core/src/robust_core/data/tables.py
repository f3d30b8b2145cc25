"""Tables: a CSV file becomes a data set whose columns keep their names, units and groups.

Buys: numbers scaled to [0, 1], categories as one-hot groups, labels from any column, and a :class:`Column` for each
column of the file, which says where its features lie and turns them back into the user's units. What cannot be meant
(a ragged row, a missing value, a number among words, a constant column) is one error with file, line and column.

A column is a category if no value of it is a number, or if ``categorical`` names it; "integer" if all values are whole.
Rows are test rows by the rule of :mod:`robust_core.data.bundled`, from the bytes of their line; the scale is that of
the training rows, and values outside it are clipped.

:func:`read_german_credit` reads Statlog (German Credit Data), H. Hofmann, UCI 1994, CC BY 4.0: 1,000 applicants, 7
numbers and 13 categories, here with class 1 for good credit.

Left out: missing values (impute or drop them yourself), dates, regression targets, other encodings than UTF-8.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_choice
from robust_core.data.bundled import is_test_row
from robust_core.data.dataset import Column, Dataset
from robust_core.data.files import read_bytes
from robust_core.errors import RobustError

__all__ = ["Column", "TableError", "find_german_credit", "load_table", "read_german_credit"]

LIMIT = 4 << 30
MAX_CATEGORIES = 256
"""More distinct words than this in one column are names or free text, not categories."""
MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})


class TableError(RobustError, ValueError):
    """A table cannot be read as it stands; the message names file, line and column."""


@dataclass(frozen=True)
class _Text:
    """A file cut into fields.

    Attributes:
        path: for messages.
        names: header.
        rows: fields of each row.
        lines: line of each row in the file, from 1.
    """

    path: Path
    names: list[str]
    rows: list[list[str]]
    lines: list[int]


def _read_text(path: Path, delimiter: str, names: Sequence[str] | None) -> _Text:
    try:
        text = read_bytes(path, limit=LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8") from error
    # a blank at the end of a line is no field where blanks are the delimiter
    physical = [line.strip(" ") if delimiter == " " else line for line in text.splitlines()]
    reader = csv.reader(physical, delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if row:
                rows.append([field.strip() for field in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: {error}") from error
    header = list(names) if names is not None else rows.pop(0) if rows else []
    first = lines[0] if names is None and lines else 1
    lines = lines if names is not None else lines[1:]
    if not rows:
        raise TableError(f"{path} holds no rows below its header")
    doubled = sorted({name for name in header if header.count(name) > 1 or not name})
    if doubled:
        raise TableError(f"{path}, line {first}: the header holds {doubled[0]!r} twice or empty; names must differ")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise TableError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}")
        for name, field in zip(header, row, strict=True):
            if field.lower() in MISSING:
                raise TableError(f"{path}, line {line}, column {name!r}: the value is missing; impute or drop the row")
    return _Text(path, header, rows, lines)


def _number(field: str) -> float | None:
    try:
        value = float(field)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _labels(text: _Text, target: str, classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    position = text.names.index(target)
    words = [row[position] for row in text.rows]
    numbers = [_number(word) for word in words]
    if all(number is not None for number in numbers):
        wrong = next((i for i, n in enumerate(numbers) if n is not None and n != int(n)), None)
        if wrong is not None:
            raise TableError(
                f"{text.path}, line {text.lines[wrong]}, column {target!r}: {words[wrong]!r} is no class; the target "
                "holds classes (words or whole numbers). Name another column: target=..."
            )
        words = [str(int(number)) for number in numbers if number is not None]
        known = sorted(set(words), key=int)
    else:
        known = sorted(set(words))
    if classes is not None:
        unknown = sorted(set(known) - set(classes))
        if unknown:
            line = text.lines[words.index(unknown[0])]
            raise TableError(f"{text.path}, line {line}, column {target!r}: {unknown[0]!r} is not in {list(classes)}")
        known = list(classes)
    if not 2 <= len(known) <= MAX_CATEGORIES:
        raise TableError(
            f"{text.path}, column {target!r}: {len(known)} different values; a target has 2 to {MAX_CATEGORIES} classes"
        )
    place = {name: i for i, name in enumerate(known)}
    return torch.tensor([place[word] for word in words]), known


def _category(text: _Text, name: str, words: list[str], first: int) -> tuple[np.ndarray, Column]:
    known = sorted(set(words))
    if len(known) > MAX_CATEGORIES:
        raise TableError(
            f"{text.path}, column {name!r}: {len(known)} different words are no categories; drop=({name!r},) leaves it "
            "out"
        )
    _refuse_constant(text, name, len(known) > 1, f"always {known[0]!r}")
    codes = np.searchsorted(known, words)
    positions = tuple(range(first, first + len(known)))
    return np.eye(len(known))[codes], Column(name, "category", positions, categories=tuple(known))


def _refuse_constant(text: _Text, name: str, varies: bool, how: str) -> None:
    if not varies:
        raise TableError(f"{text.path}, column {name!r} is constant ({how}); drop=({name!r},) leaves it out")


def _numeric(
    text: _Text, name: str, values: list[float | None], words: list[str], test: np.ndarray
) -> tuple[np.ndarray, Column]:
    bad = next((i for i, value in enumerate(values) if value is None), None)
    if bad is not None:
        raise TableError(
            f"{text.path}, line {text.lines[bad]}, column {name!r}: {words[bad]!r} is no number, others are; "
            f"correct it, or name the column: categorical=({name!r},)"
        )
    array = np.array(values, dtype=np.float64)
    low, high = float(array[~test].min()), float(array[~test].max())
    _refuse_constant(text, name, high > low, f"{low:g} in every training row")
    scaled = ((array - low) / (high - low)).clip(0, 1)
    kind = "integer" if bool((array == np.floor(array)).all()) else "number"
    return scaled[:, None], Column(name, kind, (), low=low, high=high)


def _features(text: _Text, skip: set[str], categorical: set[str], test: np.ndarray) -> tuple[Tensor, list[Column]]:
    parts: list[np.ndarray] = []
    columns: list[Column] = []
    width = 0
    for position, name in enumerate(text.names):
        if name in skip:
            continue
        words = [row[position] for row in text.rows]
        values = [_number(word) for word in words]
        if name in categorical or all(value is None for value in values):
            part, column = _category(text, name, words, width)
        else:
            part, column = _numeric(text, name, values, words, test)
            column = replace(column, positions=(width,))
        parts.append(part)
        columns.append(column)
        width += part.shape[1]
    if not parts:
        raise TableError(f"{text.path}: no column is left besides the target")
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32)), columns


def _known(text: _Text, what: str, names: Sequence[str]) -> set[str]:
    unknown = [name for name in names if name not in text.names]
    if unknown:
        raise TableError(f"{what}={unknown[0]!r} is no column of {text.path}; it has {', '.join(text.names)}")
    return set(names)


def load_table(
    path: str | os.PathLike[str],
    split: str | None = None,
    *,
    target: str | None = None,
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Dataset:
    """Return a table as a data set of (N, D) inputs in [0, 1], with its ``columns``.

    Args:
        path: a CSV file, plain or ``.gz``, with a header.
        split: ``"train"`` (also None), ``"test"`` or ``"all"``.
        target: column of the classes; the last column when None.
        categorical: columns of numbers that are codes of categories.
        drop: columns to leave out.
        delimiter: between fields.
        names: header of a file that has none.
        classes: names of the classes in the order of their labels; sorted when None.
        name: what reports call the data; the file's name when None.

    Raises:
        TableError: the file cannot be read as a table, or an argument names no column of it.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    split = check_choice("split", split or "train", ("train", "test", "all"))
    text = _read_text(path, delimiter, names)
    wanted = text.names[-1] if target is None else target
    skip = _known(text, "drop", drop) | _known(text, "target", [wanted])
    codes = _known(text, "categorical", categorical)
    test = np.array([is_test_row("\x1f".join(row).encode()) for row in text.rows])
    if test.all():
        raise TableError(f"{path}: all {len(test)} rows fall into the test split; more rows are needed")
    y, known = _labels(text, wanted, classes)
    x, columns = _features(text, skip, codes, test)
    stem = name or path.name.removesuffix(".gz").removesuffix(".csv")
    whole = Dataset(
        x,
        y,
        name=stem if split == "all" else f"{stem}/{split}",
        classes=known,
        preprocessing="numbers scaled by the training rows' minimum and maximum, clipped to [0, 1]; one-hot categories",
        columns=columns,
    )
    return whole if split == "all" else whole.subset(np.flatnonzero(test if split == "test" else ~test))


GERMAN_NAMES = (
    "status duration credit_history purpose amount savings employment instalment_rate personal_status other_debtors "
    "residence property age other_instalments housing existing_credits job dependants telephone foreign_worker class"
).split()
"""Names of the 20 attributes and the class, in the order of UCI's description."""


def find_german_credit(root: Path | None) -> Path | None:
    """Return the file of Statlog (German Credit Data) below ``root``, or None."""
    if root is None:
        return None
    folders = (root, root / "german_credit", root / "statlog+german+credit+data", root / "german")
    names = ("german.data", "german_credit.csv", "german.csv")
    return next((f / name for f in folders for name in names if (f / name).is_file()), None)


def read_german_credit(path: Path, split: str) -> Dataset:
    """Return German Credit from UCI's ``german.data``, or from a CSV with a header whose last column is the class.

    The label is 1 for good credit (1 in the file) and 0 for bad credit (2, or 0).

    Raises:
        TableError: it is another file, or damaged.
    """
    if path.suffix == ".csv":
        data = load_table(path, split)
        kinds = {"1": 1, "good": 1, "2": 0, "0": 0, "bad": 0}
        if len(data.classes) != 2 or {kinds.get(c.lower()) for c in data.classes} != {0, 1}:
            raise TableError(
                f"{path}: classes {list(data.classes)}; good and bad (or 1 and 2) are needed, in the last column"
            )
        meaning = torch.tensor([kinds[c.lower()] for c in data.classes])
        renamed = data.replace(y=meaning[data.y], name="german_credit" if split == "all" else f"german_credit/{split}")
        renamed.classes = ("bad", "good")
        return renamed
    data = load_table(path, split, delimiter=" ", names=GERMAN_NAMES, classes=("2", "1"), name="german_credit")
    data.classes = ("bad", "good")
    return data
