"""The words of ``robust rl``, checked before torch is imported: a typing error is told at once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from robust_core.errors import ResourceError
from robust_core.words import check_module, check_norm, check_word, parse_eps, parse_spec

__all__ = ["ATTACKS", "PER", "check", "listed", "split_policy"]

ATTACKS = ("random", "critic", "mad", "sarsa", "sarsa+mad", "sa-rl", "pa-ad", "pgd", "offset")
PER = ("step", "episode")


def split_policy(words: str) -> tuple[str, str, str | None]:
    """Return (kind, what it names, what stands behind @ or None) of the words of a policy.

    The kind is ``"sb3"`` (a zip, algorithm), ``"saved"`` (a folder, a member of a set), ``"lipschitz"`` (a folder) or
    ``"factory"`` (weights).

    Raises:
        ValueError: words of no known form.
    """
    if words.startswith("sb3:"):
        name, _, algorithm = words[4:].partition("@")
        return "sb3", name, algorithm or None
    if words.startswith("lipschitz:"):
        return "lipschitz", words.partition(":")[2], None
    if words.startswith("saved:"):
        name, _, member = words[6:].rpartition("@") if "@" in words else (words[6:], "", "")
        return "saved", name, member or None
    spec, _, weights = words.rpartition("@") if words.endswith(".safetensors") else (words, "", "")
    try:
        kind, name = parse_spec(spec)
    except ValueError:
        kind, name = "", ""
    if kind != "factory":
        raise ValueError(
            f"--policy {words!r}: sb3:FILE[@ALGORITHM], saved:FOLDER[@MEMBER], lipschitz:FOLDER or "
            "package.module:factory[@WEIGHTS] is needed"
        )
    return kind, name, weights or None


def check(
    *,
    policy: str | None = None,
    attacks: str | None = None,
    eps: Sequence[str] = (),
    norm: str | None = None,
    per: str | None = None,
    normaliser: Path | None = None,
    out: Path | None = None,
    positive: dict[str, float | None] | None = None,
    shares: dict[str, float] | None = None,
) -> None:
    """Refuse what can be refused by looking at the words and the disk.

    Args:
        policy: words of a policy.
        attacks: names, with commas.
        eps: radii, as text.
        norm: of the threat.
        per: ``"step"`` or ``"episode"``.
        normaliser: a file.
        out: a folder to write to.
        positive: numbers that must be above 0 where they are given.
        shares: numbers that must lie strictly between 0 and 1.

    Raises:
        ValueError: a word of no known form.
        ResourceError: a file that is not there, or a folder that cannot be written.
    """
    if policy is not None:
        _check_policy(policy)
    for word in [] if attacks is None else listed("--attacks", attacks):
        check_word("--attacks", word, ATTACKS)
    for text in eps:
        parse_eps(text)
    if norm is not None:
        check_norm(norm)
    if per is not None:
        check_word("--per", per, PER)
    _check_numbers(positive or {}, shares or {})
    if normaliser is not None and not normaliser.is_file():
        raise ResourceError(f"--normaliser {normaliser}: no such file")
    if out is not None and (out.is_file() or not os.access(_nearest(out), os.W_OK)):
        raise ResourceError(f"--out {out}: a folder that can be written is needed")


def _check_policy(policy: str) -> None:
    kind, name, weights = split_policy(policy)
    if kind == "factory":
        check_module(name)
    files = {"sb3": name, "saved": f"{name}/model.json", "lipschitz": f"{name}/policy.json"}
    file = files.get(kind, weights)
    if file is not None and not Path(file).is_file():
        raise ResourceError(f"--policy {policy}: no such file {file}")


def _check_numbers(positive: dict[str, float | None], shares: dict[str, float]) -> None:
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} {value}: a number above 0 is needed")
    for name, value in shares.items():
        if not 0 < value < 1:
            raise ValueError(f"--{name} {value}: a number between 0 and 1 is needed")


def listed(option: str, text: str) -> list[str]:
    """Return the words between commas.

    Raises:
        ValueError: there is none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{option} {text!r}: at least one name is needed")
    return words


def _nearest(folder: Path) -> Path:
    here = folder
    while not here.exists():
        here = here.parent
    return here
