"""Networks of point clouds on disk and from words: ``pointnet``, ``pillars``, ``saved:FOLDER``, or your own factory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core import loading
from robust_core.errors import UntrustedFileError
from robust_core.io import read_json, save_tensors, write_json
from robust_core.loading import load_into
from robust_core.random import reseeded
from vision_robust.lidar.models import Grid, PillarDetector, PointNet, Unmasked

__all__ = ["KINDS", "Blueprint", "build", "load_network", "load_saved", "save"]

KINDS = ("pointnet", "pillars")
SCHEMA = "robust.lidar-model/1"
MODEL, WEIGHTS = "model.json", "weights.safetensors"


@dataclass(frozen=True)
class Blueprint:
    """How a bundled network is built.

    Attributes:
        kind: one of :data:`KINDS`.
        classes: what it tells apart.
        options: further arguments of its class; ``grid`` as three entries for pillars.
    """

    kind: str
    classes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def build(blueprint: Blueprint, *, seed: int = 0) -> nn.Module:
    """Return the network with its first weights.

    Raises:
        ValueError: an unknown kind, or options that its class does not take.
    """
    options = dict(blueprint.options)
    if blueprint.kind not in KINDS:
        raise ValueError(f"kind={blueprint.kind!r}: choose one of {', '.join(KINDS)}")
    try:
        with reseeded(seed):
            if blueprint.kind == "pointnet":
                return PointNet(len(blueprint.classes), **options)
            grid = options.pop("grid", None)
            made = None if grid is None else Grid(tuple(grid["x"]), tuple(grid["y"]), grid["cell"])
            return PillarDetector(len(blueprint.classes), made, **options)
    except (TypeError, KeyError) as error:
        raise ValueError(f"options={blueprint.options!r} do not make a {blueprint.kind}: {error}") from error


def save(folder: str | os.PathLike[str], blueprint: Blueprint, model: nn.Module) -> None:
    """Write a network that :func:`load_saved` reads: weights first, what they are last."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / WEIGHTS, model.state_dict())
    write_json(path / MODEL, {"schema": SCHEMA, **asdict(blueprint)})


def load_saved(folder: str | os.PathLike[str]) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network that :func:`save` wrote, in eval mode, and its classes.

    Raises:
        UntrustedFileError: ``model.json`` is not of this form.
        ValueError: weights that do not fit.
    """
    path = Path(folder)
    document = read_json(path / MODEL)
    whole = isinstance(document, dict) and set(document) == {"schema", "kind", "classes", "options"}
    if not whole or document["schema"] != SCHEMA or not isinstance(document["options"], dict):
        raise UntrustedFileError(f"{path / MODEL}: not a network of schema {SCHEMA!r}")
    if not isinstance(document["classes"], list) or not all(isinstance(c, str) for c in document["classes"]):
        raise UntrustedFileError(f"{path / MODEL}: classes is no list of names")
    model = build(Blueprint(document["kind"], tuple(document["classes"]), document["options"]))
    load_into(model, str(path / WEIGHTS))
    return model.eval(), tuple(document["classes"])


def load_network(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """Return the network that ``spec`` names, in eval mode, and its classes where they are known.

    Args:
        spec: ``saved:FOLDER`` or ``package.module:factory``.
        weights: safetensors file for a factory's network.
        layout: ``BNC`` or ``BCN`` of a network that knows no mask; see :class:`~vision_robust.lidar.models.Unmasked`.
        device: where to put it.
        seed: of what a factory draws, such as first weights.

    Raises:
        ValueError, ResourceError, UntrustedFileError: words, modules or files that are not right.
    """
    classes: list[tuple[str, ...]] = []

    def saved(name: str, path: str | None) -> nn.Module:
        if path is not None:
            raise ValueError(f"model 'saved:{name}': the folder holds its weights; leave --weights out")
        model, known = load_saved(name)
        classes.append(known)
        return model

    with reseeded(seed):
        model = loading.load_model(spec, weights=weights, schemes={"saved": saved}, device=device)
    if layout is not None:
        model = Unmasked(model, layout=layout).eval()
    named: Sequence[str] | None = classes[0] if classes else getattr(model, "classes", None)
    return model, None if named is None else tuple(named)
