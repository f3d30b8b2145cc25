"""The verbs of ``robust lidar``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Simulate, corrupt, evaluate and harden perception of point clouds.")


@app.callback()
def _root() -> None:
    """Simulate, corrupt, evaluate and harden perception of point clouds."""
