"""The words of ``robust optim solve`` and ``compare``, checked before anything heavy is imported."""

from __future__ import annotations

import math
import os
from pathlib import Path

from robust_core.errors import DataMissingError, ResourceError
from robust_core.words import check_word

__all__ = ["METHODS", "check_common", "split_method"]

METHODS = {
    "neur2ro": None,
    "ccg": None,
    "enumeration": None,
    "branch-and-price": None,
    "k-adaptability": 2,
    "static": None,
    "nominal": None,
    "pyros": 1,
}
"""Method -> the number that may stand behind a colon (plans of k-adaptability, order of PyROS's rules), by default."""


def split_method(words: str) -> tuple[str, int | None]:
    """Return the method and its number: ``k-adaptability:3`` is ("k-adaptability", 3).

    Raises:
        ValueError: no such method, or a number where none belongs.
    """
    name, colon, text = words.partition(":")
    check_word("--method", name, METHODS)
    default = METHODS[name]
    if not colon:
        return name, default
    if default is None or not text.isdigit():
        raise ValueError(f"--method {words!r}: only k-adaptability:K and pyros:ORDER take a number")
    return name, int(text)


def check_common(problems: list[str], methods: list[str], time_limit: float, tol: float, out: Path | None) -> None:
    """Refuse what can be refused by looking at the words and the disk.

    Raises:
        ValueError: a word or number of no use.
        ResourceError: a file that is not there, or a folder that cannot be written.
    """
    for words in problems:
        name, colon, end = words.rpartition(":")
        file = name if colon and (name.endswith(".py") or (end == "loans" and not Path(words).is_file())) else words
        if not Path(file).is_file():
            raise DataMissingError(f"--problem {words}: no such file {file}")
    for words in methods:
        split_method(words)
    for option, value in (("time-limit", time_limit), ("tol", tol)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{option} {value}: a number above 0 is needed")
    if out is not None:
        nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if nearest.is_file() or not os.access(nearest, os.W_OK):
            raise ResourceError(f"--out {out}: a folder that can be written is needed")
