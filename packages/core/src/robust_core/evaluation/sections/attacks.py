"""Sections on attacks and certificates, and on the two beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.certified import certified_curve
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections.base import (
    Section,
    Table,
    class_name,
    interval_text,
    number,
    percent,
    plot_of,
    rows_of,
    table_of,
    title_of,
)

__all__ = ["adversarial", "certified", "invariant", "security_curve"]


def adversarial(report: Report, part: dict[str, Any]) -> Section:
    """Worst case over attacks."""
    name = part["name"]
    after = [k for k in report.document["figures"] if k.startswith(f"{name}/after/")]
    entries = [("before any attack", f"{name}/clean_accuracy")]
    entries += [(f"left after {k.rpartition('/')[2]}", k) for k in after]
    entries.append(("accuracy under attack", f"{name}/accuracy"))
    entries.append(("broken, of those right before", f"{name}/attack_success"))
    data = part["data"]
    text = (
        f"A sample counts only if every attack failed on it within {data['norm']} ≤ {data['eps_text']}. Attacks run "
        "one after the other, each on the samples that are left, so the rows can only fall. This is an upper bound: a "
        "better attacker may find more."
    )
    cost = data["cost"]
    spent = f"{cost['forwards_per_sample']:,.0f} forward and {cost['backwards_per_sample']:,.0f} backward passes"
    notes = [*part["notes"], f"Spent on each sample: {spent}."]
    sanity = data.get("sanity", {"figures": {}, "n": 0})
    doubts = [[k.replace("_", " "), "–" if v is None else number(v)] for k, v in sanity["figures"].items()]
    looked = Table(
        ["what was looked at", "figure"], doubts, f"Signs of a failed attack, on {sanity['n']} samples", (1,)
    )
    examples = _examples(report, name)
    return Section(
        title_of("Under attack", name, "adversarial"),
        [text],
        table=table_of(rows_of(report, entries)),
        more=[looked] if doubts else [],
        notes=notes,
        examples=examples,
        examples_text="Samples that were right until the attacker changed them. The third picture is the change alone, "
        "around mid-grey and enlarged as stated.",
    )


def _examples(report: Report, name: str) -> list[dict[str, Any]]:
    arrays = {k.removeprefix("examples/"): v for k, v in report.arrays(name).items() if k.startswith("examples/")}
    found = []
    needed = ("clean", "adversarial", "label", "prediction", "index")
    if any(key not in arrays for key in needed):
        return []
    for x, x_adv, label, prediction, index in zip(*(arrays[key] for key in needed), strict=True):
        if x.ndim != 3 or x.shape != x_adv.shape or x.shape[0] not in (1, 3):
            continue
        delta = x_adv.astype(np.float64) - x
        size = float(np.abs(delta).max())
        factor = max(1, int(0.5 / size)) if size > 0 else 1
        was, now = class_name(report, int(label)), class_name(report, int(prediction))
        shapes = {"width": x.shape[2], "height": x.shape[1]}
        images = [
            {"src": plots.png_data_url(x), "alt": f"Sample {int(index)}, class {was}", "label": f"clean: {was}"},
            {
                "src": plots.png_data_url(x_adv),
                "alt": f"The same after the attack, taken for {now}",
                "label": f"attacked: {now}",
            },
            {
                "src": plots.png_data_url(0.5 + factor * delta),
                "alt": f"The change, times {factor}",
                "label": f"change × {factor}",
            },
        ]
        caption = (
            f"sample {int(index)}: largest change {number(size)}, Euclidean {number(float(np.sqrt((delta**2).sum())))}"
        )
        found.append({"images": [{**image, **shapes} for image in images], "caption": caption})
    return found


def security_curve(report: Report, part: dict[str, Any]) -> Section:
    """Accuracy over the attacker's radius."""
    name, data = part["name"], part["data"]
    pairs = [
        (eps, report[f"{name}/eps={label}"], label) for eps, label in zip(data["grid"], data["labels"], strict=True)
    ]
    drawn = [(eps, e) for eps, e, _ in pairs if data["grey"] is None or eps < data["grey"] or len(pairs) < 4]
    marks = [
        (p["data"]["eps"], report[f"{p['name']}/accuracy"], f"all attacks, eps = {p['data']['eps_text']}")
        for p in report.parts("adversarial")
        if p["data"].get("norm") == data["norm"] and p["data"]["eps"] <= drawn[-1][0]
    ]
    unit = f"attacker's radius eps, {data['norm']}, in units of the input"
    figure = plots.security_curve_plot([eps for eps, _ in drawn], [e for _, e in drawn], unit=unit, marks=marks)
    steps = "; ".join(f"{percent(e.value)} at {label}" for _, e, label in pairs)
    last = pairs[-1]
    text = (
        "How fast accuracy falls as the attacker gets more room. A trustworthy attack brings it down to nothing: at "
        f"the last radius ({last[2]}) every input could be turned plain grey. There {percent(last[1].value)} is left."
        if data["grey"] is not None
        else "How fast accuracy falls as the attacker gets more room."
    )
    rows = [[label, percent(e.value), interval_text(e), f"{e.n:,}"] for _, e, label in pairs]
    caption = "The band is the 95 % interval of each point." + (
        " The last radius is in the table only." if len(drawn) < len(pairs) else ""
    )
    return Section(
        title_of("Security curve", name, "security"),
        [text],
        [plot_of(figure, f"Accuracy under attack: {steps}.", name, "curve", caption)],
        table_of(rows, "eps"),
        notes=part["notes"],
    )


