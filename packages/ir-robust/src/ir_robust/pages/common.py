"""What all pages share: cards, tables of figures, provenance, and the diff of two texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ir_robust.attacks.base import align
from ir_robust.report import RankingReport
from ir_robust.text import Words
from robust_core.evaluation.layout import Card
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.sections.base import Passage, Table, interval_text, number, percent

__all__ = ["NOTE", "all_figures", "card", "diff", "points", "provenance", "value_of"]

NOTE = (
    "Brackets are 95 % intervals: of the bootstrap over queries, and exact (Clopper–Pearson) where every query says "
    "yes or no. They tell how far a figure could be off because only these queries were asked, and nothing about "
    "training again."
)
CONTEXT = 9
"""Words that stay around an edit."""


def value_of(estimate: Estimate, *, share: bool = False) -> str:
    """Return a figure for people."""
    if math.isnan(estimate.value):
        return "–"
    return percent(estimate.value) if share else number(estimate.value)


def card(label: str, estimate: Estimate, *, share: bool = False) -> Card:
    """Return a figure as one of the numbers at the top."""
    return Card(label, value_of(estimate, share=share), interval_text(estimate, share=share))


def points(estimate: Estimate) -> list[str]:
    """Return (value, interval) of a figure as cells of a table."""
    return [value_of(estimate), interval_text(estimate, share=False)]


def all_figures(report: RankingReport) -> tuple[str, Table]:
    """Return the table of all figures, for the end of the page."""
    names = list(report.document["figures"])
    rows = [[name, *points(report[name]), f"{report[name].n:,}"] for name in names]
    return f"All {len(names)} figures", Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3))


def provenance(report: RankingReport, files: str, more: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Return what it takes to measure it again."""
    d: dict[str, Any] = report.document
    return [
        ("ranker", f"{d['model']}, SHA-256 {d['model_sha256'][:16]}…"),
        ("data", f"{d['data']}, SHA-256 {d['data_sha256'][:16]}…"),
        *more,
        ("seed", f"{d['seed']}: streams belong to queries and documents, figures do not depend on batches or order"),
        ("device", d["device"]),
        ("time", f"{d['seconds']:,.1f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", f"result.json (all figures), per_sample.npz (every query), {files}"),
    ]


def diff(title: str, before: str, after: str) -> Passage:
    """Return how one text became another, with some words around each edit."""
    old, new = Words.of(before), Words.of(after)
    pieces: list[tuple[str, str]] = []
    ends = [(-1, -1), *align(old.words, new.words)[1], (len(old), len(new))]
    for (i, j), (i_next, j_next) in pairwise(ends):
        gone = _span(old, i + 1, i_next)
        come = _span(new, j + 1, j_next)
        lead = new.gaps[j + 1]
        pieces.append(("same", lead))
        if gone:
            pieces.append(("old", gone))
        if come:
            pieces += [("same", " ")] if gone else []
            pieces.append(("new", come))
        if gone or come:
            pieces.append(("same", new.gaps[j_next] if come else " "))
        if j_next == len(new):
            continue
        if old.words[i_next] == new.words[j_next]:
            pieces.append(("same", new.surfaces[j_next]))
        else:
            pieces += [("old", old.surfaces[i_next]), ("same", " "), ("new", new.surfaces[j_next])]
    return Passage(title, _shortened(_joined(pieces)))


def _span(words: Words, start: int, stop: int) -> str:
    if start >= stop:
        return ""
    parts = [words.surfaces[start]]
    for k in range(start + 1, stop):
        parts += [words.gaps[k], words.surfaces[k]]
    return "".join(parts)


def _joined(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for kind, text in pieces:
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + text)
        elif text:
            found.append((kind, text))
    return found


def _shortened(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    found = []
    for number_, (kind, text) in enumerate(pieces):
        words = text.split(" ")
        first, last = number_ == 0, number_ == len(pieces) - 1
        keep = CONTEXT + 1
        if kind == "same" and len(words) > (keep if first or last else 2 * keep):
            head = [] if first else words[:keep]
            tail = [] if last else words[-keep:]
            text = " ".join([*head, "…", *tail])
        found.append((kind, text))
    return found
