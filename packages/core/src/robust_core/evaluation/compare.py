"""Several reports side by side: paired tests, Pareto marks, leaderboards that refuse to mix what cannot be compared.

Two accuracies are comparable only if they come from the same samples, after the same preprocessing, under the same
threat at the same radius. A column mixes nothing else: :class:`IncomparableError` says what differs.
"""

from __future__ import annotations

import csv
import html
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robust_core.checks import check_choice
from robust_core.errors import RobustError
from robust_core.evaluation.documents import RESULT
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.metrics.paired import Paired, compare_correct
from robust_core.evaluation.report import Report
from robust_core.random import Seed

__all__ = ["COLUMNS", "Comparison", "IncomparableError", "Leaderboard", "Row", "Spread", "compare", "spread"]


class IncomparableError(RobustError):
    """Figures of different data, samples, preprocessing or threats were to stand in one column."""


COLUMNS: tuple[tuple[str, bool], ...] = (
    ("clean/accuracy", True),
    ("adversarial/accuracy", True),
    ("corruptions/accuracy", True),
    ("certified/acr", True),
    ("calibration/ece", False),
    ("mean_effective_robustness", True),
)
"""Figures that a table shows where any report has them, and whether more is better."""

_PER_SAMPLE = {"clean": "correct", "adversarial": "robust", "certified": "correct", "shift": "correct"}


