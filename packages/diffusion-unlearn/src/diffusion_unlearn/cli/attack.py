"""``robust diffusion attack``: is the concept gone from a pipeline, or only its name?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from diffusion_unlearn.cli.app import app
from diffusion_unlearn.cli.attacking import HELP as ATTACKS
from diffusion_unlearn.cli.attacking import check_attacks, defaults
from diffusion_unlearn.cli.evaluate import PRECISIONS, UNFINISHED, check_places
from diffusion_unlearn.cli.judging import HELP as JUDGES
from diffusion_unlearn.cli.judging import check_judge
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from robust_core.errors import ResourceError
from robust_core.words import check_word

__all__ = ["attack"]


@app.command()
def attack(
    pipeline: Annotated[Path, typer.Option("--pipeline", "-p", help="Folder of the erased pipeline.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt a line (.txt), or .csv with seeds.")],
    judge: Annotated[str, typer.Option("--judge", help=f"Says whether the concept is seen: {JUDGES}")],
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help=f"{ATTACKS}. All but inversion if left out."),
    ] = None,
    original: Annotated[
        Path | None, typer.Option("--original", help="Folder of the pipeline before the erasure.")
    ] = None,
    targets: Annotated[
        Path | None, typer.Option("--targets", help="Pictures of the concept, where --original is not at hand.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Of prompts that bring none.")] = 7.5,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    together: Annotated[int, typer.Option(min=1, help="Prompts that a search works on at a time.")] = 4,
    precision: Annotated[str, typer.Option(help=f"Of losses: {', '.join(PRECISIONS)}.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes; no figure depends on it.")] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Folder for finished parts, kept at the end; below --out if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for result.json, found.csv, report.html and more.")
    ] = None,
    json: Json = False,
) -> None:
    """Attack an erasure: how often is the concept drawn as things are, and how often by an attacker's prompts?

    The same command goes on where an interrupted one stopped.
    """
    words = check_judge(judge)
    chosen = attacks or defaults(original=original is not None, targets=targets is not None)
    read = check_attacks(chosen, original=original is not None, targets=targets is not None)
    check_word("--precision", precision, PRECISIONS)
    check_places({"--pipeline": pipeline, "--original": original}, {"--prompts": prompts}, out)
    if targets is not None and not targets.exists():
        raise ResourceError(f"--targets {targets}: no such picture or folder of pictures")
    kept = resume if resume is not None or out is None else out / UNFINISHED
    from diffusion_unlearn.attacks import attack_prompts
    from diffusion_unlearn.attacks.targets import read_targets
    from diffusion_unlearn.cli.attacking import attacks_of
    from diffusion_unlearn.cli.judging import judge_of
    from diffusion_unlearn.folders import load_pipeline
    from diffusion_unlearn.pipeline import TextToImage
    from diffusion_unlearn.prompts import read_prompts
    from robust_core.device import choose_device

    asked, made, where = read_prompts(prompts), attacks_of(read), choose_device(device)
    victim = pipeline if workers > 1 else load_pipeline(pipeline, device=where)
    first = original if workers > 1 or original is None else load_pipeline(original, device=where)
    pictures = None
    if targets is not None:
        parts = TextToImage(load_pipeline(pipeline) if workers > 1 else victim)
        pictures = read_targets(targets, len(asked), parts)
    with console.progress() as report:
        result = attack_prompts(
            victim, asked, judge_of(words, device=where), made, original=first, targets=pictures, guidance=guidance,
            steps=steps, batch_size=batch_size, together=together, precision=PRECISIONS[precision],
            gradient_checkpointing=gradient_checkpointing, generator=seed,
            workers=workers, device=str(where), resume=kept, name=pipeline.name, command=command(), on_step=report,
        )  # fmt: skip
    show(result, out, json)
    if resume is None and kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    if not json:
        texts = result.texts()
        for prompt in list(texts or ())[:5]:
            console.info(f"brought it back: {prompt.text!r} (seed {prompt.seed})")
