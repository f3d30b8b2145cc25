"""Certificates: which samples provably keep their class, and how far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from robust_core.certificates.result import Certificate, Certifier, Status
from robust_core.evaluation.metrics.certified import average_certified_radius, certified_accuracy
from robust_core.evaluation.metrics.estimate import Estimate, proportion, share
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.run import Batch, Measured, Run, Table

__all__ = ["Certified", "NotCertified"]


@dataclass(frozen=True)
class Certified(Part):
    """Certified accuracy over radii, the average certified radius, and the count of every status.

    Args:
        certifier: anything with ``certify(x, y) -> Certificate``; it holds its own model.
        radii: radii of the table; None chooses round numbers up to the largest radius found.
        subset: number of evenly spaced samples, or None for all. Certificates by sampling are expensive: state n.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "certified"
    certifier: Certifier
    radii: Sequence[float] | None = None
    subset: int | None = None
    name: str = "certified"

    def run(self, run: Run) -> Summary:
        """Certify the data."""
        data = run.subset(run.data, self.subset)
        accepted = inspect.signature(self.certifier.certify).parameters
        extras = {"index", "generator"} & set(accepted)

        def measure(batch: Batch) -> Measured:
            given = {"index": batch.index, "generator": run.seed_of(self.name)}
            found = self.certifier.certify(batch.x, batch.y, **{k: v for k, v in given.items() if k in extras})
            about = {k: getattr(found.about, k) for k in ("function", "fingerprint", "norm", "method")}
            tensors = {"prediction": found.prediction, "radius": found.radius, "status": found.status}
            info = {"about": about, "alpha": found.alpha, "rigorous": found.rigorous, **_cost(found)}
            return Measured({**tensors, "correct": _counts(found, batch), "index": batch.index}, info)

        table = run.collect(self.name, data, measure, settings=self)
        return self._summary(table)

    def _summary(self, table: Table) -> Summary:
        abouts = [info["about"] for info in table.infos]
        if any(about != abouts[0] for about in abouts):
            raise ValueError(f"part {self.name!r}: the certifier spoke of different functions in different batches")
        radius, correct = table["radius"], table["correct"]
        n = len(radius)
        radii = sorted({0.0, *(self.radii if self.radii is not None else round_radii(radius))})
        figures = {f"accuracy@{r:g}": certified_accuracy(radius, correct, r) for r in radii}
        figures["acr"] = average_certified_radius(radius, correct)
        figures |= {f"status/{s.name.lower()}": proportion(table["status"] == s) for s in Status}
        figures["certified_wrong"] = share(int(((table["status"] == Status.CERTIFIED) & ~correct).sum()), n)
        alpha = max(float(info["alpha"]) for info in table.infos)
        rigorous = all(info["rigorous"] for info in table.infos)
        notes = []
        if alpha:
            certified = int((table["status"] == Status.CERTIFIED).sum())
            figures["expected_false"] = Estimate(alpha * certified, None, n)
            notes.append(
                f"each certificate is false with probability at most {alpha:g}: in expectation at most "
                f"{alpha * certified:.3g} of {certified}; all of them hold together with probability at least "
                f"{max(0.0, 1 - alpha * certified):.3g} (union bound)"
            )
        if not rigorous:
            notes.append("rounding of the arithmetic is not accounted for: these bounds are not rigorous")
        cost: dict[str, float] = {}
        for info in table.infos:
            for key, value in info.items():
                if key not in ("about", "alpha", "rigorous"):
                    cost[key] = cost.get(key, 0.0) + float(value)
        data = {**abouts[0], "alpha": alpha, "rigorous": rigorous, "radii": radii, "cost": cost}
        return Summary(n, figures, dict(table.arrays), notes=notes, data=data)


@dataclass(frozen=True)
class NotCertified(Part):
    """A certifier that has nothing to say of the model: the report lists it with the reason.

    Args:
        name: of the certifier.
        why: a sentence.
        harden_first: command that trains a model of which it can speak, if there is one.
    """

    kind: ClassVar[str] = "not-certified"
    name: str
    why: str
    harden_first: str = ""

    def run(self, run: Run) -> Summary:
        """Measure nothing."""
        return Summary(0, {}, data={"why": self.why, "harden_first": self.harden_first})


def _counts(found: Certificate, batch: Batch) -> torch.Tensor:
    return found.certified & (found.prediction.to(batch.y.device) == batch.y)


def _cost(found: Certificate) -> dict[str, float]:
    return {k: float(v) for k, v in found.cost.items() if k != "seconds" and math.isfinite(v)}


def round_radii(radius: np.ndarray, *, at_most: int = 8) -> list[float]:
    """Return up to ``at_most`` multiples of 1, 2 or 5 times a power of ten that span the radii, and the largest.

    Certificates of one threat all have its radius: then that one alone.
    """
    levels = np.unique(radius[radius > 0])
    if len(levels) < 2:
        return levels.tolist()
    largest = float(levels[-1])
    power = math.floor(math.log10(largest))
    steps = [base * 10.0**exponent for exponent in range(power - 2, power + 2) for base in (1.0, 2.0, 5.0)]
    step = next(step for step in steps if largest / step <= at_most)
    grid = [float(np.round(step * k, 12)) for k in range(1, int(largest / step + 1e-9) + 1)]
    return grid if grid[-1] >= largest * (1 - 1e-9) else [*grid, largest]
