"""Pipelines on disk, in diffusers' own layout: read without running code, written so that plain diffusers reads them.

What is wrong with a folder is said before anything heavy is loaded: a part that is not there, weights that are pickles,
code that would be run, a layout of another kind. :func:`save_delta` keeps only what an erasure changed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import edited_copy
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError
from robust_core.errors import MalformedFileError, ResourceError, UntrustedFileError
from robust_core.io import load_tensors, read_json, save_tensors, write_json

__all__ = ["check_folder", "load_delta", "load_pipeline", "save_delta", "save_pipeline"]

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
NEEDED = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "To convert weights that you trust: load them once with diffusers (use_safetensors=False) and write them with "
    "pipe.save_pretrained(folder, safe_serialization=True)"
)


def check_folder(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return (part -> class) of a pipeline on disk, after looking at everything that can be seen without loading it.

    Raises:
        ResourceError: no such folder.
        MalformedFileError: it is not in diffusers' layout, or a part is not there.
        UntrustedFileError: weights are pickles, or the folder brings code of its own.
        UnsupportedPipelineError: a pipeline without a UNet or a text encoder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ResourceError(f"{place}: no such folder; a pipeline in diffusers' layout is needed")
    if not (place / INDEX).is_file():
        raise MalformedFileError(
            f"{place} holds no {INDEX}: it is no pipeline in diffusers' layout (single-file checkpoints are converted "
            "with StableDiffusionPipeline.from_single_file(...).save_pretrained(folder))"
        )
    index = read_json(place / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise MalformedFileError(f"{place / INDEX} names no class of pipeline")
    code = next(place.rglob("*.py"), None)
    if code is not None:
        raise UntrustedFileError(f"{place} brings code of its own ({code.name}), which would be run: it was not loaded")
    parts = _parts(place, index)
    missing = [name for name in NEEDED if name not in parts]
    if missing:
        raise UnsupportedPipelineError(
            f"{index['_class_name']} in {place} has no {', '.join(missing)}: pipelines with a text encoder and a UNet "
            "are supported (Stable Diffusion 1.x, 2.x, XL)"
        )
    for name in parts:
        _check_part(place / name)
    return parts


def _parts(place: Path, index: Mapping[str, Any]) -> dict[str, str]:
    parts: dict[str, str] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise MalformedFileError(f"{place / INDEX}: the entry of {name!r} is no pair of library and class")
        if entry[0].partition(".")[0] not in LIBRARIES:
            raise UntrustedFileError(
                f"{place / INDEX} takes {name!r} from {entry[0]!r}, which would run its code: it was not loaded"
            )
        parts[name] = entry[1]
    return parts


def _check_part(place: Path) -> None:
    if not place.is_dir() or not any(place.iterdir()):
        raise MalformedFileError(f"{place.parent} lacks the part {place.name!r} that its {INDEX} names")
    if not (place / "config.json").is_file():
        return  # a tokenizer, a scheduler: no weights
    if any(place.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in place.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise UntrustedFileError(f"{place / pickles[0]} is a pickle, which can run code; it was not loaded. {_CONVERT}")
    raise MalformedFileError(f"{place} holds no weights (*.safetensors)")


def _variant(place: Path, parts: Mapping[str, str]) -> str | None:
    """Return "fp16" (or another) where weights are there in that variant alone."""
    files = [file.name for name in parts for file in (place / name).glob("*.safetensors")]
    middle = {name.split(".")[1] for name in files if name.count(".") > 1 and "-of-" not in name}
    return middle.pop() if len(middle) == 1 and all(name.count(".") > 1 for name in files) else None


def load_pipeline(
    folder: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Return the diffusers pipeline of a folder; nothing is fetched and no code of the folder is run.

    Args:
        folder: in diffusers' layout, weights in safetensors.
        device: where it shall be; None leaves it on the CPU.
        dtype: of the weights; None means as they are (training needs float32).

    Raises:
        ResourceError, MalformedFileError, UntrustedFileError, UnsupportedPipelineError: see :func:`check_folder`; or
            diffusers cannot read it.
    """
    place = Path(folder)
    parts = check_folder(place)
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    variant = _variant(place, parts)
    more = {"variant": variant} if variant else {}
    try:
        with _quiet():
            pipe: Any = DiffusionPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True, **more)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise MalformedFileError(f"{place} is damaged, or no pipeline: {str(error).strip()[:400]}") from error
    for name in ("unet", "text_encoder", "text_encoder_2"):
        _check_complete(place / name, getattr(pipe, name, None))
    pipe.set_progress_bar_config(disable=True)
    TextToImage(pipe)
    for part in pipe.components.values():
        if dtype is not None and isinstance(part, nn.Module) and part.dtype != dtype:  # diffusers warns of any cast
            part.to(dtype)
    return pipe if device is None else pipe.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let no bars be drawn while a pipeline is loaded or written; progress is the command line's."""
    import diffusers.utils.logging as first
    import transformers.utils.logging as second

    drawing = [log for log in (first, second) if log.is_progress_bar_enabled()]
    for log in drawing:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in drawing:
            log.enable_progress_bar()


