"""Small real cases, for the conformance kit: parts of a real pipeline before training, whose pictures do not matter."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from robust_core.testing import Case

__all__ = ["advunlearn", "concept_ablation", "erasure_evaluation", "esd", "fmn"]


@cache
def _pipeline() -> Any:
    from diffusion_unlearn.digits import build_pipeline

    return build_pipeline(generator=0)


def _erasure(method: Any, **drawing: Any) -> Case:
    """Return an objective that draws its own states; ``batch`` holds the step still, so that the loss can fall."""
    from diffusion_unlearn.erasure.parts import edited_copy

    pipe = edited_copy(_pipeline(), method.component)
    objective = method.objective(pipe, pool=method.pool(pipe, **drawing))
    for parameter in pipe.unet.parameters():
        parameter.requires_grad_(True)
    extra = {"draws_its_data": True, "unlabelled": True, "batch": {"step": 0, "seed": 0}, "n_classes": 2, "lr": 1e-2}
    return Case(objective, objective.model, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), extra)


def esd() -> Case:
    """Return the objective of ESD on the cross-attention."""
    from diffusion_unlearn.erasure import ESD

    return _erasure(ESD("three", batch_size=4), n=1, steps=3)


def advunlearn() -> Case:
    """Return the objective of AdvUnlearn, its attacker included."""
    from diffusion_unlearn.erasure import AdvUnlearn
    from robust_core.attacks.tokens import SoftTokens

    method = AdvUnlearn("three", ("one", "two"), warmup=0, batch_size=4, retain_batch=2, attack=SoftTokens(2, lr=0.05))
    return _erasure(method, n=1, steps=3)


def fmn() -> Case:
    """Return the objective of Forget-Me-Not."""
    from diffusion_unlearn.erasure import FMN

    return _erasure(FMN("a photo of three", "three", ends=False), n=1, steps=2)


def concept_ablation() -> Case:
    """Return the objective of concept ablation."""
    from diffusion_unlearn.erasure import ConceptAblation

    return _erasure(ConceptAblation("three", "two"), n=2, steps=2)


def erasure_evaluation() -> Case:
    """Return the figures of another pipeline against the first, with an attack, retained prompts and a distance."""
    from diffusion_unlearn.attacks import RandomPrefix
    from diffusion_unlearn.digits import build_pipeline
    from diffusion_unlearn.evaluation import evaluate_erasure
    from diffusion_unlearn.judges import judge_digit
    from diffusion_unlearn.measuring import PixelFeatures
    from diffusion_unlearn.prompts import PromptSet

    before, after = _pipeline(), build_pipeline(generator=1)
    prompts = PromptSet.of(["three", "a photo of three"])
    others = PromptSet.of(["one", "zwei", "cinco"], labels=[1, 2, 5], seeds=[7, 8, 9])

    def measure() -> dict[str, float]:
        report = evaluate_erasure(
            after, prompts, judge_digit("three"), original=before, attacks={"random": RandomPrefix(k=1, n_tries=2)},
            retain=others, features=PixelFeatures(), guidance=2.0, steps=2, n_shown=0,
        )  # fmt: skip
        return {name: figure["value"] for name, figure in report.document["figures"].items()}

    return Case(measure, after.unet, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
