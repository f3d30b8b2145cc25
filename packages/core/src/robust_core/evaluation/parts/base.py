"""What a part of an evaluation is: settings, one method, and a summary."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.run import Run, describe

__all__ = ["Part", "Summary"]


@dataclass(frozen=True)
class Summary:
    """What a part found.

    Attributes:
        n: samples measured.
        figures: short name -> figure; in the result ``<part>/<name>``.
        arrays: per-sample arrays, likewise.
        flags: red flags: reasons to distrust the figures, in sentences.
        notes: what a reader should know besides.
        data: JSON that the page or another program needs, e.g. the function that a certificate speaks of.
    """

    n: int
    figures: Mapping[str, Estimate]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    flags: Sequence[str] = ()
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


class Part(ABC):
    """One composable part of an evaluation: a frozen dataclass of settings.

    A class of your own needs :attr:`kind`, a ``name`` and :meth:`run`; see :class:`~robust_core.evaluation.Clean`.
    """

    kind: ClassVar[str]
    pools: ClassVar[bool] = False
    """Its figures depend on what other parts found, so it is summed up again when all have run."""
    name: str

    @abstractmethod
    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {f.name: describe(getattr(self, f.name)) for f in fields if f.name != "name"}
