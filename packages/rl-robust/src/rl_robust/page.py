"""The page of a policy's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_robust import plots
from rl_robust.evaluation import PolicyReport
from rl_robust.returns import Trace
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.plots import png_data_url
from robust_core.evaluation.sections.base import Section, Table, interval_text, number, plot_of

__all__ = ["render"]

STRIP = 6
"""Images of one episode on the page."""


def render(report: PolicyReport) -> str:
    """Return the page."""
    d = report.document
    return Page(
        title=f"{d['model']} on {d['data']}",
        lead=f"{d['n']:,} episodes · noise {d['details']['sigma']:g} · seed {d['seed']} · {d['device']}",
        intro=_threats(d["threat"]),
        cards=_cards(report),
        flags=d["flags"],
        clear="Checked: observations, actions and rewards finite and inside their spaces; budgets kept by the engine"
        + ("; no attack does worse than the certificate." if d["details"]["certificate"] else "."),
        note="Brackets are 95 % Student intervals of the mean over episodes. They say nothing about training again.",
        sections=[section for section in (_returns(report), _certificate(report), _traces(report)) if section],
        provenance=_provenance(d),
        command=d["command"],
        tables=[(f"All {len(d['figures'])} figures", _all(d["figures"], report))],
    ).html()


def _threats(threat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    kinds = dict.fromkeys((t["norm"], t["eps"], t["per"]) for t in threat.values())
    told = [f"{norm} of at most {eps:g} for every {per}" for norm, eps, per in kinds]
    if not told:
        return []
    return [f"Threat: someone changes what the policy observes, by {'; or '.join(told)}. The policy is known to them."]


def _cards(report: PolicyReport) -> list[Card]:
    figures = report.document["figures"]
    cards = [_card("return in peace", report["clean/return"])]
    if "worst/return" in figures:
        tried = int(report["worst/tried"].value)
        cards.append(_card(f"under the worst of {tried} attacks", report["worst/return"]))
    else:
        cards.append(Card("under attack", "", how="add attacks"))
    certified = [name for name in figures if name.startswith("certified/return@")]
    for name in certified[1:4]:
        eps = name.rpartition("@")[2]
        cards.append(Card(f"certified for a budget of {eps}", number(report[name].value), "whatever the attack"))
    if not certified:
        cards.append(Card("certified return", "", how="add certify="))
    return cards


def _card(label: str, estimate: Estimate) -> Card:
    return Card(label, number(estimate.value), interval_text(estimate, share=False))


def _labels(report: PolicyReport) -> list[str]:
    return [name.removesuffix("/returns") for name in report.arrays if name.endswith("/returns")]


def _returns(report: PolicyReport) -> Section:
    labels = _labels(report)
    figure = plots.returns_plot({label: report.arrays[f"{label}/returns"] for label in labels})
    rows = []
    for label in labels:
        e, low = report[f"{label}/return"], report[f"{label}/return_p10"]
        lost = "–" if label == "clean" else number(report[f"{label}/lost"].value)
        spread, length = interval_text(e, share=False), report[f"{label}/length"].value
        rows.append([label, number(e.value), spread, number(low.value), lost, number(length)])
    header = ["attack", "mean return", "95 % interval", "worst tenth", "lost", "mean length"]
    alt = "; ".join(f"{row[0]}: mean return {row[1]}" for row in rows)
    text = (
        "Every attack plays the same episodes with the same noise. A curve to the left is a worse attack: the worst "
        "one found is an upper bound of what a better attacker would leave."
    )
    caption = "How many episodes bring at least a return."
    return Section(
        "Returns",
        [text],
        [plot_of(figure, f"{alt}.", "returns", "curves", caption)],
        Table(header, rows, numeric=(1, 2, 3, 4, 5)),
    )


def _certificate(report: PolicyReport) -> Section | None:
    about = report.document["details"]["certificate"]
    if about is None:
        return None
    eps, bound = report.arrays["certificate/eps"], report.arrays["certificate/return"]
    attacked = []
    for label, threat in report.document["threat"].items():
        if threat["per"] == "episode":
            e = report[f"{label}/return"]
            attacked.append((label, threat["eps"], e.value, e.interval))
    figure = plots.certificate_plot(eps, bound, attacked)
    rows = [[f"{radius:g}", number(float(value))] for radius, value in zip(eps, bound, strict=True)]
    text = (
        f"With confidence {1 - about['alpha']:g} the expected return of the policy under noise {about['sigma']:g} is "
        "at least this, against every attacker of observations whose changes of an episode have the Euclidean length "
        f"on the axis, however they adapt. From {about['n']:,} fresh episodes ({about['method']}); returns are at "
        f"least {about['lower']:g}."
    )
    alt = "; ".join(f"{row[1]} at {row[0]}" for row in rows)
    plot = plot_of(figure, f"Certified return: {alt}.", "certificate", "curve", "One curve, one confidence statement.")
    return Section("Certified return", [text], [plot], Table(["budget", "certified return"], rows, numeric=(0, 1)))


def _traces(report: PolicyReport) -> Section | None:
    first = {label: traces[0] for label, traces in report.traces.items() if traces}
    if not first:
        return None
    figure = plots.trace_plot(first)
    alt = "; ".join(
        f"{label}: {len(t.reward)} steps, return {number(float(t.reward.sum()))}" for label, t in first.items()
    )
    plot = plot_of(figure, f"{alt}.", "traces", "reward", "The same episode; dots grow with what the attack spent.")
    return Section(
        "One episode, step by step",
        ["What one and the same episode becomes under each attack."],
        [plot],
        examples=[strip for label, trace in first.items() if (strip := _strip(label, trace))],
        examples_text="Evenly spaced moments of the episode.",
        examples_title="As it looked",
    )


def _strip(label: str, trace: Trace) -> dict[str, Any] | None:
    if not trace.frames:
        return None
    chosen = np.unique(np.linspace(0, len(trace.frames) - 1, STRIP).round().astype(int))
    images = []
    for k in chosen:
        frame = trace.frames[k]
        step = max(1, max(frame.shape[:2]) // 200)
        image = frame[::step, ::step].astype(np.float32).transpose(2, 0, 1) / 255
        height, width = image.shape[1:]
        images.append(
            {
                "src": png_data_url(image),
                "alt": f"{label}, step {k}",
                "width": min(160, width),
                "height": min(160, width) * height // width,
                "label": f"step {k}",
            }
        )
    return {"images": images, "caption": f"{label}: return {number(float(trace.reward.sum()))}"}


def _provenance(d: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("policy", f"{d['model']}, SHA-256 {d['model_sha256'][:16]}…"),
        ("environment", d["details"]["task"]),
        ("attacks", "; ".join(f"{name}: {what}" for name, what in d["details"]["attacks"].items()) or "none"),
        ("seed", f"{d['seed']}: streams belong to episodes, figures do not depend on how many run side by side"),
        ("device", d["device"]),
        ("time", f"{d['seconds']:,.1f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", "result.json (all figures), per_episode.npz (every episode, for paired tests)"),
    ]


def _all(figures: Mapping[str, Any], report: PolicyReport) -> Table:
    rows = [
        [name, number(report[name].value), interval_text(report[name], share=False), f"{report[name].n:,}"]
        for name in figures
    ]
    return Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3))
