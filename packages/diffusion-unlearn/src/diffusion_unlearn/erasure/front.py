"""One call for all ways to erase: pipeline, method and concept in, edited pipeline out.

    edited = erase(pipe, "Van Gogh", method="advunlearn", templates=("a painting by {}", "{} style"), retain=prompts)
    edited.save_pretrained("erased")                    # loads in plain diffusers

``pipe`` is a pipeline or a folder of one. What a word of this call means to each method:

===========  ==================================  ===================  ==============================
method       retain                              anchor               what is trained
===========  ==================================  ===================  ==============================
advunlearn   kept by its loss; needed            none                 text encoder, or UNet
esd          none                                none                 UNet, or text encoder
uce          preserved in closed form            takes the place ""   nothing: solved, in seconds
fmn          none                                none                 UNet
ca           none                                needed               UNet, text encoder, embeddings
===========  ==================================  ===================  ==============================

A concept is a *list of prompts*: what is erased from one word need not be gone from sentences with it, so give
``templates`` that users would write. List synonyms as further concepts: nothing erases names that it was not told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from typing import Any, get_type_hints

import torch

from diffusion_unlearn.erasure.advunlearn import AdvUnlearn
from diffusion_unlearn.erasure.ca import ConceptAblation
from diffusion_unlearn.erasure.esd import ESD
from diffusion_unlearn.erasure.fmn import FMN
from diffusion_unlearn.erasure.parts import check_concepts, check_retained
from diffusion_unlearn.erasure.training import OnStep, Progress, TrainedErasure
from diffusion_unlearn.erasure.uce import UCE
from robust_core.attacks.tokens import SoftTokens
from robust_core.checks import check_choice

__all__ = ["METHODS", "erase", "recipe", "settings_of"]

METHODS: dict[str, type[TrainedErasure] | type[UCE]] = {
    "advunlearn": AdvUnlearn, "esd": ESD, "uce": UCE, "fmn": FMN, "ca": ConceptAblation,
}  # fmt: skip
_OWN = {"concept", "retain", "preserve", "guide", "anchor", "generator", "attack"}
_ATTACKER = SoftTokens(n_steps=30, lr=1e-3)
_ATTACK = {"attack_steps": "n_steps", "attack_lr": "lr", "attack_fast": "fast"}


def settings_of(method: str) -> type:
    """Return the settings of a method's own as a dataclass of plain values, for ``robust_core.settings``.

    ``layers`` are numbers here, None means all; advunlearn's attacker is told in three settings of the method.
    """
    kind: Any = METHODS[check_choice("method", method, tuple(METHODS))]
    hints = get_type_hints(kind)
    plain: list[Any] = [
        ("layers", tuple[int, ...] | None, None) if f.name == "layers" else (f.name, hints[f.name], f.default)
        for f in fields(kind)
        if f.name not in _OWN
    ]
    if method == "advunlearn":
        types = get_type_hints(SoftTokens)
        plain += [(name, types[inner], getattr(_ATTACKER, inner)) for name, inner in _ATTACK.items()]
    return make_dataclass(f"{kind.__name__}Settings", [(n, t, field(default=d)) for n, t, d in plain], frozen=True)


def recipe(
    method: str,
    concept: str | Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    retain: Sequence[str] = (),
    anchor: str | None = None,
    generator: int | None = None,
    **settings: Any,
) -> Any:
    """Return a method with its settings: an object with ``fit(pipe)``.

    Args:
        method: one of :data:`METHODS`.
        concept: what is erased, one or several words or phrases.
        templates: sentences with ``{}`` where the concept stands.
        retain: prompts that shall draw what they drew.
        anchor: what takes the concept's place.
        generator: seed.
        settings: fields of the method, such as ``n_steps=200``; of advunlearn also ``attack_steps``, ``attack_lr`` and
            ``attack_fast``, of its attacker.

    Raises:
        ValueError, TypeError: an unknown method or setting, or one that this method has no use for.
    """
    kind = METHODS[check_choice("method", method, tuple(METHODS))]
    concepts = check_concepts(concept)
    prompts = _prompts(concepts, templates)
    check_retained(retain, concepts)
    given: dict[str, Any] = {"concept": prompts, **_settings(method, settings)}
    if retain:
        if method not in ("advunlearn", "uce"):
            raise ValueError(f"retain: {method} has no term that keeps other prompts; advunlearn and uce have")
        given["retain" if method == "advunlearn" else "preserve"] = tuple(retain)
    if anchor is not None:
        if method not in ("ca", "uce"):
            raise ValueError(f"anchor: {method} puts nothing in the place of the concept; ca and uce do")
        # prompts are concept by concept, template by template
        given["anchor" if method == "ca" else "guide"] = [t.format(anchor) for _ in concepts for t in templates]
    elif method == "ca":
        raise ValueError("anchor is needed by ca: what the concept's prompts shall draw instead")
    if method == "fmn" and len(concepts) == 1:
        given["subject"] = concepts[0]
    if method != "uce":
        given["generator"] = generator
    return kind(**given)


def _prompts(concepts: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str) or not templates or not all(t.count("{}") == 1 for t in templates):
        raise ValueError(f"templates={templates!r}: texts with {{}} once, where the concept stands, are needed")
    return tuple(template.replace("{}", concept) for concept in concepts for template in templates)


def _settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in settings.items() if not (name == "layers" and value is None)}
    known = [f.name for f in fields(settings_of(method))] + (["attack"] if method == "advunlearn" else [])
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: {method} has no such setting; it has {', '.join(known)}")
    attacker = {name: found.pop(name) for name in _ATTACK if name in found and method == "advunlearn"}
    if attacker:
        found["attack"] = replace(_ATTACKER, **{_ATTACK[name]: value for name, value in attacker.items()})
    return found


def erase(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    method: str = "advunlearn",
    templates: Sequence[str] = ("{}",),
    retain: Sequence[str] = (),
    anchor: str | None = None,
    generator: int | None = None,
    pool: Any = None,
    drawing: Mapping[str, Any] | None = None,
    copy: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    device: str | torch.device | None = None,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Return a pipeline without a concept; see the module.

    Args:
        pipe: a diffusers pipeline (Stable Diffusion 1.x, 2.x, XL), or a folder of one.
        concept: what is erased, one or several words or phrases.
        method: one of :data:`METHODS`.
        templates: sentences with ``{}`` where the concept stands.
        retain: prompts that shall draw what they drew.
        anchor: what takes the concept's place.
        generator: seed; None means 0.
        pool: what ``recipe(...).pool(pipe)`` gave; None draws it now.
        drawing: how it is drawn, such as ``{"n": 4, "steps": 50, "guidance": 3.0}``.
        copy: False changes ``pipe`` itself.
        checkpoint: folder; a run that was interrupted goes on from there.
        precision: "float32", "bf16" or "fp16".
        gradient_checkpointing: less memory for more time.
        device: where to train, such as "cuda"; the parts are put back afterwards.
        on_step: called with (state, loss); returning False ends the run after a checkpoint.
        progress: called with (what is done, done, in all).
        settings: fields of the method; see :func:`recipe`.

    Raises:
        ValueError, TypeError: arguments that do not fit; a retained prompt that holds the concept, prompts too long.
        UnsupportedPipelineError: a part is missing, or the method cannot edit such a pipeline.
        MalformedFileError, UntrustedFileError, ResourceError: the folder; see :mod:`diffusion_unlearn.folders`.
        CheckpointError: the checkpoint is of another run.
    """
    chosen = recipe(method, concept, templates=templates, retain=retain, anchor=anchor, generator=generator, **settings)
    if isinstance(pipe, str | os.PathLike):
        from diffusion_unlearn.folders import load_pipeline

        pipe = load_pipeline(pipe)
    if isinstance(chosen, UCE):
        unused = {"pool": pool, "drawing": drawing, "checkpoint": checkpoint, "on_step": on_step}
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: uce draws nothing and takes no steps")
        return chosen.fit(pipe, copy=copy)
    return chosen.fit(
        pipe, pool=pool, drawing=drawing, copy=copy, checkpoint=checkpoint, precision=precision,
        gradient_checkpointing=gradient_checkpointing, device=device, on_step=on_step, progress=progress,
    )  # fmt: skip
