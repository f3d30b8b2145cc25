"""The page of an attacked run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ir_robust.pages import plots
from ir_robust.pages.common import NOTE, all_figures, card, diff, points, provenance, value_of
from ir_robust.report import RankingReport
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Section, Table, interval_text, plot_of

__all__ = ["render"]

EXAMPLES = 3
"""Edited texts of each attack on the page."""


def render(report: RankingReport) -> str:
    """Return the page."""
    d, details = report.document, report.document["details"]
    worst = _worst(report)
    return Page(
        title=f"{d['model']} on {d['data']} under attack",
        lead=(
            f"{d['n']:,} queries · {details['attacked_documents']:,} documents attacked · {len(d['threat'])} attacks · "
            f"seed {d['seed']} · {d['device']}"
        ),
        intro=[_threat(d["threat"], details)],
        cards=_cards(report, worst),
        flags=d["flags"],
        clear="Checked: budgets kept (words counted again on what came back), every rank from a fresh score.",
        note=NOTE,
        sections=[*_success(report), *_measures(report), _readers(report), _examples(report, worst)],
        provenance=provenance(report, "runs/ (lists as attacked, TREC), edits.jsonl (every edited text)"),
        command=d["command"],
        tables=[all_figures(report)],
    ).html()


def _worst(report: RankingReport) -> str:
    """Return the attack that brings most documents into the first K."""
    return max(report.document["threat"], key=lambda label: report[f"{label}/entry"].value)


def budget_text(budget: Mapping[str, Any]) -> str:
    """Return a budget in words."""
    parts = []
    if budget["share"] > 0 and budget["most"] != 0:
        most = "" if budget["most"] is None else f", at most {budget['most']}"
        parts.append(f"change {100 * budget['share']:g} % of the words{most}{_synonyms(budget)}")
    if budget["insertions"]:
        parts.append(f"add {budget['insertions']} words")
    return " and ".join(parts) or "change nothing"


def _synonyms(budget: Mapping[str, Any]) -> str:
    table = budget.get("synonyms")
    if table is None:
        return ""
    size = f"{table['words']:,} words, {table['edges']:,} pairs, at most {table['largest']:,} hang together"
    return f", for synonyms ({size})"


def _threat(threat: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    told = "; ".join(f"{label} may {budget_text(budget)}" for label, budget in threat.items())
    return (
        f"Threat: the owner of one document, which stands below rank {details['k']} and is not relevant, edits it: "
        f"{told}. Signs and capitals stay. All other documents stay as they are; the ranker may be asked at will."
    )


def _cards(report: RankingReport, worst: str) -> list[Card]:
    k, details = report.document["details"]["k"], report.document["details"]
    cards = [
        card(f"documents that enter the first {k}", report[f"{worst}/entry"], share=True),
        card(f"queries where one enters ({worst})", report[f"{worst}/entered"], share=True),
        card("documents that climb at all", report[f"{worst}/success"], share=True),
        card("places climbed, mean", report[f"{worst}/boost"]),
    ]
    if details["measures"]:
        measure = details["measures"][0]
        cards.append(card(f"{measure} lost with all edits in", report[f"{worst}/{measure}_drop_rate"], share=True))
    else:
        cards.append(Card("measures after the attack", "", how="add --qrels"))
    return cards


def _success(report: RankingReport) -> list[Section]:
    details, threat = report.document["details"], report.document["threat"]
    rows = []
    labels = [*threat, *(["any"] if "any/entry" in report.document["figures"] else [])]
    for label in labels:
        cells = [f"{value_of(e, share=True)} {interval_text(e)}" for e in _shares(report, label)]
        boost = report[f"{label}/boost"]
        asked = number_of(report, f"{label}/n_queries")
        rows.append([label, *cells, f"{value_of(boost)} {interval_text(boost, share=False)}", asked])
    header = ["attack", f"enter the first {details['k']}", "queries entered", "climb", "places climbed", "scores asked"]
    ranks = {}
    for label in threat:
        ranks[label] = np.array([row["rank"] for row in report.edits if row["attack"] == label], dtype=np.float64)
    alt = "; ".join(f"{row[0]}: {row[1]} enter" for row in rows)
    plot = plot_of(
        plots.climb_plot(ranks, details["k"]), f"{alt}.", "success", "ranks",
        "A dot is a document; above the line it climbed, in the shaded band it entered.",
    )  # fmt: skip
    stop = "Searches stop once a document is in: places climbed are then those that it took, not all that can be had."
    text = [
        "Every document is attacked alone against the untouched others. The strongest attack found is a lower bound of "
        "what a better attacker reaches.",
    ]
    return [
        Section("Who climbs", text, [plot]),
        Section("All attacks", [stop], table=Table(header, rows, numeric=range(1, 6))),
    ]


def number_of(report: RankingReport, name: str) -> str:
    """Return a figure, or a dash where it was not measured."""
    return value_of(report[name]) if name in report.document["figures"] else "–"


def _shares(report: RankingReport, label: str) -> list[Any]:
    return [report[f"{label}/{what}"] for what in ("entry", "entered", "success")]


def _measures(report: RankingReport) -> list[Section]:
    measures = report.document["details"]["measures"]
    if not measures:
        return []
    rows = []
    for label in ["clean", *report.document["threat"]]:
        cells = []
        for measure in measures:
            cells += points(report[f"{label}/{measure}"])
            lost = None if label == "clean" else report[f"{label}/{measure}_drop_rate"]
            cells.append("–" if lost is None else f"{value_of(lost, share=True)} {interval_text(lost)}")
        rows.append([label, *cells])
    header = ["list", *(cell for measure in measures for cell in (measure, "95 % interval", "drop rate"))]
    text = (
        "The lists with all their attacked documents standing as edited: what readers of the first page lose. The "
        "drop rate is (after - before) / before."
    )
    return [Section("What readers lose", [text], table=Table(header, rows, numeric=range(1, len(header))))]


def _readers(report: RankingReport) -> Section:
    rows = []
    for label in report.document["threat"]:
        rows.append([label, *(number_of(report, f"{label}/{what}") for what in ("changed", "cosine", "perplexity"))])
    text = (
        "Edits for each word of the text; cosine of the tf-idf vectors before and after (1: the same bag of words); "
        "perplexity after over before, under a bigram model of the collection (1: reads as before; above: less like "
        "the collection). Cheap signs, not a judgement of meaning: read the texts below."
    )
    return Section("What a reader would notice", [text], table=Table(
        ["attack", "edits for each word", "cosine", "perplexity ratio"], rows, numeric=(1, 2, 3)
    ))  # fmt: skip


def _examples(report: RankingReport, worst: str) -> Section:
    """Show, for each attack, the documents that climbed most."""
    passages = []
    for label in sorted(report.document["threat"], key=lambda name: name != worst):
        own = [row for row in report.edits if row["attack"] == label and row["edits"]]
        own.sort(key=lambda row: (row["rank"][1] - row["rank"][0], row["qid"], row["docno"]))
        for row in own[:EXAMPLES]:
            before, after = row["rank"]
            title = (
                f"{label}: query {row['qid']}, document {row['docno']}, rank {before} → {after}, "
                f"{len(row['edits'])} edits"
            )
            passages.append(diff(title, row["before"], row["text"]))
    text = "The documents that climbed most; struck out is what was there, bold what stands there now."
    return Section("Edited texts", [text if passages else "No attack changed a word."], passages=passages)
