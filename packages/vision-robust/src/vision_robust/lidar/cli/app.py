"""The verbs of ``robust lidar``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import shlex
import sys

import typer

__all__ = ["app", "command"]

app = typer.Typer(no_args_is_help=True, help="Simulate, corrupt, evaluate and harden perception of point clouds.")


@app.callback()
def _root() -> None:
    """Simulate, corrupt, evaluate and harden perception of point clouds."""


def command() -> str:
    """Return the command as the user could type it again, without the path of the program."""
    return shlex.join(["robust", *sys.argv[1:]])
