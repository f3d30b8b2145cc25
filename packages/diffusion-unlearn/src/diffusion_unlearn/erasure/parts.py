"""What an erasure may change: parameters by name or number, a copy of the pipeline around them, prompts that fit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusion_unlearn.pipeline import UnsupportedPipelineError
from robust_core.checks import check_choice, check_count

__all__ = [
    "UNET_PARTS",
    "check_concepts",
    "check_retained",
    "check_trainable",
    "edited_copy",
    "encoder_parameters",
    "only_training",
    "trained_parameters",
    "unet_parameters",
]

UNET_PARTS = ("x", "u", "kv", "attn", "noxattn", "selfattn", "notime", "full")
"""``x`` cross-attention, ``kv`` its keys and values, ``attn`` all attention, ``u`` all linear and convolutional layers
but cross-attention, ``noxattn`` all but cross-attention, time embedding and output (as first released), ``notime`` all
but the last two."""


def unet_parameters(unet: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one of :data:`UNET_PARTS`, by name.

    Raises:
        ValueError: an unknown part.
        UnsupportedPipelineError: the network has none of it.
    """
    check_choice("part", part, UNET_PARTS)
    dense = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    rules = {
        "x": lambda name: ".attn2." in name,
        "kv": lambda name: re.search(r"\.attn2\.to_[kv]\.", name) is not None,
        "attn": lambda name: re.search(r"\.attn[12]\.", name) is not None,
        "u": lambda name: ".attn2." not in name and name.rpartition(".")[0] in dense,
        "noxattn": lambda name: ".attn2." not in name and not _ends(name),
        "selfattn": lambda name: ".attn1." in name,
        "notime": lambda name: not _ends(name),
        "full": lambda name: True,
    }
    found = {name: parameter for name, parameter in unet.named_parameters() if rules[part](name)}
    if not found:
        raise UnsupportedPipelineError(f"{type(unet).__name__} has no parameters of part {part!r}")
    return found


def _ends(name: str) -> bool:
    return name.startswith(("time_embedding.", "conv_out.", "conv_norm_out."))


def encoder_parameters(encoder: nn.Module, layers: str | Sequence[int] = "all") -> dict[str, nn.Parameter]:
    """Return the parameters of some layers of a text encoder, by name.

    Args:
        encoder: a ``CLIPTextModel``.
        layers: ``"all"``: every layer and the final normalisation; else the numbers of layers, from 0, and nothing
            beside them. Embeddings of tokens and positions are never among them.

    Raises:
        ValueError: a number that no layer has, or none at all.
        UnsupportedPipelineError: no list of layers is found.
    """
    depth = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    stacks = [(name, m) for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise UnsupportedPipelineError(f"{type(encoder).__name__} has no list of its {depth} layers")
    name, stack = stacks[0]
    if isinstance(layers, str):
        check_choice("layers", layers, ("all",))
        chosen = range(len(stack))
    else:
        chosen = sorted({check_count("layers", number, low=0) for number in layers})
        if not chosen or chosen[-1] >= len(stack):
            raise ValueError(f"layers={list(layers)}: numbers in 0 .. {len(stack) - 1} are needed, or 'all'")
    found = {f"{name}.{i}.{inner}": p for i in chosen for inner, p in stack[i].named_parameters()}
    if isinstance(layers, str):
        found |= {key: p for key, p in encoder.named_parameters() if "final_layer_norm" in key}
    return found


def trained_parameters(pipe: Any, part: str, layers: str | Sequence[int] = "all") -> dict[str, nn.Parameter]:
    """Return the parameters of a part of a pipeline, by name.

    Args:
        pipe: the pipeline.
        part: one of :data:`UNET_PARTS`, ``"text_encoder"``, or ``"embedding"``, its table of tokens.
        layers: of the text encoder.
    """
    if part == "text_encoder":
        return encoder_parameters(pipe.text_encoder, layers)
    if part == "embedding":
        table = pipe.text_encoder.get_input_embeddings().weight
        return {name: p for name, p in pipe.text_encoder.named_parameters() if p is table}
    return unet_parameters(pipe.unet, part)


def edited_copy(pipe: Any, *names: str) -> Any:
    """Return a pipeline whose parts ``names`` are copies, to be changed; the other parts are shared."""
    made = copy.copy(pipe)
    for name in names:
        setattr(made, name, copy.deepcopy(getattr(pipe, name)))
    return made


@contextmanager
def only_training(parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let gradients reach ``parameters`` and nothing else of ``modules``; flags and modes are put back."""
    wanted, whole = {id(parameter) for parameter in parameters}, list(modules)
    flags = [(p, p.requires_grad) for module in whole for p in module.parameters()]
    modes = [(inner, inner.training) for module in whole for inner in module.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        for module in whole:
            module.eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for inner, mode in modes:
            inner.training = mode


def check_trainable(trained: nn.Module, modules: Sequence[nn.Module], precision: str) -> None:
    """Refuse number formats in which a pipeline cannot be trained.

    Raises:
        ValueError: half precision in the part that is trained, or formats mixed without mixed precision.
    """
    dtype = next(trained.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{type(trained).__name__}, which is trained, is in {dtype}: small steps would be lost in rounding; load "
            "it in float32, and give precision='bf16' for networks in half precision"
        )
    others = {next(module.parameters()).dtype for module in modules} - {dtype}
    if others and precision == "float32":
        raise ValueError(
            f"parts of the pipeline are in {', '.join(sorted(map(str, others)))} beside {dtype}: give precision='bf16' "
            "or 'fp16', or load all in one format"
        )


def check_concepts(concept: str | Sequence[str], *, name: str = "concept") -> tuple[str, ...]:
    """Return the prompts that stand for a concept, one or several.

    Raises:
        TypeError, ValueError: not texts, none, an empty one, one twice.
    """
    found = (concept,) if isinstance(concept, str) else tuple(concept)
    if not all(isinstance(text, str) for text in found):
        raise TypeError(f"{name} must be a text or several, not {concept!r}")
    if not found or not all(text.strip() for text in found) or len(set(found)) < len(found):
        raise ValueError(f"{name}={list(found)}: different texts that are not empty are needed, at least one")
    return found


def check_retained(prompts: Sequence[str], concepts: Sequence[str], *, name: str = "retain") -> tuple[str, ...]:
    """Return prompts that shall stay as they are.

    Raises:
        TypeError, ValueError: not a list of different texts, or one holds a concept that is to be erased.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{name} must be a list of texts, not one text")
    found = check_concepts(prompts, name=name) if prompts else ()
    for prompt in found:
        for concept in concepts:
            if re.search(rf"(?<!\w){re.escape(concept.strip())}(?!\w)", prompt, re.IGNORECASE):
                raise ValueError(
                    f"{name} prompt {prompt[:80]!r} holds the concept {concept!r} that is to be erased: it would be "
                    "taught again; take it out"
                )
    return found
