"""Attack a whole set of prompts, in shards that processes share and that are kept as they finish.

Prompts that draw the concept as they are need no attack; each of the others meets every attack. A shard is one attack
on a few prompts. Shards are the same for any number of processes, and so are the figures; a run that was interrupted
does again only the shards that were under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_unlearn.attacks.base import Found, OnStep, PromptAttack, Scene
from diffusion_unlearn.attacks.drawing import Drawing, Try
from diffusion_unlearn.attacks.report import AttackReport, new_document
from diffusion_unlearn.judges import Judge, check_images, facts
from diffusion_unlearn.measuring import parts_of
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import PromptSet
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import CheckpointError
from robust_core.execution import run_shards
from robust_core.io import read_json, write_atomic, write_json
from robust_core.random import Seed, resolve_seed

__all__ = ["attack_prompts"]

PathLike = str | os.PathLike[str]
SCHEMA = "erasure-attack-shards/1"


@dataclass(frozen=True)
class Setting:
    """All that a shard depends on; goes to other processes, so pipelines may be folders.

    Attributes:
        victim: pipeline or folder.
        original: pipeline, folder or None.
        tries: all prompts.
        attacks: by name.
        judge: says whether the concept is seen.
        steps: of the sampler.
        batch_size: pictures at a time.
        seed: of everything random.
        precision: of losses.
        gradient_checkpointing: compute activations again instead of keeping them.
        device: where folders are loaded to.
        targets: (N, C, H, W) pictures of the concept on the CPU, one for each prompt, or None.
    """

    victim: Any
    original: Any
    tries: tuple[Try, ...]
    attacks: Mapping[str, PromptAttack]
    judge: Judge
    steps: int
    batch_size: int
    seed: int
    precision: str
    gradient_checkpointing: bool
    device: str
    targets: Tensor | None


@dataclass(frozen=True)
class Shard:
    """One piece of work: ``name`` is an attack's, or empty for prompts as they are; ``rows`` are prompts."""

    name: str
    rows: tuple[int, ...]
    file: Path | None = None


def _do(shard: Shard, *, setting: Setting, on_step: OnStep | None = None) -> list[dict[str, Any]]:
    """Return plain JSON for each prompt of a shard, and keep it."""
    victim = parts_of(setting.victim, setting.device)
    drawing = Drawing(victim, setting.judge, setting.steps, setting.batch_size)
    tries = [setting.tries[i] for i in shard.rows]
    if shard.name:
        attack = setting.attacks[shard.name]
        scene = Scene(
            victim, tries, shard.rows, drawing, seed=setting.seed, label=shard.name, precision=setting.precision,
            gradient_checkpointing=setting.gradient_checkpointing, on_step=on_step,
        )  # fmt: skip
        if attack.needs_original or attack.needs_target:
            _add_concept(scene, setting, attack)
        done = [found.as_json() for found in attack.run(scene)]
    else:
        looks = drawing.look(tries)
        done = [Found(k.hit, t.text, t.seed, k.score, 1).as_json() for k, t in zip(looks, tries, strict=True)]
    if shard.file is not None:
        write_json(shard.file, done)
    return done


def _add_concept(scene: Scene, setting: Setting, attack: PromptAttack) -> None:
    """Give the scene pictures of the concept: the user's, or what the original draws for the same prompts and seeds."""
    original = None if setting.original is None else parts_of(setting.original, setting.device)
    if attack.needs_original:
        scene.original = original
    if setting.targets is not None:
        images = setting.targets[list(scene.index)]
    else:
        assert original is not None  # what attack_prompts refuses
        drawn: dict[int, Tensor] = {}
        for guidance in dict.fromkeys(t.guidance for t in scene.tries):
            rows = [i for i, t in enumerate(scene.tries) if t.guidance == guidance]
            texts, seeds = [scene.tries[i].text for i in rows], [scene.tries[i].seed for i in rows]
            made = original.generate(
                texts, seeds, guidance=guidance, steps=setting.steps, batch_size=setting.batch_size
            )
            drawn |= dict(zip(rows, made, strict=True))
        images = torch.stack([drawn[i] for i in range(len(scene))])
    with torch.no_grad():
        scene.latents = torch.cat([scene.victim.latents_of(part) for part in images.split(setting.batch_size)])


