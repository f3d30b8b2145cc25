"""``robust optim solve``: one two-stage robust problem, by one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optim_robust.cli.app import app
from optim_robust.cli.words import METHODS, check_common
from robust_core.cli import console
from robust_core.cli.verbs import Json, Seed, command

__all__ = ["solve"]

ProblemWords = Annotated[
    str,
    typer.Option(
        "--problem",
        "-p",
        help="model.py:build (your Pyomo model), instance.json, or a published RKP_… / CB_… file (CB_…:loans).",
    ),
]
TimeLimit = Annotated[float, typer.Option("--time-limit", "-t", help="Seconds for each run.")]
Tol = Annotated[float, typer.Option(help="Relative gap at which a problem counts as solved.")]
Net = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a network for neur2ro (robust optim learn); into an empty one a small one is trained."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json and report.html.")]


@app.command()
def solve(
    problem: ProblemWords,
    method: Annotated[
        str, typer.Option("--method", "-m", help=f"One of: {', '.join(METHODS)}; k-adaptability:K, pyros:ORDER.")
    ] = "ccg",
    time_limit: TimeLimit = 60.0,
    tol: Tol = 1e-4,
    net: Net = None,
    seed: Seed = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Solve a two-stage robust problem: decisions now, the worst case, the best reaction; 1 means none was found."""
    check_common([problem], [method], time_limit, tol, out)
    from optim_robust.cli.solving import run
    from optim_robust.two_stage.page import STATUSES

    found = run([problem], [method], time_limit=time_limit, tol=tol, net=net, seed=seed, command=command())
    if out is not None:
        found.save(out)
    row = found.document["details"]["runs"][0]
    if json:
        console.emit_json(found.document)
    else:
        decisions = [(name, f"{value:g}") for name, value in row["x"].items() if abs(value) > 1e-9]
        if decisions:
            console.info(f"{row['problem']} by {row['method']}")
            console.table(("decision", "value"), decisions)
        console.info(f"status: {STATUSES[row['status']]}")
        word = "profit" if row["sense"] < 0 else "cost"
        for text, key in ((f"guaranteed {word}", "guaranteed"), ("proved bound", "bound")):
            console.info(f"{text}: {'none' if row[key] is None else f'{row[key]:.8g}'}")
        gap = "none" if row["gap"] is None else f"{100 * row['gap']:.3f} %"
        console.info(f"gap: {gap}, after {row['seconds']:.2f} s")
        for flag in found.document["flags"]:
            console.info(f"flag: {flag}")
        if out is not None:
            console.info(f"report: {out / 'report.html'}")
    if row["objective"] is None:
        raise typer.Exit(1)
