"""Measure a policy: its returns in peace, under each attack, and what a certificate leaves of them.

    report = evaluate(policy, task, {"random": RandomNoise(0.1), "mad": …}, n_episodes=200, certify=(0.0, 0.1, 0.2))
    report.save("report")

The figure that counts is the worst attack found; how many were tried stands beside it. Every attack plays the same
episodes (same seeds, same noise), so differences are paired. A certificate is taken from fresh episodes that no attack
and no choice of a checkpoint has seen, and an attack within its budget that does worse than it is an error, not a
figure.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rl_robust.observation import EpisodeBudget, ObservationAttack
from rl_robust.policy import as_policy
from rl_robust.returns import ReturnSample, Trace
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.checks import check_count
from robust_core.claim import versions
from robust_core.errors import RobustError
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.metrics.estimate import Estimate, difference, mean
from robust_core.models import fingerprint, model_device
from robust_core.random import Seed, resolve_seed

__all__ = ["BrokenCertificateError", "PolicyReport", "evaluate", "hold_certificate"]

SCHEMA = "robust.policy/1"
OnStep = Callable[[str, int, int], None]


class BrokenCertificateError(RobustError):
    """An attack within its budget did worse than a certificate allows: one of the two is wrong."""


@dataclass(frozen=True)
class PolicyReport(DocumentReport):
    """What an evaluation found.

    Attributes:
        document: JSON; figures are ``"clean/return"``, ``"worst/return"`` ….
        arrays: returns and lengths of every episode, by attack, and the certificate's curve.
        traces: of the episodes that were watched, by attack; files keep them in the page only.
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"arrays": "per_episode.npz"}

    arrays: dict[str, np.ndarray]
    traces: dict[str, tuple[Trace, ...]] = field(default_factory=dict)

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from rl_robust.page import render

        return render(self)


def evaluate(
    policy: Any,
    task: Task,
    attacks: Mapping[str, ObservationAttack] | None = None,
    *,
    n_episodes: int = 100,
    sigma: float = 0.0,
    certify: Sequence[float] = (),
    certificate_episodes: int = 10_000,
    lower: float | None = None,
    alpha: float = 0.05,
    generator: Seed = None,
    n_envs: int = 32,
    backend: str = "here",
    workers: int = 2,
    resume: str | os.PathLike[str] | None = None,
    watch: int = 1,
    render: bool = False,
    name: str | None = None,
    command: str = "",
    on_step: OnStep | None = None,
) -> PolicyReport:
    """Play a policy in peace and under attack, and certify its return.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes.
        task: the environment.
        attacks: name -> attack.
        n_episodes: for each of them.
        sigma: noise of the smoothed policy; 0 plays the policy as it is.
        certify: budgets for an episode, for which the expected return is certified; needs ``sigma`` above 0.
        certificate_episodes: fresh episodes behind the certificate.
        lower: the least return that the environment can give, also under attack; needed to certify.
        alpha: failure probability of the whole curve.
        generator: seed.
        n_envs: environments side by side; no figure depends on it.
        backend: where blocks of episodes are played, as for :func:`rl_robust.rollout.collect`.
        workers: likewise.
        resume: folder for finished blocks of episodes: the same call goes on there after an interruption.
        watch: episodes of each attack that are kept step by step, for the page.
        render: keep images of those, where the environment renders.
        name: of the policy in the report.
        command: how to run this again, for the report.
        on_step: called with (what is played, episodes done, episodes in all).

    Raises:
        BrokenCertificateError: an attack within its budget does worse than the certificate allows.
    """
    started, seed = time.perf_counter(), resolve_seed(generator)
    check_count("n_episodes", n_episodes)
    probe = task.make()
    victim = as_policy(policy, probe.action_space)
    probe.close()

    def play(label: str, attack: ObservationAttack | None, count: int, first: int) -> ReturnSample:
        def report(done: int, total: int) -> None:
            if on_step is not None:
                on_step(label, done, total)

        folder = None if resume is None else Path(resume) / label
        return collect(
            victim, task, count, attack=attack, sigma=sigma, generator=seed, first=first, n_envs=n_envs,
            backend=backend, workers=workers, checkpoint=folder, on_step=report,
        )  # fmt: skip

    def look(attack: ObservationAttack | None) -> tuple[Trace, ...]:
        if not watch:
            return ()
        kept = range(min(watch, n_episodes))
        return collect(
            victim, task, len(kept), attack=attack, sigma=sigma, generator=seed, trace=tuple(kept), render=render
        ).traces

    chosen = dict(attacks or {})
    samples = {"clean": play("clean", None, n_episodes, 0)}
    samples |= {label: play(label, attack, n_episodes, 0) for label, attack in chosen.items()}
    traces = {label: look(chosen.get(label)) for label in samples}
    certificate = None
    if certify:
        fresh = play("certificate", None, certificate_episodes, n_episodes)
        certificate = _certificate(fresh, certify, lower, alpha)
    figures = _figures(samples, certificate, chosen)
    _check(samples, chosen, certificate)
    document = {
        "schema": SCHEMA,
        "threat": {label: _threat(attack) for label, attack in chosen.items()},
        "model": name or type(policy).__name__,
        "model_sha256": fingerprint(victim),  # pyright: ignore[reportArgumentType]
        "data": task.name,
        "data_sha256": hashlib.sha256(task.identity.encode()).hexdigest(),
        "n": n_episodes,
        "seed": seed,
        "device": str(model_device(victim) or "cpu"),  # pyright: ignore[reportArgumentType]
        "figures": {label: estimate.as_json() for label, estimate in figures.items()},
        "flags": _flags(samples, chosen),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "command": command,
        "details": {
            "task": task.identity,
            "sigma": sigma,
            "attacks": {label: repr(attack) for label, attack in chosen.items()},
            "certificate": None if certificate is None else certificate.about,
        },
    }
    arrays = {f"{label}/{k}": getattr(s, k) for label, s in samples.items() for k in ("returns", "lengths", "spent")}
    if certificate is not None:
        arrays |= {"certificate/eps": certificate.eps, "certificate/return": certificate.bound}
    return PolicyReport(document, arrays, traces)


