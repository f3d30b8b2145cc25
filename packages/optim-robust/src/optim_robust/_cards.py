"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="federated-reconnaissance",
        title="Federated reconnaissance: devices share new classes as averaged prototypes, and forget none",
        paper="Hendryx, KC, Walls and Morrison 2021, arXiv 2109.00150",
        kind="objective",
        task="federated class-incremental classification",
        target="optim_robust.federated.reconnaissance:PrototypeClassifier",
        example="optim_robust._examples:federated_reconnaissance",
        claim="optim_robust.claims.federated_reconnaissance",
    ),
    MethodCard(
        slug="monna",
        title="MoNNA: learning with peers that may lie, by local momentum and nearest-neighbour averages",
        paper="Farhadkhani, Guerraoui, Gupta, Hoang, Pinot and Stephan 2023, arXiv 2209.10931",
        kind="aggregator",
        task="collaborative learning",
        target="optim_robust.byzantine.monna:MoNNA",
        example="optim_robust._examples:monna",
        claim="optim_robust.claims.monna",
    ),
    MethodCard(
        slug="neur2ro",
        title="Neur2RO: two-stage robust decisions in seconds, with the inner problem learned and the answer certified",
        paper="Dumouchelle, Julien, Kurtz and Khalil 2024, arXiv 2310.04345",
        kind="solver",
        task="two-stage robust optimisation with integer recourse",
        target="optim_robust.neur2ro:Neur2RO",
        example="optim_robust._examples:neur2ro",
        claim="optim_robust.claims.neur2ro",
    ),
)
