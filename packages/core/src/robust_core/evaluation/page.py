"""The page of an evaluation: made from the result document and the per-sample arrays alone.

A report read from disk therefore gives the page it was saved with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from robust_core.evaluation import sections as build
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections import Section, Table, interval_text, number, percent

__all__ = ["render"]

_HOW = {
    "clean": "add Clean()",
    "adversarial": "add Adversarial(threat)",
    "corruptions": "add Corruptions()",
    "shift": "add Shift(…, baseline=…)",
    "calibration": "add Calibration()",
}
_BUILDERS: dict[str, Callable[[Report, dict[str, Any]], Section]] = {
    "clean": build.clean,
    "adversarial": build.adversarial,
    "security-curve": build.security_curve,
    "certified": build.certified,
    "corruptions": build.corruptions,
    "calibration": build.calibration,
    "shift": build.shift,
    "open-set": build.open_set,
    "translation": build.translation,
}


def render(report: Report, beside: Sequence[Report] = ()) -> str:
    """Return the page of ``report``, with a section that shows it beside other reports."""
    document = report.document
    sections = _sections(report)
    if beside:
        sections.insert(0, build.beside(report, beside))
    comparisons = build.invariant(report)
    if comparisons is not None:
        sections.append(comparisons)
    title = f"{document['model']} on {document['data']}"
    threat = build.threat_text(document["threat"])
    return Page(
        title=title,
        lead=_lead(document),
        intro=[threat] if threat else [],
        cards=_cards(report),
        cards_title="The five numbers",
        flags=document["flags"],
        clear=_clear_text(report),
        note=(
            "Brackets are exact 95 % intervals for shares (Clopper–Pearson) and Student intervals for means: how far "
            f"the figure could be off because only {document['n']:,} samples were measured. They say nothing about "
            "training the model again."
        ),
        sections=sections,
        provenance=_provenance(report),
        command=document["command"],
        tables=[
            ("Settings of every part", _settings(report)),
            (f"All {len(document['figures'])} figures", _all_figures(report)),
        ],
    ).html()


def _lead(document: dict[str, Any]) -> str:
    parameters, details = document["details"]["cost"]["parameters"], document["details"]
    size = [f"{parameters:,} parameters"] if parameters else []
    facts = [f"{document['n']:,} samples", f"{details['n_classes']} classes", *size, f"seed {document['seed']}"]
    return " · ".join([*facts, document["device"]])


def _sections(report: Report) -> list[Section]:
    """One for each part; several certificates share theirs, where the first of them would stand."""
    kinds = [part["kind"] for part in report.parts()]
    together = kinds.count("certified") > 1 or "not-certified" in kinds
    sections, shown = [], False
    for part in report.parts():
        if together and part["kind"] in ("certified", "not-certified"):
            sections += [] if shown else [build.guarantees(report)]
            shown = True
        else:
            sections.append(_BUILDERS.get(part["kind"], build.other)(report, part))
    return sections


def _cards(report: Report) -> list[Card]:
    cards = []
    for label, name, kind in report.headline():
        if name is None:
            cards.append(Card(label, "", how=_HOW[kind]))
            continue
        estimate = report[name]
        value, spread = percent(estimate.value), interval_text(estimate)
        if kind == "shift":
            value, spread = build.points(estimate), build.points_interval(estimate)
        if kind == "calibration":
            floor = report.figures.get(name.rpartition("/")[0] + "/ece_if_calibrated")
            spread = "" if floor is None else f"{percent(floor.value)} would be chance alone"
        if estimate.n != report.document["n"]:
            spread = f"{spread} n = {estimate.n:,}".strip()
        cards.append(Card(label, value, spread))
    return cards


def _clear_text(report: Report) -> str:
    done = ["eval mode", "rows independent of the batch", "logits rather than probabilities", "an input gradient"]
    if any("sanity" in part["data"] for part in report.parts("adversarial")):
        done.append("gradients, randomness, and weaker attacks that must not beat stronger ones")
    if report.parts("security-curve"):
        done.append("a security curve that comes down to nothing")
    if report.comparisons():
        done.append("no certificate broken by an attack")
    return f"Checked: {', '.join(done)}."


def _provenance(report: Report) -> list[tuple[str, str]]:
    d, details = report.document, report.document["details"]
    rows = [
        ("model", f"{d['model']}, SHA-256 {d['model_sha256'][:16]}…"),
        ("data", f"{d['data']}, SHA-256 {d['data_sha256'][:16]}…"),
        ("preprocessing", details["preprocessing"] or "none stated"),
        ("input", f"{' × '.join(map(str, details['input_shape']))}, before normalisation"),
        ("cost", _cost(details["cost"])),
        ("seed", f"{d['seed']}: streams belong to samples, figures do not depend on the batch size"),
        ("device", d["device"]),
        ("time", f"{d['seconds']:,.1f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", "result.json (all figures), per_sample.npz (every sample, for paired tests)"),
    ]
    return [*rows, *(("note", note) for note in details["notes"])]


def _cost(cost: dict[str, Any]) -> str:
    flops = "" if cost["flops"] is None else f"{number(cost['flops'] / 1e6)} million operations for a sample, "
    return f"{cost['parameters']:,} parameters, {flops}{number(cost['forward_ms'])} ms for {cost['rows']} samples"


def _settings(report: Report) -> Table:
    rows = [
        [p["name"], p["kind"], f"{p['n']:,}", f"{p['seconds']:.1f} s", _flat(p["settings"])] for p in report.parts()
    ]
    return Table(["part", "kind", "n", "time", "settings"], rows, numeric=(2, 3))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("type", "")
        inner = ", ".join(f"{k}={_flat(v)}" for k, v in value.items() if k != "type" and v is not None)
        return f"{kind}({inner})" if kind else inner
    if isinstance(value, list):
        return f"[{', '.join(map(_flat, value[:12]))}{', …' if len(value) > 12 else ''}]"
    return number(value) if isinstance(value, float) else str(value)[:120]


def _all_figures(report: Report) -> Table:
    rows = [
        [name, "–" if math.isnan(e.value) else number(e.value), interval_text(e, share=False), f"{e.n:,}"]
        for name, e in report.figures.items()
    ]
    return Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3))
