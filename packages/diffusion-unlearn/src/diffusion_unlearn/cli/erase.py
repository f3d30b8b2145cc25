"""``robust diffusion erase · settings``: a folder of a pipeline in, a folder of a pipeline without a concept out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_unlearn.cli.app import app
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.errors import ResourceError
from robust_core.words import check_word

__all__ = ["METHODS", "erase", "settings"]

METHODS = ("advunlearn", "esd", "uce", "fmn", "ca")
PRECISIONS = ("float32", "bf16", "fp16")
UNFINISHED = ".unfinished"
"""Folder below ``--out`` in which a run that was interrupted is kept; gone when it is done."""


def check_words(pipeline: Path, out: Path, method: str, precision: str, retain: Path | None) -> None:
    """Refuse what can be refused by looking at the words and the disk.

    Raises:
        ValueError: a word of no known form.
        ResourceError: a file or folder that is not there, or a place that cannot be written, or is taken.
    """
    check_word("--method", method, METHODS)
    check_word("--precision", precision, PRECISIONS)
    if not (pipeline / "model_index.json").is_file():
        raise ResourceError(f"--pipeline {pipeline}: a folder in diffusers' layout (model_index.json) is needed")
    if retain is not None and not retain.is_file():
        raise ResourceError(f"--retain {retain}: no such file")
    here = out
    while not here.exists():
        here = here.parent
    if not here.is_dir() or not os.access(here, os.W_OK):
        raise ResourceError(f"--out {out}: a folder that can be written is needed")
    if out.exists() and any(out.iterdir()) and not (out / UNFINISHED).is_dir():
        raise ResourceError(f"--out {out}: holds something already; name another folder, or empty this one")


@app.command()
def erase(
    pipeline: Annotated[Path, typer.Option("--pipeline", "-p", help="Folder in diffusers' layout: SD 1.x, 2.x, XL.")],
    concept: Annotated[list[str], typer.Option("--concept", "-c", help="What is erased; give synonyms as well.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the edited pipeline; plain diffusers loads it.")],
    method: Annotated[str, typer.Option("--method", "-m", help=f"One of: {', '.join(METHODS)}.")] = "advunlearn",
    template: Annotated[
        list[str] | None, typer.Option("--template", "-t", help="A sentence with {} where the concept stands.")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option("--retain", "-r", help="Prompts that stay as they are: .txt, or .csv.")
    ] = None,
    anchor: Annotated[str | None, typer.Option(help="What takes the concept's place (ca; uce).")] = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting; see `robust diffusion settings METHOD`."),
    ] = None,
    trajectories: Annotated[
        int | None, typer.Option("--draws", "-n", min=1, help="Trajectories or pictures for each prompt to train on.")
    ] = None,
    sampler_steps: Annotated[int | None, typer.Option(min=2, help="Steps of the sampler that draws them (50).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale at which they are drawn.")] = None,
    precision: Annotated[str, typer.Option(help=f"Of the networks: {', '.join(PRECISIONS)}.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Erase a concept from a pipeline; the same command goes on where an interrupted one stopped."""
    check_words(pipeline, out, method, precision, retain)
    from diffusion_unlearn.erasing import erase_folder

    drawing = {"n": trajectories, "steps": sampler_steps, "guidance": guidance}
    with console.progress() as report:
        result = erase_folder(
            pipeline, concept, out, method=method, templates=template or ["{}"], retain=retain, anchor=anchor,
            own=own or [], drawing={name: value for name, value in drawing.items() if value is not None},
            precision=precision, gradient_checkpointing=gradient_checkpointing, seed=seed, device=device,
            checkpoint=out / UNFINISHED, command=command(), progress=report,
        )  # fmt: skip
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if json:
        console.emit_json(result)
        return
    rows = [(name, str(value)) for name, value in _shown(result)]
    console.table(("erasure", ""), rows, title=f"{', '.join(concept)} erased from {pipeline} by {method}")
    for flag in result["flags"]:
        console.info(f"flag: {flag}")
    console.info(f"load it: DiffusionPipeline.from_pretrained({str(out)!r})")
    console.info(f"how well it holds: robust diffusion attack --pipeline {out} --original {pipeline} …")


def _shown(result: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [("prompts erased", len(result["prompts"])), ("prompts retained", result["retain"]["n"]),
             ("trained", result["component"]), ("seconds", result["seconds"])]  # fmt: skip
    return [*found, *((f"loss at {name}", f"{value:.4g}") for name, value in result["loss"].items())]


@app.command()
def settings(method: Annotated[str, typer.Argument(help=f"One of: {', '.join(METHODS)}.")], json: Json = False) -> None:
    """List the settings of a method of erasure, for --set, with types and defaults."""
    check_word("METHOD", method, METHODS)
    from diffusion_unlearn.erasure.front import settings_of
    from robust_core.settings import describe_settings

    rows: list[dict[str, Any]] = [
        {"name": name, "type": hint, "default": default}
        for name, hint, default in describe_settings(settings_of(method))
    ]
    if json:
        console.emit_json({"schema": "robust.settings/1", "method": method, "settings": rows})
        return
    console.table(("setting", "type", "default"), [(r["name"], r["type"], r["default"]) for r in rows], title=method)
