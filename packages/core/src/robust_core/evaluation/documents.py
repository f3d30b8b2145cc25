"""Reports as they are kept: one JSON document whose figures have intervals, arrays beside it, and a page, in a folder.

====================  ==========================================================================================
``result.json``       the document: ``schema``, ``figures`` (name -> value, interval, n), ``flags``, all the rest
``*.npz``             numbers for each sample, in reports that have them
``report.html``       one self-contained page
====================  ==========================================================================================
"""

from __future__ import annotations

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from robust_core.errors import UntrustedFileError
from robust_core.evaluation.arrays import load_arrays, save_arrays
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.io import json_text, read_json, write_atomic

__all__ = ["PAGE", "RESULT", "DocumentReport", "save_document"]

RESULT, PAGE = "result.json", "report.html"
FEW = 8


def save_document(
    directory: str | os.PathLike[str],
    document: Mapping[str, Any],
    page: str,
    *,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``report.html`` and ``result.json`` into a folder, each atomically, and return the folder.

    Args:
        directory: made if it is not there.
        document: plain JSON; written last, so that whoever sees it finds the other files.
        page: HTML.
        write_more: writes further files into the folder, before these two.

    Raises:
        ValueError: the document holds NaN or infinity; nothing was written.
    """
    text, folder = json_text(document), Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if write_more is not None:
        write_more(folder)
    write_atomic(folder / PAGE, page)
    write_atomic(folder / RESULT, text)
    return folder


@dataclass(frozen=True)
class DocumentReport(ABC):
    """A finished measurement.

    A kind of report names its schemas and makes its page. Files beside document and page: :attr:`npz` says which
    attributes are arrays; :meth:`_write_more` and :meth:`_read_more` do the rest.

    Attributes:
        document: JSON; ``figures`` maps names to {"value", "interval", "n"}, ``flags`` are reasons to distrust them.
        schemas: those that :meth:`load` takes.
        npz: attribute that maps names to arrays -> its file.
    """

    schemas: ClassVar[tuple[str, ...]]
    npz: ClassVar[Mapping[str, str]] = {}

    document: dict[str, Any]

    def __getitem__(self, name: str) -> Estimate:
        """Return a figure, e.g. ``report["adversarial/accuracy"]``; NaN where it is undefined.

        Raises:
            KeyError: no such figure; the message names those that are nearest.
        """
        figures = self.document["figures"]
        if name not in figures:
            near = difflib.get_close_matches(str(name), figures, FEW, 0.5) or sorted(figures)[:FEW]
            more = ", …" if len(near) < len(figures) else ""
            raise KeyError(f"no figure {name!r}; there are {', '.join(near) or 'none'}{more}")
        return Estimate.from_json(figures[name])

    @property
    def figures(self) -> dict[str, Estimate]:
        """Name -> figure."""
        return {name: self[name] for name in self.document["figures"]}

    @property
    def flags(self) -> list[str]:
        """Reasons to distrust the figures."""
        return list(self.document["flags"])

    @abstractmethod
    def html(self) -> str:
        """Return the report as one self-contained page: no script, no remote asset."""

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write all files into a folder, each atomically, the document last; a page that fails leaves them as they are.

        Args:
            directory: made if it is not there.
        """
        return self._save(directory, self.html())

    def _save(self, directory: str | os.PathLike[str], page: str) -> Path:
        def write(folder: Path) -> None:
            for attribute, name in self.npz.items():
                save_arrays(folder / name, getattr(self, attribute))
            self._write_more(folder)

        return save_document(directory, self.document, page, write_more=write)

    def _write_more(self, folder: Path) -> None:
        """Write what belongs beside document, page and arrays; most reports have nothing more."""
        del folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote; the page is not read, it can be made again.

        Raises:
            UntrustedFileError: a file is damaged or hostile, or the folder holds something else.
            OSError: a file is missing.
        """
        folder = Path(directory)
        document = cls._checked(read_json(folder / RESULT), str(folder / RESULT))
        arrays = {attribute: load_arrays(folder / name) for attribute, name in cls.npz.items()}
        return cls(document, **arrays, **cls._read_more(folder, document))

    @classmethod
    def _read_more(cls, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        """Return the further attributes of a report, by name; ``document`` has been checked."""
        del folder, document
        return {}

    @classmethod
    def _checked(cls, document: Any, source: str) -> dict[str, Any]:
        """Return ``document`` if it is of this kind and its figures can be read, or refuse it."""
        if not isinstance(document, dict) or document.get("schema") not in cls.schemas:
            known = "schema" if len(cls.schemas) == 1 else "a schema among"
            raise UntrustedFileError(f"{source}: no report of {known} {', '.join(cls.schemas)}")
        figures = document.get("figures")
        if not isinstance(figures, dict) or not isinstance(document.get("flags"), list):
            raise UntrustedFileError(f"{source}: a report has 'figures', by name, and a list of 'flags'")
        for name, entry in figures.items():
            try:
                Estimate.from_json(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise UntrustedFileError(f"{source}: figure {name[:40]!r}: {error}") from error
        return document
