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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ir_robust.formats import Run, lines, read_run, write_run
from robust_core.claim import versions
from robust_core.evaluation.documents import DocumentReport
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.io import parse_json, write_atomic

__all__ = ["KINDS", "RankingReport", "new_document"]

KINDS = ("evaluation", "attack", "certificate")
SCHEMA = "robust.ranking"
EDITS, RUNS = "edits.jsonl", "runs"
LIBRARIES = ("bm25s", "ir-measures", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class RankingReport(DocumentReport):
    """A finished measurement.

    Attributes:
        document: JSON; figures are ``"reranked/nDCG@10"`` ….
        arrays: numbers for each query or attacked document; their names stand in ``document["details"]``.
        runs: name -> run.
        edits: what an attack did, a row for each document.
    """

    schemas = tuple(f"{SCHEMA}-{kind}/1" for kind in KINDS)
    npz: ClassVar = {"arrays": "per_sample.npz"}

    arrays: dict[str, np.ndarray]
    runs: dict[str, Run] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """``"evaluation"``, ``"attack"`` or ``"certificate"``."""
        return self.document["schema"].removeprefix(f"{SCHEMA}-").partition("/")[0]

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from ir_robust.pages import render  # matplotlib is imported for it

        return render(self)

    def _write_more(self, folder: Path) -> None:
        if self.runs:
            (folder / RUNS).mkdir(exist_ok=True)
        for name, run in self.runs.items():
            write_run(folder / RUNS / f"{name}.trec", run, tag=name)
        if self.edits:
            write_atomic(folder / EDITS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.edits))

    @classmethod
    def _read_more(cls, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        del document
        rows = lines(folder / EDITS) if (folder / EDITS).is_file() else ()
        return {
            "runs": {path.stem: read_run(path) for path in sorted((folder / RUNS).glob("*.trec"))},
            "edits": [parse_json(line.encode(), source=f"{folder / EDITS}:{number}") for number, line in rows],
        }


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
        "versions": versions(*LIBRARIES),
        "command": command,
        "details": dict(details or {}),
    }
