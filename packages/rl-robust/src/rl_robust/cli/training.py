"""What ``robust rl harden`` does once its words are read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_robust import hardening
from rl_robust.cli.setting import OnStep, TaskWords
from rl_robust.hardening.base import Job
from rl_robust.hardening.published import Published, published, with_defaults
from rl_robust.rollout import collect
from rl_robust.saved import Hardened
from rl_robust.task import Task
from robust_core.claim import versions
from robust_core.device import choose_device
from robust_core.evaluation.metrics.estimate import mean
from robust_core.io import write_json
from robust_core.random import derive
from robust_core.settings import parse_settings
from robust_core.threats import parse_threat

__all__ = ["train", "unbounded"]

SCHEMA = "robust.harden/1"
EPISODES = 50


def unbounded(task: Task) -> bool:
    """Return whether no element of an observation has a bound: then their units are of no common size."""
    env = task.make()
    space: Any = env.observation_space
    env.close()
    return bool(np.isinf(space.low).all() and np.isinf(space.high).all()) and task.n_frames == 1 and task.scale == 1.0


def _task(words: TaskWords, found: Published | None) -> Task:
    if found is None:
        return words.task
    if words.env is not None or words.env_set or words.frames != 1 or words.scale != 1.0:
        raise ValueError("--recipe says the environment itself; leave --env, --env-set, --frames and --scale out")
    return found.task if words.max_steps is None else replace(found.task, max_steps=words.max_steps)


def train(
    method: str,
    words: TaskWords,
    own: Sequence[str],
    *,
    recipe: str | None,
    out: Path,
    eps: str | None,
    norm: str,
    steps: int | None,
    n_envs: int | None,
    normalise: bool | None,
    seed: int,
    device: str,
    command: str,
    on_step: OnStep,
) -> dict[str, Any]:
    """Train, save, measure in peace, and return ``result.json``; see ``robust rl harden --help``."""
    started = time.perf_counter()
    found = None if recipe is None else published(recipe, method)
    usual = Published(Task("none"), 100_000) if found is None else found
    chosen = hardening.find(method)
    settings = parse_settings(chosen.settings, with_defaults(own, usual.settings))
    task = _task(words, found)
    if normalise is None:
        normalise = usual.normalise or (task.normaliser is None and unbounded(task))
    radius = eps if eps is not None else "0.05" if usual.eps is None else f"{usual.eps!r}"
    threat = parse_threat(norm, radius, domain=task.domain if not normalise else None)
    job = Job(
        task=task, threat=threat, out=out, n_steps=steps or usual.n_steps, n_envs=n_envs or usual.n_envs,
        normalise=normalise, recipe=usual.smoothed, seed=seed, device=str(choose_device(device)), on_step=on_step,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    made = chosen.train(job, settings)
    return _result(made, job, out, command, started)


def _result(made: Hardened, job: Job, out: Path, command: str, started: float) -> dict[str, Any]:
    seed = derive(int(job.seed or 0), "after training")  # pyright: ignore[reportArgumentType]
    figures = {}
    for name, policy in zip(made.names, made.policies, strict=True):
        found = collect(policy, made.task, EPISODES, sigma=made.sigma, generator=seed)
        figures[f"{name}/return"] = mean(found.returns).as_json()
    result = {
        "schema": SCHEMA,
        "method": made.method,
        "policy": f"saved:{out}",
        "threat": str(job.threat),
        "sigma": made.sigma,
        "data": made.task.name,
        "data_sha256": hashlib.sha256(made.task.identity.encode()).hexdigest(),
        "n": EPISODES,
        "seed": job.seed,
        "device": job.device,
        "figures": figures,
        "flags": [],
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "command": command,
        "details": {"task": made.task.identity, **made.details},
    }
    write_json(out / "result.json", result)
    return result
