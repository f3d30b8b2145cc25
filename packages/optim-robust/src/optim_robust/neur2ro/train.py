"""Training: mean squared error on scaled labels, through the one training loop of the core."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from optim_robust.neur2ro.data import ValueData, generate
from optim_robust.neur2ro.families import Family
from optim_robust.neur2ro.model import LABEL_SCALINGS, ValueModel
from optim_robust.neur2ro.network import SetValueNetwork
from robust_core.checks import check_choice, check_count, check_number
from robust_core.io import load_tensors, save_tensors
from robust_core.random import Seed, derive, resolve_seed
from robust_core.training import Batch, Loss, TrainState, cosine, fit, scheduled

__all__ = ["ValueRegression", "fit_value_network", "scales_of", "train", "untrained"]

_LOGGER = logging.getLogger(__name__)
Array = NDArray[np.float64]
OnStep = Callable[[str, int, int], None]


def _ends(tables: list[Array]) -> tuple[Tensor, Tensor]:
    low = np.min([table.reshape(-1, table.shape[-1]).min(0) for table in tables], axis=0)
    high = np.max([table.reshape(-1, table.shape[-1]).max(0) for table in tables], axis=0)
    span = np.where(high > low, high - low, 1.0)
    return torch.from_numpy(low), torch.from_numpy(span)


def scales_of(data: ValueData, label_scaling: str) -> dict[str, Tensor]:
    """Return the scales of features (min-max; those that follow xi over the sampled scenarios) and of labels."""
    check_choice("label_scaling", label_scaling, LABEL_SCALINGS)
    scales: dict[str, Tensor] = {}
    tables = {
        "first": [f.first for f in data.features],
        "second": [f.second for f in data.features],
        "dynamic": [f.dynamic(xi) for f, xi in zip(data.features, data.xi, strict=True)],
    }
    for name, table in tables.items():
        scales[f"{name}_low"], scales[f"{name}_span"] = _ends(table)
    per_instance = label_scaling == "per_instance"
    groups: dict[int, list[Array]] = {}
    for features, values in zip(data.features, data.values, strict=True):
        finite = values[np.isfinite(values)]
        if len(finite):
            groups.setdefault(0 if per_instance else features.size, []).append(
                finite / (features.unit if per_instance else 1.0)
            )
    joined = {size: np.concatenate(parts) for size, parts in sorted(groups.items())}
    low = torch.tensor([float(values.min()) for values in joined.values()], dtype=torch.float64)
    high = torch.tensor([float(values.max()) for values in joined.values()], dtype=torch.float64)
    scales["label_low"], scales["label_span"] = low, torch.where(high > low, high - low, torch.ones_like(low))
    scales["sizes"] = torch.tensor(list(joined), dtype=torch.int64)
    return scales


class ValueRegression(nn.Module):
    """Mean squared error of a :class:`ValueModel` on scaled labels.

    ``batch["x"]`` holds positions (B, 3) of (instance, decision, scenario) in tables kept here, as padded items: an
    instance is stored once, not with each of its labels.

    What decides in the loop is which scenario is worst for one decision, and labels differ far more between decisions
    than between scenarios. ``contrast`` gives that a share of the loss of its own:
    ``(1 - contrast) MSE(values) / var(values) + contrast MSE(differences) / var(differences)``, differences being those
    to a second scenario of the same instance and decision.

    Args:
        data: labelled combinations.
        model: whose scales are used.
        contrast: share of the loss on differences between scenarios, in [0, 1); 0 is the paper's plain error.
        dtype: of the tables.
    """

    labels: Tensor
    first: Tensor
    second: Tensor
    dynamic: Tensor
    decision: Tensor
    x_mask: Tensor
    xi_mask: Tensor

    def __init__(
        self, data: ValueData, model: ValueModel, *, contrast: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.contrast = check_number("contrast", contrast, low=0.0, high=1.0, open_high=True)
        low, span = model.scale("dynamic_low"), model.scale("dynamic_span")
        static = [model.static(f) for f in data.features]
        ranges = [model.label_range(f) for f in data.features]
        dynamic = [(f.dynamic(xi) - low) / span for f, xi in zip(data.features, data.xi, strict=True)]
        decision = [(x - f.x_lower) / f.span for f, x in zip(data.features, data.x, strict=True)]
        tables = {
            "first": [s[0] for s in static],
            "second": [s[1] for s in static],
            "dynamic": dynamic,
            "decision": decision,
            "x_mask": [np.ones(len(s[0])) for s in static],
            "xi_mask": [np.ones(len(s[1])) for s in static],
            "labels": [(v - r[0]) / r[1] for v, r in zip(data.values, ranges, strict=True)],
        }
        kept = [v[np.isfinite(v).any(axis=1)] for v in tables["labels"]]  # nanmean warns of rows without a label
        centred = [v - np.nanmean(v, axis=1, keepdims=True) for v in kept]
        flat = [np.concatenate([v[np.isfinite(v)] for v in parts]) for parts in (tables["labels"], centred)]
        self.variances = max(1e-12, float(flat[0].var())), max(1e-12, 2 * float(flat[1].var()))
        for name, parts in tables.items():
            self.register_buffer(name, _padded(parts, dtype), persistent=False)

    def items(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return items and masks of both sets at positions (B, 3)."""
        i, a, b = position.unbind(1)
        x_items = torch.cat([self.decision[i, a].unsqueeze(2), self.first[i]], dim=2)
        xi_items = torch.cat([self.dynamic[i, b], self.second[i]], dim=2)
        return x_items, xi_items, self.x_mask[i], self.xi_mask[i]

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch; ``model`` is the set network, ``y`` holds scaled labels."""
        x_items, xi_items, x_mask, xi_mask = self.items(batch["x"])
        other = self._partner(batch) if self.contrast else None
        if other is not None:
            _, more, _, _ = self.items(other)
            xi_items, xi_mask = torch.cat([xi_items, more]), torch.cat([xi_mask, xi_mask])
        predicted, *there = model(x_items, xi_items, x_mask, xi_mask).split(len(x_items))
        error = F.mse_loss(predicted, batch["y"])
        parts = {"mse": error.detach(), "mae": (predicted.detach() - batch["y"]).abs().mean()}
        if other is None:
            return Loss(error, parts)
        label = self.labels[tuple(other.unbind(1))]
        known = torch.isfinite(label)
        difference = ((predicted - there[0]) - (batch["y"] - label))[known]
        apart = difference.square().sum() / max(1, int(known.sum()))
        total = (1 - self.contrast) * error / self.variances[0] + self.contrast * apart / self.variances[1]
        return Loss(total, {**parts, "difference": apart.detach()})

    def _partner(self, batch: Batch) -> Tensor:
        """Return positions with another scenario, a function of the sample and the step."""
        position, n = batch["x"], self.dynamic.shape[1]
        if n < 2:
            return position
        step = 1 + (batch["index"] * 7919 + int(batch.get("step", 0)) * 104_729) % (n - 1)
        return torch.cat([position[:, :2], ((position[:, 2] + step) % n)[:, None]], dim=1)


def _padded(parts: list[Array], dtype: torch.dtype) -> Tensor:
    shape = np.max([part.shape for part in parts], axis=0)
    table = torch.zeros(len(parts), *shape.tolist(), dtype=dtype)
    for row, part in zip(table, parts, strict=True):
        row[tuple(slice(0, width) for width in part.shape)] = torch.from_numpy(part).to(dtype)
    return table


def scaled_labels(data: ValueData, model: ValueModel) -> tuple[Tensor, Tensor]:
    """Return positions (N, 3) int64 and labels (N,) float32 in the network's unit."""
    index = data.index
    ranges = np.array([model.label_range(f) for f in data.features])
    values = np.concatenate([v[np.isfinite(v)] for v in data.values])  # the order of nonzero: row by row
    low, span = ranges[index[:, 0]].T
    return torch.from_numpy(index), torch.from_numpy((values - low) / span).float()


