"""What to watch while a network is trained for interval bounds, and a figure of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds import IntervalBounds, TrainingPass
from robust_core.checks import check_count, check_labels, check_number
from robust_core.models import frozen
from robust_core.threats import Threat
from robust_core.training import TrainState
from vision_robust.certified.fast_certified_training.objective import LEAST_EPS, FastCertified

__all__ = ["BoundFigures", "Monitor", "bound_figures", "bound_growth", "plot_training"]


@dataclass(frozen=True)
class BoundFigures:
    """A network in eval mode under interval bounds of one radius.

    Attributes:
        eps: the radius.
        clean: share of inputs that are classified right.
        verified: share of inputs that are classified right and whose bounds prove it for the whole ball (in the
            model's own arithmetic; ``IntervalBounds.certify`` covers rounding as well).
        growth: mean radius in front of the last activation over that of the input.
        active: share of units (over inputs and layers of activations) whose lower bound is above 0.
        inactive: share whose upper bound is below 0.
        unstable: the rest.
        dead: share of units that are inactive for every input.
    """

    eps: float
    clean: float
    verified: float
    growth: float
    active: float
    inactive: float
    unstable: float
    dead: float


def bound_growth(
    model: nn.Module, x: Tensor, threat: Threat, *, eps: float | None = None, batch_size: int = 256
) -> dict[str, float]:
    """Return E[delta_i] / E[delta_0] in front of each activation, by its name, in order.

    Args:
        model: the network, bounded in eval mode.
        x: (B, ...) inputs.
        threat: the ball.
        eps: another radius than that of the threat.
        batch_size: inputs at a time.
    """
    radius = threat.eps if eps is None else check_number("eps", eps, low=0)
    bounds, totals = IntervalBounds(model, threat), {"": 0.0}
    with frozen(model), torch.no_grad():
        for part in x.split(batch_size):
            labels = torch.zeros(len(part), dtype=torch.int64, device=x.device)
            found = bounds.training_pass(part, labels, eps=radius)
            for name, box in [("", found.start), *found.activations]:
                totals[name] = totals.get(name, 0.0) + len(part) * float(box.radius.double().mean())
    start = totals.pop("")
    return {name: total / start for name, total in totals.items()}


def bound_figures(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, eps: float | None = None, batch_size: int = 256
) -> BoundFigures:
    """Measure a network in eval mode; it is left as found.

    Args:
        model: the network.
        x: (B, ...) inputs.
        y: (B,) labels.
        threat: the ball.
        eps: another radius than that of the threat.
        batch_size: inputs at a time.
    """
    check_labels(y, len(x))
    radius = threat.eps if eps is None else check_number("eps", eps, low=0)
    bounds, tally = IntervalBounds(model, threat), _Tally()
    with frozen(model), torch.no_grad():
        for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            tally.add(bounds.training_pass(part, labels, eps=radius), labels)
    return tally.figures(radius)


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(
            ("n", "clean", "verified", "first", "last", "active", "inactive", "units"), 0.0
        )
        self.asleep: list[Tensor] = []

    def add(self, found: TrainingPass, y: Tensor) -> None:
        right = found.logits.argmax(1) == y
        proven = right & (found.margins.scatter(1, y[:, None], torch.inf) > 0).all(1)
        boxes = [box for _, box in found.activations]
        off = [box.upper < 0 for box in boxes]
        new = {
            "n": len(y),
            "clean": right.sum(),
            "verified": proven.sum(),
            "first": len(y) * found.start.radius.double().mean(),
            "last": len(y) * boxes[-1].radius.double().mean() if boxes else 0.0,
            "active": sum(int((box.lower > 0).sum()) for box in boxes),
            "inactive": sum(int(part.sum()) for part in off),
            "units": sum(part.numel() for part in off),
        }
        for name, value in new.items():
            self.sums[name] += float(value)
        every = [part.all(0) for part in off]
        self.asleep = [a & b for a, b in zip(self.asleep, every, strict=True)] if self.asleep else every

    def figures(self, eps: float) -> BoundFigures:
        of, width = self.sums, sum(part.numel() for part in self.asleep)
        units = max(of["units"], 1.0)
        return BoundFigures(
            eps=eps,
            clean=of["clean"] / of["n"],
            verified=of["verified"] / of["n"],
            growth=of["last"] / of["first"] if of["first"] else float("nan"),
            active=of["active"] / units,
            inactive=of["inactive"] / units,
            unstable=(of["units"] - of["active"] - of["inactive"]) / units,
            dead=sum(int(part.sum()) for part in self.asleep) / max(width, 1),
        )


@dataclass
class Monitor:
    """Measure after each epoch: ``fit(..., on_epoch=Monitor(objective, x, y))``.

    Attributes:
        objective: the objective that is being trained, which knows the present radius.
        x: (B, ...) inputs to measure on, not those that are trained on.
        y: (B,) their labels.
        measures: further figures of the model, name -> function, e.g. the tightness of its bounds.
        every: epochs between measurements.
        records: what was measured, one mapping for each time.
        best: state of the model at the best verified accuracy among epochs at the full radius, if there was one. It
            is kept in memory alone: a run that resumes looks for it anew.
    """

    objective: FastCertified
    x: Tensor
    y: Tensor
    measures: Mapping[str, Callable[[nn.Module], float]] = field(default_factory=dict)
    every: int = 1
    records: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    _best: float = -1.0

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_labels(self.y, len(self.x))

    def __call__(self, state: TrainState) -> dict[str, float] | None:
        """Return the figures of this epoch, which ``fit`` writes to its log."""
        if state.epoch % self.every:
            return None
        threat, eps = self.objective.threat, self.objective.eps
        figures = bound_figures(state.averaged, self.x, self.y, threat, eps=max(eps, LEAST_EPS))
        record = {"epoch": float(state.epoch), **asdict(figures), "eps": eps}
        with frozen(state.averaged):
            record |= {name: float(measure(state.averaged)) for name, measure in self.measures.items()}
        self.records.append(record)
        if eps == threat.eps and figures.verified > self._best:
            self._best = figures.verified
            self.best = {name: value.detach().clone() for name, value in state.averaged.state_dict().items()}
        return {name: value for name, value in record.items() if name != "epoch" and math.isfinite(value)}


def plot_training(records: Sequence[Mapping[str, Any]] | str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw accuracy, growth of bounds, states of units and all further measures over the epochs, one below the other.

    Args:
        records: ``Monitor.records``, or the ``.jsonl`` file that ``fit`` wrote.
        path: the picture to write; its suffix says the format.

    Raises:
        ValueError: no record holds what :class:`Monitor` measures.
    """
    from matplotlib.figure import Figure  # only here: importing it takes a second

    if isinstance(records, str | os.PathLike):
        records = [json.loads(line) for line in Path(records).read_text().splitlines() if line.strip()]
    rows = [row for row in records if "verified" in row and "growth" in row]
    if not rows:
        raise ValueError("records holds none of a Monitor; pass fit(..., on_epoch=Monitor(...)) first")
    known = {"step", "epoch", *BoundFigures.__dataclass_fields__}
    further = [name for name in rows[-1] if name not in known]
    panels: list[tuple[str, list[str]]] = [
        ("share of inputs", ["clean", "verified"]),
        ("growth of radii", ["growth"]),
        ("share of units", ["active", "inactive", "unstable", "dead"]),
        *([("further", further)] if further else []),
    ]
    figure = Figure(figsize=(7, 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    epochs = [row["epoch"] for row in rows]
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(epochs, [row.get(name, float("nan")) for row in rows], label=name)
        axis.set_ylabel(label)
        axis.legend(loc="best", fontsize="small")
    axes[1].set_yscale("log")
    radius = axes[0].twinx()
    radius.plot(epochs, [row["eps"] for row in rows], color="grey", linestyle=":")
    radius.set_ylabel("radius")
    axes[-1].set_xlabel("epoch")
    figure.savefig(path)
    return Path(path)
