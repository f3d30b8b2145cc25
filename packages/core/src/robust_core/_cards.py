"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="comp-sum-losses",
        title="Comp-sum losses and their smooth adversarial form",
        paper="Mao, Mohri and Zhong 2023, arXiv 2304.07288",
        kind="objective",
        task="classification",
        target="robust_core.losses:SmoothAdvCompSumLoss",
        example="robust_core._examples:comp_sum_losses",
        claim="robust_core.claims.comp_sum_losses",
    ),
    MethodCard(
        slug="randomized-smoothing",
        title="Randomized smoothing with early stopping",
        paper="Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918",
        kind="certifier",
        task="classification",
        target="robust_core.certificates:Smoothing",
        example="robust_core._examples:randomized_smoothing",
    ),
)
