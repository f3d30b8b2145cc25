"""Counterfactuals on the command line: what would have to change, and whether it still counts after retraining."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_core.checks import check_count
from robust_core.data import Dataset
from robust_core.io import write_atomic, write_json
from robust_core.training import fit
from vision_robust.explain.robust_counterfactuals import (
    ELBO,
    ClosestCounterfactual,
    Counterfactuals,
    Generator,
    MutableSpec,
    NearestCounterfactual,
    Recourse,
    Retraining,
    Roar,
    Score,
    SmallVAE,
    StableNeighbor,
    TRexIterative,
    TRexLatent,
    TRexNearestNeighbor,
    WachterCounterfactual,
    evaluate_counterfactuals,
    retrain_models,
    validity_bounds,
)
from vision_robust.explain.robust_counterfactuals.plots import changes, changes_plot, cost_validity_plot, strip_plot
from vision_robust.recipes.base import Explanation, Recipe

__all__ = ["RECIPE", "Anew", "ExplainSettings"]

Name = Literal["t-rex-i", "t-rex-nn", "t-rex-vae", "closest", "nearest", "wachter", "sns", "roar"]


@dataclass(frozen=True)
class ExplainSettings:
    """Which searches, how stable, what may not move, and how the model is trained anew to see what remains valid.

    The first of ``methods`` is drawn row by row. ``immutable`` names columns of a table. ``models=0`` retrains nothing;
    ``retrain`` says what changes: weights and order (seed), a part of the data (leave_out), or both.
    """

    methods: tuple[Name, ...] = ("t-rex-i", "t-rex-nn", "closest", "nearest")
    tau: float = 0.75
    sigma: float = 0.05
    n_samples: int = 1000
    threshold: float = 0.5
    norm: Literal["L1", "L2"] = "L2"
    step_size: float = 0.01
    n_steps: int = 20
    radius: float = 1.0
    immutable: tuple[str, ...] = ()
    latent: int = 8
    models: int = 10
    epochs: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 32
    retrain: Literal["seed", "leave_out", "both"] = "both"
    fraction: float = 0.99
    alpha: float = 0.05
    plots: int = 8

    def __post_init__(self) -> None:
        check_count("models", self.models, low=0)
        check_count("plots", self.plots, low=0)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods={self.methods}: at least one, and each once")


class Anew:
    """A factory of untrained copies of a network: every layer draws its parameters again.

    Args:
        model: the network; it is not changed.

    Raises:
        ValueError: a layer holds parameters and has no ``reset_parameters``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True).cpu()
        for name, layer in self.model.named_modules():
            own = any(True for _ in layer.parameters(recurse=False))
            if own and not callable(getattr(layer, "reset_parameters", None)):
                raise ValueError(
                    f"the model's layer {name or type(layer).__name__!r} cannot draw its parameters again (no "
                    "reset_parameters), so it cannot be retrained from here: --set models=0, or retrain with "
                    "vision_robust.explain.robust_counterfactuals.retrain_models and a factory of your own"
                )

    def __call__(self) -> nn.Module:
        """Return an untrained copy; draws from torch's global generator."""
        twin = copy.deepcopy(self.model)
        for layer in twin.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
        return twin


def _spec(data: Dataset, settings: ExplainSettings) -> MutableSpec:
    if data.columns:
        return MutableSpec.of_columns(data.columns, immutable=settings.immutable)
    if settings.immutable:
        raise ValueError(f"--set immutable={','.join(settings.immutable)}: {data.name} is no table with named columns")
    return MutableSpec()


def _inputs(data: Dataset, device: torch.device) -> Tensor:
    return data.batch(range(len(data)))["x"].to(device)


def _latent(recourse: Recourse, train: Dataset, settings: ExplainSettings, seed: int) -> TRexLatent:
    shape = tuple(train.batch(range(1))["x"].shape[1:])
    vae = SmallVAE(shape, settings.latent, groups=recourse.spec.groups, generator=seed)
    parameter = next(iter(recourse.score.model.parameters()), None)  # pyright: ignore
    vae.to("cpu" if parameter is None else parameter.device)
    fit(vae, train, ELBO(), epochs=settings.epochs, batch_size=settings.batch_size, generator=seed)
    return TRexLatent.of(recourse, vae, tau=settings.tau)


def _search(name: str, recourse: Recourse, asked: Explanation, settings: ExplainSettings, near: Tensor) -> Generator:
    base = ClosestCounterfactual(recourse, settings.norm)
    builders: dict[str, Any] = {
        "t-rex-i": lambda: TRexIterative(
            recourse, settings.tau, base,
            step_size=settings.step_size, n_steps=settings.n_steps, radius=settings.radius,
        ),
        "t-rex-nn": lambda: TRexNearestNeighbor(recourse, near, settings.tau),
        "t-rex-vae": lambda: _latent(recourse, asked.train, settings, asked.seed),
        "closest": lambda: base,
        "nearest": lambda: NearestCounterfactual(recourse, near),
        "wachter": lambda: WachterCounterfactual(recourse),
        "sns": lambda: StableNeighbor(recourse, base),
        "roar": lambda: Roar(recourse),
    }  # fmt: skip
    return builders[name]()


def _retrained(asked: Explanation, settings: ExplainSettings, device: torch.device) -> list[nn.Module]:
    if not settings.models:
        return []
    plan = Retraining(
        Anew(asked.model),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        mode=settings.retrain,
        fraction=settings.fraction,
        device=str(device),
    )
    return retrain_models(
        plan,
        asked.train,
        settings.models,
        generator=asked.seed,
        folder=asked.out / "retrained",
        on_step=lambda done, total: asked.on_step("models retrained", done, total),
    )


