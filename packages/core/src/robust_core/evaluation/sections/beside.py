"""The section that shows a model beside others: what each is better at, and whether the difference is real."""

from __future__ import annotations

from collections.abc import Sequence

from robust_core.evaluation import plots
from robust_core.evaluation.compare import Comparison, compare
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.report import Report
from robust_core.evaluation.sections.base import Plot, Section, Table, interval_text, number, percent, plot_of

__all__ = ["beside"]

TITLES = {
    "clean/accuracy": "clean",
    "adversarial/accuracy": "under attack",
    "corruptions/accuracy": "corrupted",
    "certified/acr": "mean certified radius",
    "calibration/ece": "ECE",
    "mean_effective_robustness": "rho",
}


def beside(report: Report, others: Sequence[Report]) -> Section:
    """Return the section; the model of the page stands first."""
    reports = [report, *others]
    table = compare(reports)
    header = ["model", *(TITLES.get(column, column) for column in table.columns), "best at something"]
    rows = [
        [row.model, *(_cell(c, row.figures[c]) for c in table.columns), "★" if row.pareto else ""] for row in table.rows
    ]
    caption = "★: no other model here is at least as good in every column and better in one"
    text = (
        "The same samples, the same attacks, the same radius: only the model differs. A model is worth having if no "
        "other beats it everywhere."
    )
    return Section(
        "Beside other models",
        [text],
        [plot for plot in (_trade_off(reports), _curves(reports)) if plot is not None],
        Table(header, rows, caption, tuple(range(1, len(header) - 1))),
        [_tests(table)] if table.paired else [],
    )


def _cell(column: str, figure: Estimate | None) -> str:
    if figure is None:
        return "–"
    share = column != "certified/acr"
    value = percent(figure.value) if share else number(figure.value)
    return f"{value} {interval_text(figure, share=share)}".strip()


def _tests(table: Comparison) -> Table:
    rows = [
        [
            f"{a} against {b}",
            TITLES.get(f"{part}/accuracy", part),
            f"{100 * test.difference:+.1f} pp",
            f"[{100 * test.interval[0]:+.1f}, {100 * test.interval[1]:+.1f}] pp",
            f"{test.p_value:.2g}",
            f"{test.n:,}",
        ]
        for (a, b, part), test in table.paired.items()
    ]
    header = ["pair", "where", "difference", "95 % interval", "McNemar p", "n"]
    return Table(header, rows, "Are the differences real? Paired tests on the same samples", (2, 3, 4, 5))


def _trade_off(reports: Sequence[Report]) -> Plot | None:
    wanted = ("clean/accuracy", "adversarial/accuracy")
    if any(name not in report.document["figures"] for report in reports for name in wanted):
        return None
    points = [(report.document["model"], report[wanted[0]], report[wanted[1]]) for report in reports]
    alt = "; ".join(f"{name}: {percent(a.value)} clean, {percent(b.value)} under attack" for name, a, b in points)
    caption = "Up and to the right is better; bars are 95 % intervals."
    return plot_of(plots.trade_off_plot(points), f"{alt}.", "beside", "trade-off", caption)


def _curves(reports: Sequence[Report]) -> Plot | None:
    curves, norms = [], set()
    for report in reports:
        for part in report.parts("security-curve")[:1]:
            data, name = part["data"], part["name"]
            norms.add(data["norm"])
            pairs = zip(data["grid"], data["labels"], strict=True)
            kept = [(eps, report[f"{name}/eps={label}"]) for eps, label in pairs if eps != data["grey"]]
            curves.append((report.document["model"], [eps for eps, _ in kept], [e for _, e in kept]))
    if len(curves) < 2 or len(norms) != 1:
        return None
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{percent(e.value)} at {number(x)}" for x, e in zip(eps, found, strict=True))
        for name, eps, found in curves
    )
    unit = f"attacker's radius eps, {norms.pop()}, in units of the input"
    figure = plots.security_curves_plot(curves, unit=unit)
    return plot_of(figure, f"{alt}.", "beside", "curves", "How fast each model gives way; bands are 95 % intervals.")
