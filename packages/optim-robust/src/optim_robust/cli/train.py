"""``robust optim train``: a model by peers of which some fail or lie, simulated or on real processes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from optim_robust.cli.app import app
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from robust_core.errors import ResourceError
from robust_core.words import check_module, check_word

__all__ = ["train"]

AGGREGATORS = (
    *("nna", "mean", "median", "trimmed-mean", "meamed", "phocas", "geometric-median", "krum", "multi-krum", "mda"),
    *("smea", "caf", "filter-l2", "cge", "bulyan", "centered-clipping", "scc"),
)
ATTACKS = (
    *("none", "sign-flip", "ipm", "ipm-optimal", "alie", "alie-optimal", "mimic", "mimic-learned", "label-flip"),
    *("gaussian", "zero", "nan", "inf", "huge", "silent", "duplicate", "late", "equivocate"),
)
PRE = ("nnm", "arc", "bucketing")
REFERENCE = "no-attack"

Aggregator = Annotated[str, typer.Option(help=f"One of: {', '.join(AGGREGATORS)}.")]
Attack = Annotated[str, typer.Option(help=f"What faulty peers do: {', '.join(ATTACKS)}.")]
Faulty = Annotated[int, typer.Option("--faulty", "-f", min=0, help="Faulty peers.")]
Peers = Annotated[int, typer.Option("--peers", "-n", min=1, help="All peers, the faulty ones among them.")]
Pre = Annotated[str, typer.Option(help=f"Before the rule, comma-separated: {', '.join(PRE)}.")]
Beside = Annotated[
    str, typer.Option(help=f"More aggregators under the same attack, comma-separated; {REFERENCE} is the honest mean.")
]
Model = Annotated[str | None, typer.Option(help="package.module:factory of your network; else a small perceptron.")]
Data = Annotated[str, typer.Option(help="A bundled name, an image folder, an .npz with x and y, or a .csv table.")]
Concentration = Annotated[float, typer.Option(help="Of the Dirichlet split of classes over peers; inf splits evenly.")]
Graph = Annotated[
    str, typer.Option(help="Who hears whom: ring:K, torus:ROWSxCOLUMNS or regular:DEGREE; else everyone everyone.")
]
Kill = Annotated[int, typer.Option(min=0, help="With --processes: faulty peers that are killed instead of lying.")]
Resume = Annotated[Path | None, typer.Option(help="Folder for checkpoints: the same command goes on from there.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, report.html and the models.")]


@app.command()
def train(
    aggregator: Aggregator = "nna",
    faulty: Faulty = 5,
    attack: Attack = "alie",
    peers: Peers = 26,
    model: Model = None,
    data: Data = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Rounds.")] = 300,
    pre: Pre = "",
    tau: Annotated[float, typer.Option(help="Radius of scc, in the units of the parameters.")] = 2.0,
    wait: Annotated[str, typer.Option(help="Whom a peer waits for in a round: all, or n-f.")] = "all",
    topology: Annotated[str, typer.Option(help="peers (no server), or server.")] = "peers",
    graph: Graph = "",
    lr: Annotated[float, typer.Option(help="Step size at the beginning.")] = 0.75,
    decay: Annotated[float, typer.Option(help="Rounds after which it is halved, in stairs of 50.")] = 50.0,
    beta: Annotated[float, typer.Option(help="Momentum, in [0, 1).")] = 0.99,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a peer in a round.")] = 25,
    concentration: Concentration = 1.0,
    beside: Beside = "",
    processes: Annotated[bool, typer.Option("--processes", help="A real process for each peer.")] = False,
    kill: Kill = 0,
    deadline: Annotated[float, typer.Option(help="With --processes: seconds to wait for messages.")] = 10.0,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Train a model by peers of which some fail or lie; the accuracy of the honest ones, with curves."""
    others = _names(beside)
    _check(aggregator, attack, others, pre, wait, topology, model, resume, out)
    for name, value in (("tau", tau), ("lr", lr), ("decay", decay), ("concentration", concentration)):
        if not value > 0 or (math.isinf(value) and name != "concentration"):
            raise ValueError(f"--{name} {value}: a number above 0 is needed")
    if faulty >= peers:
        raise ValueError(f"--faulty {faulty} of --peers {peers}: honest peers are needed too")
    if kill and not processes:
        raise ValueError("--kill needs --processes: only a process can be killed")
    if processes and resume is not None:
        raise ValueError("--resume needs a simulation: leave --processes out")
    from optim_robust.collab.recipe import Recipe

    recipe = Recipe(
        honest=peers - faulty, f=faulty, data=data, model=model, aggregator=aggregator, pre=",".join(_names(pre)),
        tau=tau, wait=wait, topology=topology, graph=graph, lr=lr, decay=decay, beta=beta, batch_size=batch_size,
        concentration=concentration, seed=seed,
    )  # fmt: skip
    named = None if attack == "none" or not faulty else attack
    drivers = {"kill": kill, "deadline_s": deadline} if processes else None
    found = _measure(recipe, named, others, steps, drivers, resume, device)
    show(found, out, json)
    if not json:
        console.info(found.document["details"]["guarantee"])


def _measure(
    recipe: Any, attack: str | None, others: list[str], steps: int, drivers: dict[str, Any] | None, resume: Path | None,
    device: str,
) -> Any:  # fmt: skip
    """Run the recipe and those beside it."""
    import time
    from dataclasses import replace

    from optim_robust.collab.experiment import Curves, Experiment, run_processes, run_simulated
    from robust_core.device import choose_device

    place = "cpu" if drivers is not None else str(choose_device(device))
    clock, team, runs = time.perf_counter(), recipe.team(place), dict[str, Curves]()
    with console.progress() as report:
        for label in dict.fromkeys([recipe.aggregator, *others]):
            calm = label == REFERENCE
            words = (
                {"aggregator": "mean", "f": 0, "pre": "", "wait": "all", "graph": ""} if calm else {"aggregator": label}
            )
            own = recipe if label == recipe.aggregator else replace(recipe, **words)
            if drivers is not None and not calm:
                tell = lambda _, done, total, label=label: report(label, done, total)  # noqa: E731
                runs[label] = run_processes(own, attack, steps=steps, on_step=tell, **drivers)
                continue
            folder = None if resume is None else resume / label
            runs[label] = run_simulated(
                own, own.team(place), None if calm else attack, steps=steps, folder=folder,
                on_step=lambda done, label=label: report(label, done, steps),
            )  # fmt: skip
    seconds = time.perf_counter() - clock
    return Experiment(recipe, attack, team, runs, seconds, command(), place, processes=drivers is not None)


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _check(
    aggregator: str, attack: str, others: list[str], pre: str, wait: str, topology: str, model: str | None,
    resume: Path | None, out: Path | None,
) -> None:  # fmt: skip
    """Refuse what can be refused before torch is imported."""
    check_word("--aggregator", aggregator, AGGREGATORS)
    check_word("--attack", attack, ATTACKS)
    check_word("--wait", wait, ("all", "n-f"))
    check_word("--topology", topology, ("peers", "server"))
    for word in others:
        check_word("--beside", word, (*AGGREGATORS, REFERENCE))
    for word in _names(pre):
        check_word("--pre", word, PRE)
    if model is not None:
        check_module(model)
    for name, folder in (("--resume", resume), ("--out", out)):
        if folder is None:
            continue
        here = folder
        while not here.exists():
            here = here.parent
        if folder.is_file() or not os.access(here, os.W_OK):
            raise ResourceError(f"{name} {folder}: a folder that can be written is needed")
