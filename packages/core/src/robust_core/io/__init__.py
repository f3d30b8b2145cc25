"""Files that survive a crash when written, and cannot run code when read.

Writing is atomic and durable (:func:`write_atomic`); weights are safetensors and JSON, nothing else. Reading
trusts no length, name or number that a file claims: it is checked against the file before memory is given to it.
Importing this package does not import torch; the functions on tensors do, when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robust_core.io.files import (
    inside,
    json_text,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    sha256,
    sweep,
    sync_directory,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    from robust_core.io.tensors import load_tensors, load_weights, save_tensors

__all__ = [
    "inside",
    "json_text",
    "load_tensors",
    "load_weights",
    "parse_json",
    "read_bytes",
    "read_json",
    "replacing",
    "save_tensors",
    "sha256",
    "sweep",
    "sync_directory",
    "write_atomic",
    "write_json",
]


def __getattr__(name: str) -> Any:
    if name in {"load_tensors", "load_weights", "save_tensors"}:
        from robust_core.io import tensors

        return getattr(tensors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
