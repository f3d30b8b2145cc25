"""The verbs of ``robust optim``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Solve two-stage robust problems; train with peers that may lie.")


@app.callback()
def _root() -> None:
    """Solve two-stage robust problems; train with peers that may lie."""


from optim_robust.cli import compare, learn, solve, train  # noqa: E402,F401 - they add their verbs