@dataclass(frozen=True)
class Row:
    """One report in a table.

    Attributes:
        model: its name.
        figures: column -> figure, or None where it was not measured.
        pareto: no other row is at least as good in every column and better in one.
        flags: red flags of the report.
        group: what ``group_by`` gave.
    """

    model: str
    figures: dict[str, Estimate | None]
    pareto: bool
    flags: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Comparison:
    """Reports side by side.

    Attributes:
        columns: names of the figures.
        rows: one for each report, in the order given.
        paired: (first model, second model, part) -> test on the samples that both were measured on.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    paired: dict[tuple[str, str, str], Paired]

    def markdown(self) -> str:
        """Return the table and the paired tests as Markdown."""
        lines = [_markdown(self.columns, self.rows)]
        if self.paired:
            lines += [
                "",
                "| pair | part | difference | 95 % interval | McNemar p | n |",
                "|---|---|---:|---:|---:|---:|",
            ]
            for (a, b, part), test in self.paired.items():
                low, high = test.interval
                lines.append(
                    f"| {_cell(a)} − {_cell(b)} | {part} | {100 * test.difference:+.1f} pp | "
                    f"[{100 * low:+.1f}, {100 * high:+.1f}] pp | {test.p_value:.2g} | {test.n} |"
                )
        return "\n".join(lines) + "\n"


def _identity(report: Report, column: str) -> dict[str, Any]:
    """Return what two figures of one column must agree in."""
    d = report.document
    part = next((p for p in report.parts() if p["name"] == column.partition("/")[0]), None)
    identity = {"data_sha256": d["data_sha256"], "preprocessing": d["details"]["preprocessing"]}
    if part is None:
        return {**identity, "n": d["n"]}
    identity["n"] = part["n"]
    for key in ("norm", "eps", "profile", "names", "severities", "reference", "data_sha256", "n_bins", "positive"):
        if key in part["data"]:
            identity[f"part {key}"] = part["data"][key]
    for key in ("version", "attack", "padding"):
        if key in part["settings"]:
            identity[key] = part["settings"][key]
    return identity


def _check_column(reports: Sequence[Report], column: str) -> None:
    present = [r for r in reports if column in r.document["figures"]]
    for other in present[1:]:
        first, here = _identity(present[0], column), _identity(other, column)
        differs = [k for k in sorted(first.keys() | here.keys()) if first.get(k) != here.get(k)]
        if differs:
            shown = "; ".join(f"{k}: {str(first.get(k))[:40]} and {str(here.get(k))[:40]}" for k in differs)
            raise IncomparableError(
                f"column {column!r} would mix {present[0].document['model']} and {other.document['model']}, which "
                f"differ in {shown}. Evaluate both alike, or leave the column out"
            )


def _columns(reports: Sequence[Report], wanted: Sequence[str] | None) -> tuple[str, ...]:
    known = {name for report in reports for name in report.document["figures"]}
    if wanted is None:
        return tuple(name for name, _ in COLUMNS if name in known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"columns: no report has the figure {name!r}")
    return tuple(wanted)


def _lower_is_better(column: str) -> bool:
    name = column.rpartition("/")[2].partition("@")[0]
    return dict(COLUMNS).get(column) is False or name.endswith(("ece", "nll", "brier", "aurc", "mce", "fpr95"))


def _pareto(values: np.ndarray) -> list[bool]:
    """Return (R,) bool: not dominated. Rows with a figure missing are not marked."""
    others = values[np.isfinite(values).all(axis=1)]
    marks = []
    for row in values:
        beaten = ((others >= row).all(axis=1) & (others > row).any(axis=1)).any()
        marks.append(bool(np.isfinite(row).all() and not beaten))
    return marks


def _rows(reports: Sequence[Report], columns: Sequence[str], groups: Sequence[str]) -> tuple[Row, ...]:
    found = [{c: r[c] if c in r.document["figures"] else None for c in columns} for r in reports]
    signs = np.array([-1.0 if _lower_is_better(c) else 1.0 for c in columns])
    values = np.array([[math.nan if e is None else e.value for e in row.values()] for row in found]) * signs
    marks = _pareto(values.reshape(len(found), -1)) if columns else [False] * len(found)
    return tuple(
        Row(report.document["model"], row, mark, tuple(report.flags), group)
        for report, row, mark, group in zip(reports, found, marks, groups, strict=True)
    )


def compare(reports: Sequence[Report], columns: Sequence[str] | None = None, *, generator: Seed = None) -> Comparison:
    """Put reports side by side, with paired tests of every pair on the samples that both have.

    Args:
        reports: at least two.
        columns: names of figures; None takes those of :data:`COLUMNS` that were measured.
        generator: seed of the bootstrap.

    Raises:
        IncomparableError: a column would mix different data, n, radii or preprocessing.
    """
    if len(reports) < 2:
        raise ValueError(f"reports holds {len(reports)}; at least two are needed to compare")
    names = _columns(reports, columns)
    for column in names:
        _check_column(reports, column)
    rows = _rows(reports, names, [""] * len(reports))
    paired = {}
    labels = _labels(reports)
    for i, first in enumerate(reports):
        for j in range(i + 1, len(reports)):
            for part in dict.fromkeys(c.partition("/")[0] for c in names):
                test = _paired(first, reports[j], part, generator)
                if test is not None:
                    paired[labels[i], labels[j], part] = test
    return Comparison(names, rows, paired)


@dataclass(frozen=True)
class Spread:
    """One figure over several training runs: another thing than its sampling interval.

    Attributes:
        values: the figure of each report, in the order given; all are shown, none is the best.
        mean: their mean.
        sd: their standard deviation (n - 1).
    """

    values: tuple[float, ...]
    mean: float
    sd: float


def spread(reports: Sequence[Report], columns: Sequence[str] | None = None) -> dict[str, Spread]:
    """Return figure -> spread over models of the same recipe trained from different seeds.

    Args:
        reports: at least three, of different models, on the same data.
        columns: names of figures; None takes those of :data:`COLUMNS` that all have.

    Raises:
        IncomparableError: a column would mix different data, n, radii or preprocessing.
        ValueError: fewer than three reports, or the same model twice.
    """
    models = {report.document["model_sha256"] for report in reports}
    if len(reports) < 3 or len(models) < len(reports):
        raise ValueError(f"reports: {len(reports)} of {len(models)} different models; at least three are needed")
    found = {}
    for column in _columns(reports, columns):
        _check_column(reports, column)
        if all(column in report.document["figures"] for report in reports):
            values = [report[column].value for report in reports]
            found[column] = Spread(tuple(values), float(np.mean(values)), float(np.std(values, ddof=1)))
    return found


def _labels(reports: Sequence[Report]) -> list[str]:
    """Names of the models, with part of their hash where two share a name."""
    names = [r.document["model"] for r in reports]
    return [
        name if names.count(name) == 1 else f"{name} ({r.document['model_sha256'][:8]})"
        for name, r in zip(names, reports, strict=True)
    ]


def _paired(a: Report, b: Report, part: str, generator: Seed) -> Paired | None:
    kinds = {p["kind"] for r in (a, b) for p in r.parts() if p["name"] == part}
    array = _PER_SAMPLE.get(kinds.pop()) if len(kinds) == 1 else None
    first, second = a.arrays(part), b.arrays(part)
    if array is None or array not in first or array not in second or "index" not in first or "index" not in second:
        return None
    _, rows, others = np.intersect1d(first["index"], second["index"], return_indices=True)
    if not len(rows):
        return None
    return compare_correct(first[array][rows], second[array][others], generator=generator)


class Leaderboard:
    """All reports in a folder: each sub-folder with a ``result.json``.

    Args:
        folder: where the reports are.

    Raises:
        UntrustedFileError: a result is damaged or hostile; it is named.
        ValueError: no report is there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        places = sorted(p for p in [self.folder, *self.folder.iterdir()] if p.is_dir() and (p / RESULT).is_file())
        if not places:
            raise ValueError(f"folder={str(folder)!r} holds no report: sub-folders with a {RESULT} are needed")
        self.reports = [Report.load(place) for place in places]

    def rows(
        self,
        *,
        columns: Sequence[str] | None = None,
        sort_by: str | None = None,
        group_by: str | None = None,
    ) -> tuple[tuple[str, ...], tuple[Row, ...]]:
        """Return (columns, rows), best first within each group.

        Args:
            columns: names of figures; None takes those of :data:`COLUMNS` that were measured.
            sort_by: a column; None takes the last accuracy under attack, else the first column.
            group_by: key of the document, such as ``"data"`` or ``"device"``; figures are compared within a group
                only. None makes one group.

        Raises:
            IncomparableError: a column of one group would mix different data, n, radii or preprocessing.
        """
        names = _columns(self.reports, columns)
        if sort_by is None:
            sort_by = "adversarial/accuracy" if "adversarial/accuracy" in names else names[0]
        if sort_by not in names:
            raise ValueError(f"sort_by={sort_by!r} is not a column; there are {', '.join(names)}")
        grouped: dict[str, list[Report]] = {}
        for report in self.reports:
            grouped.setdefault(_group(report, group_by), []).append(report)
        rows: list[Row] = []
        for group in sorted(grouped):
            members = grouped[group]
            for column in names:
                _check_column(members, column)
            rows += sorted(_rows(members, names, [group] * len(members)), key=_order(sort_by))
        return names, tuple(rows)

    def render(
        self,
        kind: Literal["markdown", "html", "csv"] = "markdown",
        *,
        columns: Sequence[str] | None = None,
        sort_by: str | None = None,
        group_by: str | None = None,
    ) -> str:
        """Return the table as text; see :meth:`rows` for the arguments.

        Raises:
            IncomparableError: a column would mix what cannot be compared.
        """
        check_choice("kind", kind, ("markdown", "html", "csv"))
        names, rows = self.rows(columns=columns, sort_by=sort_by, group_by=group_by)
        return {"markdown": _markdown, "html": _html, "csv": _csv}[kind](names, rows)