@dataclass(frozen=True)
class _Curve:
    eps: np.ndarray
    bound: np.ndarray
    n: int
    about: dict[str, Any]


def _certificate(sample: ReturnSample, eps: Sequence[float], lower: float | None, alpha: float) -> _Curve:
    from rl_robust.smoothing import certify_return

    if lower is None:
        raise ValueError("lower=None: the least return that the environment can give is needed to certify, e.g. 0")
    grid = np.unique(np.asarray([0.0, *eps], dtype=np.float64))
    found = certify_return(sample.returns, sigma=sample.sigma, eps=grid, lower=lower, alpha=alpha)
    bound = np.asarray(found.expected_return, dtype=np.float64)
    about = {"sigma": sample.sigma, "alpha": alpha, "lower": lower, "n": len(sample), "method": found.method}
    return _Curve(grid, bound, len(sample), about)


def _figures(
    samples: Mapping[str, ReturnSample], certificate: _Curve | None, attacks: Mapping[str, ObservationAttack]
) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    for label, sample in samples.items():
        figures[f"{label}/return"] = mean(sample.returns)
        figures[f"{label}/return_p10"] = Estimate(float(np.quantile(sample.returns, 0.1)), None, len(sample))
        figures[f"{label}/length"] = mean(sample.lengths.astype(np.float64))
        figures[f"{label}/truncated"] = Estimate(float(sample.truncated.mean()), None, len(sample))
        if label != "clean":
            figures[f"{label}/lost"] = difference(samples["clean"].returns, sample.returns)
            figures[f"{label}/spent"] = Estimate(float(sample.spent.max()), None, len(sample))
    episode = [label for label, attack in attacks.items() if isinstance(attack.budget, EpisodeBudget)]
    step = [label for label in attacks if label not in episode]
    for name, tried in (("worst", step or episode), ("worst of an episode", episode if step else [])):
        if tried:  # a ball in every step and a budget for an episode are two threats: neither is the other's worst
            least = min(tried, key=lambda label: samples[label].mean)
            figures[f"{name}/return"] = mean(samples[least].returns)
            figures[f"{name}/tried"] = Estimate(float(len(tried)), None, len(tried))
    if certificate is not None:
        for eps, bound in zip(certificate.eps, certificate.bound, strict=True):
            figures[f"certified/return@{eps:g}"] = Estimate(float(bound), None, certificate.n)
    return figures


def _check(
    samples: Mapping[str, ReturnSample], attacks: Mapping[str, ObservationAttack], certificate: _Curve | None
) -> None:
    """No attack with an episode budget may be worse than the certificate, beyond five standard errors."""
    for label, attack in attacks.items() if certificate is not None else ():
        if not isinstance(attack.budget, EpisodeBudget) or certificate is None:
            continue
        held = certificate.bound[certificate.eps >= attack.budget.eps]
        if len(held):
            hold_certificate(label, samples[label].returns, float(held[0]))


def hold_certificate(label: str, returns: np.ndarray, bound: float) -> None:
    """Hold the returns that an attack left against a certificate for its budget.

    Raises:
        BrokenCertificateError: their mean lies below it by more than five standard errors.
    """
    value, error = float(returns.mean()), float(returns.std() / np.sqrt(len(returns)))
    if value + 5 * error < bound:
        raise BrokenCertificateError(
            f"attack {label!r} leaves {value:.4g}, the certificate for its budget promises {bound:.4g}: is lower= a "
            "bound of the environment, is the normaliser frozen, is noise added once?"
        )


def _threat(attack: ObservationAttack) -> dict[str, Any]:
    budget = attack.budget
    if isinstance(budget, EpisodeBudget):
        return {"norm": "L2", "eps": budget.eps, "per": "episode"}
    threat = getattr(budget, "threat", None)
    return {"norm": getattr(threat, "name", "?"), "eps": budget.eps, "per": "step"}


def _flags(samples: Mapping[str, ReturnSample], attacks: Mapping[str, ObservationAttack]) -> list[str]:
    flags = []
    clean = samples["clean"]
    random = [label for label in attacks if label.startswith("random")]
    other = [label for label in attacks if label not in random]
    for label in random:
        rivals = [k for k in other if attacks[k].budget == attacks[label].budget]
        lame = [k for k in rivals if samples[k].mean > samples[label].mean]
        if lame and samples[label].mean < clean.mean:
            flags.append(f"random noise does more harm than {', '.join(lame)}: those may not have found their way")
    if clean.returns.std() == 0 and len(clean) > 1 and clean.lengths.std() == 0:
        flags.append("every clean episode brought the same return: do the environment's seeds have any effect?")
    return flags
