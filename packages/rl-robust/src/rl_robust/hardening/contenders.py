"""Train one policy of each method and seed, on one and the same task, for :func:`rl_robust.comparison.compare`.

Where statistics of observations are learned, those of the natural PPO of a seed are frozen for all methods of that
seed: otherwise a radius would mean something else for each of them. The same PPO is the first policy of a set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rl_robust.hardening import METHODS
from rl_robust.hardening.base import Job, OnStep, harden
from rl_robust.hardening.published import usual_settings
from rl_robust.saved import MODEL, Hardened, load_hardened
from rl_robust.task import Task
from robust_core.checks import check_choice, check_count
from robust_core.execution import ShardError, run_shards
from robust_core.threats import Threat

__all__ = ["in_parts", "train_contenders"]

Part = TypeVar("Part")
Found = TypeVar("Found")


def in_parts(
    function: Callable[[Part], Found], parts: Sequence[Part], workers: int, what: str, on_step: OnStep | None
) -> list[Found]:
    """Return ``[function(part) for part in parts]``, in processes where there are several workers."""

    def told(done: int, total: int) -> None:
        if on_step is not None and workers > 1:
            on_step(what, done, total)

    try:
        return run_shards(
            function, parts, backend="processes" if workers > 1 else "here", workers=workers, on_step=told
        )
    except ShardError as error:
        if error.__cause__ is not None:  # a part's own error is told as such
            raise error.__cause__ from None
        raise


def _trained(
    part: tuple[int, str, Task, bool], *, threat: Threat, folder: Path, settings: Mapping[str, Mapping[str, Any]],
    **shared: Any,
) -> Path:  # fmt: skip
    seed, method, task, normalise = part
    out = folder / f"seed-{seed}" / method
    chosen = {**usual_settings(task, method, shared["n_envs"]), **settings.get(method, {})}
    tell = shared.pop("on_step")
    told = None if tell is None else lambda what, done, total: tell(f"{method}, seed {seed}: {what}", done, total)
    first = folder / f"seed-{seed}" / "ppo"
    alike = settings.get("ppo", {}).get("net_arch") == settings.get(method, {}).get("net_arch")
    job = Job(task=task, threat=threat, out=out, normalise=normalise, seed=seed, on_step=told, **shared)
    if method == "non-dominated" and alike and (first / MODEL).is_file():
        job = replace(job, first=first)
    harden(job, method, **chosen)
    return out


def train_contenders(
    methods: Sequence[str],
    task: Task,
    threat: Threat,
    *,
    out: str | os.PathLike[str],
    n_steps: int = 50_000,
    n_seeds: int = 1,
    first_seed: int = 0,
    n_envs: int = 8,
    normalise: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "cpu",
    workers: int = 1,
    on_step: OnStep | None = None,
) -> dict[str, list[Hardened]]:
    """Train by every method with every seed; what is finished is not trained again.

    Args:
        methods: of :data:`rl_robust.hardening.METHODS`.
        task: the environment.
        threat: ball of a step.
        out: folder; policies stand in ``seed-K/METHOD``, and ``--policy saved:`` reads them there.
        n_steps: environment steps of each policy that is trained.
        n_seeds: trainings of each method.
        first_seed: of them.
        n_envs: environments side by side.
        normalise: learn statistics of observations by natural PPO and freeze them for all.
        settings: method -> its own settings, over published ones where the environment has a recipe.
        device: where to train.
        workers: processes among which trainings are shared; no figure depends on it.
        on_step: progress.

    Returns:
        Method -> one for each seed.
    """
    check_count("n_seeds", n_seeds)
    for method in (*methods, *(settings or {})):
        check_choice("methods", method, tuple(METHODS))
    folder, seeds = Path(out), range(first_seed, first_seed + n_seeds)
    train = partial(
        _trained, threat=threat, folder=folder, settings=settings or {}, n_steps=n_steps, n_envs=n_envs, device=device,
        on_step=on_step if workers == 1 else None,
    )  # fmt: skip
    tasks, learn = dict.fromkeys(seeds, task), normalise and task.normaliser is None
    if learn or "ppo" in methods:
        first = in_parts(train, [(seed, "ppo", task, learn) for seed in seeds], workers, "trained: ppo", on_step)
        tasks = {seed: load_hardened(place, task=task).task for seed, place in zip(seeds, first, strict=True)}
    rest = [(seed, method, tasks[seed], False) for method in methods if method != "ppo" for seed in seeds]
    in_parts(train, rest, workers, "trained", on_step)
    return {
        method: [load_hardened(folder / f"seed-{seed}" / method, task=task, device=device) for seed in seeds]
        for method in methods
    }
