"""Which methods the verbs of ``robust vision`` know, and where each is made. Nothing heavy is imported here.

``RECIPES`` maps the name behind ``--method`` to the module that holds its ``RECIPE``; :func:`find` imports that one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vision_robust.recipes.base import Recipe

__all__ = ["RECIPES", "Entry", "find", "methods_of"]

VERBS = ("harden", "certify", "explain")


@dataclass(frozen=True)
class Entry:
    """What is known of a method before its module is imported.

    Attributes:
        module: where ``RECIPE`` (or ``RECIPES``, by name) stands.
        verbs: those of ``harden``, ``certify``, ``explain`` that it takes part in.
    """

    module: str
    verbs: tuple[str, ...]


_HERE = "vision_robust.recipes"
_TRAINING = Entry(f"{_HERE}.objectives", ("harden",))

RECIPES: Mapping[str, Entry] = MappingProxyType(
    {
        "adversarial-training": _TRAINING,
        "trades": _TRAINING,
        "comp-sum": _TRAINING,
        "gaussian-training": _TRAINING,
        "adaptive-smoothing": Entry(f"{_HERE}.adaptive_smoothing", ("harden",)),
        "crmt": Entry(f"{_HERE}.crmt", ("harden", "certify")),
        "dual-randomized-smoothing": Entry(f"{_HERE}.dual_randomized_smoothing", ("harden", "certify")),
        "rbf-prototype-network": Entry(f"{_HERE}.rbf_prototype_network", ("harden", "certify", "explain")),
        "fast-certified-training": Entry(f"{_HERE}.fast_certified_training", ("harden",)),
        "rrcm": Entry(f"{_HERE}.rrcm", ("harden", "certify")),
        "robust-counterfactuals": Entry(f"{_HERE}.robust_counterfactuals", ("explain",)),
        "zo-ae-ds": Entry(f"{_HERE}.zo_ae_ds", ("harden",)),
    }
)


def methods_of(verb: str) -> tuple[str, ...]:
    """Return the names of the methods that take part in a verb."""
    return tuple(name for name, entry in RECIPES.items() if verb in entry.verbs)


def find(name: str) -> Recipe:
    """Return the recipe of a method.

    Raises:
        ValueError: no such method.
    """
    if name not in RECIPES:
        raise ValueError(f"--method {name!r}: choose one of {', '.join(RECIPES)}")
    module = importlib.import_module(RECIPES[name].module)
    return module.RECIPES[name] if hasattr(module, "RECIPES") else module.RECIPE
