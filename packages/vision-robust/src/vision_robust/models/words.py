"""The user's vision model from words: ``torchvision:NAME``, ``timm:NAME``, ``bundled:NAME`` and what core knows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from robust_core import loading
from robust_core.errors import ResourceError, optional_import
from robust_core.io import load_weights
from robust_core.models import Normalize
from robust_core.random import Seed, reseeded, resolve_seed
from vision_robust.models.networks import SmallCNN, resnet18_32
from vision_robust.models.queries import BLACK_BOXES, black_box
from vision_robust.models.saved import load_saved

__all__ = ["build_model", "load_model"]


def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the network that ``spec`` names, inputs in [0, 1], in eval mode.

    Args:
        spec: ``torchvision:resnet18``, ``timm:convnext_nano``, ``bundled:small-cnn@1x28x28`` or
            ``bundled:resnet18-32@3x32x32`` (these two need ``weights``), ``saved:FOLDER`` (written by ``robust vision
            harden``), ``package.module:factory``, or a ``.pt2``. Models that only answer queries: ``onnx:FILE``,
            ``http://…``, ``https://…``, ``callable:package.module:function``; see :mod:`vision_robust.models.queries`.
        weights: safetensors file with the state dict. Without it, ``torchvision:`` and ``timm:`` take the library's
            published weights, which must be in its cache or within reach.
        normalise: (mean, std) to put in front of the network. ``torchvision:`` and ``timm:`` models bring their own.
        device: where to put it.

    Raises:
        ValueError: a spec of no known form, or weights that do not fit.
        ResourceError: weights, a module or a library that is not there.
    """
    schemes = {"torchvision": _torchvision, "timm": _timm, "bundled": _bundled, "saved": _saved}
    schemes |= {kind: partial(_black_box, kind) for kind in BLACK_BOXES}
    model = loading.load_model(spec, weights=weights, schemes=schemes, device=device)
    if normalise is None:
        return model
    return nn.Sequential(Normalize(*normalise), model).to(device).eval()


def _head_size(plain: nn.Module, weights: str) -> int:
    """Return the number of classes: the length of the saved counterpart of the network's last parameter."""
    last = [name for name, _ in plain.named_parameters()][-1]
    state = load_weights(weights)
    if last not in state:
        raise ValueError(f"{weights} holds no {last!r}, the last layer of {type(plain).__name__}; other architecture?")
    return int(state[last].shape[0])


def _torchvision(name: str, weights: str | None) -> nn.Module:
    import torchvision  # only here: importing it takes seconds

    try:
        published: Any = torchvision.models.get_model_weights(name)["DEFAULT"]
    except ValueError as error:
        raise ValueError(f"model 'torchvision:{name}': {error}") from error
    if weights is None:
        try:
            network = torchvision.models.get_model(name, weights=published)
        except (URLError, OSError) as error:
            raise ResourceError(
                f"model 'torchvision:{name}': the published weights are not in torch's cache and could not be fetched "
                f"({error}); give a safetensors file with --weights"
            ) from error
    else:
        with torch.device("meta"):
            plain = torchvision.models.get_model(name, weights=None)
        network = torchvision.models.get_model(name, weights=None, num_classes=_head_size(plain, weights))
        loading.load_into(network, weights)
    transform = published.transforms()
    return nn.Sequential(Normalize(transform.mean, transform.std), network)


def _timm(name: str, weights: str | None) -> nn.Module:
    timm = optional_import("timm", extra="timm", package="vision-robust")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:5])
        raise ValueError(
            f"model 'timm:{name}' is not known to timm {timm.__version__}{f'; near: {near}' if near else ''}"
        )
    if weights is None:
        try:
            network = timm.create_model(name, pretrained=True)
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"model 'timm:{name}': the published weights are not in the cache and could not be fetched ({error}); "
                "give a safetensors file with --weights"
            ) from error
    else:
        with torch.device("meta"):
            plain = timm.create_model(name)
        network = timm.create_model(name, num_classes=_head_size(plain, weights))
        loading.load_into(network, weights)
    settings = timm.data.resolve_model_data_config(network)
    return nn.Sequential(Normalize(settings["mean"], settings["std"]), network)


def _bundled(name: str, weights: str | None) -> nn.Module:
    build = _architecture(name)
    if weights is None:
        raise ResourceError(f"model 'bundled:{name}' is an architecture; give its weights with --weights FILE")
    network = build(_head_size(build(10), weights))
    loading.load_into(network, weights)
    return network


def _architecture(name: str) -> Callable[[int], nn.Module]:
    """Return what makes a bundled network from a number of classes."""
    match = re.fullmatch(r"(small-cnn|resnet18-32)(?:@(\d+)x(\d+)x(\d+))?", name)
    if match is None:
        raise ValueError(f"model 'bundled:{name}': choose small-cnn@CxHxW or resnet18-32@CxHxW")
    default = (1, 28, 28) if match[1] == "small-cnn" else (3, 32, 32)
    shape = default if match[2] is None else (int(match[2]), int(match[3]), int(match[4]))
    return partial(SmallCNN, shape=shape) if match[1] == "small-cnn" else partial(resnet18_32, channels=shape[0])


def _saved(name: str, weights: str | None) -> nn.Module:
    if weights is not None:
        raise ValueError(f"model 'saved:{name}': the folder holds its weights; leave --weights out")
    return load_saved(name)


def _black_box(kind: str, name: str, weights: str | None) -> nn.Module:
    if weights is not None:
        raise ValueError(f"model '{kind}:{name}': a black box holds its own weights; leave --weights out")
    return black_box(f"{kind}:{name}")


def build_model(spec: str, n_classes: int, *, generator: Seed = None) -> nn.Module:
    """Return a fresh network of the architecture that ``spec`` names, for weights that are loaded afterwards.

    Args:
        spec: as for :func:`load_model`. The architecture of ``saved:``, ``.pt2`` and ``onnx:`` models lies in their
            files, which are read; a factory says itself how many classes it has.
        n_classes: size of the last layer.
        generator: seed of the initial weights.
    """
    kind, _, name = spec.partition(":")
    if kind in ("saved", *BLACK_BOXES) or spec.endswith(".pt2"):
        return load_model(spec)
    with reseeded(resolve_seed(generator)):
        if kind == "bundled":
            return _architecture(name)(n_classes)
        if kind == "torchvision":
            import torchvision

            published: Any = torchvision.models.get_model_weights(name)["DEFAULT"]
            transform = published.transforms()
            network = torchvision.models.get_model(name, weights=None, num_classes=n_classes)
            return nn.Sequential(Normalize(transform.mean, transform.std), network)
        if kind == "timm":
            timm = optional_import("timm", extra="timm", package="vision-robust")
            network = timm.create_model(name, num_classes=n_classes)
            settings = timm.data.resolve_model_data_config(network)
            return nn.Sequential(Normalize(settings["mean"], settings["std"]), network)
        return loading.load_factory(spec)
