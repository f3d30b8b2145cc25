"""The page of a comparison of policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_robust import plots
from rl_robust.comparison import CERTIFIED, EPISODE, NATURAL, WORST, Comparison
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Plot, Section, Table, number, plot_of

__all__ = ["render"]


def render(found: Comparison) -> str:
    """Return the page."""
    d = found.document
    details = d["details"]
    seeds = details["training_seeds"]
    trained = f"{seeds} trainings of each" if seeds > 1 else "one training of each"
    return Page(
        title=f"{len(d['rows'])} policies on {d['data']}",
        lead=f"{trained} · {d['n']:,} episodes for each attack · {details['tried']} attacks · seed {d['seed']}",
        intro=_threats(d),
        cards=_cards(d),
        cards_title="Return in peace and under the worst attack",
        flags=d["flags"],
        clear="Budgets are kept by the engine; no attack with the budget of an episode is worse than a certificate.",
        note=f"± is half of the 95 % Student interval {details['intervals']}. Attacks give upper bounds of what a "
        "better attacker would leave; certificates give lower bounds.",
        sections=[s for s in (_table(found), _returns(found), _certificates(found)) if s is not None],
        provenance=_provenance(d),
        command=d["command"],
        tables=[("Every attack, every training", _all(d))],
    ).html()


def _threats(d: Mapping[str, Any]) -> list[str]:
    step, episode = d["threat"]["step"], d["threat"]["episode"]
    told = [
        f"Per step: someone changes every observation, each by {step['norm']} of at most {step['eps']:g}, and knows "
        "the policy. Only attacks speak of this threat; nothing is certified for it."
    ]
    if episode is not None:
        told.append(
            f"Per episode: the changes of a whole episode have together a Euclidean length of at most "
            f"{episode['eps']:g}. Attacks and, for policies that are played under noise, a certificate speak of it. "
            "This is another threat, not a stricter or laxer form of the first."
        )
    return told


def _cards(d: Mapping[str, Any]) -> list[Card]:
    cards = []
    for row in d["rows"][:6]:
        worst = row["cells"].get(WORST)
        spread = "" if worst is None else f"{number(worst['value'])} under the worst attack of a step"
        cards.append(Card(f"{row['name']}: natural", number(row["cells"][NATURAL]["value"]), spread))
    return cards


def _short(d: Mapping[str, Any]) -> list[str]:
    """Return short headers: which threat each column is of; the caption says how large."""
    episode = {EPISODE: "worst · episode", CERTIFIED: "certified · episode"}
    return [column if column == NATURAL else episode.get(column, f"{column} · step") for column in d["columns"]]


def _units(d: Mapping[str, Any]) -> str:
    step, episode = d["threat"]["step"], d["threat"]["episode"]
    told = f"step: {step['norm']} of at most {step['eps']:g} in every step"
    length = "" if episode is None else f"; episode: L2 of at most {episode['eps']:g} for the whole episode"
    return f"{told}{length}, in units of what the policy is shown."


def _table(found: Comparison) -> Section:
    d = found.document
    rows = [[row["name"], *found.cells(row)] for row in d["rows"]]
    notes = [
        f"{row['name']}: a bandit picks one of {max(row['policies'])} policies for each episode and learns from the "
        f"{d['n']} episodes of each column alone; each member is attacked by who was trained against it."
        for row in d["rows"]
        if row["method"] == "non-dominated"
    ]
    steps = "; ".join(f"{row['name']} {max(row['environment_steps']):,}" for row in d["rows"]
                      if row["environment_steps"][0] is not None)  # fmt: skip
    if steps:
        notes.append(f"Environment steps of one training, those of attackers included: {steps}.")
    families = {
        "MAD": "MAD is maximal action difference",
        "RS": "RS is robust Sarsa, with and without MAD",
        "learned": f"learned are SA-RL and PA-AD, each trained for {d['details']['attack_steps']:,} steps",
    }
    told = "; ".join(text for family, text in families.items() if family in d["columns"])
    text = f"Mean return of an episode. Each attack plays the same episodes; of a family the worst counts. {told}."
    table = Table(["policy", *_short(d)], rows, _units(d), numeric=tuple(range(1, len(rows[0]))))
    return Section("The table", [text], table=table, notes=notes)


def _returns(found: Comparison) -> Section:
    shown: list[Plot] = []
    everything = np.concatenate([v for k, v in found.arrays.items() if k.endswith("/returns")])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.03 * (high - low) + 1e-9
    for row in found.document["rows"]:
        labels = [NATURAL, *(name for name in row["attacks"] if not name.startswith("episode-"))]
        samples = {label: _pooled(found, row["name"], f"{label}/returns") for label in labels}
        figure = plots.returns_plot({label: sample for label, sample in samples.items() if len(sample)})
        figure.axes[0].set_xlim(low - margin, high + margin)
        alt = "; ".join(f"{label}: mean {number(float(s.mean()))}" for label, s in samples.items() if len(s))
        shown.append(plot_of(figure, f"{row['name']}: {alt}.", "returns", row["name"], f"{row['name']}."))
    text = (
        "How many episodes bring at least a return, in peace and under each attack of a step, all trainings together."
    )
    return Section("Return distributions", [text], shown)


def _pooled(found: Comparison, name: str, part: str) -> np.ndarray:
    kept = [v for k, v in found.arrays.items() if k.startswith(f"{name}/") and k.split("/", 2)[2] == part]
    return np.concatenate(kept) if kept else np.empty(0)


def _certificates(found: Comparison) -> Section | None:
    shown, episode = [], found.document["threat"]["episode"]
    for row in found.document["rows"]:
        eps = found.arrays.get(f"{row['name']}/0/certificate/eps")
        if eps is None or CERTIFIED not in row["cells"]:
            continue
        seeds = range(len(row["cells"][CERTIFIED]["per_seed"]))
        bound = np.mean([found.arrays[f"{row['name']}/{k}/certificate/return"] for k in seeds], axis=0)
        attacked = []
        if EPISODE in row["cells"]:
            cell = row["cells"][EPISODE]
            attacked = [("worst attack found", episode["eps"], cell["value"], cell["interval"])]
        figure = plots.certificate_plot(eps, bound, attacked)
        alt = "; ".join(f"{number(float(value))} at {radius:g}" for radius, value in zip(eps, bound, strict=True))
        told = f"{row['name']}, noise {row['sigma']:g}" + (", mean over trainings." if len(seeds) > 1 else ".")
        shown.append(plot_of(figure, f"{row['name']}: certified {alt}.", "certificate", row["name"], told))
    if not shown:
        return None
    d = found.document["details"]
    text = (
        f"With confidence {1 - d['alpha']:g} for each training, the expected return under noise is at least this, "
        "against every attacker whose changes of an episode have the Euclidean length on the axis, however they adapt; "
        f"from {d['certificate_episodes']:,} fresh episodes that no attack has seen."
    )
    return Section("Certificates", [text], shown)


def _provenance(d: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = [(row["name"], f"{row['method']}, noise {row['sigma']:g}, SHA-256 {row['model_sha256'][0][0][:16]}…")
            for row in d["rows"]]  # fmt: skip
    return [
        *told,
        ("environment", d["details"]["task"]),
        ("seed", f"{d['seed']}: of episodes and attackers; every policy plays the same episodes"),
        ("time", f"{d['seconds']:,.1f} s for attacks and certificates"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", "result.json (all figures), per_episode.npz (every episode, for paired tests)"),
    ]


def _all(d: Mapping[str, Any]) -> Table:
    seeds = d["details"]["training_seeds"]
    rows = [
        [row["name"], name, *(number(value) for value in values), *("–" for _ in range(seeds - len(values)))]
        for row in d["rows"]
        for name, values in ((NATURAL, row["cells"][NATURAL]["per_seed"]), *row["attacks"].items())
    ]
    header = ["policy", "attack", *(f"seed {k}" for k in range(seeds))]
    return Table(header, rows, numeric=tuple(range(2, 2 + seeds)))
