"""From folder to folder: what ``robust diffusion erase`` does, and what it writes beside the edited pipeline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_unlearn.erasure.front import erase, recipe, settings_of
from diffusion_unlearn.erasure.training import Progress
from diffusion_unlearn.erasure.uce import UCE
from diffusion_unlearn.folders import check_folder, load_pipeline, save_pipeline
from diffusion_unlearn.prompts import read_prompts
from robust_core.claim import versions
from robust_core.device import choose_device
from robust_core.io import sha256, write_json
from robust_core.models import fingerprint
from robust_core.settings import parse_settings

__all__ = ["SCHEMA", "erase_folder"]

SCHEMA = "robust.erasure/1"


def erase_folder(
    pipeline: Path,
    concept: Sequence[str],
    out: Path,
    *,
    method: str = "advunlearn",
    templates: Sequence[str] = ("{}",),
    retain: Path | None = None,
    anchor: str | None = None,
    own: Sequence[str] = (),
    drawing: Mapping[str, Any] | None = None,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a pipeline without a concept, and ``result.json`` beside it; return what that says.

    Args:
        pipeline: folder in diffusers' layout.
        concept: what is erased.
        out: folder for the edited pipeline.
        method: see :func:`~diffusion_unlearn.erasure.front.erase`, as all that follows.
        templates: sentences with ``{}``.
        retain: file of prompts (:func:`~diffusion_unlearn.prompts.read_prompts`).
        anchor: what takes the concept's place.
        own: settings of the method, ``name=value`` each.
        drawing: how what it is trained on is drawn.
        precision: of the networks.
        gradient_checkpointing: less memory for more time.
        seed: of everything random.
        device: "auto", "cpu", "cuda" ...
        checkpoint: folder of a run that goes on.
        command: how to do it again.
        progress: called with (what is done, done, in all).
    """
    started = time.perf_counter()
    check_folder(pipeline)
    kept = [] if retain is None else list(dict.fromkeys(read_prompts(retain).texts))
    settings = asdict(parse_settings(settings_of(method), own))
    words: dict[str, Any] = {"templates": templates, "retain": kept, "anchor": anchor, "generator": seed}
    chosen = recipe(method, concept, **words, **settings)  # refuses what it can before anything is loaded
    trained = "unet" if isinstance(chosen, UCE) else chosen.component
    pipe = load_pipeline(pipeline, device=choose_device(device), dtype=torch.float32)
    before = fingerprint(getattr(pipe, trained))
    losses: list[torch.Tensor] = []
    more: dict[str, Any] = {"precision": precision, "gradient_checkpointing": gradient_checkpointing}
    if not isinstance(chosen, UCE):
        more |= {"checkpoint": checkpoint, "on_step": lambda _, loss: losses.append(loss.total)}
    edited = erase(
        pipe, concept, method=method, copy=False, drawing=drawing or None, progress=progress, **words, **settings,
        **more,
    )  # fmt: skip
    save_pipeline(edited, out)
    result = {
        "schema": SCHEMA,
        "pipeline": str(out),
        "model": str(pipeline),
        "method": method,
        "concept": list(concept),
        "prompts": list(chosen.concept),
        "retain": {"file": retain and str(retain), "n": len(kept), "sha256": sha256(retain) if retain else None},
        "anchor": anchor,
        "settings": settings,
        "drawing": dict(drawing or {}),
        "component": trained,
        "model_sha256": {"before": before, "after": fingerprint(getattr(edited, trained))},
        "loss": _ends(losses),
        "flags": _flags(method, chosen, templates, kept, edited),
        "seed": seed,
        "device": str(edited.unet.device),
        "precision": precision,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions("diffusers", "transformers"),
        "command": command,
    }
    write_json(out / "result.json", result)
    return result


def _ends(losses: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the mean loss of the first and of the last tenth of the steps of this run."""
    if not losses:
        return {}
    values, n = torch.stack([loss.detach() for loss in losses]).float().cpu(), max(1, len(losses) // 10)
    return {"start": float(values[:n].mean()), "end": float(values[-n:].mean())}


def _flags(method: str, chosen: Any, templates: Sequence[str], kept: Sequence[str], edited: Any) -> list[str]:
    found = []
    if list(templates) == ["{}"]:
        found.append("erased from the bare words alone, which need not carry over to sentences: give --template")
    if not kept and not (method == "ca" and chosen.prior_weight > 0):
        found.append("nothing was retained: look at the pictures of other prompts")
    if getattr(edited, "safety_checker", None) is not None:
        found.append("the pipeline's safety checker was kept as it is; it hides pictures that this erasure lets pass")
    return found
