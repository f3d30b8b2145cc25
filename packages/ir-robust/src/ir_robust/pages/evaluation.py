"""The page of runs that were measured side by side."""

from __future__ import annotations

import numpy as np

from ir_robust.pages import plots
from ir_robust.pages.common import NOTE, all_figures, card, points, provenance, value_of
from ir_robust.report import RankingReport
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Plot, Section, Table, interval_text, number, percent, plot_of

__all__ = ["render"]

WORST = 10
"""Queries in the table of the worst."""


def render(report: RankingReport) -> str:
    """Return the page."""
    d, details = report.document, report.document["details"]
    first, measure = details["runs"][0], details["measures"][0]
    against = f" against {first}" if len(details["runs"]) > 1 else ""
    return Page(
        title=f"{d['model']}{against} on {d['data']}",
        lead=f"{d['n']:,} queries · {len(details['runs'])} runs · seed {d['seed']} · {d['device']}",
        cards=_cards(report, measure),
        flags=d["flags"],
        clear="Checked: every judged query is ranked, hardly any scores are equal, the first ten were judged alike.",
        note=NOTE,
        sections=[_means(report), *(_curves(report, name) for name in details["measures"]), _queries(report, measure)],
        provenance=provenance(report, "runs/ (every run, TREC)", _runs(report)),
        command=d["command"],
        tables=[all_figures(report)],
    ).html()


def _runs(report: RankingReport) -> list[tuple[str, str]]:
    return [
        ("runs", ", ".join(report.document["details"]["runs"]) + "; the first one is what others are compared with")
    ]


def _cards(report: RankingReport, measure: str) -> list[Card]:
    names, details = report.document["details"]["runs"], report.document["details"]
    last = names[-1]
    cards = [card(f"{measure} of {last}", report[f"{last}/{measure}"])]
    if len(names) > 1:
        p = details["tests"][f"{last}/{measure}"]["p"]
        gain = report[f"{last}/{measure}_gain"]
        spread = f"{interval_text(gain, share=False)}, p = {p:.2g}"
        cards.append(Card(f"gained over {names[0]}", f"{gain.value:+.4g}", spread))
    else:
        cards.append(Card("gained over another run", "", how="add a second --run, or a --ranker"))
    cards.append(Card(f"worst {percent(details['worst'])} of queries", value_of(report[f"{last}/{measure}_worst"])))
    cards.append(card(f"queries at or below {details['tau']:g}", report[f"{last}/{measure}_failed"], share=True))
    cards.append(card("variance over queries", report[f"{last}/{measure}_variance"]))
    return cards


def _means(report: RankingReport) -> Section:
    details, rows = report.document["details"], []
    for measure in details["measures"]:
        for name in details["runs"]:
            label = f"{name}/{measure}"
            gain, better, p = "", "", ""
            if name != details["runs"][0]:
                e, test = report[f"{label}_gain"], details["tests"][label]
                gain = f"{e.value:+.4g} {interval_text(e, share=False)}"
                better, p = f"{test['better']} / {test['worse']}", f"{test['p']:.2g}"
            rest = [value_of(report[f"{label}_{what}"]) for what in ("variance", "worst", "failed")]
            rows.append([measure, name, *points(report[label]), gain, better, p, *rest])
    header = [
        "measure", "run", "mean", "95 % interval", "gain", "better / worse", "p", "variance",
        f"worst {percent(details['worst'])}", f"at or below {details['tau']:g}",
    ]  # fmt: skip
    text = (
        "Gains are paired by query; p is that of the randomisation test. A small variance is good only beside an equal "
        "mean: a ranker that fails everywhere has a small one."
    )
    return Section("Means and tests", [text], table=Table(header, rows, numeric=range(2, 10)))


def _curves(report: RankingReport, measure: str) -> Section:
    details = report.document["details"]
    names = details["runs"]
    values = {name: report.arrays[f"{name}/{measure}"] for name in names}
    alt = "; ".join(f"{name}: {value_of(report[f'{name}/{measure}'])}" for name in names)
    shown = [_plot(plots.sorted_plot(values, measure), f"{measure}: {alt}.", measure, "sorted", "All queries, sorted.")]
    for name in names[1:]:
        test = details["tests"][f"{name}/{measure}"]
        alt = f"{name} is better on {test['better']} queries and worse on {test['worse']}."
        figure = plots.change_plot(values[name] - values[names[0]], measure, name, names[0])
        shown.append(_plot(figure, alt, measure, f"change-{name}", alt))
    return Section(f"{measure}, query by query", [], shown)


def _plot(figure: plots.Figure, alt: str, part: str, which: str, caption: str) -> Plot:
    return plot_of(figure, alt, part, which, caption)


def _queries(report: RankingReport, measure: str) -> Section:
    """Return the queries that lose most, or where there is one run only, those that it serves worst."""
    details = report.document["details"]
    names, qids = details["runs"], details["queries"]
    last = report.arrays[f"{names[-1]}/{measure}"]
    first = report.arrays[f"{names[0]}/{measure}"] if len(names) > 1 else np.zeros_like(last)
    order = np.argsort(last - first, kind="stable")[:WORST]
    rows = [[qids[i], *(number(float(report.arrays[f"{name}/{measure}"][i])) for name in names)] for i in order]
    what = f"lose most from {names[0]} to {names[-1]}" if len(names) > 1 else "are served worst"
    table = Table(["query", *names], rows, numeric=range(1, 1 + len(names)))
    return Section(f"Queries that {what}", [f"By {measure}: the ones to read first."], table=table)
