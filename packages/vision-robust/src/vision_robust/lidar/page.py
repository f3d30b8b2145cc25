"""The page of an evaluation of point clouds: curves against severity, all conditions, frames and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from robust_core.evaluation import plots
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.metrics import Estimate
from robust_core.evaluation.sections.base import Plot, Section, Table, interval_text, number, percent, plot_of
from vision_robust.lidar.evaluation import CLEAN, LidarReport
from vision_robust.lidar.pictures import SeenFrame, SeenShapes

__all__ = ["render"]

_LINES = 8
"""Corruptions in one plot; others stand in the table."""
_ACCIDENTS = "Corruptions are accidents of weather, sensor and driving: nobody looked for the worst case."
_NAMES = {"map/3d": "mean AP in space", "map/bev": "mean AP from above", "mota": "MOTA"}


def render(report: LidarReport) -> str:
    """Return the page."""
    d = report.document
    what = "clouds" if d["task"] == "shapes" else "frames"
    n, levels = len(d["corruptions"]), _span(d["severities"])
    corrupted = f" · {n} corruptions at severities {levels}" if n else ""
    sections = [_curves(report, measure) for measure in _measures(report) if d["corruptions"]]
    sections += [_seen(report)] if report.shown else []
    return Page(
        title=f"{d['model']} on {d['data']}",
        lead=f"{d['n']:,} {what}{corrupted} · seed {d['seed']} · {d['device']}",
        intro=[_ACCIDENTS] if n else [],
        cards=_cards(report),
        flags=d["flags"],
        clear="Checked: enough samples, clean figures above chance"
        + (".", ", boxes that agree with the data's axes.")[d["task"] == "scenes"],
        note="Brackets are 95 % intervals over clouds: exact for a condition, Student's for the mean over corruptions."
        if d["task"] == "shapes"
        else "Average precision (AP) and tracking (MOTA) have no intervals: frames of a drive are not independent."
        + " AP is counted as KITTI's program does." * (d["details"].get("sampling") == "kitti"),
        sections=sections,
        provenance=[
            ("model", d["model_sha256"]), ("data", d["data_sha256"] or "read frame by frame"), ("seed", str(d["seed"])),
            *[(name.replace("_", " "), _plain(value)) for name, value in d["details"].items() if value is not None],
            *d["versions"].items(),
        ],
        command=d["command"],
        tables=[(f"All {len(d['figures'])} figures", _all(report))],
    ).html()  # fmt: skip


def _plain(value: object) -> str:
    """Return a setting as a person writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part:g}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(levels: Sequence[int]) -> str:
    """Return levels as a person writes them."""
    whole = len(levels) > 2 and levels == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if whole else ", ".join(map(str, levels))


def _measures(report: LidarReport) -> list[str]:
    """Return the figures that are worth a curve: accuracy, or mean precision and tracking."""
    names = [name.removeprefix(f"{CLEAN}/") for name in report.document["figures"] if name.startswith(f"{CLEAN}/")]
    return [name for name in names if name == "accuracy" or name.startswith("map/") or name == "mota"]


def _cards(report: LidarReport) -> list[Card]:
    cards = []
    for measure in _measures(report):
        for when in (CLEAN, "corrupted"):
            if f"{when}/{measure}" in report.document["figures"]:
                cards.append(_card(f"{_NAMES.get(measure, measure)}, {when}", report[f"{when}/{measure}"]))
    if "mce" in report.document["figures"]:
        cards.append(Card("mean corruption error (DGCNN = 1)", number(report["mce"].value)))
    if not report.document["corruptions"]:
        cards.append(Card("under corruptions", "", how="add --corruptions"))
    return cards


def _card(label: str, estimate: Estimate) -> Card:
    return Card(label, percent(estimate.value), interval_text(estimate) if estimate.interval else "")


