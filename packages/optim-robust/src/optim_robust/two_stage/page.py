"""The page of two-stage runs: what each x guarantees, what is proved, and how the gap closed."""

from __future__ import annotations

from typing import Any

from robust_core.evaluation import plots
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Plot, Section, Table, number

__all__ = ["gap_curve", "page"]

STATUSES = {
    "optimal": "optimal: the gap is closed",
    "feasible": "ended with a gap: this method proves no optimality",
    "time_limit": "stopped by the time limit",
    "infeasible": "infeasible: no decision survives the worst case",
    "unbounded": "unbounded: costs fall without end",
    "no_solution": "no plan of this kind serves the whole set; the problem itself may be feasible",
    "error": "the solver failed",
}


def page(document: dict[str, Any]) -> str:
    """Return the HTML page made from the result document alone."""
    runs = document["details"]["runs"]
    first = runs[0]
    single = len(runs) == 1
    return Page(
        title=f"{first['method']} on {first['problem']}" if single else f"{_count(runs)} on {document['data']}",
        lead=f"{'; '.join(document['threat']['sets'])} · time limit {document['details']['time_limit']:g} s",
        intro=[
            "Decisions are made now, the worst scenario of the uncertainty set follows, the best reaction comes last. "
            "The objective shown is what the decisions truly guarantee with that reaction, computed again for every "
            "method in the same way, whatever the method itself assumed."
        ],
        cards=_cards(first) if single else _best_cards(runs),
        flags=document["flags"],
        clear="Every worst case is certified, and every point was checked again outside the solver.",
        note="The bound is proved; the gap is the most that better decisions could still gain, as a share.",
        sections=_sections(runs),
        provenance=[
            ("data", f"SHA-256 {document['data_sha256'][:16]}…"),
            ("device", document["device"]),
            ("time", f"{document['seconds']:,.1f} s"),
            ("versions", ", ".join(f"{k} {v}" for k, v in document["versions"].items())),
            ("files", "result.json (decisions, histories, all figures)"),
        ],
        command=document["command"],
    ).html()


def _count(runs: list[dict[str, Any]]) -> str:
    n = len({run["method"] for run in runs})
    return f"{n} methods" if n > 1 else runs[0]["method"]


def _text(value: float | None, *, share: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if share else number(value)


def _cards(run: dict[str, Any]) -> list[Card]:
    word = "guaranteed profit" if run["sense"] < 0 else "guaranteed cost"
    return [
        Card(word, _text(run["guaranteed"]), "" if run["certified"] else "a bound, not certified"),
        Card("proved bound", _text(run["bound"])),
        Card("gap", _text(run["gap"], share=True)),
        Card("time", f"{run['seconds']:.2f} s"),
    ]


def _best_cards(runs: list[dict[str, Any]]) -> list[Card]:
    cards = []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        gaps = sorted(run["gap"] for run in own if run["gap"] is not None)
        middle = _text(gaps[len(gaps) // 2], share=True) if gaps else "–"
        cards.append(Card(f"{method}: median gap", middle, f"{sum(run['seconds'] for run in own):.1f} s in all"))
    return cards


def _sections(runs: list[dict[str, Any]]) -> list[Section]:
    made = []
    for problem in dict.fromkeys(run["problem"] for run in runs):
        own = [run for run in runs if run["problem"] == problem]
        header = ["method", "status", "objective", "bound", "gap", "seconds", "scenarios"]
        rows = [
            [run["method"], STATUSES[run["status"]], _text(run["guaranteed"]), _text(run["bound"]),
             _text(run["gap"], share=True), f"{run['seconds']:.2f}", str(run["scenarios"])]
            for run in own
        ]  # fmt: skip
        drawn = [plot for plot in (gap_curve(own, problem), _bounds_curve(own, problem)) if plot is not None]
        chosen = [Table(["decision", *(run["method"] for run in own)], _decisions(own), "Decisions that are not 0")]
        table = Table(header, rows, numeric=(2, 3, 4, 5, 6))
        made.append(Section(problem, [_words(own)], drawn, table, more=chosen))
    return made


def _words(runs: list[dict[str, Any]]) -> str:
    held = [run for run in runs if run["guaranteed"] is not None]
    if not held:
        return "No method holds a decision: the table says why."
    best = max(held, key=lambda run: -run["sense"] * run["guaranteed"])
    return f"The best guarantee is that of {best['method']}: {_text(best['guaranteed'])}."


def _decisions(runs: list[dict[str, Any]]) -> list[list[str]]:
    names = dict.fromkeys(name for run in runs for name, value in run["x"].items() if abs(value) > 1e-9)
    return [[name, *(_text(run["x"].get(name)) for run in runs)] for name in names]


def gap_curve(runs: list[dict[str, Any]], problem: str) -> Plot | None:
    """Plot the gap against time, one line for each method that had both a bound and an incumbent."""
    figure, axes = plots.canvas()
    ends = []
    for run in runs:
        points = [(t, 100 * abs(w - b) / max(1e-9, abs(w))) for t, b, w in run["history"] if None not in (b, w)]
        if not points:
            continue
        points.append((max(run["seconds"], points[-1][0]), points[-1][1]))
        axes.step([t for t, _ in points], [g for _, g in points], where="post", label=run["method"], linewidth=1.6)
        ends.append(f"{run['method']} {points[-1][1]:.2f} %")
    if not ends:
        return None
    axes.set_xlabel("seconds")
    axes.set_ylabel("gap, %")
    axes.set_ylim(bottom=0)
    plots.legend(axes)
    text = f"In the end: {', '.join(ends)}."
    slug = "".join(c if c.isalnum() else "-" for c in problem)
    return Plot(plots.to_svg(figure, f"Gap against time. {text}", f"gap-{slug}"), f"Gap against time. {text}")


def _bounds_curve(runs: list[dict[str, Any]], problem: str) -> Plot | None:
    """Plot bound and incumbent against time for the method whose history is longest."""
    run = max(runs, key=lambda r: len(r["history"]))
    bounds = [(t, b) for t, b, _ in run["history"] if b is not None]
    worst = [(t, w) for t, _, w in run["history"] if w is not None]
    if len(bounds) < 2 or not worst:
        return None
    figure, axes = plots.canvas()
    for points, label, color in ((worst, "held", plots.ACCENT), (bounds, "proved bound", plots.WARM)):
        ends = [*points, (run["seconds"], points[-1][1])]
        axes.step([t for t, _ in ends], [v for _, v in ends], where="post", label=label, color=color, linewidth=1.6)
    axes.set_xlabel("seconds")
    axes.set_ylabel("objective")
    plots.legend(axes)
    text = f"{run['method']}: what was held ends at {number(worst[-1][1])}, the bound at {number(bounds[-1][1])}."
    slug = "".join(c if c.isalnum() else "-" for c in problem)
    return Plot(plots.to_svg(figure, text, f"bounds-{slug}"), text)
