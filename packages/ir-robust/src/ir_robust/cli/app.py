"""The verbs of ``robust ranking``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir_robust.cli.words import ATTACKS, BOUNDS, EMPTY, FOLDERS, READY, RULES, check, listed
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from robust_core.words import check_word

if TYPE_CHECKING:
    pass

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify and evaluate your own ranker.")

Corpus = Annotated[
    str, typer.Option("--corpus", "-c", help="lee, cranfield, vaswani, beir:FOLDER, irds:ID, or a file.")
]
Topics = Annotated[Path | None, typer.Option("--topics", help="Queries, where --corpus is a file.")]
QrelsFile = Annotated[Path | None, typer.Option("--qrels", help="Judgements; a named collection brings its own.")]
Fields = Annotated[str, typer.Option(help="Tags or keys that make up a document's text, with commas.")]
Empty = Annotated[str, typer.Option(help=f"Documents without text: {', '.join(EMPTY)}.")]
RankerWords = Annotated[
    str,
    typer.Option(
        "--ranker",
        "-r",
        help=f"{', '.join(READY)}, {', '.join(f'{k}:FOLDER' for k in FOLDERS)} or package.module:name.",
    ),
]
RunFile = Annotated[Path | None, typer.Option("--run", help="TREC run of the first stage; BM25's if left out.")]
Depth = Annotated[int, typer.Option(min=1, help="Documents of each list.")]
Measures = Annotated[str, typer.Option(help="As ir-measures names them, with commas.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents in a call of the ranker; no figure depends on it.")]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of a document's words that may be changed.")]
Most = Annotated[int | None, typer.Option(min=0, help="No more than so many words in any case.")]
Synonyms = Annotated[
    str | None, typer.Option(help="What may stand for what: json:FILE, wordnet:FOLDER or vectors:FILE.")
]
Edges = Annotated[str, typer.Option(help="mutual (both words name each other) or either.")]
Threshold = Annotated[float, typer.Option(help="Least similarity of vectors that are synonyms.")]
Cap = Annotated[int, typer.Option(min=1, help="Words that one word is drawn from, at most.")]
Resume = Annotated[Path | None, typer.Option(help="File of finished queries: the same command goes on from there.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, report.html, runs and more.")]
OutRun = Annotated[Path, typer.Option("--out", "-o", help="TREC run to write.")]
MEASURES = "nDCG@10,AP@100,RR@10"


@app.callback()
def _root() -> None:
    """Attack, certify and evaluate your own ranker."""


def _told(run: Path, n_queries: int, depth: int, data: str, json: bool) -> None:
    if json:
        about = {"schema": "robust.run/1", "run": str(run), "queries": n_queries, "depth": depth, "data": data}
        console.emit_json({**about, "command": command()})
    else:
        console.info(f"{n_queries} queries, at most {depth} documents each: {run}")


@app.command()
def retrieve(
    corpus: Corpus,
    out: OutRun,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    depth: Depth = 100,
    k1: Annotated[float, typer.Option(min=0, help="Saturation of repeated words.")] = 1.2,
    b: Annotated[float, typer.Option(min=0, max=1, help="Discount of long documents.")] = 0.75,
    json: Json = False,
) -> None:
    """Write the BM25 run that a re-ranker starts from."""
    check(corpus=corpus, topics=topics, empty=empty, writes=out)
    from ir_robust.cli.setting import collection_of
    from ir_robust.formats import write_run
    from ir_robust.rankers import BM25Index

    data = collection_of(corpus, topics, None, fields=fields, empty=empty)
    with console.progress() as report:
        run = BM25Index(data.docs, k1=k1, b=b).retrieve(data, depth=depth, on_step=report)
    write_run(out, run, tag="bm25")
    _told(out, len(run), depth, data.name, json)


@app.command()
def rerank(
    corpus: Corpus,
    ranker: RankerWords,
    out: OutRun,
    run: RunFile = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    depth: Depth = 100,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    resume: Resume = None,
    json: Json = False,
) -> None:
    """Re-rank a run by your own ranker, and write the new run."""
    check(corpus=corpus, topics=topics, empty=empty, ranker=ranker, files={"--run": run}, writes=out, resume=resume)
    from ir_robust.cli.setting import collection_of, ranker_of, reranked, run_of
    from ir_robust.formats import write_run
    from robust_core.device import choose_device

    data = collection_of(corpus, topics, None, fields=fields, empty=empty)
    judge = ranker_of(ranker, data, choose_device(device))
    with console.progress() as report:
        first = run_of(run, data, depth, report)
        found = reranked(judge, data, first, depth=depth, batch_size=batch_size, resume=resume, on_step=report)
    write_run(out, found, tag="reranked")
    _told(out, len(found), depth, data.name, json)


@app.command()
def evaluate(
    run: Annotated[
        list[Path] | None, typer.Option("--run", help="TREC runs; others are compared with the first one.")
    ] = None,
    qrels: QrelsFile = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", "-c", help="Needed with --ranker, or instead of --qrels.")
    ] = None,
    ranker: Annotated[
        str | None, typer.Option("--ranker", "-r", help="Re-ranks the first run and is compared with it.")
    ] = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    measures: Measures = MEASURES,
    depth: Depth = 100,
    tau: Annotated[float, typer.Option(help="A query with a value at or below it counts as failed.")] = 0.1,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure runs, or your ranker against its first stage: means, worst queries, paired tests, all with intervals."""
    files = {f"--run {number}": file for number, file in enumerate(run or [], 1)}
    check(corpus=corpus, topics=topics, empty=empty, ranker=ranker, files={**files, "--qrels": qrels}, folder=out,
          resume=resume)  # fmt: skip
    if ranker is not None and corpus is None:
        raise ValueError("--ranker needs --corpus, the texts that it reads")
    if corpus is None and (qrels is None or not run):
        raise ValueError("--run and --qrels are needed, or a --corpus that brings its judgements")
    from ir_robust.cli.setting import collection_of, ranker_of, reranked, run_of, runs_of, same_documents
    from ir_robust.evaluation import evaluate_runs
    from ir_robust.formats import read_qrels
    from ir_robust.ranking_robustness.models import digest
    from robust_core.device import choose_device

    runs, about = runs_of(run or []), {}
    with console.progress() as report:
        if corpus is None:
            judged = read_qrels(qrels or "")
            about["data"] = qrels.name if qrels is not None else ""
        else:
            data = collection_of(corpus, topics, qrels, fields=fields, empty=empty)
            judged = data.qrels
            about |= {"data": data.name, "data_sha256": data.sha256 or None}
            runs = runs or {"bm25": run_of(None, data, depth, report)}
            # both lists hold the same documents, else the depth and not the ranker would make the difference
            runs = {name: same_documents(r, data, None if ranker is None else depth) for name, r in runs.items()}
            if ranker is not None:
                chosen = choose_device(device)
                judge = ranker_of(ranker, data, chosen)
                first = next(iter(runs.values()))
                found = reranked(judge, data, first, depth=depth, batch_size=batch_size, resume=resume, on_step=report)
                runs["reranked"] = found
                about |= {"model": ranker, "model_sha256": digest(judge), "device": str(chosen)}
    if not judged:
        raise ValueError(f"--corpus {corpus}: no judgements; --qrels is needed")
    result = evaluate_runs(
        runs, judged, listed("--measures", measures), tau=tau, generator=seed, command=command(), **about
    )
    show(result, out, json)


