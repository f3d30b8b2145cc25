"""Tightness on a data set, beside what it must be read with: accuracy, verified accuracy, the state of the ReLUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.certificates.bounds import Graph, IntervalBounds
from robust_core.certificates.bounds.graph import operator_of
from robust_core.certificates.bounds.operators import Activation, Rectifier
from robust_core.checks import check_count
from robust_core.data import as_dataset
from robust_core.evaluation.metrics.estimate import Estimate, mean, proportion, share
from robust_core.evaluation.parts import Part, Summary
from robust_core.evaluation.run import Batch, Measured, Run
from robust_core.models import model_device
from robust_core.threats import Threat
from vision_robust.certified.ibp_tightness.local import box_region, check_box, double_graph, graph_widths, output_rows

__all__ = ["Layer", "Tightness", "TightnessReport", "tightness_report"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Layer:
    """What intervals of the given radius do in front of one activation.

    Attributes:
        name: number of the activation, from 1, in the order of the forward pass.
        label: its kind and where it stands.
        growth: mean radius in front of it over that of what the first dense layer reads.
        active: share of units whose interval lies at or above 0; NaN where the activation is no ReLU.
        inactive: share of units whose interval lies below 0.
        unstable: share of the rest.
        dead: share of units that are inactive on every sample.
    """

    name: str
    label: str
    growth: float
    active: float
    inactive: float
    unstable: float
    dead: float


@dataclass(frozen=True)
class TightnessReport:
    """Local tightness of a model on a data set. Never read it without the two accuracies.

    Attributes:
        tightness: (N,) mean local tightness over the margins of each sample; NaN where intervals have width 0.
        correct: (N,) predicted right.
        verified: (N,) predicted right, and interval bounds prove that the box holds no other prediction.
        layers: what happens in front of each activation.
    """

    tightness: np.ndarray
    correct: np.ndarray
    verified: np.ndarray
    layers: tuple[Layer, ...]

    @property
    def mean(self) -> float:
        """Mean tightness over the samples where it is defined; NaN where it is nowhere."""
        known = self.tightness[~np.isnan(self.tightness)]
        return float(known.mean()) if len(known) else math.nan

    def quantile(self, q: float) -> float:
        """Return the quantile of the samples' tightness, over those where it is defined."""
        known = self.tightness[~np.isnan(self.tightness)]
        return float(np.quantile(known, q)) if len(known) else math.nan

    def figures(self) -> dict[str, float]:
        """Return the figures as plain numbers: what ``on_epoch`` of a training may log."""
        return {name: estimate.value for name, estimate in self.estimates().items()}

    def estimates(self) -> dict[str, Estimate]:
        """Return the figures with their 95 % intervals."""
        n = len(self.tightness)
        known = self.tightness[~np.isnan(self.tightness)]
        found = {
            "tightness": mean(known, low=0, high=1),
            "accuracy": proportion(self.correct),
            "verified_accuracy": proportion(self.verified),
            "undefined": share(n - len(known), n),
        }
        found |= {f"tightness_q{100 * q:02.0f}": Estimate(self.quantile(q), None, len(known)) for q in QUANTILES}
        for layer in self.layers:
            found[f"growth/{layer.name}"] = Estimate(layer.growth, None, n)
            if not math.isnan(layer.active):
                shares = {key: getattr(layer, key) for key in ("active", "inactive", "unstable", "dead")}
                found |= {f"{key}/{layer.name}": Estimate(value, None, n) for key, value in shares.items()}
        return found


