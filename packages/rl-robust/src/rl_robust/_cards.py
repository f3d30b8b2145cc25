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
    MethodCard(
        slug="srpo",
        title="SRPO: a language model that answers and improves its answers, whoever wrote the preference data",
        paper="Choi, Ahmadian, Geist, Pietquin and Gheshlaghi Azar 2025, arXiv 2406.01660",
        kind="objective",
        task="preference training",
        target="rl_robust.preference.srpo:SRPOObjective",
        example="rl_robust._examples:srpo",
        claim="rl_robust.claims.srpo",
    ),
    MethodCard(
        slug="non-dominated-policies",
        title="Non-dominated policies: a small set of policies, and a bandit that picks the one for each episode",
        paper="Liu, Deng, Sun, Liang and Huang 2024, arXiv 2402.12673",
        kind="measure",
        task="reinforcement learning",
        target="rl_robust.nondominated.discovery:discover_policies",
        example="rl_robust._examples:non_dominated_policies",
        claim="rl_robust.claims.non_dominated_policies",
    ),
    MethodCard(
        slug="lipschitz-policies",
        title="Controllers cloned from an expert under a certified bound on how far they amplify measurement errors",
        paper="Al Makdah, Krishnan and Pasqualetti 2021, arXiv 2103.16629",
        kind="policy",
        task="reinforcement learning",
        target="rl_robust.lipschitz:fit_lipschitz_policy",
        example="rl_robust._examples:lipschitz_policies",
        claim="rl_robust.claims.lipschitz_policies",
    ),
    MethodCard(
        slug="per-step-negatives",
        title="Training on the step that lost the answer, found by roll-outs in wrong solutions",
        paper="Setlur, Garg, Geng, Garg, Smith and Kumar 2024, arXiv 2406.14532",
        kind="objective",
        task="language modelling",
        target="rl_robust.preference.per_step:PerStepDPO",
        example="rl_robust._examples:per_step_negatives",
        claim="rl_robust.claims.per_step_negatives",
        extras=("preference",),
    ),
)
