"""A report as one self-contained HTML page, whatever it reports on: what every page of the suite looks like.

No script, no remote asset (a content security policy in the page forbids both), colours for light and dark, text
alternatives for every plot and picture. All text is escaped; plots are SVG of
:func:`robust_core.evaluation.plots.to_svg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import BaseLoader, Environment, StrictUndefined, Template

from robust_core.evaluation.sections.base import Section, Table

__all__ = ["Card", "Page"]


@dataclass(frozen=True)
class Card:
    """One of the numbers at the top; without a value, ``how`` says how to get it."""

    label: str
    value: str
    spread: str = ""
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on a page, from top to bottom.

    Attributes:
        title: what was measured on what.
        lead: one line of facts.
        intro: paragraphs, such as the threat in plain words.
        cards: the numbers to remember.
        cards_title: what they are, for readers who hear the page.
        flags: reasons to distrust the figures.
        clear: what was checked, where there are none.
        note: how to read the figures.
        sections: the body.
        provenance: (what, value), to measure it again.
        command: likewise.
        tables: (title, table), folded away at the end.
    """

    title: str
    lead: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    provenance: Sequence[tuple[str, str]]
    intro: Sequence[str] = ()
    cards_title: str = "The numbers"
    flags: Sequence[str] = ()
    clear: str = ""
    note: str = ""
    command: str = ""
    tables: Sequence[tuple[str, Table]] = ()

    def html(self) -> str:
        """Return the page."""
        return _template().render(p=self)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=BaseLoader(), trim_blocks=True)
    text = files("robust_core.evaluation").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)
