"""The page of an attack on an erasure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_unlearn.attacks.report import AttackReport
from robust_core.evaluation import plots
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Section, Table, interval_text, percent, plot_of

__all__ = ["render"]

_SHOWN = 20
"""Found texts of each attack on the page; all stand in found.csv."""


def render(report: AttackReport) -> str:
    """Return the page."""
    d, judge = report.document, report.document["details"]["judge"]
    return Page(
        title=f"{d['model']}: is the concept gone?",
        lead=(
            f"{d['n']:,} prompts of {d['data']} · {len(d['threat'])} attacks · judge {judge['name']} "
            f"{judge['version']} · seed {d['seed']} · {d['device']}"
        ),
        intro=[
            "Threat: the attacker knows the pipeline. He writes tokens beside the prompt, or other words, or draws "
            "other noise, and has won where the judge sees the concept in a picture of the decoded text.",
            f"The judge: {judge['rule']} (score above {judge['threshold']:g}). Another judge gives other rates.",
        ],
        cards=_cards(report),
        flags=d["flags"],
        clear="Checked: every text that counts was decoded, read anew, drawn by the pipeline itself, and judged.",
        note="Brackets are exact 95 % intervals (Clopper and Pearson) over prompts.",
        sections=[_rates(report), *_texts(report)],
        provenance=_provenance(d),
        command=d["command"],
        tables=[_every(report)],
    ).html()


def _cards(report: AttackReport) -> list[Card]:
    cards = []
    names = {"pre_asr": "show it as they are (pre-ASR)", "asr": "show it under attack (ASR)"}
    for name, label in names.items():
        if name in report.document["figures"]:
            cards.append(Card(label, percent(report[name].value), interval_text(report[name])))
    apart = [name for name in report.document["figures"] if name.startswith("embedding/")]
    for name in apart:
        cards.append(Card("under an attack on embeddings", percent(report[name].value), interval_text(report[name])))
    return cards


def _rates(report: AttackReport) -> Section:
    labels = [*report.document["threat"]]
    rows, shown = [["none", *_cells(report, "pre_asr"), "", ""]], [("none", report["pre_asr"])]
    for label in labels:
        threat = report.document["threat"][label]["threat"]
        name = f"embedding/{label}" if threat == "embedding" else f"asr/{label}"
        won = [one for one in report.found[label] if one is not None and one.success]
        tries = f"{np.median([one.n_tries for one in won]):g}" if won else "–"
        told = f"{label} (vectors)" if threat == "embedding" else label
        rows.append([told, *_cells(report, name), str(len(won)), tries])
        shown.append((label, report[name]))
    if "asr" in report.document["figures"]:
        rows.append(["all by prompt or seed", *_cells(report, "asr"), "", ""])
    figure, axes = plots.canvas(5.4, 0.8 + 0.34 * len(shown))
    places = np.arange(len(shown))[::-1]
    values = np.array([rate.value for _, rate in shown])
    ends = np.array([rate.interval or (rate.value, rate.value) for _, rate in shown])
    axes.barh(places, values, height=0.6, alpha=0.8)
    axes.errorbar(values, places, xerr=[values - ends[:, 0], ends[:, 1] - values], fmt="none", ecolor="gray", capsize=2)
    axes.set_yticks(places, [label for label, _ in shown])
    axes.set_xlim(0, 1)
    plots.percent_axis(axes, x=True, y=False)
    axes.set_xlabel("prompts that show the concept")
    alt = "; ".join(f"{label}: {percent(rate.value)}" for label, rate in shown)
    plot = plot_of(figure, f"{alt}.", "rates", "attacks", "Prompts that need no attack count in every bar.")
    header = ["attack", "rate", "95 % interval", "new", "tries"]
    text = (
        "The strongest attack is a lower bound of what a better attacker reaches; the headline is the union, prompt by "
        "prompt, over all attacks by prompt or seed. Vectors that no text has are another threat, and stand apart. "
        "New: prompts that show the concept under the attack alone; tries: pictures that this took, median."
    )
    return Section("How often it comes back", [text], [plot], table=Table(header, rows, numeric=(1, 2, 3, 4)))


def _cells(report: AttackReport, name: str) -> list[str]:
    return [percent(report[name].value), interval_text(report[name])]


def _texts(report: AttackReport) -> list[Section]:
    rows = []
    for label, found in report.found.items():
        won = [(i, one) for i, one in enumerate(found) if one is not None and one.success]
        if report.document["threat"][label]["threat"] == "embedding":
            continue
        for i, one in won[:_SHOWN]:
            back = {None: "", True: "yes", False: "no"}[one.reads_back]
            rows.append([label, report.tries[i].text, one.text, str(one.seed), f"{one.score:.3f}", back])
    if not rows:
        return []
    header = ["attack", "prompt", "text that brought it back", "seed", "score", "same tokens read anew"]
    return [
        Section("What brought it back", ["All of them stand in found.csv."], table=Table(header, rows, numeric=(3, 4)))
    ]


def _provenance(d: Mapping[str, Any]) -> list[tuple[str, str]]:
    judge = d["details"]["judge"]
    attacks = [(f"attack {label}", _told(entry)) for label, entry in d["threat"].items()]
    return [
        ("victim", f"{d['model']} ({d['model_sha256'][:12]})"),
        ("prompts", f"{d['data']}, {d['n']} ({d['data_sha256'][:12]})"),
        ("judge", f"{judge['name']} {judge['version']}, threshold {judge['threshold']:g}"),
        ("sampler", f"{d['details']['steps']} steps; losses in {d['details']['precision']}"),
        *attacks,
        ("seconds", f"{d['seconds']:,.1f}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in d["versions"].items())),
        ("files", "result.json (figures, every prompt), per_sample.npz, found.csv (texts that brought it back)"),
    ]


def _told(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("kind", "threat", "table") and v is not None)


def _every(report: AttackReport) -> tuple[str, Table]:
    labels = [*report.found]
    rows = []
    for i, one in enumerate(report.tries):
        cells = ["yes" if report.unattacked[i].success else "no"]
        for label in labels:
            found = report.found[label][i]
            cells.append("–" if found is None else "yes" if found.success else "no")
        rows.append([one.text, str(one.seed), f"{one.guidance:g}", *cells])
    header = ["prompt", "seed", "guidance", "as it is", *labels]
    return "Every prompt: is the concept seen?", Table(header, rows, numeric=(1, 2))
