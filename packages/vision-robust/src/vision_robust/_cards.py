"""The methods of this package, as data."""

from robust_core.methods import MethodCard

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="adaptive-smoothing",
        title="Adaptive smoothing: the accuracy of one classifier and the robustness of another",
        paper="Bai, Anderson, Kim and Sojoudi 2023, arXiv 2301.12554",
        kind="defence",
        task="image classification",
        target="vision_robust.inference.adaptive_smoothing:MixedClassifier",
        example="vision_robust._examples:adaptive_smoothing",
        claim="vision_robust.claims.adaptive_smoothing",
    ),
    MethodCard(
        slug="fast-certified-training",
        title="Fast certified training: certificates from interval bounds within a short warm-up",
        paper="Shi, Wang, Zhang, Yi and Hsieh 2021, arXiv 2103.17268",
        kind="objective",
        task="image classification",
        target="vision_robust.certified.fast_certified_training:FastCertified",
        example="vision_robust._examples:fast_certified_training",
        claim="vision_robust.claims.fast_certified_training",
    ),
    MethodCard(
        slug="dual-randomized-smoothing",
        title="Dual randomized smoothing: the certificates of two interleaved halves of an image",
        paper="Xia, Yu, Jiang and Ding 2024, arXiv 2404.09586",
        kind="certifier",
        task="image classification",
        target="vision_robust.certified.dual_randomized_smoothing:DualSmoothing",
        example="vision_robust._examples:dual_randomized_smoothing",
        claim="vision_robust.claims.dual_randomized_smoothing",
    ),
    MethodCard(
        slug="zo-ae-ds",
        title="ZO-AE-DS: a certifiably robust classifier from one that only answers queries",
        paper="Zhang, Yao, Jia, Yi, Hong, Chang and Liu 2022, arXiv 2203.14195",
        kind="objective",
        task="image classification",
        target="vision_robust.certified.zo_ae_ds:QueryStability",
        example="vision_robust._examples:zo_ae_ds",
        claim="vision_robust.claims.zo_ae_ds",
    ),
    MethodCard(
        slug="robust-counterfactuals",
        title="Robust counterfactuals: advice that still holds after the model was retrained",
        paper="Hamman, Noorani, Mishra, Magazzeni and Dutta 2023, arXiv 2305.11997",
        kind="measure",
        task="classification of tables and images",
        target="vision_robust.explain.robust_counterfactuals:TRexIterative",
        example="vision_robust._examples:robust_counterfactuals",
        claim="vision_robust.claims.robust_counterfactuals",
    ),
)