def _check_complete(place: Path, module: nn.Module | None) -> None:
    """Refuse weights that leave parameters out: transformers draws these at random and only warns."""
    from safetensors import safe_open

    if module is None:
        return
    found: set[str] = set()
    for file in place.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                words = key.split(".")
                found |= {".".join(words[i:]) for i in range(len(words))}  # versions put other words in front
    missing = [name for name, _ in module.named_parameters() if name not in found]
    if missing:
        raise MalformedFileError(f"{place}: the weights leave out {len(missing)} tensors, {missing[0]} among them")


def save_pipeline(pipe: Any, folder: str | os.PathLike[str]) -> Path:
    """Write a pipeline that plain diffusers loads: ``DiffusionPipeline.from_pretrained(folder)``.

    Raises:
        OSError: it cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with _quiet():
        pipe.save_pretrained(place, safe_serialization=True)
    return place


# -- what an erasure changed ---------------------------------------------------------------------------------------

EDITED = ("unet", "text_encoder", "text_encoder_2")
_SCHEMA = "erasure-delta/1"


def save_delta(folder: str | os.PathLike[str], edited: Any, original: Any, *, recipe: object = None) -> list[str]:
    """Write the tensors that an erasure changed, ``delta.safetensors``, and how, ``delta.json``; return their names.

    Args:
        folder: where.
        edited: the edited pipeline.
        original: the pipeline that it came from.
        recipe: the settings of the method, a dataclass; kept for the reader.

    Raises:
        ValueError: the pipelines have other parts, or nothing differs.
    """
    changed: dict[str, Tensor] = {}
    for part in EDITED:
        after, before = getattr(edited, part, None), getattr(original, part, None)
        if after is before:
            continue
        if after is None or before is None:
            raise ValueError(f"edited and original: one of them has no {part}")
        old = before.state_dict()
        for name, value in after.state_dict().items():
            if name not in old or old[name].shape != value.shape:
                raise ValueError(f"edited is no edit of original: {part}.{name} is not there, or has another shape")
            if not torch.equal(value.to(old[name].device), old[name]):
                changed[f"{part}.{name}"] = value.detach().cpu()
    if not changed:
        raise ValueError("edited and original are alike: there is nothing to save")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save_tensors(place / "delta.safetensors", changed)
    known = dataclasses.is_dataclass(recipe) and not isinstance(recipe, type)
    settings = {key: repr(value) for key, value in vars(recipe).items()} if known else repr(recipe)
    method = type(recipe).__name__ if known else None
    document = {"schema": _SCHEMA, "pipeline": type(original).__name__, "method": method, "settings": settings}
    write_json(place / "delta.json", {**document, "tensors": sorted(changed)})
    return sorted(changed)


def load_delta(pipe: Any, folder: str | os.PathLike[str], *, copy: bool = True) -> Any:
    """Return ``pipe`` with the tensors that :func:`save_delta` kept; the parts that do not change are shared.

    Args:
        pipe: the pipeline that was edited, or one of the same shapes (another checkpoint of the same base).
        folder: what was written.
        copy: False changes ``pipe`` itself.

    Raises:
        MalformedFileError: the folder holds something else.
        ValueError: the pipeline has no such tensor, or one of another shape.
    """
    place = Path(folder)
    document, tensors = read_json(place / "delta.json"), load_tensors(place / "delta.safetensors", finite=True)
    good = isinstance(document, dict) and document.get("schema") == _SCHEMA
    if not good or sorted(tensors) != document.get("tensors") or {n.partition(".")[0] for n in tensors} - {*EDITED}:
        raise MalformedFileError(f"{place} holds no delta of an erasure")
    parts = sorted({name.partition(".")[0] for name in tensors})
    absent = [part for part in parts if getattr(pipe, part, None) is None]
    if absent:
        raise ValueError(f"the delta changes {', '.join(absent)}, which {type(pipe).__name__} has not")
    own = {part: getattr(pipe, part).state_dict() for part in parts}
    for name, value in tensors.items():
        part, _, inner = name.partition(".")
        mine = own[part].get(inner)
        if mine is None or mine.shape != value.shape:
            shape = "no such tensor" if mine is None else f"shape {tuple(mine.shape)}"
            raise ValueError(f"the delta does not fit: {name} has shape {tuple(value.shape)}, the pipeline {shape}")
    result = edited_copy(pipe, *parts) if copy else pipe
    for name, value in tensors.items():
        part, _, inner = name.partition(".")
        with torch.no_grad():
            cast("dict[str, Tensor]", getattr(result, part).state_dict())[inner].copy_(value)
    return result