def _checked(setting: Setting) -> None:
    """Refuse what cannot work before anything is drawn."""
    victim, texts = parts_of(setting.victim, setting.device), [t.text for t in setting.tries]
    victim.ids(texts)
    for name, attack in setting.attacks.items():
        if not isinstance(attack, PromptAttack):
            raise TypeError(f"attacks: {name!r} is a {type(attack).__name__}; a PromptAttack is needed")
        attack.check(victim, texts)
        if attack.needs_original and setting.original is None:
            raise ValueError(f"attack {name!r} needs the pipeline before the erasure: give original")
        if attack.needs_target and setting.original is None and setting.targets is None:
            raise ValueError(f"attack {name!r} needs pictures of the concept: give targets, or the original pipeline")
    if setting.targets is not None:
        check_images(setting.targets)
        if len(setting.targets) != len(setting.tries):
            raise ValueError(f"targets: {len(setting.targets)} pictures for {len(setting.tries)} prompts; one each")


class _Kept:
    """Shards on disk; the file ``about.json`` says of which run they are."""

    def __init__(self, folder: PathLike | None, about: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        head = {"schema": SCHEMA, **about}
        file = self.folder / "about.json"
        if file.is_file():
            if read_json(file) != json.loads(json.dumps(head)):
                raise CheckpointError(
                    f"{self.folder}: was written with another pipeline, other prompts, attacks or settings; remove it, "
                    "or name another folder"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(head, indent=1))

    def shard(self, name: str, rows: Sequence[int]) -> Shard:
        """Return a shard with the place where it is kept."""
        digest = hashlib.sha256(json.dumps([name, list(rows)]).encode()).hexdigest()[:16]
        file = None if self.folder is None else self.folder / f"{digest}.json"
        return Shard(name, tuple(rows), file)

    def read(self, shard: Shard) -> list[dict[str, Any]] | None:
        """Return what was done before, or None."""
        if shard.file is None or not shard.file.is_file():
            return None
        found = read_json(shard.file)
        if not isinstance(found, list) or len(found) != len(shard.rows):
            raise CheckpointError(f"{shard.file}: is damaged; remove it")
        return found


def _work(
    shards: Sequence[Shard], setting: Setting, kept: _Kept, task: str, workers: int, on_step: OnStep | None
) -> list[list[Found]]:
    rows = [kept.read(shard) for shard in shards]
    open_ = [i for i, found in enumerate(rows) if found is None]
    before = len(shards) - len(open_)

    def report(done: int, total: int) -> None:
        del total
        if on_step is not None:
            on_step(task, before + done, len(shards))

    report(0, 0)
    here = workers == 1 or len(open_) <= 1
    do = partial(_do, setting=setting, on_step=on_step if here else None)
    made = run_shards(
        do, [shards[i] for i in open_], backend="here" if here else "processes", workers=workers, on_step=report
    )  # fmt: skip
    for i, found in zip(open_, made, strict=True):
        rows[i] = found
    return [[Found.from_json(row) for row in found or ()] for found in rows]


def _check_workers(workers: int, **pipelines: Any) -> None:
    for label, given in pipelines.items():
        if workers > 1 and given is not None and not isinstance(given, str | os.PathLike):
            raise ValueError(
                f"workers={workers}: every process loads its own {label}; give a folder (pipe.save_pretrained(folder))"
            )


def _about(setting: Setting, prompts: PromptSet, together: int) -> dict[str, Any]:
    """Return all that the figures depend on, as plain JSON."""
    targets = setting.targets
    return {
        "victim": _identity(setting.victim, setting.device),
        "original": _identity(setting.original, setting.device),
        "prompts": prompts.sha256,
        "tries": [list(t) for t in setting.tries],
        "judge": facts(setting.judge),
        "attacks": {label: repr(attack) for label, attack in setting.attacks.items()},
        "steps": setting.steps,
        "together": together,
        "precision": setting.precision,
        "seed": setting.seed,
        "targets": "" if targets is None else hashlib.sha256(targets.contiguous().numpy().tobytes()).hexdigest(),
    }


def _identity(pipe: Any, device: str) -> str:
    return "" if pipe is None else parts_of(pipe, device).sha256


def attack_prompts(
    pipe: Any,
    prompts: PromptSet,
    judge: Judge,
    attacks: Mapping[str, PromptAttack],
    *,
    original: Any = None,
    targets: Tensor | None = None,
    guidance: float = 7.5,
    steps: int = 50,
    batch_size: int = 16,
    together: int = 4,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    generator: Seed = None,
    workers: int = 1,
    device: str = "cpu",
    resume: PathLike | None = None,
    name: str | None = None,
    command: str = "",
    on_step: OnStep | None = None,
) -> AttackReport:
    """Attack an erased pipeline.

    Args:
        pipe: the victim, or a folder that holds it, which several processes need.
        prompts: what an attacker would like to have drawn, with seeds.
        judge: says whether the concept is seen.
        attacks: name -> attack.
        original: the pipeline before the erasure, or its folder; draws pictures of the concept where ``targets`` are
            not given, and is what P4D imitates.
        targets: (N, C, H, W) pictures of the concept in [0, 1], one for each prompt.
        guidance: of prompts without a guidance of their own.
        steps: of the sampler.
        batch_size: pictures at a time.
        together: prompts that gradient attacks work on at a time; figures depend on it by rounding alone.
        precision: of losses: ``"float32"``, ``"bfloat16"`` or ``"float16"`` (mixed).
        gradient_checkpointing: compute activations of the UNet again instead of keeping them: less memory, more time.
        generator: seed.
        workers: processes.
        device: where folders are loaded to.
        resume: a folder for finished shards; the same call goes on there.
        name: of the victim in the report.
        command: how to run this again.
        on_step: called with (what is done, steps done, steps in all).

    Raises:
        ValueError: no attack; a prompt without room for an attack's tokens; no picture of the concept.
        CheckpointError: ``resume`` belongs to another run.
        ShardError: a shard failed; its cause is chained.
    """
    started, seed = time.perf_counter(), resolve_seed(generator)
    check_count("together", together), check_count("workers", workers)
    check_number("guidance", guidance, low=0)
    check_choice("precision", precision, ("float32", "bfloat16", "float16"))
    if not attacks:
        raise ValueError("attacks: at least one is needed")
    _check_workers(workers, pipe=pipe, original=original)
    tries = tuple(Try(p.text, p.seed, guidance if p.guidance is None else p.guidance) for p in prompts)
    setting = Setting(
        pipe, original, tries, dict(attacks), judge, steps, batch_size, seed, precision, gradient_checkpointing, device,
        None if targets is None else targets.cpu().float(),
    )  # fmt: skip
    _checked(setting)
    about = _about(setting, prompts, together)
    kept = _Kept(resume, about)
    work = partial(_work, setting=setting, kept=kept, workers=workers, on_step=on_step)

    plain = [kept.shard("", rows) for rows in _chunks(range(len(tries)), batch_size)]
    unattacked = [found for rows in work(plain, task="prompts as they are") for found in rows]
    open_ = [i for i, found in enumerate(unattacked) if not found.success]
    shards = [kept.shard(label, rows) for label in attacks for rows in _chunks(open_, together)]
    found: dict[str, list[Found | None]] = {label: [None] * len(tries) for label in attacks}
    for shard, rows in zip(shards, work(shards, task="attacks"), strict=True):
        for i, one in zip(shard.rows, rows, strict=True):
            found[shard.name][i] = one
    document, arrays = new_document(
        prompts, tries, unattacked, found, dict(attacks), about=about, judge=facts(judge), seed=seed, started=started,
        name=name or _name(pipe), device=str(parts_of(pipe, device).device), command=command,
        checked=_has_checker(parts_of(pipe, device)),
    )  # fmt: skip
    return AttackReport(document, arrays, tuple(tries), tuple(unattacked), found)


def _chunks(rows: Iterable[int], size: int) -> list[list[int]]:
    every = list(rows)
    return [every[start : start + size] for start in range(0, len(every), size)]


def _name(pipe: Any) -> str:
    return Path(pipe).name if isinstance(pipe, str | os.PathLike) else type(pipe).__name__


def _has_checker(parts: TextToImage) -> bool:
    return getattr(parts.pipe, "safety_checker", None) is not None
