"""The verbs of ``robust diffusion``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Erase concepts from a diffusion pipeline; attack and evaluate it.")


@app.callback()
def _root() -> None:
    """Erase concepts from a diffusion pipeline; attack and evaluate it."""
