"""What the command line prints: tables and progress for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

__all__ = ["emit_json", "error", "info", "progress", "table"]


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def emit_json(document: Any) -> None:
    """Print one JSON document on stdout. NaN and infinity are refused: JSON has none."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def info(text: str) -> None:
    """Print a line for people on stderr."""
    _stderr().print(text, soft_wrap=True)


def error(text: str) -> None:
    """Print an error on stderr."""
    _stderr().print(f"[bold red]error:[/] {_escape(text)}", soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table on stdout."""
    shown = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        shown.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*(_escape(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(shown)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``report(task, done, total)``, which draws bars on stderr where that is a terminal.

    Elsewhere one line is logged when a task starts and one when it ends, so that logs stay short.
    """
    if quiet:
        yield lambda task, done, total: None
        return
    console = _stderr()
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(_escape(task), total=total)
            bars.update(tasks[task], completed=done, total=total)

        yield report


def _plain(console: Console) -> Callable[[str, int, int], None]:
    """Lines instead of bars: when a task starts, at each of its few steps (or each tenth), and when it ends."""
    shown: dict[str, int] = {}

    def report(task: str, done: int, total: int) -> None:
        tenth = done if total <= 20 else 10 * done // max(total, 1)
        before = shown.get(task)
        if before is None:
            console.print(f"{_escape(task)} …")
        if done >= total and before != -1:
            console.print(f"{_escape(task)}: done")
        elif before is not None and done < total and tenth > before:
            console.print(f"{_escape(task)}: {done} of {total}")
        shown[task] = -1 if done >= total else tenth

    return report


def figures_table(figures: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> None:
    """Print ``{name: {"value", "interval", "n"}}`` as a table."""
    from robust_core.evaluation.sections.base import number  # not at the top: `--help` must not wait for torch

    rows = []
    for name, figure in figures.items():
        interval = figure.get("interval")
        spread = "" if not interval else f"[{number(interval[0])}, {number(interval[1])}]"
        value = figure["value"]
        rows.append((name, "–" if value is None else number(value), spread, str(figure.get("n", ""))))
    table(("figure", "value", "95 % interval", "n"), rows, title=title)
