"""Put policies side by side: in peace, under every attack, certified; one table.

    contenders = train_contenders(("ppo", "sa-ppo", "smoothed"), Task("CartPole-v1"), threat, out="runs")
    found = compare(contenders, StepBudget(threat), folder="runs")
    found.save("report")

Two threats stand in the table, and they are not comparable. *Per step*: every observation may move within a ball,
again and again; attacks only, nothing is certified. *Per episode*: the changes of a whole episode have a Euclidean
length; here stand the worst attack that was found and, for policies that are played under noise, what no attack can go
below.

Every policy plays the same episodes. Attackers are trained against each policy itself; of a family (robust Sarsa with
and without maximal action difference; SA-RL and PA-AD) the one that leaves least counts. A set of policies is played by
a bandit that picks one for each episode and learns from the returns, so what learning costs is in its figures; each
member is attacked by who was trained against it. With several training seeds a figure is the mean over them, with the
Student interval over *them*; with one, the interval is over episodes and says nothing about training again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from rl_robust.attacks.suite import SARSA_STEPS, Suite, usual_attacks
from rl_robust.bandits import Exp3IX
from rl_robust.evaluation import hold_certificate
from rl_robust.hardening.contenders import in_parts
from rl_robust.nondominated.adaptive import replay
from rl_robust.observation import EpisodeBudget, ObservationAttack, StepBudget
from rl_robust.rollout import collect
from rl_robust.saved import Hardened, least_return
from rl_robust.smoothing import certify_return
from robust_core.checks import check_count, check_number
from robust_core.claim import versions
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.metrics.estimate import Estimate, mean
from robust_core.models import fingerprint
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["ATTACKS", "Comparison", "Settings", "compare"]

SCHEMA = "robust.policies-compared/1"
ATTACKS = ("random", "mad", "sarsa", "sarsa+mad", "sa-rl", "pa-ad")
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "random": ("random",),
    "critic": ("critic",),
    "MAD": ("mad",),
    "RS": ("sarsa", "sarsa+mad"),
    "learned": ("sa-rl", "pa-ad"),
}
"""Columns of attacks of a step, and the attacks of which each shows the worst."""
NATURAL, WORST, EPISODE, CERTIFIED = "natural", "worst", "episode worst", "certified"
CURVE = 9
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How much is spent on the comparison.

    Attributes:
        attacks: of a step, by name; those that ask for more than a policy has are left out for it.
        n_episodes: for each attack; a bandit that plays a set has as many to learn in.
        attack_steps: environment steps of the training of each learned attacker.
        sarsa_steps: steps for which robust Sarsa watches.
        episode_eps: length of the changes of an episode, for the second threat; None takes the largest noise.
        certificate_episodes: fresh episodes behind each certificate.
        lower: the least return that the environment can give, also under attack; None where it is known.
        alpha: failure probability of each certificate.
        duration: steps among which attacks share the budget of an episode.
    """

    attacks: tuple[str, ...] = ATTACKS
    n_episodes: int = 100
    attack_steps: int = 20_000
    sarsa_steps: int = SARSA_STEPS
    episode_eps: float | None = None
    certificate_episodes: int = 2_000
    lower: float | None = None
    alpha: float = 0.05
    duration: int = 200

    def __post_init__(self) -> None:
        for name in ("n_episodes", "attack_steps", "sarsa_steps", "certificate_episodes", "duration"):
            check_count(name, getattr(self, name))
        check_number("alpha", self.alpha, low=0, high=0.5, open_low=True)
        if self.episode_eps is not None:
            check_number("episode_eps", self.episode_eps, low=0)


