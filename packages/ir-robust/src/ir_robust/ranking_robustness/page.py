"""The page of a report card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ir_robust.pages.plots import sorted_plot
from ir_robust.ranking_robustness import plots
from ir_robust.ranking_robustness.report import BEST, LEGEND, TIED, RobustnessReport, paired_rows, plain
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.sections.base import Plot, Section, Table, interval_text, number, percent, plot_of

__all__ = ["render"]


def render(report: RobustnessReport) -> str:
    """Return the page."""
    d = report.document
    about = d["details"]
    lists = "the first stage asked again" if about["candidates"] == "retrieved" else "the candidates of the clean query"
    sections = [_taxonomy(report), *(_section(report, task) for task in report.tasks), _paired(report)]
    return Page(
        title=f"Robustness of {len(report.models)} rankers on {d['data']}",
        lead=f"{d['n']:,} queries · depth {about['depth'] or 'all'} · {about['measures'][0]} · seed {d['seed']}",
        intro=[f"Attacked queries rank {lists}. All models get the same queries, edits, targets and resamples."],
        cards=[_card(report, task) for task in report.tasks],
        cards_title="Best in each task",
        flags=d["flags"],
        clear="Checked: identifiers of queries, documents and judgements fit together; every score is finite; every "
        "attack was scored afresh and kept its budget.",
        note=LEGEND,
        sections=[section for section in sections if section is not None],
        provenance=_provenance(d),
        command=d["command"],
        tables=[(f"All {len(d['figures'])} figures", _all(report))],
    ).html()


def _percents(estimate: Estimate) -> str:
    return "–" if math.isnan(estimate.value) else f"{100 * estimate.value:+.1f} %"


def _card(report: RobustnessReport, task: Mapping[str, Any]) -> Card:
    best = task["best"]
    if best is None:
        return Card(task["title"], "", how="no model has a figure")
    figure = report.headline(task["name"], best)
    value = _percents(figure) if task["higher_is_better"] else f"{figure.value:.2f}"
    mark = "clearly" if task["clear"] else "not clearly"
    spread = interval_text(figure, share=task["higher_is_better"])
    return Card(f"{task['title']}: {best}", value, f"{mark} best · {spread}".rstrip(" ·"))


def _taxonomy(report: RobustnessReport) -> Section:
    rows = report.table()
    header = list(rows[0])
    told = [
        f"{task['title']}: {task['headline']} of {report.document['details']['measures'][0]}." for task in report.tasks
    ]
    table = Table(header, [[row[name] for name in header] for row in rows], numeric=tuple(range(1, len(header))))
    return Section("The five tasks" if len(report.tasks) == 5 else "The tasks", [" ".join(told)], [], table)


def _conditions(report: RobustnessReport, task: Mapping[str, Any]) -> list[str]:
    measure, start = report.document["details"]["measures"][0], f"{task['name']}/{report.models[0]}/"
    end = f"/{measure}/drop"
    return [k[len(start) : -len(end)] for k in report.document["figures"] if k.startswith(start) and k.endswith(end)]


def _values(report: RobustnessReport, task: Mapping[str, Any], model: str, what: str) -> np.ndarray | None:
    """Return (Q,) values of an array, averaged over its rows."""
    measure = report.document["details"]["measures"][0]
    found = report.arrays.get(f"{plain(task['name'])}/{plain(model)}/{plain(what)}/{plain(measure)}")
    return None if found is None else found.mean(axis=0)


def _section(report: RobustnessReport, task: Mapping[str, Any]) -> Section | None:
    conditions = _conditions(report, task)
    return _drops(report, task, conditions) if conditions else _variance(report, task)


def _variance(report: RobustnessReport, task: Mapping[str, Any]) -> Section | None:
    measure = report.document["details"]["measures"][0]
    values = {model: _values(report, task, model, "clean") for model in report.models}
    known = {model: v for model, v in values.items() if v is not None}
    if not known:
        return None
    keys = ("mean", "variance", "spread", "failures", "worst 10 %", "worst 25 %")
    rows = []
    for model in report.models:
        figures = [report[f"{task['name']}/{model}/{measure}/{key}"] for key in keys]
        rows.append(
            [
                model,
                *(
                    percent(f.value) if k == "failures" else f"{f.value:.3f}"
                    for k, f in zip(keys, figures, strict=True)
                ),
            ]
        )
    points = {model: (float(rows[i][1]), float(rows[i][2])) for i, model in enumerate(report.models)}
    alt = "; ".join(f"{row[0]}: mean {row[1]}, variance {row[2]}" for row in rows)
    header = ["model", "mean P", "variance V", "sqrt(V) / P", "poorly served", "worst 10 %", "worst 25 %"]
    return Section(
        task["title"],
        ["A low variance is worth something at a comparable mean only: a ranker that is bad everywhere varies least."],
        [
            plot_of(sorted_plot(known, measure), f"{alt}.", task["name"], "queries", "Every query, worst first."),
            plot_of(
                plots.spread_plot(points, measure), f"{alt}.", task["name"], "spread", "To the lower right is better."
            ),
        ],
        Table(header, rows, numeric=(1, 2, 3, 4, 5, 6)),
    )


def _drops(report: RobustnessReport, task: Mapping[str, Any], conditions: list[str]) -> Section:
    measure, name = report.document["details"]["measures"][0], task["name"]
    drops = {m: [report[f"{name}/{m}/{c}/{measure}/drop"] for c in conditions] for m in report.models}
    rows = []
    for condition in conditions:
        for model in report.models:
            home, away, drop = (report[f"{name}/{model}/{condition}/{measure}/{w}"] for w in ("home", "away", "drop"))
            known = report.document["figures"].get(f"{name}/{model}/{condition}/{measure}/known")
            reference = "–" if known is None or known["value"] is None else f"{known['value']:.3f}"
            values = (f"{home.value:.3f}", f"{away.value:.3f}", _percents(drop), interval_text(drop), reference)
            rows.append([condition, model, *values])
    alt = "; ".join(f"{row[1]}, {row[0]}: {row[4]}" for row in rows)
    shown = [plot_of(plots.drop_plot(conditions, drops), f"{alt}.", name, "drops", "Drop rates, 95 % intervals.")]
    change = _changes(report, task, conditions)
    if change is not None:
        shown.append(change)
    climb, more = _climb(report, task, conditions)
    header = ["condition", "model", "home", "away", "drop rate", "95 % interval", "trained for it"]
    notes = [_unchanged(report, task, conditions)]
    return Section(
        task["title"],
        [f"{task['headline'].capitalize()} decides; {BEST} and {TIED} above."],
        [*shown, *climb],
        Table(header, rows, numeric=(2, 3, 4, 5, 6)),
        more,
        [note for note in notes if note],
    )


def _unchanged(report: RobustnessReport, task: Mapping[str, Any], conditions: list[str]) -> str:
    told = []
    for condition in conditions:
        key = f"{task['name']}/{report.models[0]}/{condition}/unchanged queries"
        if key in report.document["figures"] and report[key].value > 0:
            told.append(f"{condition}: {percent(report[key].value)}")
    return f"Queries that an operator could not change count as they are ({'; '.join(told)})." if told else ""


def _changes(report: RobustnessReport, task: Mapping[str, Any], conditions: list[str]) -> Plot | None:
    """Plot the mean change of each query over conditions, where home and away are the same queries."""
    found = {}
    for model in report.models:
        home = _values(report, task, model, "home")
        away = [_values(report, task, model, condition) for condition in conditions]
        if home is not None and all(a is not None and len(a) == len(home) for a in away):
            found[model] = np.mean([a for a in away if a is not None], axis=0) - home
    if not found:
        return None
    measure = report.document["details"]["measures"][0]
    alt = "; ".join(f"{model}: worse for {percent(float((v < 0).mean()))} of queries" for model, v in found.items())
    caption = "What became of each query, mean over conditions."
    return plot_of(plots.change_plot(found, measure), f"{alt}.", task["name"], "change", caption)


def _climb(report: RobustnessReport, task: Mapping[str, Any], conditions: list[str]) -> tuple[list[Plot], list[Table]]:
    settings = report.document["threat"][task["name"]]
    k = settings.get("k")
    if k is None:
        return [], []
    keys = ("targets", "success", "boost", f"top {k}", "words changed", "calls")
    rows, shown = [], []
    for condition in conditions:
        ranks = {}
        for model in report.models:
            array = report.arrays.get(f"{plain(task['name'])}/{plain(model)}/{plain(condition)}/rank")
            if array is not None and len(array):
                ranks[model] = array
            prefix = f"{task['name']}/{model}/{condition}"
            known = {key: report[f"{prefix}/{key}"] for key in keys if f"{prefix}/{key}" in report.document["figures"]}
            shares = {
                key: percent(known[key].value) for key in ("success", f"top {k}", "words changed") if key in known
            }
            rows.append(
                [
                    condition,
                    model,
                    *(shares.get(key) or (number(known[key].value) if key in known else "–") for key in keys),
                ]
            )
        if ranks:
            alt = "; ".join(f"{m}: {percent(float((r[:, 1] <= k).mean()))} enter the top {k}" for m, r in ranks.items())
            figure = plots.climb_plot(ranks, k)
            shown.append(
                plot_of(figure, f"{alt}.", task["name"], f"climb-{condition}", f"{condition}: where pages end.")
            )
    header = ["attack", "model", "targets", "climbed", "places climbed", f"into the top {k}", "words changed", "calls"]
    return shown, [Table(header, rows, "What attackers got", numeric=(2, 3, 4, 5, 6, 7))]


def _paired(report: RobustnessReport) -> Section | None:
    rows = paired_rows(report.tasks)
    if not rows:
        return None
    text = (
        "Differences of the compared figures, a less b, with bootstrap intervals that resample the same queries for "
        "both; tests on what each query keeps of its model's own mean (in the variance task: on effectiveness itself). "
        "They are not corrected for their number."
    )
    header = ["task", "a", "b", "difference", "95 % interval", "p (t)", "p (randomisation)"]
    return Section("Pairs of models", [text], [], Table(header, rows, numeric=(3, 4, 5, 6)))


def _provenance(d: Mapping[str, Any]) -> list[tuple[str, str]]:
    about = d["details"]
    models = [f"{n}: {m['about'] or 'no description'}, SHA-256 {m['sha256'][:12]}…" for n, m in about["models"].items()]
    trainings = max(m["trainings"] for m in about["models"].values())
    return [
        ("models", "; ".join(models)),
        ("collection", f"{d['data']}, SHA-256 {d['data_sha256'][:16]}…"),
        (
            "first stage",
            "a run of the user's" if about["own_run"] else f"{about['first_stage']}, {about['candidates']}",
        ),
        ("training", f"{about['folds'] or 'no'} folds, {trainings} trainings of each recipe"),
        ("tasks", "; ".join(f"{name}: {what}" for name, what in d["threat"].items())),
        ("seed", f"{d['seed']}: no figure depends on the order of queries, models or tasks"),
        ("time", f"{d['seconds']:,.1f} s"),
        ("versions", ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("files", "result.json (all figures), per_query.npz (every query), runs/ (TREC runs)"),
    ]


def _all(report: RobustnessReport) -> Table:
    rows = []
    for name in report.document["figures"]:
        e = report[name]
        shown = "–" if math.isnan(e.value) else number(e.value)
        rows.append([name, shown, interval_text(e, share=False), f"{e.n:,}"])
    return Table(["figure", "value", "95 % interval", "n"], rows, numeric=(1, 2, 3))
