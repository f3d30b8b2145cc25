"""``robust diffusion evaluate``: is the concept gone, does it stay gone under attack, and what did the erasure cost?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_unlearn.cli.app import app
from diffusion_unlearn.cli.attacking import HELP as ATTACK_HELP
from diffusion_unlearn.cli.attacking import check_attacks, defaults
from diffusion_unlearn.cli.judging import HELP as JUDGE_HELP
from diffusion_unlearn.cli.judging import check_judge
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from robust_core.errors import ResourceError
from robust_core.words import check_module, check_word, parse_spec

if TYPE_CHECKING:
    from diffusion_unlearn.measuring import Features

__all__ = ["check_places", "evaluate", "features_of"]

CONVENTIONS = ("cosine", "hessel", "percent")
PRECISIONS = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNFINISHED = ".unfinished"
"""Folder below ``--out`` in which a run that was interrupted is kept; gone when it is done."""


def check_places(folders: dict[str, Path | None], files: dict[str, Path | None], out: Path | None) -> None:
    """Refuse what can be refused by looking at the disk.

    Args:
        folders: option -> pipeline in diffusers' layout.
        files: option -> file that must be there.
        out: folder to write to.

    Raises:
        ResourceError: it is not there, or cannot be written.
    """
    for option, folder in folders.items():
        if folder is not None and not (folder / "model_index.json").is_file():
            raise ResourceError(f"{option} {folder}: a folder in diffusers' layout (model_index.json) is needed")
    for option, file in files.items():
        if file is not None and not file.is_file():
            raise ResourceError(f"{option} {file}: no such file")
    here = out
    while here is not None and not here.exists():
        here = here.parent
    if here is not None and not (here.is_dir() and os.access(here, os.W_OK)):
        raise ResourceError(f"--out {out}: a folder that can be written is needed")


def _check_features(words: str) -> None:
    kind, _, name = words.split(",")[0].partition(":")
    if kind == "pixels" and (not name or name.isdigit()):
        return
    if kind == "clip" and name:
        if not Path(name).expanduser().is_dir():
            raise ResourceError(f"--features {words}: no such folder {name}")
        return
    try:
        found, spec = parse_spec(words.split(",")[0])
    except ValueError:
        raise ValueError(
            f"--features {words!r}: pixels, pixels:SIDE, clip:FOLDER, or package.module:factory[,size=299] is needed"
        ) from None
    if found == "factory":
        check_module(spec)
    elif not Path(spec).expanduser().is_file():
        raise ResourceError(f"--features {words}: no such file {spec}")


def features_of(words: str, *, device: str) -> Features:
    """Return the features that ``--features`` names."""
    from diffusion_unlearn.clip import ClipFeatures
    from diffusion_unlearn.measuring import NetworkFeatures, PixelFeatures
    from robust_core.loading import load_model
    from robust_core.settings import parse_settings

    head, *rest = words.split(",")
    kind, _, name = head.partition(":")
    if kind == "pixels":
        return PixelFeatures(int(name)) if name else PixelFeatures()
    if kind == "clip":
        return ClipFeatures.from_folder(Path(name).expanduser(), device=device)
    asked = parse_settings(_network_settings(), rest)
    weights = None if asked.weights is None else Path(asked.weights).expanduser()
    return NetworkFeatures(load_model(head, weights=weights, device=device), size=asked.size, name=head)


def _network_settings() -> Any:
    from dataclasses import make_dataclass

    return make_dataclass("Features", [("size", int | None, None), ("weights", str | None, None)])


@app.command()
def evaluate(
    pipeline: Annotated[Path, typer.Option("--pipeline", "-p", help="The erased pipeline, in diffusers' layout.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="What would draw the concept: .txt, or .csv with seeds.")],
    judge: Annotated[str, typer.Option("--judge", "-j", help=JUDGE_HELP)],
    original: Annotated[Path | None, typer.Option(help="The pipeline before the erasure.")] = None,
    retain: Annotated[
        Path | None, typer.Option("--retain", "-r", help="What should have stayed; .csv with a column label, if known.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help=f"{ATTACK_HELP}. none: no attack. All but inversion if left out."),
    ] = None,
    targets: Annotated[
        Path | None, typer.Option(help="Pictures of the concept, where --original is not at hand.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="package.module:factory or .pt2, for the labels of --retain; a judge's own if left out."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="For a Frechet distance: pixels:SIDE, clip:FOLDER, package.module:factory[,size=299]."),
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP checkpoint, for CLIP scores of --retain.")] = None,
    convention: Annotated[str, typer.Option(help=f"Of CLIP scores: {', '.join(CONVENTIONS)}.")] = "cosine",
    seeds: Annotated[int, typer.Option("--seeds", "-n", min=1, help="Pictures of each prompt, with other seeds.")] = 1,
    guidance: Annotated[float, typer.Option(min=0, help="Of prompts without their own.")] = 7.5,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    together: Annotated[int, typer.Option(min=1, help="Prompts that gradient attacks work on at a time.")] = 4,
    precision: Annotated[str, typer.Option(help=f"Of attacks: {', '.join(PRECISIONS)}.")] = "float32",
    shown: Annotated[int, typer.Option(min=0, help="Prompts of either set that the page shows pictures of.")] = 8,
    store_images: Annotated[
        bool, typer.Option("--store-images", help="Show pictures that the judge calls hits, too.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes; no figure depends on them.")] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[Path | None, typer.Option(help="Folder for finished work; below --out if left out.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for result.json, report.html and the texts found.")
    ] = None,
    json: Json = False,
) -> None:
    """Evaluate an erasure: pictures before, after and under attack, rates with intervals, and what it cost.

    The same command goes on where an interrupted one stopped. No picture that the judge calls a hit is written, unless
    --store-images asks for it.
    """
    read = check_judge(judge)
    hand = {"original": original is not None, "targets": targets is not None}
    chosen = check_attacks([] if attack == ["none"] else attack or defaults(**hand), **hand)
    check_word("--convention", convention, CONVENTIONS)
    check_word("--precision", precision, PRECISIONS)
    check_places({"--pipeline": pipeline, "--original": original}, {"--prompts": prompts, "--retain": retain}, out)
    if targets is not None and not targets.exists():
        raise ResourceError(f"--targets {targets}: no such picture or folder of pictures")
    for option, value in {"--classifier": classifier, "--features": features, "--clip": clip}.items():
        if value is not None and retain is None:
            raise ValueError(f"{option}: is measured on prompts that should have stayed: give --retain")
    if features is not None:
        _check_features(features)
    from diffusion_unlearn.attacks.targets import read_targets
    from diffusion_unlearn.cli.attacking import attacks_of
    from diffusion_unlearn.cli.judging import judge_of
    from diffusion_unlearn.clip import ClipFeatures
    from diffusion_unlearn.evaluation import evaluate_erasure
    from diffusion_unlearn.measuring import parts_of
    from diffusion_unlearn.prompts import read_prompts
    from robust_core.device import choose_device
    from robust_core.loading import load_model

    place = str(choose_device(device))
    kept = resume if resume is not None else None if out is None else out / UNFINISHED
    attacks, wanted = attacks_of(chosen), read_prompts(prompts).repeated(seeds)
    pictures = None if targets is None else read_targets(targets, len(wanted), parts_of(pipeline, place))
    with console.progress() as report:
        result = evaluate_erasure(
            pipeline, wanted, judge_of(read, device=place), original=original,
            attacks=attacks, targets=pictures, retain=None if retain is None else read_prompts(retain).repeated(seeds),
            classifier=None if classifier is None else load_model(classifier, device=place),
            features=None if features is None else features_of(features, device=place),
            clip=None if clip is None else ClipFeatures.from_folder(clip, device=place), convention=convention,
            guidance=guidance, steps=steps, batch_size=batch_size, together=together, precision=PRECISIONS[precision],
            n_shown=shown, store_images=store_images, workers=workers, generator=seed, device=place, resume=kept,
            command=command(), on_step=report,
        )  # fmt: skip
    show(result, out, json)
    if out is not None and resume is None:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
