"""Common corruptions: 15 kinds at 5 severities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from robust_core.checks import check_count
from robust_core.data.corruptions import FAMILIES, corrupt, corruptions
from robust_core.data.corruptions.constants import choose_profile
from robust_core.evaluation.metrics.accuracy import label_rank
from robust_core.evaluation.metrics.corruption import Reference, mce, relative_mce
from robust_core.evaluation.metrics.estimate import Estimate, mean, proportion
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.report import Report
from robust_core.evaluation.run import Batch, Measured, Run
from robust_core.models import predict_logits

__all__ = ["Corruptions", "reference_of"]


@dataclass(frozen=True)
class Corruptions(Part):
    """Accuracy under each corruption and severity, its mean, the families and, with a reference, mCE.

    Args:
        profile: constants of the corruptions: ``"imagenet"`` (224 pixels), ``"cifar"`` (32) or ``"small"`` (lengths
            scaled with the height; not comparable with published figures); None chooses by the size of the images.
        frost: folder of frost photographs; without it, procedural frost takes their place.
        names: corruptions; None means the 15 of the benchmark.
        severities: 1 .. 5.
        reference: a named model whose errors on the same data define mCE; None gives no mCE.
        subset: number of evenly spaced samples, or None for all.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "corruptions"
    profile: str | None = None
    frost: str | None = None
    names: Sequence[str] | None = None
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    reference: Reference | None = None
    subset: int | None = None
    name: str = "corruptions"

    def __post_init__(self) -> None:
        if not self.severities or any(check_count("severities", s) > 5 for s in self.severities):
            raise ValueError(f"severities={self.severities!r}: numbers 1 .. 5 are needed")

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        names = tuple(self.names or corruptions(frost_photos=self.frost is not None))
        data = run.subset(run.data, self.subset)
        shape = data.inputs([0]).shape
        if len(shape) != 4:
            raise ValueError(f"x has shape {tuple(shape)}; corruptions need images (B, C, H, W)")
        profile = choose_profile(self.profile, shape[2], shape[3])
        seed = run.seed_of("corruptions")

        def measure(batch: Batch) -> Measured:
            found = {"index": batch.index}
            for name in names:
                hits = []
                for severity in self.severities:
                    x = corrupt(
                        batch.x,
                        name,
                        severity,
                        index=batch.index,
                        generator=seed,
                        profile=profile,
                        frost=self.frost,
                    )
                    hits.append(predict_logits(run.model, x, batch_size=run.batch_size).argmax(1) == batch.y)
                found[name] = torch.stack(hits, 1)
            return Measured(found)

        table = run.collect(self.name, data, measure, settings=(self, names, profile))
        clean = label_rank(run.logits(data), data.y.cpu().numpy()) == 0
        return self._summary(profile, {name: table[name] for name in names}, table["index"], clean)

    def _summary(self, profile: str, correct: dict[str, np.ndarray], index: np.ndarray, clean: np.ndarray) -> Summary:
        n, names = len(clean), list(correct)
        every = np.stack([correct[name] for name in names], 1)  # (N, corruptions, severities)
        figures = {"accuracy": mean(every.mean((1, 2)), low=0, high=1), "clean_accuracy": proportion(clean)}
        worst = min(names, key=lambda name: correct[name].mean())
        figures["worst_accuracy"] = mean(correct[worst].mean(1), low=0, high=1)
        for family, members in FAMILIES.items():
            here = [m for m in names if m in members or (m == "frost" and family == "weather")]
            if here:
                figures[f"family/{family}"] = mean(np.stack([correct[m] for m in here], 1).mean((1, 2)), low=0, high=1)
        for name in names:
            for column, severity in enumerate(self.severities):
                figures[f"{name}/{severity}"] = proportion(correct[name][:, column])
        if self.reference is not None:
            errors = {name: (1 - correct[name].mean(0)).tolist() for name in names}
            figures["mce"] = Estimate(mce(errors, self.reference), None, n)
            lost = _relative(errors, float(1 - clean.mean()), self.reference)
            figures["relative_mce"] = Estimate(lost, None, n)
        notes = []
        if profile == "small":
            notes.append("profile 'small': lengths follow the image size; not comparable with published figures")
        if any("procedural" in name for name in names):
            notes.append("frost is procedural, not from photographs: not comparable with published figures")
        data = {"names": names, "severities": list(self.severities), "worst": worst, "profile": profile}
        data["reference"] = None if self.reference is None else self.reference.name
        arrays = {"correct": every, "index": index}
        return Summary(n, figures, arrays, notes=notes, data=data)


def _relative(errors: dict[str, list[float]], clean: float, reference: Reference) -> float:
    try:
        return relative_mce(errors, clean, reference)
    except ValueError:  # the reference loses nothing somewhere: the ratio does not exist, the rest of the report does
        return math.nan


def reference_of(report: Report, *, part: str = "corruptions") -> Reference:
    """Return the errors of a report's model, as the reference of other models on the same data.

    Args:
        report: with a part :class:`Corruptions` over all 15 corruptions.
        part: its name.
    """
    about = next(p for p in report.parts("corruptions") if p["name"] == part)["data"]
    errors = {
        name: [1 - report[f"{part}/{name}/{severity}"].value for severity in about["severities"]]
        for name in about["names"]
    }
    title = f"{report.document['model']} on {report.document['data']} ({report.document['model_sha256'][:8]})"
    return Reference(title, 1 - report[f"{part}/clean_accuracy"].value, errors)
