"""``robust lidar harden``: train perception of points that keeps working, by INTACT or what it is compared with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.words import check_module, check_word
from vision_robust.lidar.cli.app import app
from vision_robust.lidar.cli.words import DATA_HELP, LAYOUTS, check_data, check_out, open_data

if TYPE_CHECKING:
    from robust_core.data import Dataset
    from vision_robust.lidar.saved import Blueprint
    from vision_robust.lidar.sources import Source

__all__ = ["METHODS", "harden"]

METHODS = ("intact", "intact-without-shift", "curriculum", "noise", "adversarial", "standard")
_FEW = 5_000
"""Shapes that are too few for dropout, and for a network that has to learn from bare coordinates."""


@app.command()
def harden(
    data: Annotated[str, typer.Option("--data", "-d", help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the network, checkpoints and result.json.")],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "intact",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Your package.module:factory; for scenes with a loss. Bundled if left out."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Factory of the teacher; built as the model if left out.")] = None,
    layout: Annotated[
        str | None, typer.Option(help=f"Your network knows no mask and reads: {' or '.join(LAYOUTS)}.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Of the method: sigma, eps, drop, mu, kappa, warm, …"),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Of the bundled network; 64 for shapes, 32 for scenes if left out.")
    ] = None,
    reach: Annotated[float, typer.Option(help="Metres around the sensor that the bundled detector sees.")] = 48.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, with a cosine schedule.")] = 2e-3,
    precision: Annotated[str, typer.Option(help="float32, or bf16 or fp16 on an accelerator.")] = "float32",
    split: Annotated[str | None, typer.Option(help="Of the data; its training split, or its usual one.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="So many frames of each sequence at most.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a network to withstand missing, displaced and forged points; the same command again goes on."""
    check_word("--method", method, METHODS)
    check_data(data)
    check_out(out)
    for spec in (model, teacher):
        if spec is not None:
            check_module(spec)
    if layout is not None:
        check_word("--layout", layout, LAYOUTS)
    import torch

    from robust_core.device import choose_device
    from robust_core.training import cosine, scheduled
    from vision_robust.lidar.intact import Classification, detection_of
    from vision_robust.lidar.intact import harden as train
    from vision_robust.lidar.models import Unmasked
    from vision_robust.lidar.saved import build, load_network, save

    settings, own = (
        _settings(options or []),
        None if model is None else load_network(model, layout=layout, seed=seed)[0],
    )
    found = open_data(data, split, None if own is None else getattr(own, "classes", None), train=True)
    columns, plan = _columns(found, frames, width, reach)
    student = build(plan, seed=seed) if own is None else own
    task = Classification() if _is_shapes(found) else detection_of(student)
    theirs = teacher or model
    helper = build(plan, seed=seed + 1) if theirs is None else load_network(theirs, layout=layout, seed=seed + 1)[0]
    where = choose_device(device)
    with console.progress() as report:
        done = train(
            student.to(where), {k: v.to(where) for k, v in columns.items()}, method, task=task,
            teacher=helper.to(where), settings=settings, epochs=epochs, batch_size=batch_size,
            optimiser=partial(torch.optim.Adam, lr=learning_rate), schedule=scheduled(cosine()), precision=precision,
            keep_outputs=_is_shapes(found), checkpoint=out / "checkpoints", generator=seed, on_step=report,
        )  # fmt: skip
    if own is None:
        save(out, plan, student)
        use = f"--model saved:{out}"
    else:
        from robust_core.io import save_tensors

        bare = own.model if isinstance(own, Unmasked) else own  # as the factory builds it
        save_tensors(out / "weights.safetensors", bare.state_dict())
        use = f"--model {model} --weights {out / 'weights.safetensors'}"
        use += "" if layout is None else f" --layout {layout}"
    _told(out, json, method=method, data=data, n=len(columns["x"]), steps=done.state.step, seed=seed, use=use)


def _is_shapes(found: Any) -> bool:
    from robust_core.data import Dataset

    return isinstance(found, Dataset)


def _settings(words: list[str]) -> Any:
    """Return settings of method and noise from NAME=VALUE words."""
    from dataclasses import fields, replace

    from robust_core.settings import parse_settings
    from vision_robust.lidar.intact import Settings, TargetedPerturbation

    own = {f.name for f in fields(TargetedPerturbation)}
    noise = [word for word in words if word.partition("=")[0].strip() in own]
    rest = [word for word in words if word not in noise]
    for word in rest:
        if word.partition("=")[0].strip() == "noise":
            raise ValueError(f"--set {word!r}: set one of {', '.join(sorted(own))} instead")
    return replace(parse_settings(Settings, rest), noise=parse_settings(TargetedPerturbation, noise))


def _columns(
    found: Dataset | Source, frames: int | None, width: int | None, reach: float
) -> tuple[dict[str, Any], Blueprint]:
    """Return training columns, and the bundled network for them."""
    from vision_robust.lidar.intact import columns_of
    from vision_robust.lidar.saved import Blueprint

    if _is_shapes(found):
        data: Any = found
        batch = data.batch(range(len(data)))
        options: dict[str, Any] = {"frequencies": 2, "dropout": 0.0} if len(data) < _FEW else {}
        if width is not None:
            options |= {"widths": [width] * 3 + [2 * width, 16 * width], "head": [8 * width, 4 * width]}
        names = data.classes or [str(i) for i in range(data.n_classes)]
        return {"x": batch["x"], "y": batch["y"]}, Blueprint("pointnet", tuple(names), options)
    source: Any = found
    every = [f[i] for _, f in source.sequences for i in range(len(f) if frames is None else min(frames, len(f)))]
    seen = [frame for frame in every if len(frame.points)]
    if len(seen) < len(every):
        console.info(f"{len(every) - len(seen)} of {len(every)} frames hold no point and are left out")
    side = 2 * round(reach)
    grid = {"x": (-side / 2, side / 2), "y": (-side / 2, side / 2), "cell": 0.5}
    return columns_of(seen), Blueprint("pillars", tuple(source.classes), {"grid": grid, "width": width or 32})


def _told(out: Path, json: bool, **about: Any) -> None:
    from robust_core.claim import versions
    from robust_core.io import write_json

    document = {"schema": "robust.lidar-hardened/1", **about, "versions": versions(), "command": command()}
    write_json(out / "result.json", document)
    if json:
        console.emit_json(document)
        return
    console.info(f"{about['method']}: {about['steps']} steps on {about['n']} samples")
    console.info(f"use it: robust lidar evaluate {about['use']} --data {about['data']}")