def _group(report: Report, key: str | None) -> str:
    if key is None:
        return ""
    value = report.document.get(key, report.document["details"].get(key))
    if key == "threat" and isinstance(value, dict):
        return f"{value['norm']} {value['eps_text']}"
    if value is None or isinstance(value, dict | list):
        raise ValueError(f"group_by={key!r}: choose a key with a plain value, such as 'data', 'model' or 'threat'")
    return str(value)


def _order(column: str) -> Callable[[Row], tuple[float, str]]:
    sign = 1.0 if _lower_is_better(column) else -1.0

    def key(row: Row) -> tuple[float, str]:
        figure = row.figures[column]
        return (math.inf if figure is None or math.isnan(figure.value) else sign * figure.value, row.model)

    return key


def _shown(figure: Estimate | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    interval = figure.interval
    return f"{figure.value:.4g}" + ("" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]")


def _cell(text: str) -> str:
    """Return text that cannot leave its cell or become markup."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _header(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    grouped = ["group"] if any(row.group for row in rows) else []
    return [*grouped, "model", *columns, "n", "flags"]


def _cells(row: Row, columns: Sequence[str], *, grouped: bool) -> list[str]:
    n = "/".join(str(v) for v in sorted({e.n for e in row.figures.values() if e is not None}))
    mark = " ★" if row.pareto else ""
    flags = f"⚑ {len(row.flags)}" if row.flags else ""
    cells = [f"{row.model}{mark}", *(_shown(row.figures[c]) for c in columns), n, flags]
    return [row.group, *cells] if grouped else cells


_LEGEND = (
    "★ no other row of its group is at least as good everywhere. ⚑ red flags: read that report before trusting it."
)


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    header = _header(columns, rows)
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join('---' for _ in header)}|"]
    lines += [f"| {' | '.join(map(_cell, _cells(r, columns, grouped=header[0] == 'group')))} |" for r in rows]
    return "\n".join([*lines, "", _LEGEND])


def _html(columns: Sequence[str], rows: Sequence[Row]) -> str:
    header = _header(columns, rows)
    grouped = header[0] == "group"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row, columns, grouped=grouped))}</tr>"
        for row in rows
    )
    return f"<table><caption>{_LEGEND}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n"


def _csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["group", "model", "pareto", "flags", *(f"{c} {k}" for c in columns for k in ("value", "low", "high", "n"))]
    )
    for row in rows:
        cells: list[Any] = [_harmless(row.group), _harmless(row.model), int(row.pareto), len(row.flags)]
        for column in columns:
            figure = row.figures[column]
            if figure is None:
                cells += ["", "", "", ""]
                continue
            low, high = figure.interval or ("", "")
            cells += ["" if math.isnan(figure.value) else figure.value, low, high, figure.n]
        writer.writerow(cells)
    return buffer.getvalue()


def _harmless(text: str) -> str:
    """A spreadsheet would run a cell that starts with one of these."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