class _Meter:
    """Measures batch after batch on one float64 copy of a model."""

    def __init__(self, model: nn.Module, threat: Threat, max_elements: int = 2**24) -> None:
        self.model, self.threat = model, threat
        self.max_elements = check_count("max_elements", max_elements)
        self.certifier = IntervalBounds(model, threat)
        self.known: Graph | None = None

    def graph(self, x: Tensor) -> Graph:
        if self.known is None:
            self.known = double_graph(self.model, x)
        return self.known

    def layers(self) -> list[tuple[str, int, bool]]:
        """Return label, position of the pre-activation and whether it is a ReLU, for each activation."""
        if self.known is None:
            raise RuntimeError("a batch is measured before layers are asked for")
        found: list[tuple[str, int, bool]] = []
        for node in self.known.nodes[1:]:
            operator = operator_of(node)
            if isinstance(operator, Activation):
                found.append((operator.label, node.inputs[0], isinstance(operator, Rectifier)))
        return found

    def measure(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return tensors of a batch; those whose name starts with ``_`` have one row for all of it."""
        certificate = self.certifier.certify(x, y)
        region, graph = box_region(x, self.threat), self.graph(x)
        exact, loose = graph_widths(graph, region, output_rows(graph, x, y), self.max_elements)
        correct = certificate.prediction == y
        measured = {
            "tightness": torch.where(loose > 0, exact / loose, torch.nan).nanmean(1),
            "correct": correct,
            "verified": certificate.certified & correct,
        }
        with torch.no_grad():
            boxes = graph.intervals(region.box, None)
        first = next((node.inputs[0] for node in graph.nodes[1:] if operator_of(node).dense), 0)
        measured["start"] = boxes[first].radius.flatten(1).mean(1)
        radius, active, inactive, alive = [], [], [], []
        for _, position, _ in self.layers():
            box = boxes[position]
            radius.append(box.radius.flatten(1).mean(1))
            on, off = (box.lower >= 0).flatten(1), (box.upper < 0).flatten(1)
            active.append(on.double().mean(1))
            inactive.append(off.double().mean(1))
            alive.append((~off).any(0))
        if radius:
            rows = {"radius": radius, "active": active, "inactive": inactive}
            measured |= {name: torch.stack(columns, dim=1) for name, columns in rows.items()}
            measured["_alive"] = torch.cat(alive).unsqueeze(0)
        return measured

    def report(self, arrays: Mapping[str, np.ndarray]) -> TightnessReport:
        """Return the report of all batches, put together."""
        layers, first = [], 0
        for number, (label, position, rectifier) in enumerate(self.layers()):
            units = math.prod(self.graph_shape(position))
            alive = arrays["_alive"][:, first : first + units].any(0)
            first += units
            active, inactive = (float(arrays[key][:, number].mean()) for key in ("active", "inactive"))
            growth = float(arrays["radius"][:, number].mean() / arrays["start"].mean())
            states = (active, inactive, 1 - active - inactive, 1 - float(alive.mean()))
            layers.append(Layer(f"{number + 1}", label, growth, *(states if rectifier else [math.nan] * 4)))
        return TightnessReport(arrays["tightness"], arrays["correct"], arrays["verified"], tuple(layers))

    def graph_shape(self, position: int) -> tuple[int, ...]:
        if self.known is None:
            raise RuntimeError("a batch is measured before shapes are asked for")
        return self.known.nodes[position].shape


def tightness_report(model: nn.Module, data: Any, threat: Threat, *, batch_size: int = 256) -> TightnessReport:
    """Measure a model on a data set.

    In a training: ``fit(..., on_epoch=lambda state: tightness_report(state.model, held_out, threat).figures())``, or
    ``Monitor(..., measures={"tightness": lambda model: tightness_report(model, held_out, threat).mean})`` of
    :mod:`vision_robust.certified.fast_certified_training`, whose plot then shows it.

    Args:
        model: an ``nn.Module`` of supported layers, taken in eval mode; left as found.
        data: a ``Dataset``, a pair ``(x, y)``, or a map-style data set.
        threat: an ``Linf`` ball; the accuracies and the states of units are those at its radius.
        batch_size: inputs at a time.
    """
    data = as_dataset(data)
    if not len(data):
        raise ValueError("data is empty: nothing can be measured")
    meter = _Meter(model, threat)
    device = model_device(model) or torch.device("cpu")
    found: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(data)).split(check_count("batch_size", batch_size)):
        batch = data.batch(rows)
        found.append({k: v.cpu() for k, v in meter.measure(batch["x"].to(device), batch["y"].to(device)).items()})
    return meter.report({name: torch.cat([part[name] for part in found]).numpy() for name in found[0]})


@dataclass(frozen=True)
class Tightness(Part):
    """Part of an evaluation: local tightness, beside accuracy and accuracy verified by intervals.

    Args:
        threat: an ``Linf`` ball.
        subset: number of evenly spaced samples, or None for all.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "tightness"
    threat: Threat
    subset: int | None = None
    name: str = "tightness"

    def __post_init__(self) -> None:
        check_box(self.threat)

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        if not isinstance(run.model, nn.Module):
            raise TypeError(f"the model is a {type(run.model).__name__}; tightness needs an nn.Module")
        data = run.subset(run.data, self.subset)
        meter = _Meter(run.model, self.threat)
        meter.graph(data.batch(range(1))["x"].to(run.device))

        def measure(batch: Batch) -> Measured:
            return Measured({**meter.measure(batch.x, batch.y), "index": batch.index})

        table = run.collect(self.name, data, measure, settings=self)
        report = meter.report(table.arrays)
        arrays = {name: table[name] for name in ("tightness", "correct", "verified", "index")}
        flags = []
        undefined = int(np.isnan(report.tightness).sum())
        if undefined:
            flags.append(
                f"{undefined} of {len(data)} samples reach the last layer through no active unit: interval bounds have "
                "width 0 there and tightness is undefined; the network has collapsed or is dead in part"
            )
        notes = [
            "local tightness: 1 where interval bounds are exact. Neither high nor low is good in itself: read it "
            "beside accuracy and verified accuracy; a collapsed network has a tightness without meaning"
        ]
        layers = [{"name": layer.name, "label": layer.label} for layer in report.layers]
        return Summary(len(data), report.estimates(), arrays, flags, notes, {"layers": layers})
