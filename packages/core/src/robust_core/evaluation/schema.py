"""The result document: one JSON object for each evaluation, checked key by key when it is written and when it is read.

Unknown keys are errors, at every level: a figure that nobody defined is a typo or a forgery. See
:data:`TOP` for the keys. ``figures`` maps a name to ``{"value", "interval", "n"}``; a name starts with the
name of the part that measured it (``adversarial/accuracy``). Lengths are in units of the raw input, images in [0, 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from robust_core.errors import UntrustedFileError
from robust_core.threats import Threat

__all__ = ["SCHEMA", "check_document", "threat_json"]

SCHEMA = "robust.evaluation/1"
MAX_TEXT = 20_000
MAX_FIGURES = 100_000


def threat_json(threat: Threat | None) -> dict[str, Any] | None:
    """Return the threat as the document states it."""
    if threat is None:
        return None
    domain = None if threat.domain is None else list(threat.domain)
    return {"norm": threat.name, "eps": threat.eps, "eps_text": threat.eps_text, "domain": domain}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _sha(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 10_000 and all(map(_text, value))


def _plain(value: Any, depth: int = 0) -> bool:
    """Settings are any JSON, within reason."""
    if depth > 12:
        return False
    if isinstance(value, Mapping):
        return all(_text(k) and _plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return len(value) <= MAX_FIGURES and all(_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool) or _number(value) or _text(value)


def _threat(value: Any) -> bool:
    if value is None:
        return True
    keys = {"norm", "eps", "eps_text", "domain"}
    if not isinstance(value, Mapping) or set(value) != keys:
        return False
    domain = value["domain"]
    norm = value["norm"] in ("Linf", "L2", "L1")
    return (
        norm
        and _number(value["eps"])
        and value["eps"] >= 0
        and _text(value["eps_text"])
        and (domain is None or _pair(domain))
    )


def _figure(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"value", "interval", "n"}:
        return False
    number, interval = value["value"], value["interval"]
    return (number is None or _number(number)) and (interval is None or _pair(interval)) and _count(value["n"])


def _figures(value: Any) -> bool:
    whole = isinstance(value, Mapping) and len(value) <= MAX_FIGURES
    return whole and all(_text(k) and _figure(v) for k, v in value.items())


def _versions(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) <= 1000 and all(_text(k) and _text(v) for k, v in value.items())


PART: dict[str, Callable[[Any], bool]] = {
    "kind": _text,
    "name": _text,
    "settings": _plain,
    "n": _count,
    "seconds": _number,
    "notes": _texts,
    "data": _plain,
}
DETAILS: dict[str, Callable[[Any], bool]] = {
    "preprocessing": _text,
    "classes": _texts,
    "n_classes": _count,
    "input_shape": _plain,
    "cost": _plain,
    "checks": _plain,
    "batch_size": _count,
    "notes": _texts,
    "parts": lambda value: isinstance(value, list) and len(value) <= 1000,
}
TOP: dict[str, Callable[[Any], bool]] = {
    "schema": lambda value: value == SCHEMA,
    "threat": _threat,
    "model": _text,
    "model_sha256": _sha,
    "data": _text,
    "data_sha256": _sha,
    "n": lambda value: _count(value) and value > 0,
    "seed": _count,
    "device": _text,
    "figures": _figures,
    "flags": _texts,
    "seconds": _number,
    "versions": _versions,
    "command": _text,
    "details": lambda value: isinstance(value, Mapping),
}
"""Key -> check. ``details`` holds what it takes to redo the run: preprocessing, classes, settings of each part."""


def check_document(document: Any, *, source: str = "the result") -> dict[str, Any]:
    """Return ``document`` if it is a well-formed result.

    Raises:
        UntrustedFileError: a key is unknown, missing, or holds something else than it should.
    """
    _check(document, TOP, source)
    _check(document["details"], DETAILS, f"{source}: details")
    for number, part in enumerate(document["details"]["parts"]):
        _check(part, PART, f"{source}: details.parts[{number}]")
    names = [part["name"] for part in document["details"]["parts"]]
    if len(set(names)) != len(names):
        raise UntrustedFileError(f"{source}: two parts share a name")
    return document


def _check(value: Any, keys: Mapping[str, Callable[[Any], bool]], source: str) -> None:
    if not isinstance(value, Mapping):
        raise UntrustedFileError(f"{source} is no JSON object")
    unknown, missing = sorted(set(value) - set(keys)), sorted(set(keys) - set(value))
    if unknown or missing:
        raise UntrustedFileError(
            f"{source}: unknown keys {[str(k)[:40] for k in unknown]}, missing keys {missing}; "
            f"this version reads {SCHEMA!r}"
        )
    for key, fits in keys.items():
        if not fits(value[key]):
            raise UntrustedFileError(
                f"{source}: {key!r} holds {str(value[key])[:60]!r}, which is not what belongs there"
            )
