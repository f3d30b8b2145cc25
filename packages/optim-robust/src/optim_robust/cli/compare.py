"""``robust optim compare``: several methods on several two-stage problems, one table, one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optim_robust.cli.app import app
from optim_robust.cli.solve import Net, TimeLimit, Tol
from optim_robust.cli.words import METHODS, check_common
from robust_core.cli import console
from robust_core.cli.verbs import Json, Seed, command

__all__ = ["compare"]


@app.command()
def compare(
    problems: Annotated[
        list[str], typer.Option("--problem", "-p", help="As in solve; may be given several times.", show_default=False)
    ],
    methods: Annotated[
        str, typer.Option("--methods", "-m", help=f"Comma-separated, of: {', '.join(METHODS)}.")
    ] = "ccg,static,nominal",
    time_limit: TimeLimit = 30.0,
    tol: Tol = 1e-4,
    net: Net = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for result.json and report.html.")] = Path(
        "comparison"
    ),
    json: Json = False,
) -> None:
    """Put methods side by side: what each decision truly guarantees, what is proved, and the time it took."""
    chosen = [word.strip() for word in methods.split(",") if word.strip()]
    if not chosen:
        raise ValueError(f"--methods {methods!r}: at least one name is needed")
    check_common(problems, chosen, time_limit, tol, out)
    from optim_robust.cli.solving import run

    found = run(problems, chosen, time_limit=time_limit, tol=tol, net=net, seed=seed, command=command())
    found.save(out)
    if json:
        console.emit_json(found.document)
        return
    rows = []
    for row in found.document["details"]["runs"]:
        numbers = ["–" if row[key] is None else f"{row[key]:.7g}" for key in ("guaranteed", "bound")]
        gap = "–" if row["gap"] is None else f"{100 * row['gap']:.2f} %"
        rows.append((row["problem"], row["method"], row["status"], *numbers, gap, f"{row['seconds']:.2f}"))
    console.table(("problem", "method", "status", "guaranteed", "bound", "gap", "seconds"), rows)
    for flag in found.document["flags"]:
        console.info(f"flag: {flag}")
    console.info(f"report: {out / 'report.html'}")
