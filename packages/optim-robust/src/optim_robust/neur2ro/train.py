"""Training: mean squared error on scaled labels, through the one training loop of the core."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from functools import partial
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
from robust_core.checks import check_choice, check_count
from robust_core.random import Seed, derive, resolve_seed
from robust_core.training import Batch, Loss, TrainState, cosine, fit, scheduled

__all__ = ["ValueRegression", "fit_value_network", "scales_of", "train", "untrained"]

_LOGGER = logging.getLogger(__name__)
Array = NDArray[np.float64]


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

    Args:
        data: labelled combinations.
        model: whose scales are used.
        dtype: of the tables.
    """

    first: Tensor
    second: Tensor
    dynamic: Tensor
    decision: Tensor
    x_mask: Tensor
    xi_mask: Tensor

    def __init__(self, data: ValueData, model: ValueModel, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        low, span = model.scale("dynamic_low"), model.scale("dynamic_span")
        static = [model.static(f) for f in data.features]
        dynamic = [(f.dynamic(xi) - low) / span for f, xi in zip(data.features, data.xi, strict=True)]
        decision = [(x - f.x_lower) / f.span for f, x in zip(data.features, data.x, strict=True)]
        tables = {
            "first": [s[0] for s in static],
            "second": [s[1] for s in static],
            "dynamic": dynamic,
            "decision": decision,
            "x_mask": [np.ones(len(s[0])) for s in static],
            "xi_mask": [np.ones(len(s[1])) for s in static],
        }
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
        predicted = model(*self.items(batch["x"]))
        loss = F.mse_loss(predicted, batch["y"])
        return Loss(loss, {"mse": loss.detach(), "mae": (predicted.detach() - batch["y"]).abs().mean()})


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
    checkpoint: str | os.PathLike[str] | None = None,
    generator: Seed = None,
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
        checkpoint: folder from which an interrupted run goes on.
        generator: seed of order and split.

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
    objective = ValueRegression(data, model)
    best: dict[str, Any] = {"mae": float("inf"), "state": None, "epoch": 0}

    def validate(state: TrainState) -> Mapping[str, Any] | None:
        if state.epoch % evaluate_every and state.epoch != epochs:
            return None
        mae = _error(model.network, objective, position[outside], y[outside])
        if mae < best["mae"]:
            best.update(mae=mae, state=copy.deepcopy(model.network.state_dict()), epoch=state.epoch)
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
    workers: int = 1,
    generator: Seed = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **network: Any,
) -> tuple[ValueModel, dict[str, float]]:
    """Generate data for a family, train a network on it, and return both the network and its errors.

    Args:
        family: :data:`~.families.KNAPSACK`, :data:`~.families.CAPITAL_BUDGETING` or :func:`~.families.fixed`.
        n_instances: see :func:`~.data.generate`, as for the next four.
        n_first_stage: decisions for each instance.
        n_scenarios: scenarios for each instance.
        sizes: numbers of items.
        sampler: ``"paper"`` or ``"mixed"``.
        label_scaling: ``"per_size"`` (the paper's) or ``"per_instance"``.
        epochs: passes over the data.
        workers: processes that label.
        generator: seed of everything.
        checkpoint: folder from which training goes on.
        **network: options of :class:`~.network.SetValueNetwork`.
    """
    seed = resolve_seed(generator)
    data = generate(
        family, n_instances=n_instances, n_first_stage=n_first_stage, n_scenarios=n_scenarios, sizes=sizes,
        sampler=sampler, per_instance=label_scaling == "per_instance", workers=workers, generator=derive(seed, "data"),
    )  # fmt: skip
    model = untrained(data, family, label_scaling=label_scaling, generator=seed, **network)
    return model, train(model, data, epochs=epochs, checkpoint=checkpoint, generator=seed)
