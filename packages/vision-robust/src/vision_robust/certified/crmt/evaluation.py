"""Accuracy where modalities are missing, as a part of any evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robust_core.evaluation import Part, Summary
from robust_core.evaluation.metrics import proportion
from robust_core.evaluation.run import Batch, Measured, Run
from robust_core.models import predict_logits
from vision_robust.certified.crmt.model import Packed

__all__ = ["MissingModalities"]


@dataclass(frozen=True)
class MissingModalities(Part):
    """Accuracy with all modalities, and with each one missing in turn.

    Args:
        fill: what stands in the place of a missing modality; None leaves its scores out.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "missing"
    fill: float | None = 0.0
    name: str = "missing"

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``.

        Raises:
            TypeError: the model is not a packed classifier of several modalities.
        """
        if not isinstance(run.model, Packed):
            raise TypeError(f"model is a {type(run.model).__name__}; missing modalities need a Packed classifier")
        views = {"all": run.model}
        views |= {f"without_{name}": run.model.without([name], self.fill) for name in run.model.names}

        def measure(batch: Batch) -> Measured:
            found = {name: predict_logits(view, batch.x).argmax(1) == batch.y for name, view in views.items()}
            return Measured({**found, "index": batch.index})

        table = run.collect(self.name, run.data, measure, settings=self)
        figures = {f"accuracy/{name}": proportion(table[name]) for name in views}
        return Summary(len(run.data), figures, dict(table.arrays))
