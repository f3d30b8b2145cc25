"""Settings of a method from words such as ``n_components=20``: a dataclass says names, types and defaults.

Every command line of the suite takes the options that many methods share by name, and a method's own by ``--set``; the
method's settings dataclass is the only place that knows them.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args, get_origin

__all__ = ["NoSettings", "describe_settings", "parse_settings"]

T = TypeVar("T")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class NoSettings:
    """For methods without settings of their own."""


def parse_settings(kind: type[T], words: Sequence[str]) -> T:
    """Return ``kind`` with the fields that ``words`` set.

    Args:
        kind: a dataclass whose fields are str, int, float, bool, a Literal, a tuple of those, or one of them or None.
        words: ``name=value`` each; ``8/255`` is a float, ``1,2`` a tuple, ``none`` is None where that is allowed.

    Raises:
        ValueError: an unknown name, a value of another type, a name set twice, or what the dataclass itself refuses.
    """
    if not is_dataclass(kind):
        raise TypeError(f"kind is {kind!r}; a dataclass is needed")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init]
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or name not in known:
            asked = f"name=value is needed, with a name of {', '.join(known)}" if known else "nothing can be set here"
            raise ValueError(f"--set {word!r}: {asked}")
        if name in found:
            raise ValueError(f"--set {word!r}: {name} is set twice")
        found[name] = _value(word, hints[name], text.strip())
    needed = [f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"--set {missing[0]}=… is needed here")
    return kind(**found)


def describe_settings(kind: type[Any]) -> list[tuple[str, str, str]]:
    """Return (name, type, default) of each setting, as a person reads them."""
    hints = typing.get_type_hints(kind)
    rows = []
    for f in fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        rows.append((f.name, _named(hints[f.name]), "needed" if default is MISSING else str(default)))
    return rows


def _named(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_named(a) for a in arguments)
    if get_origin(hint) is tuple:
        return ",".join(_named(a) for a in arguments if a is not ...)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _value(word: str, hint: Any, text: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return _value(word, next(a for a in arguments if a is not type(None)), text)
    if origin is Literal:
        chosen = [value for value in arguments if str(value) == text]
        if not chosen:
            raise ValueError(f"--set {word!r}: choose {', '.join(map(str, arguments))}")
        return chosen[0]
    if origin is tuple:
        return tuple(_value(word, arguments[0], part.strip()) for part in text.split(","))
    return _scalar(word, hint, text)


def _scalar(word: str, hint: Any, text: str) -> Any:
    try:
        if hint is bool:
            return _TRUTH[text.lower()]
        if hint is int:
            return int(text)
        if hint is float:
            return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, KeyError, ZeroDivisionError):
        raise ValueError(f"--set {word!r}: {_named(hint)} is needed") from None
    return text
