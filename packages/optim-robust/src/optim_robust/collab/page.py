"""The page of a run: what was asked, what is proved, the curves, who was lost."""

from __future__ import annotations

from typing import Any

from robust_core.evaluation import plots
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Plot, Section, Table, number, percent

__all__ = ["page"]

_LIMIT = 800


def page(document: dict[str, Any]) -> str:
    """Return the HTML page made from the result document alone."""
    threat, details = document["threat"], document["details"]
    first = next(iter(details["curves"]))
    figures, recipe = document["figures"], details["recipe"]
    attack, rounds = threat["attack"] or "no attack", len(details["curves"][first]["loss"])
    return Page(
        title=f"{recipe['aggregator']} on {document['data']}, {threat['faulty']} of {threat['peers']} peers faulty",
        lead=f"{attack} · {rounds} rounds · {details['driver']} · seed {document['seed']}",
        intro=[details["guarantee"]],
        cards=[
            Card("accuracy, mean of honest peers", _share(figures, f"{first}/accuracy"), _interval(figures, first)),
            Card("worst honest peer", _share(figures, f"{first}/accuracy of the worst peer")),
            Card("sent by a peer in a round", f"{number(details['bytes_per_message'] / 1024)} KiB"),
            Card("time of a round", f"{number(1000 * details['curves'][first]['round_seconds'])} ms"),
        ],
        flags=document["flags"],
        clear="Numbers lie inside what is proved of the rule, and no honest peer was lost.",
        note="Intervals speak of the test samples only; another seed gives other shards, starts and attacks.",
        sections=_sections(details["curves"]),
        provenance=[
            ("model", f"{document['model']}, SHA-256 of the architecture {document['model_sha256'][:16]}…"),
            ("data", f"{document['data']}, SHA-256 {document['data_sha256'][:16]}…"),
            ("device", document["device"]),
            ("time", f"{document['seconds']:,.1f} s"),
            ("versions", ", ".join(f"{k} {v}" for k, v in document["versions"].items())),
            ("files", "result.json, peers.safetensors (all honest models), model.safetensors (the first of them)"),
        ],
        command=document["command"],
        tables=[("The recipe", Table(["setting", "value"], [[k, str(v)] for k, v in recipe.items()]))],
    ).html()


def _share(figures: dict[str, Any], name: str) -> str:
    return percent(figures[name]["value"]) if name in figures else "–"


def _interval(figures: dict[str, Any], label: str) -> str:
    found = figures.get(f"{label}/accuracy", {}).get("interval")
    return "" if found is None else f"[{100 * found[0]:.1f}, {100 * found[1]:.1f}] %"


def _sections(curves: dict[str, Any]) -> list[Section]:
    made = []
    for key, title, text in (
        ("accuracy", "Accuracy", "Mean over the honest peers' models on test data."),
        ("loss", "Loss", "Mean over the honest peers, each on its own batch."),
        ("drift", "Disagreement", "Mean squared distance of the honest models from their mean, after mixing."),
    ):
        lines = {label: _points(found[key], key) for label, found in curves.items() if found[key]}
        if lines:
            made.append(Section(title, [text], [_plot(key, title, lines)]))
    notes = [[label, note] for label, found in curves.items() for note in found["notes"]]
    if notes:
        made.append(Section("Processes", ["What happened to peers."], table=Table(["run", "what"], notes)))
    return made


def _points(values: list[Any], key: str) -> list[tuple[int, float]]:
    pairs = [(int(a), float(b)) for a, b in values] if key == "accuracy" else list(enumerate(values, start=1))
    stride = -(-len(pairs) // _LIMIT)
    return pairs[::stride] if stride > 1 else pairs


def _plot(key: str, title: str, lines: dict[str, list[tuple[int, float]]]) -> Plot:
    figure, axes = plots.canvas()
    for label, pairs in lines.items():
        axes.plot([a for a, _ in pairs], [b for _, b in pairs], label=label, linewidth=1.4)
    axes.set_xlabel("round")
    axes.set_ylabel(title.lower())
    if key == "accuracy":
        plots.percent_axis(axes)
    if key == "drift" and all(value > 0 for pairs in lines.values() for _, value in pairs):
        axes.set_yscale("log")
    plots.legend(axes)
    ends = ", ".join(f"{label} {pairs[-1][1]:.3g}" for label, pairs in lines.items())
    return Plot(plots.to_svg(figure, f"{title} by round; in the end {ends}", f"train-{key}"), f"In the end: {ends}.")