@app.command()
def attack(
    corpus: Corpus,
    ranker: RankerWords,
    run: RunFile = None,
    qrels: QrelsFile = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    attacks: Annotated[str, typer.Option(help=f"With commas: {', '.join(ATTACKS)}.")] = "spam",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="The first K are what an attacker wants to enter.")] = 10,
    targets: Annotated[int, typer.Option(min=1, help="Documents below K that are attacked for each query.")] = 10,
    share: Share = 0.1,
    most: Most = None,
    insertions: Annotated[int, typer.Option(min=0, help="Words that may be added, by attacks that add.")] = 10,
    synonyms: Synonyms = None,
    edges: Edges = "mutual",
    threshold: Threshold = 0.9,
    cut: Annotated[int | None, typer.Option("--cap", min=1, help="Cut larger components into cliques first.")] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="Ranker whose gradients pgd and gcg take, where yours has none.")
    ] = None,
    max_queries: Annotated[int | None, typer.Option(min=1, help="Scores that a search may ask, a document.")] = None,
    measures: Measures = MEASURES,
    depth: Depth = 100,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Edit documents within a budget: how many enter the first K, how far they climb, and what a reader would see."""
    check(corpus=corpus, topics=topics, empty=empty, ranker=ranker, files={"--run": run, "--qrels": qrels}, folder=out,
          resume=resume, synonyms=synonyms, attacks=attacks)  # fmt: skip
    check(ranker=surrogate)
    check_word("--edges", edges, ("mutual", "either"))
    from ir_robust.attacks.run import attack_run
    from ir_robust.cli.setting import attacks_of, collection_of, graph_of, ranker_of, run_of
    from robust_core.device import choose_device

    data = collection_of(corpus, topics, qrels, fields=fields, empty=empty)
    chosen = choose_device(device)
    judge = ranker_of(ranker, data, chosen)
    graph = None if synonyms is None else graph_of(synonyms, data, edges=edges, threshold=threshold, cap=cut)
    found = attacks_of(
        attacks, data, share=share, most=most, insertions=insertions, graph=graph, victim=judge,
        max_queries=max_queries,
        surrogate=None if surrogate is None else ranker_of(surrogate, data, chosen),
    )  # fmt: skip
    with console.progress() as report:
        first = run_of(run, data, depth, report)
        result = attack_run(
            judge, data, first, found, k=k, depth=depth, targets=targets, measures=listed("--measures", measures),
            batch_size=batch_size, generator=seed, resume=resume, name=ranker, device=str(chosen), command=command(),
            on_step=report,
        )  # fmt: skip
    show(result, out, json)


@app.command()
def certify(
    corpus: Corpus,
    ranker: RankerWords,
    synonyms: Annotated[str, typer.Option(help="What may stand for what: json:FILE, wordnet:FOLDER or vectors:FILE.")],
    run: RunFile = None,
    qrels: QrelsFile = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, help="Which K; may be given several times.")
    ] = None,
    n_samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Noisy texts of each document, at most.")
    ] = 1000,
    alpha: Annotated[float, typer.Option(help="Failure probability of a query's certificates together.")] = 0.05,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of words that may change; all if left out.")
    ] = None,
    cap: Cap = 100,
    cluster: Annotated[bool, typer.Option(help="Cut components larger than the cap into cliques.")] = True,
    edges: Edges = "mutual",
    threshold: Threshold = 0.9,
    rule: Annotated[str, typer.Option(help=f"One of: {', '.join(RULES)} (weaker).")] = "per_document",
    bound: Annotated[str, typer.Option(help=f"Of the sampling error: {', '.join(BOUNDS)}.")] = "betting",
    measures: Measures = MEASURES,
    depth: Depth = 100,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Promise, query by query, that no edit by synonyms brings a document into the first K."""
    check(corpus=corpus, topics=topics, empty=empty, ranker=ranker, files={"--run": run, "--qrels": qrels}, folder=out,
          resume=resume, synonyms=synonyms, shares={"--alpha": alpha})  # fmt: skip
    check_word("--edges", edges, ("mutual", "either"))
    check_word("--bound", bound, BOUNDS)
    check_word("--rule", rule, RULES)
    from ir_robust.certdr.report import certify_report
    from ir_robust.cli.setting import collection_of, graph_of, ranker_of, run_of
    from ir_robust.tables import PerturbationTable
    from robust_core.device import choose_device

    data = collection_of(corpus, topics, qrels, fields=fields, empty=empty)
    chosen = choose_device(device)
    judge = ranker_of(ranker, data, chosen)
    graph = graph_of(synonyms, data, edges=edges, threshold=threshold, cap=cap if cluster else None)
    settings: dict[str, Any] = {"n_samples": n_samples, "alpha": alpha, "rule": rule, "bound": bound}
    kind = f"{edges}, cut into cliques" if cluster else edges
    with console.progress() as report:
        first = run_of(run, data, depth, report)
        result = certify_report(
            judge, PerturbationTable(graph, cap), data, first, sorted(set(k or (1, 5, 10))), budget=share,
            measures=listed("--measures", measures), depth=depth, generator=seed, source=synonyms,
            threshold=threshold if synonyms.startswith("vectors:") else None, edges=kind, name=ranker,
            device=str(chosen), command=command(), resume=resume, on_step=report, **settings,
        )  # fmt: skip
    show(result, out, json)
