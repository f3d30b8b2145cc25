"""Safe latent diffusion: every step of the sampler is pushed away from a concept; no weight changes.

Schramowski, Brack, Deiseroth and Kersting 2023 (arXiv 2211.05105). With the predictions e_0, e_p, e_s under the empty
prompt, the prompt and a text that names the concept, a step is drawn with (:class:`SafeGuidance`)

    mu    = min(scale |e_p - e_s|, 1) where e_p - e_s < threshold, else 0          elementwise
    gamma = mu (e_s - e_0) + momentum_scale nu
    nu    = momentum nu + (1 - momentum) gamma
    e     = e_0 + g (e_p - e_0 - gamma)           from step number ``warmup`` on; before it without gamma

``SLD(concept).fit(pipe)`` returns a pipeline of the same parts that draws so. It is called as every other, also by
attacks and evaluations; but there is nothing to save, and whoever holds the weights leaves it out. Its ``unet`` is the
unguided one: attacks with gradients transfer from it. Without guidance (a scale of 1 or below) there is no effect.

Settings are the four published ones (:data:`STRENGTHS`). The warm-up counts steps, as published; some later code
compares it with the scheduler's time, 999 .. 0, which ends it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import check_concepts, edited_copy
from diffusion_unlearn.pipeline import Conditioning, TextToImage, UnsupportedPipelineError
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["SLD", "STRENGTHS", "SafeGuidance", "safety_direction"]

STRENGTHS: dict[str, tuple[int, float, float, float, float]] = {
    "weak": (15, 200.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}
"""Name -> (warmup, scale, threshold, momentum_scale, momentum)."""


def safety_direction(told: Tensor, untold: Tensor, safe: Tensor, scale: float, threshold: float) -> Tensor:
    """Return (B, C, H, W) ``mu (e_s - e_0)``, before momentum.

    Args:
        told: (B, C, H, W) predictions under the prompt.
        untold: under the empty prompt.
        safe: under the text that names the concept.
        scale: s_s.
        threshold: lambda.
    """
    apart = told - safe
    mu = torch.where(apart < threshold, (scale * apart.abs()).clamp(max=1.0), 0.0)
    return mu * (safe - untold)


@dataclass
class SafeGuidance:
    """One run of the sampler: what is subtracted, step by step.

    Args:
        method: settings.
        momentum: nu; None before the first step.
        step: number of the next step.
    """

    method: SLD
    momentum: Tensor | None = None
    step: int = 0

    def __call__(self, told: Tensor, untold: Tensor, safe: Tensor) -> Tensor:
        """Return (B, C, H, W) gamma, or 0 during the warm-up, and go one step on."""
        method = self.method
        nu = torch.zeros_like(told) if self.momentum is None else self.momentum
        direction = safety_direction(told, untold, safe, method.scale, method.threshold)
        gamma = direction + method.momentum_scale * nu
        self.momentum = method.momentum * nu + (1 - method.momentum) * gamma
        self.step += 1
        return gamma if self.step > method.warmup else torch.zeros_like(gamma)


@dataclass(frozen=True)
class SLD:
    """Draw away from a concept; see the module. Defaults are ``STRENGTHS["medium"]``.

    Args:
        concept: words for it, one text or several, which are joined by commas.
        warmup: steps before guidance begins.
        scale: s_s.
        threshold: lambda.
        momentum_scale: s_m.
        momentum: beta, in [0, 1).
    """

    concept: str | Sequence[str]
    warmup: int = 10
    scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum: float = 0.4

    def __post_init__(self) -> None:
        check_concepts(self.concept)
        check_count("warmup", self.warmup, low=0)
        for name in ("scale", "momentum_scale"):
            check_number(name, getattr(self, name), low=0)
        check_number("threshold", self.threshold)
        check_number("momentum", self.momentum, low=0, high=1, open_high=True)

    @classmethod
    def of_strength(cls, concept: str | Sequence[str], strength: str = "medium") -> SLD:
        """Return one of the published settings: ``"weak"``, ``"medium"``, ``"strong"`` or ``"max"``."""
        return cls(concept, *STRENGTHS[check_choice("strength", strength, tuple(STRENGTHS))])

    def fit(self, pipe: Any) -> Any:
        """Return a pipeline of the same parts that draws with safe guidance.

        Raises:
            UnsupportedPipelineError: a part is missing.
            ValueError: the concept does not fit into the encoder's length.
        """
        parts = TextToImage(pipe)
        text = ", ".join(check_concepts(self.concept))
        parts.ids([text])
        made = edited_copy(pipe)
        made.__class__ = type(f"Safe{type(pipe).__name__}", (_Safe, type(pipe)), {"_sld": (self, text)})
        return made


class _Safe:
    """What is put in front of a class of pipelines."""

    _sld: tuple[SLD, str]

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        method, text = self._sld
        pipe: Any = self
        plain = pipe.unet
        with torch.no_grad():
            condition = TextToImage(pipe).encode([text])
        pipe.unet = _GuidedPredictor(plain, SafeGuidance(method), condition, lambda: pipe.do_classifier_free_guidance)
        try:
            return super().__call__(*arguments, **more)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            pipe.unet = plain

    def save_pretrained(self, *arguments: Any, **more: Any) -> None:
        """Refuse: the weights are the unedited ones.

        Raises:
            UnsupportedPipelineError: always.
        """
        raise UnsupportedPipelineError(
            "safe latent diffusion changes how pictures are drawn, not the weights, so that a folder would hold none "
            "of it: save the pipeline it was made of, and call SLD(...).fit(pipe) after loading"
        )


class _GuidedPredictor(nn.Module):
    """Stands in for a UNet during one run of the sampler; each call sees untold and told rows."""

    def __init__(self, unet: Any, guidance: SafeGuidance, condition: Conditioning, guided: Any) -> None:
        super().__init__()
        self.unet, self.guidance, self.condition, self.guided = unet, guidance, condition, guided

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *, return_dict: bool = True, **more: Any
    ) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        found = self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **more)[0]
        if self.guided():
            n = len(sample) // 2
            other, condition = dict(more), self.condition.expand(n)
            if condition.pooled is not None:
                other["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": condition.sizes}
            hidden = condition.hidden.to(encoder_hidden_states.dtype)
            safe = self.unet(sample[:n], timestep, encoder_hidden_states=hidden, return_dict=False, **other)[0]
            untold, told = found.chunk(2)
            found = torch.cat([untold, told - self.guidance(told, untold, safe)])
        return UNet2DConditionOutput(sample=found) if return_dict else (found,)
