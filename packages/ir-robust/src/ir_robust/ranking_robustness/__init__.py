"""Are rankers robust? Five tasks, one material for all models, one report card for each.

    benchmark = RobustnessBenchmark(
        [
            VarianceTask(),
            UnseenQueryTypeTask(length_types(data.queries)),
            UnseenCorpusTask({"vaswani": load_collection("vaswani")}),
            QueryAttackTask((Typos(1), Typos(2), RemoveStopWords())),
            DocumentAttackTask(TermSpamming(WordBudget(share=0, insertions=5))),
        ]
    )
    rankers = {"bm25": PerCorpus(lambda docs: BM25Ranker(BM25Index(docs))), "mine": my_ranker, "knrm": Trained(fit)}
    print(benchmark.run(rankers, data).to_markdown())

What it buys: average effectiveness hides the queries that fail badly, the types and corpora that training has not
shown, mistyped queries and spammed pages. Each becomes a figure with an interval, comparable between models because
every model gets the same queries, edits, targets and resamples; and a defence can show what it changes.

Wu, Zhang, Guo, Fan and Cheng 2022, ACM TOIS 41(2), arXiv 2108.05018.

===========================================  =================================================================
``V = mean (M(q) - P)^2`` (T1)                :func:`.metrics.variance`, :func:`.metrics.normalised`
``DR = (P_new - P_ref) / P_ref`` (T2 to T5)  :func:`.metrics.drop_rate`
success, places climbed, top k (T5)          :class:`.document_task.DocumentAttackTask`
``M(q)``                                     ir-measures (:mod:`ir_robust.measures`)
===========================================  =================================================================

Reconstructed, for the article's text was not at hand: the formulas above (its abstract names the families), the data of
each task and the parameters of every attack, which are ours. Ours too: T1 is compared by ``sqrt(V) / P``, because V
alone is least for a ranker that is bad everywhere (on the Lee corpus a random ranker's V, 0.015, is below a good
bi-encoder's); models are trained by folds, each query tested unseen; drop rates carry bootstrap intervals of the ratio;
a best model is called clear only if its paired differences leave out 0. Left out: one number over all tasks, for which
there is no common unit. Pre-processing decides how typos reach a model (sub-words, unknown words, missing terms): say
what it does in ``about``, it stands in the report.
"""

from ir_robust.ranking_robustness.benchmark import RobustnessBenchmark
from ir_robust.ranking_robustness.document_task import DocumentAttackTask
from ir_robust.ranking_robustness.metrics import (
    PairedTest,
    cvar,
    drop_rate,
    failure_rate,
    mean_value,
    normalised,
    paired_test,
    rank_boost,
    relative_spread,
    top_k_entry,
    variance,
)
from ir_robust.ranking_robustness.models import PerCorpus, Trained
from ir_robust.ranking_robustness.report import RobustnessReport
from ir_robust.ranking_robustness.tasks import (
    QueryAttackTask,
    Task,
    UnseenCorpusTask,
    UnseenQueryTypeTask,
    VarianceTask,
    length_types,
)

__all__ = [
    "DocumentAttackTask",
    "PairedTest",
    "PerCorpus",
    "QueryAttackTask",
    "RobustnessBenchmark",
    "RobustnessReport",
    "Task",
    "Trained",
    "UnseenCorpusTask",
    "UnseenQueryTypeTask",
    "VarianceTask",
    "cvar",
    "drop_rate",
    "failure_rate",
    "length_types",
    "mean_value",
    "normalised",
    "paired_test",
    "rank_boost",
    "relative_spread",
    "top_k_entry",
    "variance",
]
