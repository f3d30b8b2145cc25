"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="certdr",
        title="CertDR: no document outside the top K enters it by synonyms, certified for any ranker",
        paper="Wu, Zhang, Guo, Chen, Fan, de Rijke and Cheng 2022, arXiv 2209.06691",
        kind="measure",
        task="ranking",
        target="ir_robust.certdr:certify_run",
        example="ir_robust._examples:certdr",
        claim="ir_robust.claims.certdr",
    ),
    MethodCard(
        slug="ranking-robustness",
        title="Five tasks for rankers: worst queries, unseen types and corpora, attacked queries and documents",
        paper="Wu, Zhang, Guo, Fan and Cheng 2022, arXiv 2108.05018",
        kind="measure",
        task="ranking",
        target="ir_robust.ranking_robustness:RobustnessBenchmark",
        example="ir_robust._examples:ranking_robustness",
        claim="ir_robust.claims.ranking_robustness",
    ),
)
