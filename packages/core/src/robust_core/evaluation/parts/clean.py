"""Clean data: accuracy, calibration, other data sets of the same classes, and small translations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count
from robust_core.data import Dataset, as_dataset
from robust_core.evaluation.metrics import calibration
from robust_core.evaluation.metrics.accuracy import group_accuracies, label_rank, worst_group_accuracy
from robust_core.evaluation.metrics.estimate import Estimate, mean, proportion
from robust_core.evaluation.metrics.shift import Baseline, relative_robustness
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.run import Batch, Measured, Run
from robust_core.models import predict_logits

__all__ = ["Calibration", "Clean", "Shift", "TranslationConsistency"]


@dataclass(frozen=True)
class Clean(Part):
    """Accuracy on the data as they are: top-1, top-5, every class, the worst class, and the worst group.

    Args:
        groups: (N,) group of each sample (background, hospital, ...), for the worst-group accuracy.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "clean"
    groups: Tensor | None = None
    name: str = "clean"

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        logits, y = run.logits(run.data), run.data.y.cpu().numpy()
        rank = label_rank(logits, y)
        correct = rank == 0
        figures = {"accuracy": proportion(correct)}
        if run.n_classes > 5:
            figures["top5_accuracy"] = proportion(rank < 5)
        figures["worst_class_accuracy"], worst = worst_group_accuracy(correct, y)
        figures |= {f"class/{label}": e for label, e in group_accuracies(correct, y).items()}
        data: dict[str, Any] = {"worst_class": worst}
        if self.groups is not None:
            figures["worst_group_accuracy"], data["worst_group"] = worst_group_accuracy(correct, self.groups)
            figures |= {f"group/{g}": e for g, e in group_accuracies(correct, self.groups).items()}
        confidence = _confidence(logits)
        arrays = {
            "prediction": logits.argmax(1),
            "correct": correct,
            "label": y,
            "index": run.data.index.cpu().numpy(),
            "confidence": confidence,
        }
        return Summary(len(y), figures, arrays, data=data)


def _confidence(logits: np.ndarray) -> np.ndarray:
    return np.exp(calibration.log_probabilities(logits).max(1))


def calibration_figures(logits: np.ndarray, y: np.ndarray) -> dict[str, Estimate]:
    """Return NLL, Brier score and the calibration errors of (N, C) logits."""
    n = len(y)
    confidence, correct = _confidence(logits), label_rank(logits, y) == 0
    return {
        "ece": Estimate(calibration.ece(confidence, correct), None, n),
        "adaptive_ece": Estimate(calibration.adaptive_ece(confidence, correct), None, n),
        "nll": mean(calibration.negative_log_likelihood(logits, y), low=0),
        "brier": mean(calibration.brier(logits, y), low=0, high=2),
        "aurc": Estimate(calibration.aurc(confidence, correct), None, n),
    }