def explain(asked: Explanation, settings: ExplainSettings) -> Mapping[str, Any]:
    """Write what the rejected rows would have to change, how stable that is, and how changed models judge it.

    ``methods.csv`` and ``methods.json`` compare the searches; ``counterfactuals.csv`` holds each proposal; plots are
    ``cost-validity.png``, and ``changes-*.png`` (tables) or ``images.png``. Finished retrainings are kept in
    ``retrained``, from which the same command goes on.

    Raises:
        ValueError: no target, or no row that the model rejects.
    """
    if asked.target is None:
        raise ValueError("--target: say which class is wished for, as its number")
    x = asked.data.batch(range(len(asked.data)))["x"]
    parameter = next(iter(asked.model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    score = Score(asked.model, target=asked.target, threshold=settings.threshold)
    spec = _spec(asked.data, settings)
    recourse = Recourse(score, spec, settings.sigma, settings.n_samples, generator=asked.seed)
    x = x.to(device)
    recourse.check(x)
    rejected = (~score.accepts(x)).nonzero().flatten()
    if not len(rejected):
        raise ValueError(
            f"--target {asked.target}: the model gives all {len(x)} rows that class already; take more rows (--n) or "
            "another target"
        )
    queries = asked.data.subset(rejected.cpu())
    x, near = x[rejected], _inputs(asked.train, device)
    found: dict[str, Counterfactuals] = {}
    for done, name in enumerate(settings.methods, 1):
        proposals = _search(name, recourse, asked, settings, near).generate(x)
        found[proposals.method] = proposals
        asked.on_step("searches", done, len(settings.methods))
    models = _retrained(asked, settings, device)
    table = evaluate_counterfactuals(found, recourse, models, reference=near, alpha=settings.alpha)
    records = table.records()
    write_json(asked.out / "methods.json", {"methods": records, "conditional": table.conditional})
    write_atomic(asked.out / "methods.csv", table.csv().encode())
    _write_rows(asked, queries, found, recourse, models, settings)
    _draw(asked, queries, next(iter(found.values())), settings)
    if models:
        cost_validity_plot(table).savefig(asked.out / "cost-validity.png", dpi=150)
    return {"figures": _figures(records), "methods": records, "conditional": table.conditional}


def _figures(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for record in records:
        name, n = record["method"], record["n"]
        interval = None if record["validity"] is None else [record["validity_low"], record["validity_high"]]
        figures[f"{name}/found"] = {"value": record["found"], "interval": None, "n": n}
        figures[f"{name}/cost L2"] = {"value": record["cost_l2"], "interval": None, "n": n}
        figures[f"{name}/stability (no theorem)"] = {"value": record["stability"], "interval": None, "n": n}
        figures[f"{name}/accepted by changed models"] = {
            "value": record["validity"],
            "interval": interval,
            "n": record["models"],
        }
    return figures


def _write_rows(
    asked: Explanation, queries: Dataset, found: Mapping[str, Counterfactuals], recourse: Recourse,
    models: list[nn.Module], settings: ExplainSettings,
) -> None:  # fmt: skip
    """Write ``counterfactuals.csv``: one line for each query and method."""
    names = ["index", "label", "method", "valid", "score", "stability", "reached", "cost_l2", "cost_l1"]
    names += ["accepted_by_changed", "lower_bound"]
    names += [c.name for c in queries.columns] or [f"x{i}" for i in range(math.prod(queries.x.shape[1:]))]
    with (asked.out / "counterfactuals.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for method, proposals in found.items():
            bounds = validity_bounds(proposals.points, recourse, models, alpha=settings.alpha) if models else None
            values = [c.read(proposals.points) for c in queries.columns]
            flat = proposals.points.flatten(1).tolist()
            cost = proposals.cost("L2"), proposals.cost("L1")
            for row in range(len(proposals)):
                judged = ["", ""] if bounds is None else [float(bounds.validity[row]), float(bounds.lower[row])]
                head = [int(queries.index[row]), int(queries.y[row]), method, bool(proposals.valid[row])]
                numbers = [float(proposals.score[row]), float(proposals.stability[row])]
                reached = "" if proposals.tau is None else bool(proposals.reached[row])
                point = [column[row] for column in values] or flat[row]
                writer.writerow([*head, *numbers, reached, *(float(c[row]) for c in cost), *judged, *point])


def _draw(asked: Explanation, queries: Dataset, proposals: Counterfactuals, settings: ExplainSettings) -> None:
    shown = min(settings.plots, len(proposals))
    before, after = proposals.original[:shown].cpu(), proposals.points[:shown].cpu()
    if queries.columns:
        for row in range(shown):
            figure = changes_plot(queries.columns, before[row], after[row])
            figure.savefig(asked.out / f"changes-{int(queries.index[row])}.png", dpi=150)
            asked.on_step("rows drawn", row + 1, shown)
        told = {
            str(int(queries.index[row])): [
                {"column": name, "before": old, "after": new}
                for name, old, new, _ in changes(queries.columns, before[row], after[row])
            ]
            for row in range(shown)
        }
        write_json(asked.out / "changes.json", told)
    elif shown and before.ndim == 4 and before.shape[1] in (1, 3):
        strip_plot(before, after).savefig(asked.out / "images.png", dpi=150)


RECIPE = Recipe(slug="robust-counterfactuals", explain=explain, explain_settings=ExplainSettings)
