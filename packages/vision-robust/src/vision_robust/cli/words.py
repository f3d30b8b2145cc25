"""The words of ``robust vision``, checked before torch is imported: a typing error is told at once."""

from __future__ import annotations

import math
import os
from pathlib import Path

from robust_core.errors import ResourceError
from robust_core.words import check_module, check_norm, check_word, parse_eps, parse_spec
from vision_robust.recipes import methods_of

__all__ = ["CERTIFIERS", "PARTS", "PRECISIONS", "PROFILES", "SCHEMES", "SPLITS", "VERSIONS", "check"]

SCHEMES = ("torchvision", "timm", "bundled", "saved", "onnx", "http", "https", "callable")
CERTIFIERS = ("smoothing", "interval", "crown", "crown-ibp", "alpha-crown", "lipschitz")
PARTS = ("clean", "calibration", "adversarial", "curve", "corruptions", "certified", "tightness", "translation")
VERSIONS = ("standard", "plus", "rand", "fast")
PROFILES = ("imagenet", "cifar", "small")
PRECISIONS = ("float32", "bf16", "fp16")
SPLITS = ("train", "test", "all")
_CHOICES = {
    "version": VERSIONS,
    "certifier": (*CERTIFIERS, *methods_of("certify"), "all"),
    "objective": methods_of("harden"),
    "explainer": methods_of("explain"),
    "profile": PROFILES,
    "precision": PRECISIONS,
    "split": SPLITS,
}
_OPTION = {"certifier": "method", "objective": "method", "explainer": "method"}


def check(
    *,
    model: str | None = None,
    data: str | None = None,
    root: Path | None = None,
    weights: Path | None = None,
    norm: str | None = None,
    eps: str | None = None,
    parts: str | None = None,
    positive: dict[str, float] | None = None,
    shares: dict[str, float] | None = None,
    out: Path | None = None,
    **words: str | None,
) -> None:
    """Refuse what can be refused by looking at the words and the disk.

    Args:
        model: words of a model.
        data: a named data set, a folder, an ``.npz`` file or a ``.csv`` table.
        root: where named data sets and relative paths lie.
        weights: a file.
        norm: of the threat.
        eps: of the threat.
        parts: names of parts, with commas.
        positive: numbers that must be above 0.
        shares: numbers that must lie strictly between 0 and 1.
        out: a folder to write to.
        words: further options with a fixed set of values, None where not given.

    Raises:
        ValueError: a word of no known form.
        ResourceError: a file that is not there, or a folder that cannot be written.
    """
    for name, value in words.items():
        if value is not None:
            check_word(f"--{_OPTION.get(name, name)}", value, _CHOICES[name])
    if norm is not None:
        check_norm(norm)
    if eps is not None:
        parse_eps(eps)
    if parts is not None:
        names = [word.strip() for word in parts.split(",") if word.strip()]
        if not names or not set(names) <= set(PARTS):
            raise ValueError(f"--parts {parts!r}: choose from {', '.join(PARTS)}")
    for name, value in (positive or {}).items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} {value}: a number above 0 is needed")
    for name, value in (shares or {}).items():
        if not 0 < value < 1:
            raise ValueError(f"--{name} {value}: a number between 0 and 1 is needed")
    if model is not None:
        _check_model(model)
    _check_files(data, root, weights, out)


def _check_model(model: str) -> None:
    kind, name = parse_spec(model, SCHEMES)
    if kind == "factory":
        check_module(model)
    if kind == "pt2" and not Path(model).is_file():
        raise ResourceError(f"--model {model}: no such file")
    if kind == "onnx" and not Path(name.partition("#")[0]).is_file():
        raise ResourceError(f"--model {model}: no such file")
    if kind == "callable":
        check_module(name)
    if kind == "saved" and not (Path(name) / "model.json").is_file():
        raise ResourceError(f"--model {model}: no model.json in {name or '.'}/")


def _check_files(data: str | None, root: Path | None, weights: Path | None, out: Path | None) -> None:
    # with --root, a path is looked for there by the loader
    if (
        data is not None
        and root is None
        and ("/" in data or data.endswith((".npz", ".csv")))
        and not Path(data).exists()
    ):
        raise ResourceError(f"--data {data}: no such file or folder")
    if weights is not None and not weights.is_file():
        raise ResourceError(f"--weights {weights}: no such file")
    if out is not None:
        _check_writable(out)


def _check_writable(folder: Path) -> None:
    """Refuse a folder for results that could not be made or written, before hours of work rather than after."""
    here = folder
    while not here.exists():
        here = here.parent
    if not here.is_dir():
        raise ResourceError(f"--out {folder}: {here} is a file, a folder is needed")
    if not os.access(here, os.W_OK | os.X_OK):
        raise ResourceError(f"--out {folder}: no permission to write into {here}")