def untrained(
    data: ValueData, family: Family, *, label_scaling: str = "per_size", generator: Seed = None, **options: Any
) -> ValueModel:
    """Return a network with random weights and the scales of ``data``: the start of training, and its control."""
    features = data.features[0]
    x_dim, xi_dim = 1 + features.first.shape[1], features.offset.shape[1] + features.second.shape[1]
    seed = derive(resolve_seed(generator), "weights") & 0x7FFFFFFF
    network = SetValueNetwork(x_dim, xi_dim, generator=seed, **options)
    return ValueModel(network, scales_of(data, label_scaling), family=family.name, label_scaling=label_scaling)


def train(
    model: ValueModel,
    data: ValueData,
    *,
    epochs: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    validation: float = 0.2,
    evaluate_every: int = 10,
    contrast: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    generator: Seed = None,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Train in place with Adam and keep the weights of the best validation error; the defaults are the paper's.

    Args:
        model: from :func:`untrained`.
        data: labels; whole instances are held out.
        epochs: passes over the data.
        learning_rate: of Adam, which falls by a cosine.
        batch_size: labels for each step.
        validation: share of instances held out; 0.2 in the paper.
        evaluate_every: epochs between validations.
        contrast: share of the loss on differences between scenarios; see :class:`ValueRegression`.
        checkpoint: folder from which an interrupted run goes on, to the same weights.
        generator: seed of order and split.
        on_step: called after each epoch with ("epochs", epochs done, epochs).

    Returns:
        ``{"validation_mae", "training_mae"}`` in units of the labels' range.
    """
    check_count("epochs", epochs)
    check_count("evaluate_every", evaluate_every)
    seed = resolve_seed(generator)
    position, y = scaled_labels(data, model)
    order = np.random.default_rng(derive(seed, "split")).permutation(len(data))
    one_only = len(data) < 2  # a single instance: hold out labels
    held = set(order[: max(1, round(validation * len(data)))].tolist())
    if one_only:
        rows = np.random.default_rng(derive(seed, "rows")).random(len(y)) < validation
    else:
        rows = np.array([i in held for i in position[:, 0].tolist()])
    outside = torch.from_numpy(rows)
    objective = ValueRegression(data, model, contrast=contrast)
    kept = None if checkpoint is None else Path(checkpoint) / "best"
    best = _kept(kept)

    def validate(state: TrainState) -> Mapping[str, Any] | None:
        if on_step is not None:
            on_step("epochs", state.epoch, epochs)
        if state.epoch % evaluate_every and state.epoch != epochs:
            return None
        mae = _error(model.network, objective, position[outside], y[outside])
        if mae < best["mae"]:
            best.update(mae=mae, state=copy.deepcopy(model.network.state_dict()), epoch=state.epoch)
            if kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
                save_tensors(
                    kept / "weights.safetensors",
                    {**best["state"], "mae": torch.tensor([mae, state.epoch], dtype=torch.float64)},
                )
        return {"validation_mae": mae}

    fit(
        model.network, (position[~outside], y[~outside]), objective, epochs=epochs, batch_size=batch_size,
        optimiser=partial(torch.optim.Adam, lr=learning_rate), schedule=scheduled(cosine()), generator=seed,
        on_epoch=validate, checkpoint=checkpoint,
    )  # fmt: skip
    if best["state"] is not None:
        model.network.load_state_dict(best["state"])
    final = _error(model.network, objective, position[~outside], y[~outside])
    _LOGGER.info("best validation error %.4g after epoch %d", best["mae"], best["epoch"])
    return {"validation_mae": float(best["mae"]), "training_mae": final}


def _kept(folder: Path | None) -> dict[str, Any]:
    """Return the best weights of a run that was interrupted, with their error and epoch."""
    if folder is None or not (folder / "weights.safetensors").is_file():
        return {"mae": float("inf"), "state": None, "epoch": 0}
    state = load_tensors(folder / "weights.safetensors", finite=True)
    mae, epoch = state.pop("mae").tolist()
    return {"mae": mae, "state": state, "epoch": int(epoch)}


@torch.no_grad()
def _error(network: nn.Module, objective: ValueRegression, position: Tensor, y: Tensor) -> float:
    parts = zip(position.split(8192), y.split(8192), strict=True)
    total = sum(float((network(*objective.items(p)) - target).abs().sum()) for p, target in parts)
    return total / max(1, len(y))


def fit_value_network(
    family: Family,
    *,
    n_instances: int = 500,
    n_first_stage: int = 10,
    n_scenarios: int = 50,
    sizes: tuple[int, ...] | None = None,
    sampler: str = "mixed",
    label_scaling: str = "per_size",
    epochs: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    contrast: float = 0.0,
    workers: int = 1,
    generator: Seed = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
    **network: Any,
) -> tuple[ValueModel, dict[str, float]]:
    """Generate data for a family, train a network on it, and return both the network and its errors.

    Args:
        family: :data:`~.families.KNAPSACK`, :data:`~.families.CAPITAL_BUDGETING` or :func:`~.families.fixed`.
        n_instances: see :func:`~.data.generate`, as for the next four.
        n_first_stage: decisions for each instance.
        n_scenarios: scenarios for each instance.
        sizes: numbers of items.
        sampler: ``"paper"``, ``"mixed"`` or ``"aligned"``.
        label_scaling: ``"per_size"`` (the paper's) or ``"per_instance"``.
        epochs: passes over the data.
        learning_rate: see :func:`train`, as for the next two.
        batch_size: labels for each step.
        contrast: share of the loss on differences between scenarios.
        workers: processes that label.
        generator: seed of everything.
        checkpoint: folder from which training goes on; data are drawn again, the same.
        on_step: called with ("labels", instances done, instances), then ("epochs", epochs done, epochs).
        **network: options of :class:`~.network.SetValueNetwork`.
    """
    seed = resolve_seed(generator)
    data = generate(
        family, n_instances=n_instances, n_first_stage=n_first_stage, n_scenarios=n_scenarios, sizes=sizes,
        sampler=sampler, per_instance=label_scaling == "per_instance", workers=workers, generator=derive(seed, "data"),
        on_step=None if on_step is None else partial(on_step, "labels"),
    )  # fmt: skip
    model = untrained(data, family, label_scaling=label_scaling, generator=seed, **network)
    errors = train(
        model, data, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, contrast=contrast,
        checkpoint=checkpoint, generator=seed, on_step=on_step,
    )  # fmt: skip
    return model, errors
