"""Which methods ``robust rl harden`` knows, and where each is made. Nothing heavy is imported here.

``METHODS`` maps the name behind ``--method`` to the module that holds its ``METHOD``; :func:`find` imports that one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_robust.hardening.base import Method

__all__ = ["METHODS", "find"]

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "ppo": "rl_robust.hardening.peace",
        "sa-ppo": "rl_robust.hardening.peace",
        "smoothed": "rl_robust.hardening.smoothed",
        "atla": "rl_robust.hardening.game",
        "non-dominated": "rl_robust.hardening.sets",
    }
)


def find(name: str) -> Method:
    """Return a method.

    Raises:
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"--method {name!r}: choose one of {', '.join(METHODS)}")
    module = importlib.import_module(METHODS[name])
    return module.METHODS[name] if hasattr(module, "METHODS") else module.METHOD
