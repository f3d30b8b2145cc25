"""The user's own network from words: ``package.module:factory`` with weights, or an exported ``.pt2``.

Domain packages add schemes of their own (``torchvision:resnet18``) through :func:`load_model`'s ``schemes``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core.errors import ResourceError
from robust_core.io import load_weights
from robust_core.io.exported import load_exported
from robust_core.words import check_module, current_folder, parse_spec

__all__ = ["Scheme", "load_factory", "load_model", "load_object"]

Scheme = Callable[[str, str | None], nn.Module]
"""Maps (name after the colon, weights file or None) to a model."""


def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    schemes: Mapping[str, Scheme] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the network that ``spec`` names, in eval mode on ``device``.

    Args:
        spec: ``package.module:factory`` (importable from the current folder too), a ``.pt2`` file, or
            ``scheme:name`` of one of ``schemes``.
        weights: safetensors file (or a ``.pt`` with tensors only) to load into what the factory returns.
        schemes: further prefixes.
        device: where to put it.

    Raises:
        ValueError: a spec of no known form, a factory that returns no ``nn.Module``, weights that do not fit.
        ResourceError: a module or file that is not there.
        UntrustedFileError: a file that could run code.
    """
    kind, name = parse_spec(spec, schemes or ())
    if kind == "pt2":
        if weights is not None:
            raise ValueError(f"weights={weights!r}: an exported program holds its own weights")
        return load_exported(spec, device=device)
    path = None if weights is None else os.fspath(weights)
    if schemes and kind in schemes:
        return schemes[kind](name, path).to(device).eval()
    model = load_factory(spec)
    if path is not None:
        load_into(model, path)
    return model.to(device).eval()


def load_into(model: nn.Module, path: str) -> None:
    """Load weights into ``model``, every name and shape matching.

    Raises:
        ValueError: names or shapes that do not match, or NaN among the weights.
    """
    state = load_weights(path)
    bad = sorted(k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all()))
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors hold NaN or infinity, {bad[0]!r} first")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        why = why if len(why) < 400 else f"{why[:400]} …"
        raise ValueError(f"{path} does not fit {type(model).__name__}: {why}") from error


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` (the current folder counts too) and return what it names.

    Raises:
        ResourceError: the module is not importable.
        ValueError: it has no such name.
    """
    module_name, _, name = spec.partition(":")
    check_module(spec)
    with current_folder():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and not module_name.startswith(error.name):
                raise ResourceError(f"model {spec!r}: {module_name} needs {error.name!r}, which is missing") from error
            raise ResourceError(
                f"model {spec!r}: no module {module_name!r}; it is looked for in {Path.cwd().name}/ and in the "
                "environment"
            ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model {spec!r}: {module_name} has no {name!r}")
        found = getattr(found, part)
    return found


def load_factory(spec: str, **arguments: Any) -> nn.Module:
    """Import ``package.module:factory`` and call it; a class or a ready ``nn.Module`` will do as well.

    Raises:
        ResourceError: the module is not importable.
        ValueError: it has no such name, or the name gives no ``nn.Module``.
    """
    found = load_object(spec)
    with current_folder():
        try:
            model = found if isinstance(found, nn.Module) else found(**arguments) if callable(found) else found
        except Exception as error:  # the user's code: anything may be raised
            raise ValueError(
                f"model {spec!r} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r} gave {type(model).__name__}; an nn.Module is needed")
    return model