def _curves(report: LidarReport, measure: str) -> Section:
    d = report.document
    levels, names, name = d["severities"], d["corruptions"], _NAMES.get(measure, measure)
    values = 100 * np.array([[_value(report, f"{c}@{k}/{measure}") for k in levels] for c in names])
    found: list[Plot] = []
    if len(levels) > 1:
        figure, axes = plots.canvas()
        clean = 100 * report[f"{CLEAN}/{measure}"].value
        hardest = np.argsort(values.mean(1))[:_LINES]
        for row in hardest:
            axes.plot([0, *levels], [clean, *values[row]], marker="o", ms=3, lw=1.2, label=_short(names[row]))
        axes.set_xlabel("severity (0: clean)")
        axes.set_ylabel(f"{name}, %")
        low = min(0.0, clean, float(np.nanmin(values)))
        axes.set_ylim(low - 0.02 * (100 - low), 100 + 0.02 * (100 - low))  # whole marks at both ends
        plots.legend(axes)
        alt = "; ".join(f"{names[r]}: {', '.join(f'{v:.0f} %' for v in values[r])}" for r in hardest)
        caption = f"The {len(hardest)} hardest of {len(names)}." if len(names) > len(hardest) else ""
        found.append(plot_of(figure, f"{name} against severity. {alt}.", measure, "curves", caption))
    heat = plots.corruption_heat_map([_short(n) for n in names], levels, values / 100)
    found.append(plot_of(heat, f"{name} in percent, corruption by severity.", measure, "heat", "In percent."))
    return Section(f"{name} against severity", [], found)


def _short(corruption: str) -> str:
    return corruption.partition("/")[2].replace("_", " ")


def _value(report: LidarReport, name: str) -> float:
    return report[name].value if name in report.document["figures"] else float("nan")


def _seen(report: LidarReport) -> Section:
    """Return the pictures, and what their colours say."""
    from vision_robust.lidar.birds_eye import birds_eye_plot, shapes_plot

    drawn = []
    view = next((_view(seen) for seen in report.shown if isinstance(seen, SeenFrame)), None)
    for i, seen in enumerate(report.shown):
        if isinstance(seen, SeenShapes):
            right = [a == b for a, b in zip(seen.truth, seen.said, strict=True)]
            told = [a if good else f"{b}, is {a}" for a, b, good in zip(seen.truth, seen.said, right, strict=True)]
            figure = shapes_plot(seen.clouds, told, right, weights=seen.weights, title=seen.name)
            caption = f"{seen.name}: {sum(right)} of {len(right)} right"
            alt = f"{caption}: {'; '.join(told)}"
        else:
            figure = birds_eye_plot(
                seen.frame, detections=seen.said, trails=seen.trails, weights=seen.weights, view=view,
                title=seen.name,
            )  # fmt: skip
            tracks = f", {len(seen.trails)} tracks" if report.document["details"]["tracked"] else ""
            caption = (
                f"{seen.name}: {len(seen.frame.points):,} points, {int((~seen.frame.ignore).sum())} boxes to find, "
                f"{len(seen.said.boxes)} found{tracks}"
            )
            alt = caption
        drawn.append(plot_of(figure, alt, "seen", str(i), caption))
    return Section(*_words(report), drawn)


def _view(seen: SeenFrame) -> tuple[float, float, float, float]:
    """Return where to look: the sensor, what is to be found and what was found, and some metres around."""
    places = [box.tolist() for box in (*seen.frame.boxes[~seen.frame.ignore, :2], *seen.said.boxes[:, :2])]
    x, y = np.clip(np.array([[0.0, 0.0], *places]), -70.0, 70.0).T
    middle = (y.min() + y.max()) / 2
    half = max((y.max() - y.min()) / 2 + 6.0, (x.max() - x.min() + 12.0) * 0.2)
    return x.min() - 6.0, x.max() + 6.0, middle - half, middle + half


def _words(report: LidarReport) -> tuple[str, list[str]]:
    d, weighed = report.document, any(seen.weights is not None for seen in report.shown)
    chosen = "clean" + ", and at the hardest severity of the corruptions that harm most" * bool(d["corruptions"])
    if d["task"] == "shapes":
        title, text = "What the model looks at", [f"Some shapes, {chosen}; the mark says whether the answer is right."]
        colours = "where a small move of the point would change the answer"
    else:
        title, least = "From above", d["details"]["min_score"]
        tracks = (
            " Lines are where tracks came from, numbers who they are." if report.document["details"]["tracked"] else ""
        )
        text = [f"One frame, {chosen}; boxes point to their front, found ones score {least:g} or more.{tracks}"]
        colours = (
            "in and around boxes, where a small move of the point would worsen what is said; 1 is the most of each box"
        )
    if weighed:
        text.append(f"Colours are the robust saliency of this model, averaged over noise: {colours}.")
    if d["saliency"] != "shown":
        text.append(f"{d['saliency']}.")
    return title, text


def _all(report: LidarReport) -> Table:
    rows = []
    for name in report.document["figures"]:
        e = report[name]
        rows.append([name, number(e.value), interval_text(e, share=False) if e.interval else "", f"{e.n:,}"])
    return Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3))
