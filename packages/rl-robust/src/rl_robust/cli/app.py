"""The verbs of ``robust rl``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify, evaluate and harden your own policy.")


@app.callback()
def _root() -> None:
    """Attack, certify, evaluate and harden your own policy."""
