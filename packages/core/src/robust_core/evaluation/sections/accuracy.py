"""Sections on data that nobody attacks: clean, corrupted, shifted, unknown, translated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.accuracy import group_accuracies
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.metrics.shift import Baseline
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections.base import (
    Section,
    class_name,
    interval_text,
    percent,
    plot_of,
    points,
    points_interval,
    rows_of,
    table_of,
    title_of,
)

__all__ = ["clean", "corruptions", "open_set", "other", "shift", "translation"]

MAX_CLASSES_SHOWN = 20


def clean(report: Report, part: dict[str, Any]) -> Section:
    """Accuracy on the data as they are."""
    name = part["name"]
    rows = rows_of(
        report,
        [
            ("top-1 accuracy", f"{name}/accuracy"),
            ("top-5 accuracy", f"{name}/top5_accuracy"),
            (
                f"worst class ({class_name(report, part['data'].get('worst_class') or 0)})",
                f"{name}/worst_class_accuracy",
            ),
            (f"worst group ({part['data'].get('worst_group', '')})", f"{name}/worst_group_accuracy"),
        ],
    )
    arrays = report.arrays(name)
    per_class = group_accuracies(arrays["correct"], arrays["label"])
    attacked = _robust_per_class(report, arrays)
    order = sorted(per_class, key=lambda c: (per_class[c].value, c))
    shown = order[:MAX_CLASSES_SHOWN]
    figure = plots.per_class_plot(
        [class_name(report, c) for c in shown],
        [per_class[c] for c in shown],
        robust=[attacked[c] for c in shown] if attacked and all(c in attacked for c in shown) else None,
    )
    worst = order[0]
    alt = f"Accuracy of each class. Worst: {class_name(report, worst)}, {percent(per_class[worst].value)}."
    which = "" if len(order) <= MAX_CLASSES_SHOWN else f" The {MAX_CLASSES_SHOWN} worst of {len(order)} are drawn."
    caption = f"Each class with its 95 % interval, worst first.{which}"
    more = [
        [class_name(report, c), percent(per_class[c].value), interval_text(per_class[c]), f"{per_class[c].n:,}"]
        for c in order
    ]
    return Section(
        "Clean data",
        ["How often the model is right when nobody interferes. The mean can hide a class that hardly works."],
        [plot_of(figure, alt, name, "classes", caption)],
        table_of(rows),
        [table_of(more, "class", "Accuracy of every class")],
        [
            *part["notes"],
            "The worst class is the least of many noisy numbers; its interval holds for all classes at once.",
        ],
    )


def _robust_per_class(report: Report, clean_arrays: Mapping[str, np.ndarray]) -> dict[int, Estimate]:
    for part in report.parts("adversarial"):
        arrays = report.arrays(part["name"])
        _, a, b = np.intersect1d(clean_arrays["index"], arrays["index"], return_indices=True)
        return group_accuracies(arrays["robust"][b], clean_arrays["label"][a])
    return {}


def corruptions(report: Report, part: dict[str, Any]) -> Section:
    """Fifteen corruptions at five severities."""
    name, data = part["name"], part["data"]
    names, severities = data["names"], data["severities"]
    grid = np.array([[report[f"{name}/{c}/{s}"].value for s in severities] for c in names])
    figure = plots.corruption_heat_map(names, severities, grid)
    alt = "Accuracy by corruption and severity: " + "; ".join(
        f"{c.replace('_', ' ')} {100 * row[0]:.0f} to {100 * row[-1]:.0f}" for c, row in zip(names, grid, strict=True)
    )
    entries = [
        ("mean accuracy", f"{name}/accuracy"),
        (f"worst: {data['worst'].replace('_', ' ')}", f"{name}/worst_accuracy"),
    ]
    entries += [
        (f"family: {k.rpartition('/')[2]}", k) for k in report.document["figures"] if k.startswith(f"{name}/family/")
    ]
    rows = rows_of(report, entries) + rows_of(
        report, [("mCE", f"{name}/mce"), ("relative mCE", f"{name}/relative_mce")], share=False
    )
    every = [[f"{c.replace('_', ' ')}, severity {s}", f"{name}/{c}/{s}"] for c in names for s in severities]
    notes = list(part["notes"])
    if data["reference"]:
        notes.append(f"mCE is relative to {data['reference']}: 1 means as many errors as it makes, less is better.")
    return Section(
        title_of("Common corruptions", name, "corruptions"),
        ["Accidents rather than attacks: noise, blur, weather and digital artefacts, each at rising severity."],
        [plot_of(figure, alt + ".", name, "map", f"Accuracy in percent (constants: profile {data['profile']}).")],
        table_of(rows),
        [table_of(rows_of(report, [(a, b) for a, b in every]), "corruption", "Every corruption and severity")],
        notes,
    )


def shift(report: Report, part: dict[str, Any]) -> Section:
    """Another data set of the same classes."""
    name, line = part["name"], part["data"]["baseline"]
    baseline = None
    if line is not None:
        baseline = Baseline(
            line["slope"], line["intercept"], line["domain"], tuple(line["acc_id"]), tuple(line["acc_shift"])
        )
    plotted = []
    if f"{name}/id_accuracy" in report.document["figures"]:
        x, y = report[f"{name}/id_accuracy"].value, report[f"{name}/accuracy"].value
        figure = plots.shift_scatter([(report.document["model"][:24], x, y)], baseline=baseline)
        alt = f"{percent(x)} in distribution, {percent(y)} under the shift."
        plotted.append(
            plot_of(
                figure,
                alt,
                name,
                "scatter",
                "Above the line of the baselines: more robust than their accuracy explains.",
            )
        )
    entries = [("accuracy under the shift", "accuracy"), ("accuracy in distribution", "id_accuracy")]
    rows = rows_of(report, [(label, f"{name}/{k}") for label, k in entries])
    gains = [("effective robustness ρ", "effective_robustness"), ("relative robustness τ", "relative_robustness")]
    rows += [[label, points(e), points_interval(e), f"{e.n:,}"] for label, e in _present(report, name, gains)]
    rows += rows_of(report, [("ECE under the shift", f"{name}/ece")])
    rows += rows_of(report, [("NLL under the shift", f"{name}/nll")], share=False)
    text = f"The same classes in other data ({part['data']['data']}). Nobody attacks; the world has moved."
    if baseline is not None:
        text += f" The line is fitted over {len(baseline.acc_id)} declared baselines in the {baseline.domain} domain."
    return Section(f"Shift: {name}", [text], plotted, table_of(rows), notes=part["notes"])


def _present(report: Report, part: str, entries: Sequence[tuple[str, str]]) -> list[tuple[str, Estimate]]:
    known = report.document["figures"]
    return [(label, report[f"{part}/{k}"]) for label, k in entries if f"{part}/{k}" in known]


def open_set(report: Report, part: dict[str, Any]) -> Section:
    """Unknown inputs."""
    name, data = part["name"], part["data"]
    entries = [
        ("AUROC (50 % is guessing)", "auroc"),
        ("AUPR, unknown positive", "aupr_out"),
        ("AUPR, known positive", "aupr_in"),
    ]
    entries += [("known inputs rejected when 95 % of the unknown are noticed (FPR95)", "fpr95")]
    group = f" ({data['group']})" if data["group"] else ""
    text = (
        f"Can the model's own score tell {data['n_unknown']:,} unknown inputs{group} from {data['n_known']:,} known "
        "ones? AUROC is the chance that a random unknown input looks stranger than a random known one."
    )
    rows = rows_of(report, [(label, f"{name}/{k}") for label, k in entries])
    return Section(title_of("Unknown inputs", name, "open-set"), [text], table=table_of(rows), notes=part["notes"])


def translation(report: Report, part: dict[str, Any]) -> Section:
    """Shifts by a few pixels."""
    name = part["name"]
    entries = []
    for k in (k for k in report.document["figures"] if k.startswith(f"{name}/consistency@")):
        size = k.rpartition("@")[2]
        entries += [
            (f"same prediction, shifts up to {size} px", k),
            (f"right under all of them, {size} px", f"{name}/accuracy@{size}"),
        ]
    text = (
        "Share of samples whose prediction stays the same under every shift by whole pixels, diagonals included. All "
        "were tried."
    )
    return Section(
        title_of("Small translations", name, "translation"),
        [text],
        table=table_of(rows_of(report, entries)),
        notes=part["notes"],
    )


def other(report: Report, part: dict[str, Any]) -> Section:
    """Figures of a part that this page does not know."""
    prefix = f"{part['name']}/"
    names = [k for k in report.document["figures"] if k.startswith(prefix)]
    rows = rows_of(report, [(k.removeprefix(prefix), k) for k in names], share=False)
    return Section(part["name"], [], table=table_of(rows), notes=part["notes"])
