"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="policy-smoothing",
        title="Policy smoothing: the return that is left whatever an adaptive attacker of observations does",
        paper="Kumar, Levine and Feizi 2022, arXiv 2106.11420",
        kind="measure",
        task="reinforcement learning",
        target="rl_robust.smoothing:certify_return",
        example="rl_robust._examples:policy_smoothing",
        claim="rl_robust.claims.policy_smoothing",
    ),
)