@dataclass(frozen=True)
class Comparison(DocumentReport):
    """What a comparison found.

    Attributes:
        document: JSON; ``rows`` hold ``cells`` by column, figures are ``"row/column"``.
        arrays: returns of every episode, "row/seed/attack", and the curves of certificates.
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"arrays": "per_episode.npz"}

    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def header(self) -> list[str]:
        """What stands above the columns, with the threat that each speaks of."""
        step, episode = self.document["threat"]["step"], self.document["threat"]["episode"]
        named = {NATURAL: "natural", WORST: f"worst of {self.document['details']['tried']}, per step"}
        named |= {family: f"{family}, per step {step['norm']} {step['eps']:g}" for family in FAMILIES}
        if episode is not None:
            told = f"per episode L2 {episode['eps']:g}"
            named |= {EPISODE: f"worst found, {told}", CERTIFIED: f"certified, {told}"}
        return [named[column] for column in self.document["columns"]]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """Return the row as text, one word for each column; what was not measured is a dash."""
        shown = []
        for column in self.document["columns"]:
            cell = row["cells"].get(column)
            half = "" if cell is None or cell["interval"] is None else _half(cell)
            shown.append("–" if cell is None else f"{_compact(cell['value'])}{half}")
        return shown

    def text(self) -> str:
        """Return the table in Markdown."""
        lines = [["policy", *self.header], ["---", *("---:" for _ in self.header)]]
        lines += [[row["name"], *self.cells(row)] for row in self.document["rows"]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from rl_robust.comparison_page import render

        return render(self)


def _half(cell: Mapping[str, Any]) -> str:
    half = (cell["interval"][1] - cell["interval"][0]) / 2
    return f" ± {_compact(half) if half >= 100 else f'{half:.2g}'}"


def _compact(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def compare(
    contenders: Mapping[str, Sequence[Hardened]],
    budget: StepBudget,
    settings: Settings | None = None,
    *,
    generator: Seed = None,
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
    command: str = "",
    on_step: OnStep | None = None,
) -> Comparison:
    """Attack and certify policies, and put them in one table.

    Args:
        contenders: name -> one for each training seed, all of one environment; of :func:`train_contenders`, of
            :func:`rl_robust.saved.load_hardened`, or ``Hardened((policy,), ("mine",), task, "given")``.
        budget: of a step.
        settings: how much is spent.
        generator: seed of the episodes and of the attackers.
        folder: of finished episodes and trained attackers: the same call goes on from there.
        workers: processes among which policies are shared; no figure depends on it.
        command: how to run this again, for the report.
        on_step: called with (what is done, done, in all).

    Raises:
        ValueError: no contender, or environments that differ.
        rl_robust.evaluation.BrokenCertificateError: an attack within its budget does worse than a certificate allows.
    """
    started, seed, settings = time.perf_counter(), resolve_seed(generator), settings or Settings()
    if any("/" in name for name in contenders):
        raise ValueError(f"contenders {', '.join(contenders)}: names without '/' are needed")
    names = {made.task.name for trained in contenders.values() for made in trained}
    if len(names) != 1 or not all(contenders.values()):
        raise ValueError(f"contenders play {', '.join(sorted(names)) or 'nothing'}; one environment is needed")
    noise = max(made.sigma for trained in contenders.values() for made in trained)
    radius = settings.episode_eps or noise or None
    settings = replace(settings, episode_eps=radius)
    measure = partial(
        _measured, budget=budget, settings=settings, seed=seed, folder=None if folder is None else Path(folder),
        on_step=on_step if workers == 1 else None,
    )  # fmt: skip
    parts = [(name if len(trained) == 1 else f"{name}, seed {k}", made)
             for name, trained in contenders.items() for k, made in enumerate(trained)]  # fmt: skip
    all_found = iter(in_parts(measure, parts, workers, "measured", on_step))
    rows, arrays = [], {}
    for name, trained in contenders.items():
        found = [next(all_found) for _ in trained]
        arrays |= {f"{name}/{k}/{part}": value for k, one in enumerate(found) for part, value in one.arrays.items()}
        rows.append(_row(name, trained, found))
    document = _document(contenders, rows, budget, settings, seed)
    document |= {"seconds": round(time.perf_counter() - started, 3), "versions": versions(), "command": command}
    return Comparison(document, arrays)


@dataclass(frozen=True)
class _Found:
    """What was measured of one contender of one training seed."""

    cells: dict[str, float]
    attacks: dict[str, float]
    arrays: dict[str, np.ndarray]


def _measured(part: tuple[str, Hardened], *, budget: StepBudget, **more: Any) -> _Found:
    return _Measurement(*part, budget, **more).run()


class _Measurement:
    """Measures one contender of one training seed."""

    def __init__(
        self, label: str, made: Hardened, budget: StepBudget, *, settings: Settings, seed: int, folder: Path | None,
        on_step: OnStep | None,
    ) -> None:  # fmt: skip
        self.made, self.budget, self.settings, self.seed, self.folder = made, budget, settings, seed, folder
        self.label, self.on_step = label, on_step
        self.cells: dict[str, float] = {}
        self.attacks: dict[str, float] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def told(self, what: str, done: int, total: int) -> None:
        """Say how far it is."""
        if self.on_step is not None:
            self.on_step(f"{self.label}: {what}", done, total)

    @property
    def blocks(self) -> Path | None:
        """Where finished episodes are kept, of policies that have weights."""
        weights = all(isinstance(policy, nn.Module) for policy in self.made.policies)
        return self.folder / "episodes" if self.folder is not None and weights else None

    def run(self) -> _Found:
        """Measure everything."""
        returns = self.played()
        self.arrays |= {f"{attack}/returns": value for attack, value in returns.items()}
        means = {attack: float(value.mean()) for attack, value in returns.items()}
        self.attacks = {attack: value for attack, value in means.items() if attack != NATURAL}
        self.cells[NATURAL] = means[NATURAL]
        for family, members in FAMILIES.items():
            tried = [means[member] for member in members if member in means]
            if tried:
                self.cells[family] = min(tried)
        steps = [means[name] for name in self.settings.attacks if name in means]
        if steps:
            self.cells[WORST] = min(steps)
        episode = {name: value for name, value in means.items() if name.startswith("episode-")}
        if episode:
            self.cells[EPISODE] = min(episode.values())
        self.certify(returns, tuple(episode))
        return _Found(self.cells, self.attacks, self.arrays)

    def played(self) -> dict[str, np.ndarray]:
        """Return the returns of every attack: of the policy, or of the bandit on the members of a set."""
        made, n = self.made, self.settings.n_episodes
        tables: dict[str, list[np.ndarray]] = {}
        for k, policy in enumerate(made.policies):
            attacks: dict[str, ObservationAttack | None] = {NATURAL: None, **self.suite(k)}
            for done, (name, attack) in enumerate(attacks.items()):
                found = collect(policy, made.task, n, attack=attack, sigma=made.sigma, generator=self.seed,
                                checkpoint=self.blocks)  # fmt: skip
                tables.setdefault(name, []).append(found.returns)
                self.told(
                    "attacked" if len(made.policies) == 1 else f"{made.names[k]} attacked", done + 1, len(attacks)
                )
        if made.reward_range is None:
            return {name: found[0] for name, found in tables.items()}
        played = {}
        for name, found in tables.items():
            table = np.stack(found)
            bandit = Exp3IX(len(table), n, reward_range=made.reward_range, generator=derive(self.seed, "bandit", name))
            played[name] = replay(bandit, table).returns
            self.arrays[f"{name}/members"] = table
        return played

    def suite(self, k: int) -> dict[str, ObservationAttack]:
        """Return the attacks against one member."""
        made, settings, policy = self.made, self.settings, self.made.policies[k]
        who = "" if len(made.policies) == 1 else f"{made.names[k]}, "
        suite = Suite(
            policy, made.task, sigma=made.sigma, duration=settings.duration, attack_steps=settings.attack_steps,
            sarsa_steps=settings.sarsa_steps, generator=derive(self.seed, "attackers"),
            folder=None if self.folder is None else self.folder / "attackers",
            on_step=lambda what, done, total: self.told(f"{who}{what}", done, total),
        )  # fmt: skip
        allowed = usual_attacks(policy)
        found = suite.build([name for name in settings.attacks if name in allowed], self.budget)
        if settings.episode_eps is not None:
            length = EpisodeBudget(settings.episode_eps, made.task.domain)
            beside = suite.build(suite.beside_certificates, length)
            found |= {f"episode-{name}": attack for name, attack in beside.items()}
        return found

    def certify(self, returns: Mapping[str, np.ndarray], episode: Sequence[str]) -> None:
        """Certify a policy that is played under noise, and hold the attacks against it."""
        made, settings, radius = self.made, self.settings, self.settings.episode_eps
        lower = least_return(made.task) if settings.lower is None else settings.lower
        if made.sigma <= 0 or lower is None or radius is None or made.is_set:
            return
        fresh = collect(
            made.policies[0], made.task, settings.certificate_episodes, sigma=made.sigma, generator=self.seed,
            first=settings.n_episodes, checkpoint=self.blocks, on_step=lambda k, n: self.told("certificate", k, n),
        )  # fmt: skip
        grid = np.unique([*np.linspace(0.0, 2.0 * max(radius, made.sigma), CURVE), radius])
        found = certify_return(fresh.returns, sigma=made.sigma, eps=grid, lower=lower, alpha=settings.alpha)
        bound = float(found.expected_return[found.eps == radius][0])
        self.cells[CERTIFIED] = bound
        self.arrays |= {"certificate/eps": found.eps, "certificate/return": found.expected_return}
        for name in episode:
            hold_certificate(f"{self.label}: {name}", returns[name], bound)


def _row(name: str, trained: Sequence[Hardened], found: Sequence[_Found]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for column in found[0].cells:
        values = [one.cells[column] for one in found if column in one.cells]
        cells[column] = {**_estimate(column, values, found).as_json(), "per_seed": values}
    attacks = {k: [one.attacks[k] for one in found if k in one.attacks] for k in found[0].attacks}
    return {
        "name": name,
        "method": trained[0].method,
        "policies": [len(made.policies) for made in trained],
        "sigma": trained[0].sigma,
        "normaliser": [None if made.task.normaliser is None else made.task.normaliser.sha256[:16] for made in trained],
        "model_sha256": [[fingerprint(p) for p in made.policies] for made in trained],  # pyright: ignore
        "environment_steps": [made.details.get("environment_steps") for made in trained],
        "cells": cells,
        "attacks": attacks,
    }


def _estimate(column: str, values: Sequence[float], found: Sequence[_Found]) -> Estimate:
    """Return the mean over training seeds with its interval over them; of one seed, the interval over episodes."""
    if column == CERTIFIED:
        return Estimate(float(np.mean(values)), None, len(values))
    if len(values) > 1:
        return mean(values)
    means = {name: float(r.mean()) for name, r in _samples(found[0]).items()}
    name = min(means, key=lambda key: abs(means[key] - values[0]))
    return mean(_samples(found[0])[name])


def _samples(found: _Found) -> dict[str, np.ndarray]:
    return {k.removesuffix("/returns"): v for k, v in found.arrays.items() if k.endswith("/returns")}


def _document(
    contenders: Mapping[str, Sequence[Hardened]], rows: list[dict[str, Any]], budget: StepBudget, settings: Settings,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    order = (NATURAL, *FAMILIES, WORST, EPISODE, CERTIFIED)
    columns = [column for column in order if any(column in row["cells"] for row in rows)]
    task = next(iter(contenders.values()))[0].task
    radius, n_seeds = settings.episode_eps, max(len(trained) for trained in contenders.values())
    return {
        "schema": SCHEMA,
        "threat": {
            "step": {"norm": budget.threat.name, "eps": budget.eps, "per": "step"},
            "episode": None if radius is None else {"norm": "L2", "eps": radius, "per": "episode"},
        },
        "data": task.name,
        "data_sha256": hashlib.sha256(task.identity.encode()).hexdigest(),
        "n": settings.n_episodes,
        "seed": seed,
        "columns": columns,
        "rows": rows,
        "figures": {
            f"{row['name']}/{column}": {k: v for k, v in cell.items() if k != "per_seed"}
            for row in rows
            for column, cell in row["cells"].items()
        },
        "flags": _flags(rows, n_seeds),
        "details": {
            "task": task.identity,
            "training_seeds": n_seeds,
            "intervals": "over training seeds" if n_seeds > 1 else "over episodes of one training",
            "tried": sum(name in settings.attacks for name in {k for row in rows for k in row["attacks"]}),
            **{k: v for k, v in vars(settings).items() if k != "attacks"},
        },
    }


def _flags(rows: Sequence[Mapping[str, Any]], n_seeds: int) -> list[str]:
    flags = []
    for row in rows:
        means = {name: float(np.mean(values)) for name, values in row["attacks"].items()}
        noise = means.get("random", np.inf)
        lame = [k for k in FAMILIES["learned"] if k in means and means[k] > noise + 0.02 * abs(noise)]
        if lame:
            flags.append(
                f"{row['name']}: trained attackers do less harm than random noise ({', '.join(lame)}); give them more "
                "steps before their figures are believed"
            )
    if n_seeds == 1:
        flags.append("one training of each policy: differences between rows may be luck; take several seeds")
    return flags
