"""The words of a command line, read without torch: a typing error is told at once, not after seconds of imports."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from robust_core.errors import ResourceError

__all__ = ["check_module", "check_norm", "check_word", "current_folder", "parse_eps", "parse_spec"]

_NORMS = {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2", "l1": "L1", "1": "L1"}


def check_word(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        ValueError: it is not; the message names them all.
    """
    known = tuple(allowed)
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    return value


def check_norm(norm: str) -> str:
    """Return ``"Linf"``, ``"L2"`` or ``"L1"`` for any way to write it.

    Raises:
        ValueError: no such norm.
    """
    found = _NORMS.get(str(norm).lower())
    if found is None:
        raise ValueError(f"norm={norm!r}: choose one of 'linf', 'l2', 'l1'")
    return found


def parse_eps(eps: float | str) -> float:
    """Return a radius from a number, its text, or a fraction such as ``8/255``.

    Raises:
        ValueError: neither a number nor a fraction, negative, or not finite.
    """
    try:
        radius = float(Fraction(eps)) if isinstance(eps, str) else eps
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"eps={eps!r}: a number or a fraction such as 8/255 is needed") from None
    if isinstance(eps, str) and not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"eps={eps!r}: a radius of at least 0 is needed")
    return radius


def parse_spec(spec: str, schemes: Iterable[str] = ()) -> tuple[str, str]:
    """Return what names a model, split into kind and name: ``("torchvision", "resnet18")``.

    Args:
        spec: the words.
        schemes: prefixes known beside ``package.module:factory`` and ``.pt2`` files.

    Returns:
        (one of ``schemes``, the name behind it), ``("pt2", path)`` or ``("factory", spec)``.

    Raises:
        ValueError: words of no known form.
    """
    prefix, colon, name = spec.partition(":")
    known = tuple(schemes)
    if spec.endswith(".pt2"):
        return "pt2", spec
    if colon and prefix in known:
        return prefix, name
    if not colon or not all(part.isidentifier() for part in (*prefix.split("."), *name.split("."))):
        named = "".join(f", {scheme}:NAME" for scheme in known)
        raise ValueError(f"model {spec!r}: give package.module:factory{named} or a .pt2 file")
    return "factory", spec


def check_module(spec: str) -> None:
    """See that the package of ``package.module:factory`` is there, without importing it.

    Raises:
        ResourceError: it is neither in the current folder nor in the environment.
    """
    module = spec.partition(":")[0]
    with current_folder():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise ResourceError(
                f"model {spec!r}: no module {module!r}; it is looked for in {Path.cwd().name}/ and in the environment"
            )


@contextmanager
def current_folder() -> Iterator[None]:
    """Let modules beside the user be imported, as ``python -m`` does."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
