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
)
