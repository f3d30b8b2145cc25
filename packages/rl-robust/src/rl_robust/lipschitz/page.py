"""The curve over the Lipschitz constant as a page: what robustness costs, and which constant to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rl_robust.lipschitz.cloning import TradeoffRow
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.plots import SERIES, canvas, legend
from robust_core.evaluation.sections.base import Section, Table, number, plot_of

__all__ = ["render", "tradeoff_plot"]


def tradeoff_plot(rows: Sequence[TradeoffRow]) -> Figure:
    """Plot the mean return over the certified constant: in peace, and the worst attack for each size of error."""
    figure, axes = canvas()
    first = {row.certified: row.nominal for row in rows}
    lines = [("in peace", sorted(first.items()))]
    for zeta in sorted({row.zeta for row in rows if row.attacked}):
        lines.append((f"errors of {zeta:g}", sorted((r.certified, r.worst) for r in rows if r.zeta == zeta)))
    for place, (label, points) in enumerate(lines):
        colour, marker, style = SERIES[place % len(SERIES)]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=marker, markersize=4, label=label)
    if min(first) > 0 and max(first) > 20 * min(first):
        axes.set_xscale("log")
    axes.set_xlabel("certified Lipschitz constant")
    axes.set_ylabel("mean return")
    legend(axes, loc="best")
    return figure


def render(document: Mapping[str, Any], rows: Sequence[TradeoffRow]) -> str:
    """Return the page of ``robust rl imitate``.

    Args:
        document: what the verb prints with ``--json``.
        rows: of :func:`rl_robust.lipschitz.tradeoff`.
    """
    best = max(rows, key=lambda row: (row.worst, row.nominal))
    attacks = sorted({name for row in rows for name in row.attacked})
    header = ["constant", "certified", "residual", "errors", "return in peace", *attacks]
    table = [
        [f"{r.lipschitz:.4g}", f"{r.certified:.6g}", number(r.residual_max), f"{r.zeta:g}", number(r.nominal),
         *(number(r.attacked[name]) if name in r.attacked else "–" for name in attacks)]
        for r in rows
    ]  # fmt: skip
    alt = "; ".join(f"{number(r.worst)} at {r.certified:.4g} under {r.zeta:g}" for r in rows)
    text = [
        "Every policy was fitted under its constant, and measured on the same episodes. The constant is certified: a "
        "bound on the weights, not an estimate. The returns under attack are those of the worst attack tried.",
        "A smaller constant is not always more robust: a low gain makes some loops slow, and errors pile up. Choose "
        "from the curve.",
    ]
    flags = []
    if document["slope"] > max(row.lipschitz for row in rows):
        flags.append(
            f"The demonstrations have a slope of {document['slope']:.4g}, above every constant: no policy here can "
            "match the expert everywhere."
        )
    plot = plot_of(tradeoff_plot(rows), f"Return under attack: {alt}.", "tradeoff", "curve", "What robustness costs.")
    return Page(
        title=f"{document['model']} on {document['data']}",
        lead=f"{document['n']:,} demonstrations · {document['episodes']:,} episodes a mean · seed {document['seed']}",
        cards=[
            Card("largest slope of the expert's data", f"{document['slope']:.4g}", "a lower bound of its constant"),
            Card("best constant under attack" if attacks else "best constant", f"{best.certified:.4g}", "certified"),
            Card("its return in peace", number(best.nominal)),
            Card("its return under attack", number(best.worst) if attacks else "", how="add --zeta"),
        ],
        flags=flags,
        clear="Checked: every constant by singular values in float64, or pair by pair.",
        sections=[
            Section("Performance and robustness", text, [plot], Table(header, table, numeric=range(len(header))))
        ],
        provenance=[
            ("policies", "; ".join(document["policies"])),
            ("expert", document["expert"]),
            ("seed", str(document["seed"])),
            ("time", f"{document['seconds']:,.1f} s"),
            ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ],
        command=document["command"],
    ).html()
