"""What the verbs of all packages share: options that mean the same everywhere, and how a finished report is shown."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from robust_core.cli import console

__all__ = ["Device", "Json", "Savable", "Seed", "command", "show"]

Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


class Savable(Protocol):
    """A finished measurement."""

    @property
    def document(self) -> dict[str, Any]:
        """JSON: ``model``, ``data``, ``figures``, ``flags``."""
        ...

    def save(self, folder: Path, /) -> object:
        """Write the files into ``folder``."""
        ...


def command() -> str:
    """Return the command as the user could type it again, without the path of the program."""
    return shlex.join(["robust", *sys.argv[1:]])


def show(report: Savable, out: Path | None, json: bool) -> None:
    """Write ``report`` to ``out`` if asked; then print its JSON, or its figures and doubts for people."""
    if out is not None:
        report.save(out)
    document = report.document
    if json:
        console.emit_json(document)
        return
    console.figures_table(document["figures"], title=f"{document['model']} on {document['data']}")
    for flag in document["flags"]:
        console.info(f"flag: {flag}")
    if out is not None:
        console.info(f"report: {out / 'report.html'}")
