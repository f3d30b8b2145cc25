"""``robust rl compare``: train or load policies, attack and certify them, and print one table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_robust.cli.app import (
    Alpha,
    Env,
    EnvSet,
    Frames,
    Lower,
    MaxSteps,
    Norm,
    NormaliserFile,
    Scale,
    app,
)
from rl_robust.cli.words import ATTACKS, check, listed
from rl_robust.hardening import METHODS
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.words import check_word, parse_eps

__all__ = ["compare"]

USUAL = "ppo,sa-ppo,smoothed,non-dominated"


@app.command()
def compare(
    env: Env = None,
    methods: Annotated[
        str | None, typer.Option(help=f"To train, comma-separated: {', '.join(METHODS)}. Without --policy: {USUAL}.")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", "-p", metavar="NAME=WORDS", help="One that is there already.")
    ] = None,
    eps: Annotated[str, typer.Option("--eps", help="Radius of the ball of every step.")] = "0.1",
    norm: Norm = "linf",
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of each policy that is trained.")] = 20_000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method.")] = 1,
    own: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A setting of a method, such as sa-ppo.kappa=0.3."),
    ] = None,
    n_envs: Annotated[int, typer.Option(min=1, help="Environments side by side in training.")] = 8,
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--normalise/--no-normalise",
            help="Freeze the statistics of natural PPO for all; by default where observations have no bounds.",
        ),
    ] = None,
    attacks: Annotated[
        str, typer.Option(help=f"Of a step, comma-separated: {', '.join(ATTACKS[:-2])}.")
    ] = "random,mad,sarsa,sa-rl,pa-ad",
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes for each attack.")] = 100,
    attack_steps: Annotated[int, typer.Option(min=1, help="Environment steps of each trained attacker.")] = 10_000,
    sarsa_steps: Annotated[int, typer.Option(min=1, help="Steps for which robust Sarsa watches.")] = 6_000,
    budget: Annotated[
        float | None, typer.Option(min=0, help="L2 budget of an episode, for the certificate; the noise by default.")
    ] = None,
    certificate_episodes: Annotated[int, typer.Option(min=1, help="Episodes behind each certificate.")] = 2_000,
    lower: Lower = None,
    alpha: Alpha = 0.05,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; no figure depends on it. As many as cores, at most 4.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything; what is finished is taken from it.")
    ] = Path("comparison"),
    json: Json = False,
) -> None:
    """Put policies side by side: natural, under every attack, certified; one table, one page."""
    chosen = listed("--methods", methods) if methods else [] if policies else listed("--methods", USUAL)
    named = _named(policies or [])
    check(attacks=attacks, eps=[eps], norm=norm, normaliser=normaliser, out=out, shares={"alpha": alpha},
          positive={"scale": scale, "budget": budget})  # fmt: skip
    for method in chosen:
        check_word("--methods", method, METHODS)
    for words in named.values():
        check(policy=words)
    from rl_robust.cli.comparing import run
    from rl_robust.cli.setting import TaskWords
    from rl_robust.comparison import Settings

    settings = Settings(
        tuple(listed("--attacks", attacks)), n_episodes=episodes, attack_steps=attack_steps, sarsa_steps=sarsa_steps,
        episode_eps=budget, certificate_episodes=certificate_episodes, lower=lower, alpha=alpha,
    )  # fmt: skip
    words = TaskWords(env=env, env_set=env_set or (), max_steps=max_steps, scale=scale, normaliser=normaliser,
                      frames=frames)  # fmt: skip
    training: dict[str, Any] = {"n_steps": steps, "n_seeds": seeds, "n_envs": n_envs}
    shared = workers or min(4, os.cpu_count() or 1)
    with console.progress() as report:
        found = run(
            words, chosen, named, own or (), settings, training, eps=parse_eps(eps), norm=norm, normalise=normalise,
            seed=seed, device=device, workers=shared, out=out, command=command(), on_step=report,
        )  # fmt: skip
    if json:
        console.emit_json(found.document)
        return
    rows = [(row["name"], *found.cells(row)) for row in found.document["rows"]]
    console.table(("policy", *found.header), rows, title=f"mean return on {found.document['data']}")
    for flag in found.document["flags"]:
        console.info(f"flag: {flag}")
    console.info(f"report: {out / 'report.html'}")


def _named(words: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for word in words:
        name, sign, policy = word.partition("=")
        if not sign or not name or "/" in name or name in named:
            raise ValueError(f"--policy {word!r}: NAME=WORDS is needed, each name once and without '/'")
        named[name] = policy
    return named
