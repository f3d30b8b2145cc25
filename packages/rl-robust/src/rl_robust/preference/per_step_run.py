"""From problems to a model that unlearned its fatal steps, and what was seen on the way; every stage can go on.

Sampled responses and roll-outs are kept in a folder, in JSON, so that a call that was interrupted draws nothing twice:

1. :func:`draw_responses`: solutions of the model itself, a fixed number for each problem;
2. :func:`estimate_values`: the values of their steps, from roll-outs;
3. :func:`diagnose`: the steps that lost the answer, and the *spurious* ones: steps of right solutions after which a
   right answer had become less likely, which training on right solutions would copy all the same;
4. :func:`rl_robust.preference.per_step_pairs.build_pairs` and :func:`rl_robust.preference.per_step.train_per_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_robust.preference.per_step_values import (
    Ids,
    Problem,
    RollOuts,
    Sampler,
    Splitter,
    StepValues,
    Verifier,
    estimate_step_values,
)
from robust_core.checks import check_count, check_number, check_same_length
from robust_core.errors import CheckpointError
from robust_core.evaluation.metrics.estimate import Estimate, mean
from robust_core.io import read_json, write_json
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Diagnosis", "accuracy", "diagnose", "draw_responses", "estimate_values"]

OnStep = Callable[[int, int], object]
CHUNK = 16
"""Problems between two writings of the responses."""


def _kept(file: Path, identity: str) -> Any:
    """Return what an earlier call kept, None where there is nothing.

    Raises:
        CheckpointError: it is that of another model or of other settings.
    """
    if not file.is_file():
        return None
    found = read_json(file, max_bytes=1 << 31)
    if not isinstance(found, dict) or found.get("identity") != identity:
        raise CheckpointError(f"{file} is of another model or of other settings; take another folder, or remove it")
    return found["kept"]


def _keep(file: Path, identity: str, kept: Any) -> None:
    write_json(file, {"identity": identity, "kept": kept}, indent=None)


def draw_responses(
    sampler: Sampler,
    problems: Sequence[Problem],
    n: int,
    *,
    file: Path,
    identity: str,
    generator: Seed = None,
    on_step: OnStep | None = None,
) -> list[list[Ids]]:
    """Return ``n`` responses to each problem; response k of a problem depends on its tokens and the seed alone.

    Args:
        sampler: the model.
        problems: what is asked.
        n: responses for each.
        file: where they are kept.
        identity: of the model and its settings.
        generator: seed.
        on_step: called with (problems done, problems).
    """
    check_count("n", n)
    seed = resolve_seed(generator)
    told = f"{identity} responses {n} {seed} {derive(0, *(str(p.prompt) for p in problems)):x}"
    found = [[tuple(row) for row in rows] for rows in _kept(file, told) or []]
    while len(found) < len(problems):
        part = problems[len(found) : len(found) + CHUNK]
        seeds = [derive(seed, "responses", *p.prompt) for p in part]
        found += [[tuple(row) for row in rows] for rows in sampler([p.prompt for p in part], n, seeds=seeds)]
        _keep(file, told, found)
        if on_step is not None:
            on_step(len(found), len(problems))
    return found


def estimate_values(
    sampler: Sampler,
    problems: Sequence[Problem],
    responses: Sequence[Sequence[Ids]],
    *,
    file: Path,
    identity: str,
    verifier: Verifier,
    splitter: Splitter,
    k: int = 5,
    n_rollouts: int = 16,
    generator: Seed = None,
    on_step: OnStep | None = None,
) -> list[list[StepValues]]:
    """Return the values of the steps of all responses; roll-outs are kept in ``file`` after every wave.

    Args:
        sampler: the model.
        problems: what was asked.
        responses: of :func:`draw_responses`.
        file: where roll-outs are kept.
        identity: of the model and its settings.
        verifier: is an answer right?
        splitter: where do steps end?
        k: size of the best-of group.
        n_rollouts: draws for each prefix.
        generator: seed.
        on_step: called with (steps done, steps).
    """
    told = f"{identity} roll-outs {n_rollouts} {resolve_seed(generator)}"
    kept = _kept(file, told) or {}
    cache = {key: RollOuts(int(count), None if ids is None else tuple(ids)) for key, (count, ids) in kept.items()}

    def step(done: int, total: int) -> None:
        _keep(file, told, cache)
        if on_step is not None:
            on_step(done, total)

    return estimate_step_values(
        sampler, problems, responses, verifier=verifier, splitter=splitter, k=k, n_rollouts=n_rollouts,
        generator=generator, cache=cache, on_step=step,
    )  # fmt: skip


def accuracy(problems: Sequence[Problem], responses: Sequence[Sequence[Ids]], verifier: Verifier) -> Estimate:
    """Return the share of right responses, mean over problems with its interval."""
    check_same_length(problems=len(problems), responses=len(responses))
    shares = [float(np.mean([verifier(p, y) for y in rows])) for p, rows in zip(problems, responses, strict=True)]
    return mean(np.array(shares), low=0.0, high=1.0)


@dataclass(frozen=True)
class Diagnosis:
    """What the values of the steps tell.

    Attributes:
        wrong: wrong responses.
        lost: those in which a step is found that lost the answer.
        early: share of those lost in the first half of their steps.
        right: right responses.
        spurious: right responses with a step of which the advantage is at most ``-drop``.
        drop: the drop of the value that counts.
        pits: the worst, as (problem, step, value before, value after, token ids of the step).
        copied: the worst spurious ones, likewise.
    """

    wrong: int
    lost: int
    early: float
    right: int
    spurious: int
    drop: float
    pits: tuple[tuple[int, int, float, float, Ids], ...]
    copied: tuple[tuple[int, int, float, float, Ids], ...]


def diagnose(values: Sequence[Sequence[StepValues]], *, drop: float = 0.25, n_shown: int = 10) -> Diagnosis:
    """Return which steps lost answers, and which right solutions hold a step that made theirs less likely.

    Args:
        values: of the responses of each problem.
        drop: of the value, in (0, 1].
        n_shown: most steps that are listed of each kind.
    """
    check_number("drop", drop, low=0.0, high=1.0, open_low=True)
    wrong = right = spurious = 0
    pits, copied, early = [], [], []
    for number, rows in enumerate(values):
        for value in rows:
            q = [value.q0, *value.q.tolist()]
            if value.correct:
                right += 1
                worst = min(range(len(value.ends)), key=lambda i: q[i + 1] - q[i])
                if q[worst + 1] - q[worst] <= -drop:
                    spurious += 1
                    copied.append((number, worst, q[worst], q[worst + 1], _step(value, worst)))
                continue
            wrong += 1
            pit = value.pit()
            if pit is not None:
                early.append(pit < len(value.ends) / 2)
                pits.append((number, pit, q[pit], q[pit + 1], _step(value, pit)))

    def worst_first(steps: list[Any]) -> tuple[Any, ...]:
        return tuple(sorted(steps, key=lambda row: row[3] - row[2])[:n_shown])

    share = float(np.mean(early)) if early else 0.0
    return Diagnosis(wrong, len(pits), share, right, spurious, drop, worst_first(pits), worst_first(copied))


def _step(value: StepValues, step: int) -> Ids:
    return value.response[len(value.prefix(step)) : value.ends[step]]
