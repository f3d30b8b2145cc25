"""``robust ranking train``: a small ranker from judged queries, or a transformer tuned on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir_robust.cli.app import (
    Cap,
    Corpus,
    Depth,
    Edges,
    Empty,
    Fields,
    QrelsFile,
    RunFile,
    Synonyms,
    Threshold,
    Topics,
    app,
)  # fmt: skip
from ir_robust.cli.words import FOLDERS, MODELS, check, check_vectors, split_ranker
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.words import check_word

if TYPE_CHECKING:
    from ir_robust.collection import Collection

__all__ = ["train"]

LOSSES = ("hinge", "ranknet")


@app.command()
def train(
    corpus: Corpus,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help=f"New: {', '.join(MODELS)}; or one to tune: cross:FOLDER, sbert:FOLDER, …"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the ranker; then use --ranker saved:FOLDER.")],
    run: RunFile = None,
    qrels: QrelsFile = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    vectors: Annotated[
        str | None, typer.Option(help="Of words: FILE of text, or FOLDER of a transformer; random if left out.")
    ] = None,
    loss: Annotated[str, typer.Option(help=f"Of pairs: {', '.join(LOSSES)}.")] = "hinge",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 5,
    lr: Annotated[float | None, typer.Option(help="Step size; 1e-3 for new models, 2e-5 for transformers.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 64,
    negatives: Annotated[int, typer.Option(min=1, help="For each relevant document.")] = 10,
    synonyms: Synonyms = None,
    edges: Edges = "mutual",
    threshold: Threshold = 0.9,
    cap: Cap = 100,
    depth: Depth = 100,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[Path | None, typer.Option(help="Folder of checkpoints: the same command goes on there.")] = None,
    json: Json = False,
) -> None:
    """Train a ranker on judged queries; --synonyms draws the documents' words anew, as certificates want it."""
    check(corpus=corpus, topics=topics, empty=empty, files={"--run": run, "--qrels": qrels}, folder=out,
          synonyms=synonyms)  # fmt: skip
    fresh = model in MODELS
    if not fresh:
        if split_ranker(model)[0] not in FOLDERS:
            raise ValueError(f"--model {model!r}: choose one of {', '.join(MODELS)}, or a ranker in a folder to tune")
        check(ranker=model)
    check_vectors(vectors)
    check_word("--loss", loss, LOSSES)
    check_word("--edges", edges, ("mutual", "either"))
    if lr is not None and not lr > 0:
        raise ValueError(f"--lr {lr}: a number above 0 is needed")
    from ir_robust.certdr import NoiseAugment
    from ir_robust.cli.setting import collection_of, graph_of, ranker_of, run_of
    from ir_robust.rankers import fit_ranker, save_ranker, training_pairs
    from ir_robust.tables import PerturbationTable
    from robust_core.device import choose_device

    data = collection_of(corpus, topics, qrels, fields=fields, empty=empty)
    if not data.judged():
        raise ValueError(f"--corpus {corpus}: no judgements to learn from; --qrels is needed")
    chosen = choose_device(device)
    made = _made(model, vectors, data, seed).to(chosen) if fresh else ranker_of(model, data, chosen)
    noise = None
    if synonyms is not None:
        graph = graph_of(synonyms, data, edges=edges, threshold=threshold, cap=cap)
        noise = NoiseAugment(PerturbationTable(graph, cap), generator=seed)
    options: dict[str, Any] = {} if resume is None else {"checkpoint": resume}
    with console.progress() as report:
        first = run_of(run, data, depth, report)
        pairs = training_pairs(data, first, ranks=(min(10, depth), depth), n_negatives=negatives, generator=seed)
        fit_ranker(
            made, data, pairs, loss=loss, epochs=epochs, lr=lr or (1e-3 if fresh else 2e-5), batch_size=batch_size,
            augment=noise, generator=seed, on_step=report, **options,
        )  # fmt: skip
    about = {
        "model": model, "data": data.name, "data_sha256": data.sha256, "queries": len(data.judged()),
        "pairs": len(pairs.triples), "epochs": epochs, "loss": loss, "seed": seed, "noise": synonyms,
    }  # fmt: skip
    save_ranker(out, made.eval(), about)
    if json:
        console.emit_json({"schema": "robust.trained/1", **about, "ranker": f"saved:{out}", "command": command()})
    else:
        console.info(f"{about['pairs']:,} pairs of {about['queries']} queries; next: --ranker saved:{out}")


def _made(kind: str, vectors: str | None, data: Collection, seed: int) -> Any:
    """Return an untrained model on vectors of the collection's words."""
    from ir_robust.rankers import idf_of, piece_vectors, random_vectors, read_vectors, vocabulary_of
    from ir_robust.rankers.saved import WORD_MODELS
    from robust_core.methods import load

    words = vocabulary_of([*data.docs.values(), *data.queries.values()])
    if vectors is None:
        table = random_vectors(words, generator=seed)
    else:
        place = Path(vectors).expanduser()
        table = piece_vectors(place, words) if place.is_dir() else read_vectors(place, words)
    options: dict[str, Any] = {"idf": idf_of(table.vocabulary, data.docs.values())} if kind == "drmm" else {}
    return load(WORD_MODELS[kind])(table, generator=seed, **options)
