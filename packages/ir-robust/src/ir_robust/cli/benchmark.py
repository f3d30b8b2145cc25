"""``robust ranking benchmark``: several rankers on the five tasks of robustness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ir_robust.cli.app import (
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
from ir_robust.cli.words import ATTACKS, BM25, TASKS, check, listed
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.words import check_word

__all__ = ["benchmark"]


@app.command()
def benchmark(
    corpus: Corpus,
    ranker: Annotated[list[str], typer.Option("--ranker", "-r", help="Rankers side by side; as of rerank.")],
    qrels: QrelsFile = None,
    run: RunFile = None,
    topics: Topics = None,
    fields: Fields = "text",
    empty: Empty = "refuse",
    tasks: Annotated[str, typer.Option(help=f"With commas: {', '.join(TASKS)}.")] = "variance,query,document",
    other: Annotated[list[str] | None, typer.Option("--other-corpus", help="For the corpus task; a named one.")] = None,
    typos: Annotated[str, typer.Option(help="Typos in a query, with commas.")] = "1,2",
    attacks: Annotated[str, typer.Option(help=f"On documents: {', '.join(ATTACKS)}.")] = "spam",
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of a document's words that may change.")] = 0.1,
    insertions: Annotated[int, typer.Option(min=0, help="Words that may be added.")] = 10,
    synonyms: Synonyms = None,
    edges: Edges = "mutual",
    threshold: Threshold = 0.9,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="The top that attackers of documents want.")] = 10,
    measures: Annotated[str, typer.Option(help="The first one is compared.")] = "nDCG@10,AP@100",
    depth: Depth = 100,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[Path | None, typer.Option(help="Folder of finished blocks.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, report.html, runs.")] = None,
    json: Json = False,
) -> None:
    """Compare rankers on worst queries, new types of queries, other corpora, attacked queries and documents."""
    files = {"--run": run, "--qrels": qrels}
    check(corpus=corpus, topics=topics, empty=empty, files=files, folder=out, attacks=attacks, synonyms=synonyms)
    check_word("--edges", edges, ("mutual", "either"))
    for words in ranker:
        check(ranker=words)
    for words in other or []:
        check(corpus=words)
    chosen = listed("--tasks", tasks, TASKS)
    if "corpus" in chosen and not other:
        raise ValueError("--tasks corpus: --other-corpus is needed, such as vaswani or beir:FOLDER")
    counts = listed("--typos", typos)
    if not all(word.isdigit() and int(word) > 0 for word in counts):
        raise ValueError(f"--typos {typos!r}: whole numbers above 0 are needed")
    from ir_robust.cli.setting import attacks_of, collection_of, graph_of, ranker_of
    from ir_robust.collection import load_collection
    from ir_robust.formats import read_run
    from ir_robust.perturb import RemoveStopWords, Shuffle, Typos
    from ir_robust.rankers import BM25Index, BM25Ranker
    from ir_robust.ranking_robustness import (
        DocumentAttackTask,
        PerCorpus,
        QueryAttackTask,
        RobustnessBenchmark,
        UnseenCorpusTask,
        UnseenQueryTypeTask,
        VarianceTask,
        length_types,
    )  # fmt: skip
    from robust_core.device import choose_device

    data = collection_of(corpus, topics, qrels, fields=fields, empty=empty)
    machine = choose_device(device)
    graph = None if synonyms is None else graph_of(synonyms, data, edges=edges, threshold=threshold, cap=None)
    budget: dict[str, Any] = {"share": share, "most": None, "insertions": insertions}
    makers: dict[str, Any] = {
        "variance": VarianceTask,
        "type": lambda: UnseenQueryTypeTask(length_types(data.queries)),
        "corpus": lambda: UnseenCorpusTask({words: load_collection(words) for words in other or []}),
        "query": lambda: QueryAttackTask((*(Typos(int(word)) for word in counts), RemoveStopWords(), Shuffle())),
        "document": lambda: DocumentAttackTask(
            attacks_of(attacks, data, graph=graph, **budget), ranks=(k + 1, k + 20), k=k
        ),
    }
    names: dict[str, Any] = {}
    for words in ranker:
        bm25 = words == BM25
        names[words] = (
            PerCorpus(lambda docs: BM25Ranker(BM25Index(docs)), "bm25s") if bm25 else ranker_of(words, data, machine)
        )
    bench = RobustnessBenchmark([makers[task]() for task in chosen], listed("--measures", measures), depth=depth,
                                generator=seed)  # fmt: skip
    with console.progress() as report:
        found = bench.run(names, data, run=None if run is None else read_run(run), resume=resume, command=command(),
                          on_step=report)  # fmt: skip
    if out is not None:
        found.save(out)
    if json:
        console.emit_json(found.document)
        return
    rows = found.table()
    console.table(list(rows[0]), [list(row.values()) for row in rows], title=data.name)
    for flag in found.document["flags"]:
        console.info(f"flag: {flag}")
    if out is not None:
        console.info(f"report: {out / 'report.html'}")
