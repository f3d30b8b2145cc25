"""CertDR: top-K certificates for any ranker against synonyms.

    graph = SynonymGraph.from_json("neighbours.json", words=vocabulary_of(data.docs.values())).clustered(100)
    table = PerturbationTable(graph)
    print(table.report(data.docs.values()))            # what can be promised at all, before anything is drawn
    report = certify_run(ranker, table, data, run)     # CRQ@K and a row for each query

The owner of a page may write synonyms to push it into the first K results. CertDR wraps *any* ranker into a smoothed
one, whose score is the mean over documents with their words drawn anew, and states for a query and a K that no document
now outside the top K can enter it, whatever words of the table are used.

Paper: Wu, Zhang, Guo, Chen, Fan, de Rijke, Cheng, "Certified Robustness to Word Substitution Ranking Attack for Neural
Ranking Models", CIKM 2022, arXiv 2209.06691, on the smoothing of Ye, Gong and Liu (ACL 2020).

* graphs of synonyms: :mod:`ir_robust.synonyms`; sets and overlaps (theorem 4.1): :mod:`ir_robust.tables`
* smoothed ranker and noise-augmented training: :mod:`~ir_robust.certdr.smoothed`
* certificate (proposition 4.2), joint confidence, what is deployed: :mod:`~ir_robust.certdr.certificate`
* early decisions: :mod:`~ir_robust.certdr.early`; whole runs: :mod:`~ir_robust.certdr.run`
* the deterministic alternative: :mod:`~ir_robust.certdr.representative`

Ours, not the paper's: the overlap by the larger size and its proof, the rule per document, joint confidence over the
list, bounds that heed the variance, early decisions, predictions that keep incumbents. Nothing is promised about the
order inside the top K, about edits of the query or of documents inside, nor about insertions and deletions. Left out:
certificates of several edited incumbents. Defaults: 1,000 samples, sets of at most 100 words and lists of 100 documents
are the paper's; alpha = 0.05 is, here, of a query's certificates together.
"""

from ir_robust.certdr.certificate import (
    BOUNDS,
    RULES,
    Prediction,
    TopKCertificate,
    certified_robust_queries,
    certify_top_k,
    mc_error,
    predict_top_k,
    score_bounds,
)
from ir_robust.certdr.early import certify_list
from ir_robust.certdr.representative import RepresentativeRanker
from ir_robust.certdr.run import certify_run, fit_squash
from ir_robust.certdr.smoothed import NoiseAugment, SmoothedRanker, SmoothedScores, Squash
from ir_robust.rankers.vectors import vocabulary_of
from ir_robust.synonyms import GraphReport, SynonymGraph
from ir_robust.tables import PerturbationTable, TableReport, deviation

__all__ = [
    "BOUNDS",
    "RULES",
    "GraphReport",
    "NoiseAugment",
    "PerturbationTable",
    "Prediction",
    "RepresentativeRanker",
    "SmoothedRanker",
    "SmoothedScores",
    "Squash",
    "SynonymGraph",
    "TableReport",
    "TopKCertificate",
    "certified_robust_queries",
    "certify_list",
    "certify_run",
    "certify_top_k",
    "deviation",
    "fit_squash",
    "mc_error",
    "predict_top_k",
    "score_bounds",
    "vocabulary_of",
]
