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
)
