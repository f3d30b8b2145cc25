"""What ``robust rl compare`` does once its words are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_robust import hardening
from rl_robust.cli.setting import OnStep, TaskWords, load_policy
from rl_robust.cli.training import unbounded
from rl_robust.comparison import Comparison, Settings, compare
from rl_robust.hardening.contenders import train_contenders
from rl_robust.observation import StepBudget
from rl_robust.saved import Hardened
from robust_core.device import choose_device
from robust_core.settings import parse_settings
from robust_core.threats import parse_threat

__all__ = ["run"]


def _settings(words: Sequence[str], methods: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each method from ``METHOD.NAME=VALUE``."""
    own: dict[str, list[str]] = {}
    for word in words:
        method, sign, rest = word.partition(".")
        if not sign or method not in methods:
            raise ValueError(f"--set {word!r}: METHOD.NAME=VALUE is needed, with a method of {', '.join(methods)}")
        own.setdefault(method, []).append(rest)
    parsed = {method: parse_settings(hardening.find(method).settings, rest) for method, rest in own.items()}
    named = {method: [word.partition("=")[0].strip().replace("-", "_") for word in own[method]] for method in own}
    return {method: {name: getattr(kept, name) for name in named[method]} for method, kept in parsed.items()}


def run(
    words: TaskWords,
    methods: Sequence[str],
    named: Mapping[str, str],
    own: Sequence[str],
    settings: Settings,
    training: Mapping[str, Any],
    *,
    eps: float,
    norm: str,
    normalise: bool | None,
    seed: int,
    device: str,
    workers: int,
    out: Path,
    command: str,
    on_step: OnStep,
) -> Comparison:
    """Train, load, measure and save; see ``robust rl compare --help``."""
    where = choose_device(device)
    contenders: dict[str, Sequence[Hardened]] = {
        name: [load_policy(policy, words, where)] for name, policy in named.items()
    }
    clash = sorted(set(contenders) & set(methods))
    if clash:
        raise ValueError(f"--policy {clash[0]}=…: the name of a method that is trained; take another")
    first = next(iter(contenders.values()), None)
    task = words.task if first is None else first[0].task
    if normalise is None:
        normalise = task.normaliser is None and unbounded(task)
    threat = parse_threat(norm, eps, domain=None if normalise else task.domain)
    if methods:
        trained = train_contenders(
            methods, task, threat, out=out, first_seed=seed, normalise=normalise, device=str(where), workers=workers,
            settings=_settings(own, methods), on_step=on_step, **training,
        )  # fmt: skip
        contenders = {**trained, **contenders}
    found = compare(contenders, StepBudget(threat), settings, generator=seed, folder=out, workers=workers,
                    command=command, on_step=on_step)  # fmt: skip
    found.save(out)
    return found
