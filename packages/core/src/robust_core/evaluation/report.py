"""What an evaluation gives back: figures with intervals, red flags, per-sample arrays, files and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from robust_core.errors import UntrustedFileError
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.invariant import Comparison, check_invariant
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.schema import SCHEMA, check_document

__all__ = ["Report"]

NEEDED = {
    "clean": ("index", "label", "correct", "confidence"),
    "calibration": ("confidence", "correct"),
    "adversarial": ("index", "adversarial_distance", "robust"),
    "security-curve": ("index", "adversarial_distance"),
    "certified": ("index", "radius", "correct"),
    "corruptions": ("index", "correct"),
    "shift": ("index", "correct"),
    "translation": ("index", "steps"),
}
"""Kind of part -> arrays that it must have."""


@dataclass(frozen=True)
class Report(DocumentReport):
    """The result of one evaluation.

    A report is checked whenever it is made, by :func:`evaluate` or from a file: its keys, and that no attack in it
    breaks what a certificate in it protects.

    Attributes:
        document: the result document, see :mod:`robust_core.evaluation.schema`.
        per_sample: ``<part>/<array>`` -> array whose first axis is the sample (examples and curves aside).
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"per_sample": "per_sample.npz"}

    per_sample: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        check_document(self.document)
        _check_arrays(self.parts(), self.per_sample)
        self.comparisons()

    def __str__(self) -> str:
        d = self.document
        lines = [f"{d['model']} on {d['data']}, n={d['n']}, seed {d['seed']}, {d['device']}"]
        for label, figure, _ in self.headline():
            shown = "not measured" if figure is None else _shown(self[figure])
            lines.append(f"  {label:<32} {shown}")
        lines += [f"  FLAG: {flag}" for flag in self.flags]
        return "\n".join(lines)

    def parts(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the descriptions of the parts, of one kind or all."""
        return [p for p in self.document["details"]["parts"] if kind in (None, p["kind"])]

    def arrays(self, part: str) -> dict[str, np.ndarray]:
        """Return the per-sample arrays of a part, by short name."""
        prefix = f"{part}/"
        return {k[len(prefix) :]: v for k, v in self.per_sample.items() if k.startswith(prefix)}

    def comparisons(self) -> tuple[Comparison, ...]:
        """Compare certificates with attacks; see :func:`~robust_core.evaluation.invariant.check_invariant`."""
        try:
            return check_invariant(self.parts(), self.per_sample)
        except (KeyError, IndexError, TypeError) as error:
            raise UntrustedFileError(f"per-sample arrays and parts do not fit together: {error!r}") from error

    def headline(self) -> list[tuple[str, str | None, str]]:
        """Return the five numbers: (label, name of the figure or None, kind of the part that measures it)."""
        wanted = (
            ("clean accuracy", "clean", "accuracy"),
            ("accuracy under attack", "adversarial", "accuracy"),
            ("mean accuracy under corruption", "corruptions", "accuracy"),
            ("effective robustness to shift", "shift", "effective_robustness"),
            ("expected calibration error", "calibration", "ece"),
        )
        found: list[tuple[str, str | None, str]] = []
        for label, kind, figure in wanted:
            names = [f"{p['name']}/{figure}" for p in self.parts(kind)]
            present = [name for name in names if name in self.document["figures"]]
            if kind == "shift" and len(present) > 1:
                present = ["mean_effective_robustness"]
            found.append((label, present[0] if present else None, kind))
        return found

    def html(self, *, beside: Sequence[Report] = ()) -> str:
        """Return the report as one self-contained page: no script, no remote asset.

        Args:
            beside: reports of other models on the same data, to show this one beside.

        Raises:
            IncomparableError: ``beside`` holds figures of other data, n, radii or preprocessing.
        """
        from robust_core.evaluation.page import render

        return render(self, beside)

    def save(self, directory: str | os.PathLike[str], *, beside: Sequence[Report] = ()) -> Path:
        """Write ``result.json``, ``per_sample.npz`` and ``report.html`` into a folder, each atomically.

        Args:
            directory: made if it is not there.
            beside: reports of other models, which the page shows beside this one; their files are not written.
        """
        return self._save(directory, self.html(beside=beside))

    @classmethod
    def _checked(cls, document: Any, source: str) -> dict[str, Any]:
        return check_document(document, source=source)


def _check_arrays(parts: list[dict[str, Any]], per_sample: Mapping[str, np.ndarray]) -> None:
    """Every part has the arrays that its page and the paired tests need, one row for each of its samples."""
    prefixes = tuple(f"{part['name']}/" for part in parts)
    strange = [name for name in per_sample if not name.startswith(prefixes)]
    if strange:
        raise UntrustedFileError(f"per-sample arrays {strange[:3]} belong to no part")
    for part in parts:
        for name in NEEDED.get(part["kind"], ()):
            array = per_sample.get(f"{part['name']}/{name}")
            if array is None or array.ndim < 1 or len(array) != part["n"]:
                found = "missing" if array is None else f"of shape {array.shape}"
                raise UntrustedFileError(f"part {part['name']!r} of {part['n']} samples: its array {name!r} is {found}")


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "undefined"
    interval = estimate.interval
    spread = "" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return f"{estimate.value:.4f}{spread} n={estimate.n}"
