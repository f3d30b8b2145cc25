"""What every measurement of a ranker leaves: one JSON document, numbers for each query, runs, edited texts, one page.

====================  ==================================================================================
``result.json``       the document: figures with their intervals, threat, flags, versions, command
``per_sample.npz``    numbers for each query (or attacked document), for tests of one's own
``runs/*.trec``       runs, as attacked or smoothed
``edits.jsonl``       what an attack did to each document: one JSON object in a line
``report.html``       one self-contained page, made from the files above alone
====================  ==================================================================================
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ir_robust.formats import Run, lines, read_run, write_run
from robust_core.claim import versions
from robust_core.errors import UntrustedFileError
from robust_core.evaluation.arrays import load_arrays, save_arrays
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.io import parse_json, read_json, write_atomic, write_json

__all__ = ["KINDS", "RankingReport", "new_document"]

KINDS = ("evaluation", "attack", "certificate")
SCHEMA = "robust.ranking"
RESULT, ARRAYS, PAGE, EDITS, RUNS = "result.json", "per_sample.npz", "report.html", "edits.jsonl", "runs"
LIBRARIES = ("bm25s", "ir-measures", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class RankingReport:
    """A finished measurement.

    Attributes:
        document: JSON; ``figures`` maps names to {"value", "interval", "n"}.
        arrays: numbers for each query or attacked document; their names stand in ``document["details"]``.
        runs: name -> run.
        edits: what an attack did, a row for each document.
    """

    document: dict[str, Any]
    arrays: dict[str, np.ndarray]
    runs: dict[str, Run] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Estimate:
        """Return a figure, e.g. ``report["reranked/nDCG@10"]``."""
        entry = self.document["figures"][name]
        interval = None if entry["interval"] is None else (entry["interval"][0], entry["interval"][1])
        return Estimate(math.nan if entry["value"] is None else entry["value"], interval, entry["n"])

    @property
    def kind(self) -> str:
        """``"evaluation"``, ``"attack"`` or ``"certificate"``."""
        return self.document["schema"].removeprefix(f"{SCHEMA}-").partition("/")[0]

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from ir_robust.pages import render  # matplotlib is imported for it

        return render(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the files into a folder, each atomically, the document last."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder / ARRAYS, self.arrays)
        if self.runs:
            (folder / RUNS).mkdir(exist_ok=True)
        for name, run in self.runs.items():
            write_run(folder / RUNS / f"{name}.trec", run, tag=name)
        if self.edits:
            write_atomic(folder / EDITS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.edits))
        write_atomic(folder / PAGE, self.html())
        write_json(folder / RESULT, self.document)
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> RankingReport:
        """Read what :meth:`save` wrote.

        Raises:
            UntrustedFileError: the folder holds something else.
        """
        folder = Path(directory)
        document = read_json(folder / RESULT)
        known = [f"{SCHEMA}-{kind}/1" for kind in KINDS]
        if not isinstance(document, dict) or document.get("schema") not in known:
            raise UntrustedFileError(f"{folder / RESULT}: no report of a schema among {', '.join(known)}")
        runs = {path.stem: read_run(path) for path in sorted((folder / RUNS).glob("*.trec"))}
        edits = []
        if (folder / EDITS).is_file():
            for number, line in lines(folder / EDITS):
                edits.append(parse_json(line.encode(), source=f"{folder / EDITS}:{number}"))
        return cls(document, load_arrays(folder / ARRAYS), runs, edits)


def new_document(
    kind: str,
    *,
    figures: Mapping[str, Estimate],
    model: str,
    model_sha256: str,
    data: str,
    data_sha256: str,
    n: int,
    seed: int,
    started: float,
    threat: Mapping[str, Any] | None = None,
    device: str = "cpu",
    flags: Sequence[str] = (),
    command: str = "",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the document of a report.

    Args:
        kind: one of :data:`KINDS`.
        figures: name -> figure.
        model: what was measured.
        model_sha256: its identity.
        data: what it was measured on.
        data_sha256: of the files.
        n: queries.
        seed: of everything random.
        started: ``time.perf_counter()`` at the beginning.
        threat: what the attacker may do.
        device: where the ranker ran.
        flags: reasons to distrust the figures.
        command: how to run it again.
        details: everything else, as plain JSON.
    """
    return {
        "schema": f"{SCHEMA}-{kind}/1",
        "threat": None if threat is None else dict(threat),
        "model": model,
        "model_sha256": model_sha256,
        "data": data,
        "data_sha256": data_sha256,
        "n": n,
        "seed": seed,
        "device": device,
        "figures": {name: estimate.as_json() for name, estimate in figures.items()},
        "flags": list(flags),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": {**versions(), **_libraries()},
        "command": command,
        "details": dict(details or {}),
    }


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
