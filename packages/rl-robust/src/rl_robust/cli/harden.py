"""``robust rl harden · settings``: train policies that withstand, by any method, published recipes included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rl_robust.cli.app import (
    Env,
    EnvSet,
    Frames,
    MaxSteps,
    Norm,
    NormaliserFile,
    Scale,
    app,
)
from rl_robust.cli.words import check
from rl_robust.hardening import METHODS
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.words import check_word

__all__ = ["harden", "settings"]

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method's own; `robust rl settings METHOD`."),
]
Normalise = Annotated[
    bool | None,
    typer.Option(
        "--normalise/--no-normalise",
        help="Learn statistics of observations and freeze them; by default where observations have no bounds.",
    ),
]


@app.command()
def harden(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the policy: --policy saved:FOLDER reads it.")],
    env: Env = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "sa-ppo",
    recipe: Annotated[str | None, typer.Option(help="A published training, with its environment and radius.")] = None,
    own: Set = None,
    eps: Annotated[str | None, typer.Option("--eps", help="Radius of the ball of every step (0.05).")] = None,
    norm: Norm = "linf",
    steps: Annotated[int | None, typer.Option(min=1, help="Environment steps of each policy (100,000).")] = None,
    n_envs: Annotated[int | None, typer.Option(min=1, help="Environments side by side (8).")] = None,
    normalise: Normalise = None,
    normaliser: NormaliserFile = None,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    frames: Frames = 1,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train policies that withstand attackers; the same command goes on where an interrupted one stopped."""
    check(eps=[] if eps is None else [eps], norm=norm, out=out, normaliser=normaliser, positive={"scale": scale})
    check_word("--method", method, METHODS)
    from rl_robust.cli.setting import TaskWords
    from rl_robust.cli.training import train

    words = TaskWords(env=env, env_set=env_set or (), max_steps=max_steps, scale=scale, normaliser=normaliser,
                      frames=frames)  # fmt: skip
    with console.progress() as report:
        result = train(
            method, words, own or (), recipe=recipe, out=out, eps=eps, norm=norm, steps=steps, n_envs=n_envs,
            normalise=normalise, seed=seed, device=device, command=command(), on_step=report,
        )  # fmt: skip
    if json:
        console.emit_json(result)
        return
    console.figures_table(result["figures"], title=f"{method} on {result['data']}")
    console.info(f"use it: robust rl evaluate --policy {result['policy']}")


@app.command()
def settings(method: Annotated[str, typer.Argument(help=f"One of: {', '.join(METHODS)}.")], json: Json = False) -> None:
    """List the settings of a method's own, for --set, with types and defaults; and its published recipes."""
    check_word("METHOD", method, METHODS)
    from rl_robust import hardening
    from rl_robust.hardening.published import RECIPES
    from robust_core.settings import describe_settings

    found = hardening.find(method)
    rows: list[dict[str, Any]] = [
        {"name": name, "type": hint, "default": default} for name, hint, default in describe_settings(found.settings)
    ]
    recipes = [name for name, methods in RECIPES.items() if method in methods]
    if json:
        console.emit_json({"schema": "robust.settings/1", "method": method, "settings": rows, "recipes": recipes})
        return
    shown = [(row["name"], row["type"], row["default"]) for row in rows]
    console.table(("setting", "type", "default"), shown, title=f"{method} seeks {found.seeks}")
    console.info(f"recipes: {', '.join(recipes) or 'none'}")
