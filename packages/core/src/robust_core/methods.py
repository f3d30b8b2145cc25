"""The catalogue of methods: cards are data, found through entry points, and listing them imports no method."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from robust_core.errors import RobustError

__all__ = ["KINDS", "CatalogueError", "MethodCard", "catalogue", "find", "load"]

KINDS = (
    "attack",
    "defence",
    "objective",
    "certifier",
    "policy",
    "aggregator",
    "solver",
    "data",
    "measure",
    "theory",
)
GROUP = "robust.methods"


class CatalogueError(RobustError):
    """The catalogue contradicts itself: a duplicate slug, an unknown kind or a target that is not there."""


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What the catalogue knows of a method without importing it.

    Attributes:
        slug: short name, unique over all installed packages.
        title: what it is, in words.
        paper: citation with arXiv id.
        kind: one of :data:`KINDS`.
        task: what the user has, e.g. ``"image classification"``.
        target: ``"module:Name"`` of the public entry point.
        example: ``"module:function"`` that returns a ready ``robust_core.testing.Case`` in under 5 s.
        claim: ``"module"`` of the claim (``run``, ``STATEMENTS``), or None.
        extras: extras of the package that the method needs.
        verified: where it was run: ``"cpu"``, ``"ddp-gloo"``, ``"cuda"``.
    """

    slug: str
    title: str
    paper: str
    kind: str
    task: str
    target: str
    example: str
    claim: str | None = None
    extras: tuple[str, ...] = ()
    verified: tuple[str, ...] = ("cpu",)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CatalogueError(f"{self.slug}: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        for field in ("target", "example"):
            if getattr(self, field).count(":") != 1:
                raise CatalogueError(f"{self.slug}: {field}={getattr(self, field)!r} is not 'module:Name'")

    def as_json(self, package: str) -> dict[str, Any]:
        """Return the public description of this card."""
        public = asdict(self)
        del public["example"]
        return {**public, "package": package, "claim": self.claim is not None}


def _read(entry: EntryPoint) -> Iterable[MethodCard]:
    cards = entry.load()
    for card in cards:
        if not isinstance(card, MethodCard):
            raise CatalogueError(f"entry point {entry.name!r} ({entry.value}) holds {card!r}, not a MethodCard")
        yield card


def gather(packages: Mapping[str, Iterable[MethodCard]]) -> dict[str, tuple[str, MethodCard]]:
    """Return slug -> (package, card), sorted by slug.

    Raises:
        CatalogueError: two cards share a slug.
    """
    found: dict[str, tuple[str, MethodCard]] = {}
    for package, cards in packages.items():
        for card in cards:
            if card.slug in found:
                raise CatalogueError(f"slug {card.slug!r} is claimed by {found[card.slug][0]} and by {package}")
            found[card.slug] = (package, card)
    return dict(sorted(found.items()))


@cache
def catalogue() -> dict[str, tuple[str, MethodCard]]:
    """Return slug -> (package, card) over every installed package."""
    return gather({entry.name: tuple(_read(entry)) for entry in entry_points(group=GROUP)})


def find(slug: str) -> tuple[str, MethodCard]:
    """Return (package, card).

    Raises:
        ValueError: no installed package has this slug.
    """
    cards = catalogue()
    if slug not in cards:
        import difflib

        near = difflib.get_close_matches(slug, cards, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; installed: {', '.join(cards)}"
        raise ValueError(f"slug={slug!r} is not in the catalogue{hint}")
    return cards[slug]


def load(target: str) -> Any:
    """Import ``"module:Name"``.

    Raises:
        CatalogueError: the target is not there.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not module.startswith(error.name):
            raise  # the module is there, one that it needs is not
        raise CatalogueError(f"target {target!r} does not exist") from error
