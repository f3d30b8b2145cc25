"""The verbs of ``robust ranking``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_core.cli import console

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify and evaluate your own ranker.")


@app.callback()
def _root() -> None:
    """Attack, certify and evaluate your own ranker."""


@app.command()
def retrieve(
    corpus: Annotated[
        str, typer.Option("--corpus", "-c", help="lee, cranfield, vaswani, beir:FOLDER, irds:ID, or a file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="TREC run to write.")],
    topics: Annotated[Path | None, typer.Option("--topics", help="Queries, where --corpus is a file.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Documents for each query.")] = 100,
    k1: Annotated[float, typer.Option(min=0, help="Saturation of repeated words.")] = 1.2,
    b: Annotated[float, typer.Option(min=0, max=1, help="Discount of long documents.")] = 0.75,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")] = False,
) -> None:
    """Write the BM25 run that a re-ranker starts from."""
    from ir_robust.collection import load_collection, read_collection
    from ir_robust.formats import write_run
    from ir_robust.rankers import BM25Index

    data = load_collection(corpus) if topics is None else read_collection(corpus, topics)
    with console.progress() as report:
        run = BM25Index(data.docs, k1=k1, b=b).retrieve(data, depth=depth, on_step=report)
    write_run(out, run, tag="bm25")
    if json:
        console.emit_json(
            {"schema": "robust.run/1", "run": str(out), "queries": len(run), "depth": depth, "data": data.name}
        )
    else:
        console.info(f"{len(run)} queries, at most {depth} documents each: {out}")