@dataclass(frozen=True)
class Calibration(Part):
    """Whether stated confidences mean what they say, and whether they rank mistakes.

    Args:
        held_out: data of the same kind on which the temperature is fitted, never the data under evaluation; without
            it no temperature is fitted.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "calibration"
    held_out: Dataset | tuple[Tensor, Tensor] | None = None
    name: str = "calibration"

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        logits, y = run.logits(run.data), run.data.y.cpu().numpy()
        n = len(y)
        figures = calibration_figures(logits, y)
        probabilities = np.exp(calibration.log_probabilities(logits))
        figures["classwise_ece"] = Estimate(calibration.classwise_ece(probabilities, y), None, n)
        floor, limit = calibration.noise_floor(probabilities.max(1), generator=run.seed_of("calibration"))
        figures["ece_if_calibrated"] = Estimate(floor, None, n)
        figures["ece_limit"] = Estimate(limit, None, n)
        notes = [f"{calibration.N_BINS} right-closed bins of equal width on the confidence of the top class"]
        if self.held_out is not None:
            held_out = as_dataset(self.held_out, name="held out")
            _check_disjoint(held_out, run.data)
            temperature = calibration.fit_temperature(run.logits(held_out), held_out.y.cpu().numpy())
            scaled = calibration_figures(logits / temperature, y)
            figures["temperature"] = Estimate(temperature, None, len(held_out))
            figures |= {f"scaled/{name}": scaled[name] for name in ("ece", "nll", "brier")}
        arrays = {"confidence": probabilities.max(1), "correct": label_rank(logits, y) == 0}
        return Summary(n, figures, arrays, notes=notes, data={"n_bins": calibration.N_BINS})


def _check_disjoint(held_out: Dataset, data: Dataset) -> None:
    if held_out.sha256 == data.sha256:
        raise ValueError("held_out is the data under evaluation: a temperature must be fitted on other samples")


@dataclass(frozen=True)
class Shift(Part):
    """Accuracy and calibration on another data set of the same classes.

    Args:
        data: the shifted data; labels in the class numbers of the model.
        name: prefix of the figures; a shift has a name of its own, such as ``"imagenet-v2"``.
        classes: classes of the model that occur under the shift; the others are masked before the arg-max, here and
            for the accuracy in distribution that rho compares with.
        baseline: line over declared baseline models (``metrics.fit_baseline``), for the effective robustness rho.
        base_accuracy: accuracy under the shift of the model that this one was made from, for tau.
    """

    kind: ClassVar[str] = "shift"
    data: Dataset | tuple[Tensor, Tensor]
    name: str
    classes: Sequence[int] | None = None
    baseline: Baseline | None = None
    base_accuracy: float | None = None

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        data = as_dataset(self.data, name=self.name)
        y = data.y.cpu().numpy()
        logits = self._masked(run.logits(data), y)
        correct = label_rank(logits, y) == 0
        figures = {"accuracy": proportion(correct), **calibration_figures(logits, y)}
        here = run.data.y.cpu().numpy()
        rows = np.isin(here, self.classes) if self.classes is not None else np.ones(len(here), dtype=bool)
        notes, acc_id = [], None
        if rows.any():
            figures["id_accuracy"] = proportion(
                label_rank(self._masked(run.logits(run.data)[rows], here[rows]), here[rows]) == 0
            )
            acc_id = figures["id_accuracy"].value
        if self.baseline is not None and acc_id is not None:
            rho = self.baseline.effective_robustness(acc_id, figures["accuracy"].value)
            low, high = figures["accuracy"].interval or (math.nan, math.nan)
            shift = rho - figures["accuracy"].value
            figures["effective_robustness"] = Estimate(rho, (low + shift, high + shift), len(y))
            if not self.baseline.in_range(acc_id):
                notes.append("the accuracy in distribution lies outside the baselines: rho is an extrapolation")
        if self.base_accuracy is not None:
            tau = relative_robustness(figures["accuracy"].value, self.base_accuracy)
            figures["relative_robustness"] = Estimate(tau, None, len(y))
        line = None
        if self.baseline is not None:
            b = self.baseline
            line = {"domain": b.domain, "slope": b.slope, "intercept": b.intercept}
            line |= {"acc_id": list(b.acc_id), "acc_shift": list(b.acc_shift)}
        about = {"data": data.name, "data_sha256": data.sha256, "baseline": line}
        arrays = {"correct": correct, "index": data.index.cpu().numpy(), "confidence": _confidence(logits)}
        return Summary(len(y), figures, arrays, notes=notes, data=about)

    def _masked(self, logits: np.ndarray, y: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return logits
        keep = np.asarray(self.classes)
        if not np.isin(y, keep).all():
            raise ValueError(f"classes of shift {self.name!r} lack labels that occur in its data")
        masked = np.full_like(logits, -np.inf)
        masked[:, keep] = logits[:, keep]
        return masked


@dataclass(frozen=True)
class TranslationConsistency(Part):
    """Share of samples whose prediction stays the same under every shift by 1 .. k pixels, diagonal ones included.

    All ``(2 k + 1)^2 - 1`` integer shifts are tried, so the figure is exact on these samples: no attacker who may only
    shift the image by up to k pixels can change more. Correctness plays no role.

    Args:
        max_shift: largest shift k, in pixels.
        padding: what fills the uncovered border: ``"replicate"`` (the edge) or ``"zeros"``.
        subset: number of evenly spaced samples, or None for all.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "translation"
    max_shift: int = 2
    padding: Literal["replicate", "zeros"] = "replicate"
    subset: int | None = None
    name: str = "translation"

    def __post_init__(self) -> None:
        check_count("max_shift", self.max_shift)
        check_choice("padding", self.padding, ("replicate", "zeros"))

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        data = run.subset(run.data, self.subset)

        def measure(batch: Batch) -> Measured:
            first, robust = self._steps(run, batch)
            return Measured({"steps": first, "robust_steps": robust, "index": batch.index})

        table = run.collect(self.name, data, measure, settings=self)
        steps, robust = table["steps"], table["robust_steps"]
        radii = range(1, self.max_shift + 1)
        figures = {f"consistency@{k}": proportion(steps >= k) for k in radii}
        figures |= {f"accuracy@{k}": proportion(robust >= k) for k in radii}
        return Summary(len(data), figures, dict(table.arrays))

    def _steps(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, row by row, the largest k whose shifts all keep the prediction, and all are right (-1: none is)."""
        x, k = batch.x, self.max_shift
        if x.ndim != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; shifts need images (B, C, H, W)")
        mode = "constant" if self.padding == "zeros" else "replicate"
        wide = nn.functional.pad(x, (k, k, k, k), mode=mode)
        height, width = x.shape[2:]

        def predict(dy: int, dx: int) -> Tensor:
            moved = wide[:, :, k + dy : k + dy + height, k + dx : k + dx + width].contiguous()
            return predict_logits(run.model, moved, batch_size=run.batch_size).argmax(1)

        clean = predict(0, 0)
        same = torch.full_like(clean, k)
        right = torch.where(clean == batch.y, k, -1)
        for dy in range(-k, k + 1):
            for dx in range(-k, k + 1):
                size = max(abs(dy), abs(dx))
                if size == 0:
                    continue
                found = predict(dy, dx)
                same = torch.where(found == clean, same, same.clamp(max=size - 1))
                right = torch.where(found == batch.y, right, right.clamp(max=size - 1))
        return same, right
