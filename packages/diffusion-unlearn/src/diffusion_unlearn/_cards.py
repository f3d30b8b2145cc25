"""The methods of this package, as data."""

from robust_core.methods import MethodCard

_TASK = "text-to-image generation"
_EXAMPLES = "diffusion_unlearn._examples"

CARDS: tuple[MethodCard, ...] = (
    MethodCard(
        slug="advunlearn",
        title="AdvUnlearn: a concept erased together with the prompts that would bring it back",
        paper="Zhang et al., NeurIPS 2024 (arXiv:2405.15234)",
        kind="objective",
        task=_TASK,
        target="diffusion_unlearn.erasure.advunlearn:AdvUnlearn",
        example=f"{_EXAMPLES}:advunlearn",
        claim="diffusion_unlearn.claims.advunlearn",
    ),
    MethodCard(
        slug="esd",
        title="Erased Stable Diffusion: predict for a concept the opposite of what tells it apart",
        paper="Gandikota et al., ICCV 2023 (arXiv:2303.07345)",
        kind="objective",
        task=_TASK,
        target="diffusion_unlearn.erasure.esd:ESD",
        example=f"{_EXAMPLES}:esd",
    ),
    MethodCard(
        slug="concept-ablation",
        title="Concept ablation: the prompts of a concept come to draw an anchor",
        paper="Kumari et al., ICCV 2023 (arXiv:2303.13516)",
        kind="objective",
        task=_TASK,
        target="diffusion_unlearn.erasure.ca:ConceptAblation",
        example=f"{_EXAMPLES}:concept_ablation",
    ),
    MethodCard(
        slug="forget-me-not",
        title="Forget-Me-Not: pictures of a concept pay no attention to its words",
        paper="Zhang et al., 2023 (arXiv:2303.17591)",
        kind="objective",
        task=_TASK,
        target="diffusion_unlearn.erasure.fmn:FMN",
        example=f"{_EXAMPLES}:fmn",
    ),
    MethodCard(
        slug="unlearndiffatk",
        title="UnlearnDiffAtk: tokens beside a prompt bring an erased concept back, found with the victim alone",
        paper="Zhang et al., ECCV 2024 (arXiv:2310.11868)",
        kind="attack",
        task=_TASK,
        target="diffusion_unlearn.attacks.unlearndiffatk:UnlearnDiffAtk",
        example="diffusion_unlearn.attacks._examples:unlearndiffatk",
        claim="diffusion_unlearn.claims.unlearndiffatk",
    ),
    MethodCard(
        slug="p4d",
        title="P4D: tokens with which an erased model says what the original says of the concept",
        paper="Chin et al., ICML 2024 (arXiv:2309.06135)",
        kind="attack",
        task=_TASK,
        target="diffusion_unlearn.attacks.p4d:P4D",
        example="diffusion_unlearn.attacks._examples:p4d",
    ),
    MethodCard(
        slug="erasure-evaluation",
        title="Erasure report: the concept before, after and under attack by a named judge, and what the erasure cost",
        paper="Zhang et al., ECCV 2024 (arXiv:2310.11868); Heusel et al., NeurIPS 2017 (arXiv:1706.08500)",
        kind="measure",
        task=_TASK,
        target="diffusion_unlearn.evaluation:evaluate_erasure",
        example=f"{_EXAMPLES}:erasure_evaluation",
    ),
)
