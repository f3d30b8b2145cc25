"""``robust optim learn``: a network for Neur2RO, for a family of instances or for the user's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optim_robust.cli.app import app
from optim_robust.cli.solve import ProblemWords
from optim_robust.cli.words import check_common
from robust_core.cli import console
from robust_core.cli.verbs import Json, Seed

__all__ = ["learn"]


@app.command()
def learn(
    problem: ProblemWords,
    net: Annotated[
        Path, typer.Option(help="Folder for the network; the same command goes on from its checkpoints after a stop.")
    ],
    instances: Annotated[
        int | None, typer.Option(min=1, help="Instances drawn: 200, or 1 for a model of your own. The paper: 500.")
    ] = None,
    decisions: Annotated[
        int | None, typer.Option(min=1, help="First stages for each: 6, or 40 for your own. The paper: 10.")
    ] = None,
    scenarios: Annotated[int, typer.Option(min=1, help="Scenarios for each. The paper: 50.")] = 20,
    sizes: Annotated[
        str, typer.Option(help="Numbers of items to draw from, comma-separated; else the problem's own.")
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the labels. The paper: 500.")] = 40,
    workers: Annotated[int, typer.Option(min=1, help="Processes that label; the labels do not depend on it.")] = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a network for `solve --method neur2ro --net FOLDER`; a knapsack or capital budget names its family.

    A published or JSON instance stands for its family at its size (or --sizes), which the network then serves. Any
    other model, model.py:build, is learned by itself; its name and sizes must be the same when the network is used.
    An interrupted run goes on: the labels are drawn again, the same, and training continues at its last epoch.
    """
    check_common([problem], [], 1.0, 1.0, net)
    words = [word.strip() for word in sizes.split(",") if word.strip()]
    if not all(word.isdigit() and int(word) for word in words):
        raise ValueError(f"--sizes {sizes!r}: numbers above 0, comma-separated, are needed")
    from optim_robust.cli.solving import train_network
    from optim_robust.two_stage.files import load_problem

    training: dict[str, Any] = {"n_scenarios": scenarios, "epochs": epochs, "workers": workers}
    training |= {key: n for key, n in (("n_instances", instances), ("n_first_stage", decisions)) if n is not None}
    if words:
        training["sizes"] = tuple(int(word) for word in words)
    _, document = train_network(load_problem(problem), net, seed, **training)
    if json:
        console.emit_json(document)
    else:
        console.info(f"network for {document['family']}: {net}")
