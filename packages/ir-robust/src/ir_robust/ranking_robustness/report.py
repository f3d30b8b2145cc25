"""What the benchmark found: the taxonomy's table, every figure, the runs behind them, and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ir_robust.formats import write_run
from ir_robust.ranking_robustness.session import Kept
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.metrics.estimate import Estimate

__all__ = ["SCHEMA", "RobustnessReport", "plain"]

SCHEMA = "robust.ranking-robustness/1"
RUNS = "runs"
BEST, TIED = "★", "☆"
LEGEND = (
    f"{BEST} best of its task, clearly: the 95 % intervals of its paired differences leave out 0; {TIED} best, but not "
    "clearly so. Brackets are 95 % bootstrap intervals over queries; trainings are averaged."
)


def plain(text: str) -> str:
    """Return a name with only such signs as names of arrays and files may have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-=+(),@ ") else "-" for c in text)


@dataclass(frozen=True)
class RobustnessReport(DocumentReport):
    """The report card of several models.

    Attributes:
        document: JSON; figures are ``task/model/figure``, such as ``"variance/bm25/nDCG@10/mean"``; ``details`` holds
            tasks, winners and paired tests.
        arrays: ``task/model/condition/measure`` -> (R, Q) values of queries.
        kept: the rankings behind the figures; empty in a report that was read from a folder.
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"arrays": "per_query.npz"}

    arrays: dict[str, np.ndarray]
    kept: tuple[Kept, ...] = field(default=(), repr=False)

    @property
    def models(self) -> list[str]:
        """The models, in the order given."""
        return list(self.document["details"]["models"])

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks: name, title, what is compared, the best model and whether it is clear, paired tests."""
        return list(self.document["details"]["tasks"])

    @property
    def wins(self) -> dict[str, list[str]]:
        """Model -> tasks in which it is best; those that are not clear among them."""
        return {name: [task["title"] for task in self.tasks if task["best"] == name] for name in self.models}

    def headline(self, task: str, model: str) -> Estimate:
        """Return the figure of a task that is compared."""
        return self[f"{task}/{model}/headline"]

    def table(self) -> list[dict[str, str]]:
        """Return the taxonomy's table: a row for each model, a column for each task, as text."""
        measure = self.document["details"]["measures"][0]
        rows = []
        for model in self.models:
            row = {"model": model}
            for task in self.tasks:
                row[task["title"]] = self._cell(task, model, measure)
            rows.append({**row, "best in": str(len(self.wins[model]))})
        return rows

    def _cell(self, task: dict[str, Any], model: str, measure: str) -> str:
        mark = "" if task["best"] != model else f" {BEST if task['clear'] else TIED}"
        figure = self.headline(task["name"], model)
        if math.isnan(figure.value):
            return "–"
        if not task["higher_is_better"]:
            mean, spread = (self[f"{task['name']}/{model}/{measure}/{what}"] for what in ("mean", "variance"))
            return f"{figure.value:.2f}{mark} (P {mean.value:.3f}, V {spread.value:.3f})"
        ends = "" if figure.interval is None else " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in figure.interval))
        return f"{100 * figure.value:+.1f} %{ends}{mark}"

    def to_markdown(self) -> str:
        """Return the table as Markdown, with what its columns mean."""
        rows = self.table()
        header = list(rows[0])
        lines = [f"| {' | '.join(header)} |", f"|{'|'.join('---' for _ in header)}|"]
        lines += [f"| {' | '.join(_cell(row[name]) for name in header)} |" for row in rows]
        measure = self.document["details"]["measures"][0]
        told = [f"**{task['title']}**: {task['headline']} of {measure}" for task in self.tasks]
        return "\n".join([*lines, "", "; ".join(told) + ".", "", LEGEND]) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from ir_robust.ranking_robustness.page import render

        return render(self)

    def save_runs(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write every ranking as a TREC run, ``CONDITION/MODEL-TRAINING.trec``.

        Raises:
            ValueError: the report was read from a folder, which holds the runs already.
        """
        if not self.kept:
            raise ValueError("this report holds no rankings: it was read from a folder")
        written = []
        for kept in self.kept:
            folder = Path(directory) / plain(kept.condition).replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{plain(kept.model)}-{plain(kept.part)}".replace(" ", "-")
            written.append(write_run(folder / f"{name}.trec", kept.run(), tag=plain(kept.model).replace(" ", "-")))
        return written

    def save(self, directory: str | os.PathLike[str], *, runs: bool = True) -> Path:
        """Write ``result.json``, ``per_query.npz``, ``report.html`` and ``runs/`` into a folder, the document last.

        Args:
            directory: made if it is not there.
            runs: whether to write the rankings, if the report holds them.
        """
        return super().save(directory) if runs else replace(self, kept=()).save(directory)

    def _write_more(self, folder: Path) -> None:
        if self.kept:
            self.save_runs(folder / RUNS)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def paired_rows(tasks: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return (task, a, b, difference, interval, p of t, p of randomisation) of every pair, as text."""
    rows = []
    for task in tasks:
        for pair in task["paired"]:
            ends = "–" if pair["interval"] is None else "[{:+.3f}, {:+.3f}]".format(*pair["interval"])
            p = ["–" if pair[key] is None else f"{pair[key]:.4f}" for key in ("p_t", "p_randomisation")]
            gap = "–" if pair["difference"] is None else f"{pair['difference']:+.3f}"
            rows.append([task["title"], pair["a"], pair["b"], gap, ends, *p])
    return rows
