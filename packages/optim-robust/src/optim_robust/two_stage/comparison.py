"""Methods on problems, side by side: one document, one page, and what is told while it runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optim_robust.solver import Status
from optim_robust.two_stage.page import page
from optim_robust.two_stage.problem import TwoStageProblem
from optim_robust.two_stage.solution import Step, TwoStageSolution
from optim_robust.two_stage.tracking import OnStep
from robust_core.claim import versions
from robust_core.evaluation.documents import save_document

__all__ = ["Comparison", "Entry", "Method", "compare", "fingerprint"]


class Method(Protocol):
    """Anything that solves two-stage problems."""

    def solve(
        self, problem: TwoStageProblem, *, time_limit: float | None = None, on_step: OnStep | None = None
    ) -> TwoStageSolution:
        """Return a solution."""
        ...


@dataclass(frozen=True)
class Entry:
    """One method on one problem."""

    problem: TwoStageProblem
    method: str
    solution: TwoStageSolution


def fingerprint(problem: TwoStageProblem) -> str:
    """Return the SHA-256 of all figures of a problem: costs, rows, bounds and the uncertainty set's box."""
    digest = hashlib.sha256()
    sparse = (*(v.slopes for v in (problem.c, problem.d, problem.h, problem.c0)), problem.A)
    for affine in (problem.T, problem.W):
        sparse += (affine.constant, *affine.slopes.values())
    dense = [v.constant for v in (problem.c, problem.d, problem.h, problem.c0)]
    dense += [problem.b, problem.uncertainty.lower, problem.uncertainty.upper]
    for stage in (problem.x, problem.y):
        dense += [stage.lower, stage.upper, stage.integer]
    for matrix in sparse:
        dense += [matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data]
    for array in dense:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def compare(
    problems: Sequence[TwoStageProblem],
    methods: dict[str, Method],
    *,
    time_limit: float | None = None,
    on_step: Callable[[str, str, Step], object] | None = None,
) -> list[Entry]:
    """Run every method on every problem, in order.

    Args:
        problems: what to solve; names should differ.
        methods: by the names that are shown.
        time_limit: seconds for each run.
        on_step: called with (problem, method, step) while it goes on.
    """
    entries = []
    for problem in problems:
        for name, method in methods.items():

            def tell(step: Step, problem: TwoStageProblem = problem, name: str = name) -> None:
                if on_step is not None:
                    on_step(problem.name, name, step)

            entries.append(Entry(problem, name, method.solve(problem, time_limit=time_limit, on_step=tell)))
    return entries


@dataclass(frozen=True)
class Comparison:
    """The entries as one document and one page.

    Attributes:
        entries: what was run.
        command: as the user typed it.
        seconds: all of it.
        time_limit: seconds for each run.
        seed: of everything random.
    """

    entries: Sequence[Entry]
    command: str
    seconds: float
    time_limit: float
    seed: int = 0

    @property
    def document(self) -> dict[str, Any]:
        """Everything, as JSON; objectives in the users' own sense (profits positive)."""
        names = list(dict.fromkeys(entry.problem.name for entry in self.entries))
        prints = [fingerprint(p) for p in dict.fromkeys(entry.problem for entry in self.entries)]
        methods = list(dict.fromkeys(entry.method for entry in self.entries))
        figures: dict[str, Any] = {}
        for entry in self.entries:
            row = _row(entry)
            for key in ("objective", "bound", "gap", "seconds"):
                name = f"{entry.problem.name}/{entry.method}/{key}"
                figures[name] = {"value": row[key], "interval": None, "n": 1}
        return {
            "schema": "robust.two-stage/1",
            "threat": {"sets": [_set(p) for p in dict.fromkeys(entry.problem for entry in self.entries)]},
            "model": ", ".join(methods),
            "model_sha256": hashlib.sha256(" ".join(methods).encode()).hexdigest(),
            "data": ", ".join(names),
            "data_sha256": hashlib.sha256(" ".join(prints).encode()).hexdigest(),
            "n": len(names),
            "seed": self.seed,
            "device": "cpu",
            "figures": figures,
            "flags": self._flags(),
            "seconds": round(self.seconds, 3),
            "versions": versions("highspy", "pyomo"),
            "command": self.command,
            "details": {"time_limit": self.time_limit, "runs": [_row(entry) for entry in self.entries]},
        }

    def _flags(self) -> list[str]:
        flags = []
        for entry in self.entries:
            solution, where = entry.solution, f"{entry.problem.name}, {entry.method}"
            if "note" in solution.info:
                flags.append(f"{where}: {solution.info['note']}")
            if solution.x is not None and not solution.certified:
                flags.append(f"{where}: the worst case is not certified, only bounded")
            if solution.status == Status.ERROR:
                flags.append(f"{where}: the solver failed numerically")
        return flags

    def save(self, folder: Path) -> None:
        """Write ``result.json`` and ``report.html``."""
        document = self.document
        save_document(folder, document, page(document))


def _set(problem: TwoStageProblem) -> str:
    return f"{problem.name}: {type(problem.uncertainty).__name__} in {problem.dim} dimensions"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _row(entry: Entry) -> dict[str, Any]:
    """Return one run as JSON: infinities and NaN become None."""
    solution, problem = entry.solution, entry.problem
    chosen = {} if solution.x is None else dict(zip(problem.x.names, solution.x.tolist(), strict=True))
    info = {k: _finite(v) if isinstance(v, float) else v for k, v in solution.info.items()}
    return {
        "problem": problem.name,
        "method": entry.method,
        "status": str(solution.status),
        "sense": problem.sense,
        "objective": _finite(problem.sense * solution.worst_case),
        "guaranteed": _finite(problem.sense * solution.upper),
        "bound": _finite(problem.sense * solution.lower_bound),
        "gap": _finite(solution.gap),
        "certified": solution.certified,
        "seconds": round(solution.seconds, 4),
        "scenarios": len(solution.scenarios),
        "x": chosen,
        "history": [
            [s.seconds, _finite(problem.sense * s.lower_bound), _finite(problem.sense * s.worst_case)]
            for s in solution.history
        ],
        "info": info,
    }
