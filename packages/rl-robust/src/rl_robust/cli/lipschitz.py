"""``robust rl imitate``: clone an expert under a hard bound on how far the clone amplifies measurement errors."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rl_robust.cli.app import EnvSet, MaxSteps, NormaliserFile, Scale, app
from rl_robust.cli.words import check
from robust_core.cli import console
from robust_core.cli.verbs import Json, Seed, command
from robust_core.errors import ResourceError
from robust_core.words import check_word

if TYPE_CHECKING:
    from rl_robust.cli.setting import TaskWords
    from rl_robust.lipschitz import Demonstrations

__all__ = ["SOLVERS", "imitate", "read_demonstrations"]

SOLVERS = ("network", "linear", "graph")
_NAMES = (("x", "u"), ("obs", "acts"), ("observations", "actions"))


@app.command()
def imitate(
    env: Annotated[str, typer.Option("--env", "-e", help="A registered gymnasium id with continuous actions.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of policies, result.json and report.html.")],
    demonstrations: Annotated[
        Path | None, typer.Option(help="Pairs of an expert: an .npz with x (N, n) and u (N, m), or obs and acts.")
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="The expert itself, in words of --policy: it is played and watched.")
    ] = None,
    lipschitz: Annotated[float | None, typer.Option(help="The bound, in action per unit of observation.")] = None,
    tradeoff: Annotated[
        bool, typer.Option("--tradeoff", help="A curve over many bounds instead: multiples of the data's slope.")
    ] = False,
    solver: Annotated[str, typer.Option(help=f"One of: {', '.join(SOLVERS)}.")] = "network",
    zeta: Annotated[
        list[float] | None, typer.Option("--zeta", help="Euclidean size of measurement errors; several may be given.")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes for each mean.")] = 50,
    watched: Annotated[int, typer.Option(min=1, help="Episodes of --expert that are watched.")] = 20,
    sigma: Annotated[float, typer.Option(min=0, help="Noise on what --expert sees, to leave its path.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam, for a network.")] = 2_000,
    width: Annotated[int, typer.Option(min=2, help="Of the three layers of a network; even.")] = 64,
    neighbours: Annotated[
        int | None, typer.Option(min=1, help="Of the graph solver: start from so many, for more than 2,000 points.")
    ] = None,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Clone an expert under a certified Lipschitz bound; attack the clone with --policy lipschitz:FOLDER after."""
    check(policy=expert, normaliser=normaliser, out=out, positive={"scale": scale, "lipschitz": lipschitz})
    check_word("--solver", solver, SOLVERS)
    _check_choices(demonstrations, expert, lipschitz, tradeoff, zeta or [])
    if width % 2 and solver == "network":
        raise ValueError(f"--width {width}: an even number is needed")
    from rl_robust.cli.setting import TaskWords
    from rl_robust.lipschitz import cloning, largest_slope
    from rl_robust.lipschitz.page import render
    from robust_core.claim import versions
    from robust_core.evaluation.documents import save_document

    started = time.perf_counter()
    words = TaskWords(env=env, env_set=env_set or (), max_steps=max_steps, scale=scale, normaliser=normaliser)
    task = words.task
    with console.progress() as report:
        if expert is None:
            pairs, told = read_demonstrations(cast("Path", demonstrations)), str(demonstrations)
        else:
            report(f"watching {expert}", 0, 1)
            pairs, told = _watch(expert, words, watched, sigma, seed), expert
            report(f"watching {expert}", 1, 1)
        slope = largest_slope(pairs.x, pairs.u)
        grid = [lipschitz] if lipschitz is not None else [factor * slope for factor in cloning.GRID]
        settings = {"network": {"n_steps": steps, "hidden": (width,) * 3}, "graph": {"neighbours": neighbours}}
        rows = cloning.tradeoff(
            pairs.x, pairs.u, task, zetas=tuple(zeta or (0.0,)), lipschitz_grid=grid, solver=cast("Any", solver),
            n_episodes=episodes, generator=seed, folder=out, on_step=lambda k, n: report("constants", k, n),
            **settings.get(solver, {}),
        )  # fmt: skip
    folders = [str(cloning.policy_folder(out, value)) for value in grid]
    document = {
        "schema": "robust.imitation/1", "model": f"{solver} policy", "data": task.name, "n": len(pairs.x),
        "expert": told, "slope": slope, "episodes": episodes,
        "rows": [asdict(row) | {"worst": row.worst} for row in rows],
        "policies": folders, "seed": seed, "seconds": round(time.perf_counter() - started, 3), "versions": versions(),
        "command": command(),
    }  # fmt: skip
    save_document(out, document, render(document, rows))
    if json:
        console.emit_json(document)
        return
    header = ("constant", "certified", "residual", "errors", "in peace", "worst attack")
    console.table(
        header,
        [[f"{v:.5g}" for v in (r.lipschitz, r.certified, r.residual_max, r.zeta, r.nominal, r.worst)] for r in rows],
        title=f"{solver} policies on {task.name}",
    )
    console.info(f"report: {out / 'report.html'}; next: robust rl attack --policy lipschitz:{folders[0]} --env {env}")


def _check_choices(
    demonstrations: Path | None, expert: str | None, lipschitz: float | None, tradeoff: bool, zetas: list[float]
) -> None:
    if (demonstrations is None) == (expert is None):
        raise ValueError("give --demonstrations FILE.npz or --expert WORDS, one of them")
    if (lipschitz is None) == (not tradeoff):
        raise ValueError("give --lipschitz BOUND or --tradeoff, one of them")
    if demonstrations is not None and not demonstrations.is_file():
        raise ResourceError(f"--demonstrations {demonstrations}: no such file")
    for value in zetas:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--zeta {value}: a number of at least 0 is needed")


def read_demonstrations(path: Path) -> Demonstrations:
    """Return the pairs of an ``.npz``: ``x`` and ``u``, or the names that other libraries use; no pickle is read.

    Raises:
        ValueError: arrays of other names or shapes.
    """
    import numpy as np
    import torch

    from rl_robust.lipschitz import Demonstrations
    from robust_core.evaluation.arrays import load_arrays

    arrays = load_arrays(path)
    names = next((pair for pair in _NAMES if set(pair) <= set(arrays)), None)
    if names is None:
        known = " or ".join(" and ".join(pair) for pair in _NAMES)
        raise ValueError(f"--demonstrations {path} holds {', '.join(sorted(arrays)) or 'nothing'}; {known} are needed")
    x, u = (np.asarray(arrays[name], dtype=np.float64) for name in names)
    if x.ndim < 2 or not len(x) or len(x) != len(u):
        raise ValueError(
            f"--demonstrations {path}: {names[0]} {x.shape}, {names[1]} {u.shape}; (N, n) and (N, m) are needed"
        )
    episode = (
        torch.as_tensor(arrays["episode"]).long() if "episode" in arrays else torch.zeros(len(x), dtype=torch.int64)
    )
    wide = (torch.as_tensor(value).reshape(len(x), -1).float() for value in (x, u))
    states, actions = wide
    return Demonstrations(states, actions, episode)


def _watch(policy: str, words: TaskWords, n_episodes: int, sigma: float, seed: int) -> Demonstrations:
    import torch

    from rl_robust.cli.setting import load_policy, one_policy
    from rl_robust.lipschitz import collect_demonstrations
    from robust_core.random import derive

    found = load_policy(policy, words, torch.device("cpu"))
    return collect_demonstrations(
        one_policy(found, policy), found.task, n_episodes, sigma=sigma, generator=derive(seed, "demonstrations")
    )
