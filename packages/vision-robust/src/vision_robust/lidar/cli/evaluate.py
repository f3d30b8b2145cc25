"""``robust lidar evaluate``: your own classifier or detector of points, clean and under corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from robust_core.words import check_module, check_word, parse_spec
from vision_robust.lidar.cli.app import app
from vision_robust.lidar.cli.words import (
    DATA_HELP,
    LAYOUTS,
    check_data,
    check_out,
    levels_of,
    named_corruptions,
    open_data,
)

__all__ = ["evaluate"]

Model = Annotated[str, typer.Option("--model", "-m", help="saved:FOLDER or package.module:factory.")]
Data = Annotated[str, typer.Option("--data", "-d", help=DATA_HELP)]


@app.command()
def evaluate(
    model: Model,
    data: Data,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a factory's network.")] = None,
    layout: Annotated[
        str | None, typer.Option(help=f"Your network knows no mask and reads: {' or '.join(LAYOUTS)}.")
    ] = None,
    corruptions: Annotated[
        str, typer.Option(help="Names such as kitti-c/fog, registries such as modelnet-c, all or none; with commas.")
    ] = "all",
    severities: Annotated[str, typer.Option(help="Levels such as 1,3,5, or a span such as 1-5.")] = "1-5",
    split: Annotated[str | None, typer.Option(help="Of the data; its test split, or its usual one.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="So many frames of each sequence at most.")] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least overlap of a right box; KITTI's by class if left out.")
    ] = None,
    sampling: Annotated[
        str, typer.Option(help="Of average precision: exact, or kitti as its program counts, for its table.")
    ] = "exact",
    difficulty: Annotated[
        str | None, typer.Option(help="Boxes to find, of KITTI: easy, moderate or hard; hard if left out.")
    ] = None,
    min_score: Annotated[
        float, typer.Option(help="Detections that the tracker hears; choose it on clean validation data.")
    ] = 0.3,
    batch_size: Annotated[int, typer.Option(min=1, help="Clouds in one pass; no figure depends on it.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    saliency: Annotated[
        bool, typer.Option(help="Show which points matter to the model on a few frames or shapes, by its gradients.")
    ] = True,
    resume: Annotated[Path | None, typer.Option(help="Folder for finished conditions, to go on from.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json and report.html.")] = None,
    json: Json = False,
) -> None:
    """Measure a model of points under accidents of weather, sensor and driving: accuracy, or precision and tracking."""
    check_data(data)
    check_out(out)
    kind, _ = parse_spec(model, ("saved",))
    if kind == "factory":
        check_module(model)
    if layout is not None:
        check_word("--layout", layout, LAYOUTS)
    check_word("--sampling", sampling, ("exact", "kitti"))
    if difficulty is not None:
        check_word("--difficulty", difficulty, ("easy", "moderate", "hard"))
    levels = levels_of(severities)
    names = named_corruptions(corruptions, shapes=data.partition(":")[0] in ("digits", "modelnet40"))
    from robust_core.device import choose_device
    from vision_robust.lidar.evaluation import evaluate as measure
    from vision_robust.lidar.saved import load_network
    from vision_robust.lidar.sources import Source

    network, classes = load_network(model, weights=weights, layout=layout, device=choose_device(device), seed=seed)
    found = open_data(data, split, classes)
    options: dict[str, Any] = {"sampling": sampling, "difficulty": difficulty}
    if overlap is not None and isinstance(found, Source):
        options["thresholds"] = dict.fromkeys(found.classes, overlap)
    with console.progress() as report:
        result = measure(
            network, found, corruptions=names, severities=levels, batch_size=batch_size, min_score=min_score,
            frames=frames, generator=seed, resume=resume, saliency=saliency, name=model, command=command(),
            on_step=report, **options,
        )  # fmt: skip
    show(result, out, json)