def certified(report: Report, part: dict[str, Any]) -> Section:
    """Certified accuracy over radii."""
    name, data = part["name"], part["data"]
    arrays = report.arrays(name)
    levels, accuracy = certified_curve(arrays["radius"], arrays["correct"])
    attacked = _empirical(report, part)
    unit = f"radius, {data['norm']}, in units of the input"
    figure = plots.certified_curve_plot(levels, accuracy, n=part["n"], unit=unit, attacked=attacked)
    entries = [
        (f"certified at radius {k.rpartition('@')[2]}", k)
        for k in report.document["figures"]
        if k.startswith(f"{name}/accuracy@")
    ]
    rows = rows_of(report, entries) + rows_of(report, [("average certified radius", f"{name}/acr")], share=False)
    status = [(k.rpartition("/")[2], k) for k in report.document["figures"] if k.startswith(f"{name}/status/")]
    alt = "Certified accuracy: " + "; ".join(f"{row[1]} {row[0][13:]}" for row in rows[:-1]) + "."
    kind = "with high probability" if data["alpha"] else "for certain"
    text = (
        f"Samples that are right and {kind} stay right for every change below the radius, whatever the attacker does. "
        f"Method: {data['method']}; it speaks of the {data['function']} function."
    )
    caption = (
        "Certified accuracy is a lower bound, attacks an upper one: the truth lies between the curve and the points."
    )
    return Section(
        title_of("Certified", name, "certified"),
        [text],
        [plot_of(figure, alt, name, "curve", caption)],
        table_of(rows),
        [table_of(rows_of(report, status), "outcome", "How every sample ended")],
        part["notes"],
    )


def _empirical(report: Report, certificate: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Return (eps, accuracy, label) of the attacks on the same function, norm and samples.

    Only the certified samples count, and only attacks that met all of them: then no point can lie below the curve
    unless a certificate is broken.
    """
    about, index = certificate["data"], report.arrays(certificate["name"])["index"]
    found = []
    for part in (*report.parts("security-curve"), *report.parts("adversarial")):
        data, arrays = part["data"], report.arrays(part["name"])
        rows = np.isin(arrays["index"], index)
        if any(data.get(k) != about.get(k) for k in ("fingerprint", "norm")) or rows.sum() < len(index):
            continue
        nearest = arrays["adversarial_distance"][rows]
        radii = data["grid"] if part["kind"] == "security-curve" else [data["eps"]]
        found += [(eps, float((nearest > eps).mean()), "left by attacks") for eps in radii if eps != data.get("grey")]
    return found


def invariant(report: Report) -> Section | None:
    """Certificates beside attacks."""
    comparisons = report.comparisons()
    if not comparisons:
        return None
    rows = [
        [f"{c.certified} against {c.attacked}", f"{c.n:,}", f"{len(c.violations)}", f"{c.limit}"] for c in comparisons
    ]
    text = (
        "No attack may break a sample within the radius that a certificate of the same function promises. Every "
        "pair was compared, sample by sample."
    )
    header = ["pair", "certified and attacked", "broken", "explained by chance"]
    return Section("Certificates against attacks", [text], table=Table(header, rows, numeric=(1, 2, 3)))
