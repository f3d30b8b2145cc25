"""The page of an evaluation: how often the concept comes back, what the erasure cost, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffusion_unlearn.evaluation import ErasureReport
from diffusion_unlearn.showing import HIDDEN, Cell, Shown
from robust_core.evaluation import plots
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.sections.base import (
    Section,
    Table,
    interval_text,
    number,
    percent,
    plot_of,
    points,
    points_interval,
)

__all__ = ["render"]

_TEXTS = 12
"""Texts of one attack on the page."""
_CLASSES = 20
"""Classes in the plot."""
WIDTH = 160
_THREATS = {
    "prompt": "writes the prompt, the seed stays",
    "seed": "draws the same prompt from other noise",
    "embedding": "reaches behind the tokenizer, which no prompt can: a stronger threat, never counted with the others",
}


def render(report: ErasureReport) -> str:
    """Return the page."""
    d = report.document
    retain = d["details"]["retain"]
    beside = "" if retain is None else f" · {retain['n']:,} prompts that should have stayed"
    texts = f" of {d['details']['texts']:,} texts" if d["details"]["texts"] < d["n"] else ""
    sections = [_rates(report), _pictures(report), _cost(report), _texts(report)]
    return Page(
        title=f"{d['model']}: {d['data']} after its erasure",
        lead=f"{d['n']:,} prompts{texts}{beside} · {_judge(d['details']['judge'])} · {d['details']['steps']} steps · "
        f"seed {d['seed']} · {d['device']}",
        intro=_intro(d["threat"]),
        cards=_cards(report),
        flags=d["flags"],
        clear="Checked: prompts enough for the intervals, none in both sets; the judge sees the concept before the "
        "erasure; the pipelines differ; no safety checker stands between pictures and judge; no attack does worse than "
        "random tokens.",
        note="Brackets are exact 95 % intervals of shares and what was lost of them, Student intervals of means, over "
        "prompts as independent draws (many seeds of few texts are fewer); erasing with another seed is not in them.",
        sections=[section for section in sections if section is not None],
        provenance=_provenance(report),
        command=d["command"],
        tables=[(f"All {len(d['figures'])} figures, and who measured them", _all(report))],
    ).html()


def _intro(threat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(entry["threat"] for entry in threat.values())
    if not kinds:
        return []
    told = [f"one who {_THREATS[kind]}" for kind in kinds]
    return [f"Threat: {'; '.join(told)}. The attacker knows the erased model and its weights."]


def _judge(facts: Mapping[str, Any]) -> str:
    return f"judge {facts['name']} {facts['version']}, threshold {facts['threshold']:g}"


def _has(report: ErasureReport, name: str) -> bool:
    return name in report.document["figures"]


def _cards(report: ErasureReport) -> list[Card]:
    cards = [_card(report, "pre_asr", "pre-ASR: of the prompts as they are")]
    if _has(report, "asr"):
        n = sum(label.startswith("asr/") for label in report.document["figures"])
        cards.append(_card(report, "asr", f"ASR: all {n} attacks together" if n > 1 else "ASR: under attack"))
    else:
        cards.append(Card("ASR: under attack", "", how="add attacks"))
    if _has(report, "retention/after"):
        before = f", {percent(report['retention/before'].value)} before" if _has(report, "retention/before") else ""
        rate = report["retention/after"]
        cards.append(Card(f"of other concepts still drawn{before}", percent(rate.value), interval_text(rate)))
    else:
        cards.append(Card("of other concepts still drawn", "", how="give retained prompts with labels"))
    if _has(report, "frechet"):
        again = report["frechet/original"].value
        cards.append(
            Card(
                "Fréchet distance, erased",
                number(report["frechet"].value),
                f"of the original itself: {number(again)}",
            )
        )
    elif _has(report, "clip/after"):
        score = report["clip/after"]
        cards.append(Card("CLIP score after", number(score.value), interval_text(score, share=False)))
    return cards


def _card(report: ErasureReport, name: str, label: str) -> Card:
    return Card(label, percent(report[name].value), interval_text(report[name]))


def _rows(report: ErasureReport) -> list[tuple[str, str, Estimate]]:
    """Return (label, threat, rate) of everything that says how often the concept is seen."""
    found = [("before the erasure", "", report["before"])] if _has(report, "before") else []
    found.append(("after it, prompts as they are", "", report["pre_asr"]))
    for label, entry in report.document["threat"].items():
        name = f"embedding/{label}" if entry["threat"] == "embedding" else f"asr/{label}"
        found.append((label, entry["threat"], report[name]))
    if _has(report, "asr"):
        found.append(("all by prompt or seed", "", report["asr"]))
    return found


def _rates(report: ErasureReport) -> Section:
    rows = _rows(report)
    d = report.document
    how = _told(d["figures"]["pre_asr"]["about"])
    alt = "; ".join(f"{label}: {percent(rate.value)}" for label, _, rate in rows)
    caption = "Prompts that need no attack count in every bar after the erasure."
    cells = [
        [f"{label} ({threat})" if threat else label, percent(rate.value), interval_text(rate), f"{rate.n:,}"]
        for label, threat, rate in rows
    ]
    text = (
        "A prompt is broken where the judge sees the concept in its picture. The strongest attack is a lower bound of "
        "what a better attacker reaches; the headline is the union over all attacks, prompt by prompt."
    )
    header = ["pictures", "seen in", "95 % interval", "n"]
    return Section(
        "How often the concept comes back",
        [text],
        [plot_of(_bars([(label, rate) for label, _, rate in rows]), f"{alt}.", "rates", "bars", caption)],
        table=Table(header, cells, numeric=(1, 2, 3)),
        notes=[f"The judge: {d['details']['judge']['rule']}. {how}."],
    )


def _bars(rows: Sequence[tuple[str, Estimate]]) -> Figure:
    figure, axes = plots.canvas(5.0, 0.8 + 0.34 * len(rows))
    for place, (label, rate) in enumerate(reversed(rows)):
        low, high = rate.interval or (rate.value, rate.value)
        colour = plots.SERIES[0 if label.startswith(("before", "after")) else 1][0]
        axes.barh([place], [rate.value], height=0.6, color=colour, alpha=0.75)
        axes.errorbar([rate.value], [place], xerr=[[rate.value - low], [high - rate.value]], fmt="none",
                      ecolor=plots.MUTED, capsize=2)  # fmt: skip
    axes.set_yticks(range(len(rows)), [label[:32] for label, _ in reversed(rows)])
    axes.grid(visible=False, axis="y")
    plots.percent_axis(axes, x=True, y=False)
    axes.set_xlabel("prompts that show the concept")
    return figure


def _pictures(report: ErasureReport) -> Section | None:
    rows = [row for row in report.shown if not row.retained]
    if not rows:
        return None
    hidden = report.document["details"]["hidden"]
    text = "Prompts at even distances in their file, not chosen by how they look."
    if hidden:
        text += f" {hidden} pictures on this page are hidden, because the judge sees the concept in them."
    return Section(
        "Before, after, under attack",
        ["The same prompt and seed throughout, but for what an attack changed; its text stands below."],
        examples=[_strip(row) for row in rows],
        examples_text=text,
        examples_title="How it looks",
    )


def _strip(row: Shown) -> dict[str, Any]:
    caption = f"{row.prompt} (seed {row.seed})"
    if row.found:
        caption += f" → {row.found}"
    return {"images": [_image(row, cell) for cell in row.cells], "caption": caption}


def _image(row: Shown, cell: Cell) -> dict[str, Any]:
    seen = "seen" if cell.seen else "not seen"
    if cell.image is None:
        pixels = _blank(striped=cell.note == HIDDEN)
        label = f"{cell.title}: {cell.note}"
        alt = f"{cell.title}, no picture: {cell.note}; concept {seen}"
    else:
        pixels = cell.image
        label = f"{cell.title}" if row.retained else f"{cell.title}: {seen}"
        alt = f"{cell.title}, drawn from: {row.prompt}; concept {seen}"
    height, width = pixels.shape[1:]
    return {
        "src": plots.png_data_url(pixels),
        "alt": alt,
        "width": WIDTH,
        "height": WIDTH * height // width,
        "label": label,
    }


def _blank(*, striped: bool) -> np.ndarray:
    """Return a grey picture; diagonal stripes where one is hidden."""
    rows, columns = np.indices((24, 24))
    stripes = ((rows + columns) // 4) % 2
    return np.where(stripes, 0.62, 0.72)[None] if striped else np.full((1, 24, 24), 0.8)


def _cost(report: ErasureReport) -> Section | None:
    rows, notes = [], {}
    for name, label, share in (("retention", "other concepts drawn", True), ("clip", "CLIP score", False)):
        for side in ("before", "after", "lost"):
            key = f"{name}/{side}"
            if not _has(report, key):
                continue
            e = report[key]
            if not share:
                value, interval = number(e.value), interval_text(e, share=False)
            elif side == "lost":
                value, interval = points(e), points_interval(e)
            else:
                value, interval = percent(e.value), interval_text(e)
            title = f"{label}, lost (paired)" if side == "lost" else f"{label}, {side}"
            rows.append([title, value, interval, f"{e.n:,}"])
            notes[_told(_about(report, key))] = label
    for key, label in (
        ("frechet", "Fréchet distance, erased"),
        ("frechet/original", "Fréchet distance, original"),
    ):
        if _has(report, key):
            rows.append([label, number(report[key].value), "", f"{report[key].n:,}"])
            notes[_told(_about(report, key))] = "Fréchet distance"
    shown = [_strip(row) for row in report.shown if row.retained]
    if not rows and not shown:
        return None
    text = ["Prompts that should not have changed, with the same seeds before and after."]
    if _has(report, "frechet"):
        text.append(
            "Fréchet distances are to pictures that the original draws with other seeds. Of finitely many pictures "
            "they are above 0 even where nothing changed: compare the two, never those of other numbers of pictures."
        )
    return Section(
        "What the erasure cost",
        text,
        [plot] if (plot := _classes(report)) is not None else [],
        table=Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3)) if rows else None,
        notes=[f"{label[0].upper()}{label[1:]}: {told}." for told, label in notes.items()],
        examples=shown,
        examples_title="Prompts that should have stayed",
        examples_text="At even distances in their file.",
    )


def _classes(report: ErasureReport) -> Any:
    """Return the plot of retention class by class, the worst first, or None."""
    prefix = "retention/after/class "
    labels = [name.removeprefix(prefix) for name in report.document["figures"] if name.startswith(prefix)]
    if len(labels) < 2:
        return None
    worst = sorted(labels, key=lambda label: report[f"{prefix}{label}"].value)[:_CLASSES]
    figure, axes = plots.canvas(5.0, 0.8 + 0.26 * len(worst))
    for place, label in enumerate(reversed(worst)):
        rate = report[f"{prefix}{label}"]
        low, high = rate.interval or (rate.value, rate.value)
        axes.errorbar([rate.value], [place], xerr=[[rate.value - low], [high - rate.value]], fmt="o",
                      color=plots.SERIES[1][0], markersize=5, label="after" if not place else None)  # fmt: skip
        if _has(report, before := f"retention/before/class {label}"):
            axes.plot([report[before].value], [place], "D", color=plots.SERIES[0][0], markersize=4, fillstyle="none",
                      label="before" if not place else None)  # fmt: skip
    axes.set_yticks(range(len(worst)), [f"class {label}" for label in reversed(worst)])
    plots.percent_axis(axes, x=True, y=False)
    axes.set_xlabel("pictures in which the class is seen")
    plots.legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncol=2)
    alt = "; ".join(f"class {label}: {percent(report[f'{prefix}{label}'].value)}" for label in worst)
    caption = "Worst first: what is like the erased concept suffers first."
    return plot_of(figure, f"After the erasure, {alt}.", "cost", "classes", caption)


def _texts(report: ErasureReport) -> Section | None:
    if report.attack is None:
        return None
    rows = []
    for label, found in report.attack.found.items():
        if report.document["threat"][label]["threat"] == "embedding":
            continue
        won = [(i, one) for i, one in enumerate(found) if one is not None and one.success]
        rows += [[label, report.attack.tries[i].text, one.text, str(one.seed)] for i, one in won[:_TEXTS]]
    if not rows:
        return None
    header = ["attack", "prompt", "text that brought it back", "seed"]
    text = "All of them stand in attack/found.csv, as a file of prompts."
    return Section("What brought it back", [text], table=Table(header, rows, numeric=(3,)))


def _about(report: ErasureReport, name: str) -> Mapping[str, Any]:
    return report.document["figures"][name]["about"]


def _told(about: Mapping[str, Any]) -> str:
    threshold = "" if about["threshold"] is None else f", threshold {about['threshold']:g}"
    more = "".join(f", {key} {about[key]}" for key in ("convention", "dimension") if key in about)
    return (
        f"{about['detector']} {about['version']}{threshold}{more}; seed {about['seed']}, {about['steps']} steps, "
        f"guidance {about['guidance']:g} where a prompt has none of its own"
    )


def _all(report: ErasureReport) -> Table:
    rows = []
    for name in report.document["figures"]:
        e = report[name]
        rows.append([name, number(e.value), interval_text(e, share=False), f"{e.n:,}", _told(_about(report, name))])
    return Table(["figure", "value", "95 % interval", "n", "measured by"], rows, numeric=(1, 2, 3))


def _provenance(report: ErasureReport) -> list[tuple[str, str]]:
    d = report.document
    details, retain = d["details"], d["details"]["retain"]
    original = details["original_sha256"]
    rows = [
        ("erased pipeline", f"{d['model']}, SHA-256 {d['model_sha256'][:16]}…"),
        ("original", "none" if original is None else f"SHA-256 {original[:16]}…"),
        ("prompts", f"{d['data']}, {d['n']:,}, SHA-256 {d['data_sha256'][:16]}…"),
        (
            "should have stayed",
            "none" if retain is None else f"{retain['name']}, {retain['n']:,}, SHA-256 {retain['sha256'][:16]}…",
        ),
        ("judge", f"{_judge(details['judge'])}: {details['judge']['rule']}"),
        ("sampler", f"{details['steps']} steps, guidance {details['guidance']:g} where a prompt has none of its own"),
        ("seed", f"{d['seed']} for attacks; pictures have the seeds of their prompts"),
    ]
    for label, entry in d["threat"].items():
        settings = ", ".join(
            f"{k} {v}" for k, v in entry.items() if k not in ("kind", "threat", "table") and v is not None
        )
        rows.append((f"attack {label}", f"{entry['kind']}: {settings}"))
    return [
        *rows,
        ("device", d["device"]),
        ("time", f"{d['seconds']:,.1f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", "result.json (figures), per_sample.npz (every prompt), attack/ (every text); no pictures but these"),
    ]
