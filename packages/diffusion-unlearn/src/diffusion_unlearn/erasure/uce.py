"""Unified Concept Editing: concepts erased in closed form, in seconds, without a picture.

Gandikota, Orgad, Belinkov, Materzynska and Bau 2024 (arXiv 2308.14761). Every cross-attention key and value matrix
``W`` is replaced by the minimiser of (:func:`edited_weight`)

    lambda |W* - W|^2 + s_e sum_i |W* c_i - W g_i|^2 + s_p sum_j |W* c_j - W c_j|^2

over encodings c_i of what is erased, g_i of what takes its place and c_j of what is preserved, each at the last token
of the prompt (:func:`last_tokens`). Defaults (lambda 0.5, both scales 1, the empty prompt as guide) are those of the
released code. Departures: the system is solved, not inverted, and in float64.

Left out: debiasing and moderation, which are other choices of g_i. UNets of XL pipelines are edited alike: their
cross-attention reads both encoders side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import check_concepts, check_retained, edited_copy, unet_parameters
from diffusion_unlearn.pipeline import TextToImage
from robust_core.checks import check_number

__all__ = ["UCE", "edited_weight", "last_tokens"]

ILL_CONDITIONED = 1e6
"""Condition number above which a warning is given: far concepts, or many, drag unrelated prompts along."""


def edited_weight(
    weight: Tensor,
    erased: Tensor,
    guides: Tensor,
    preserved: Tensor,
    *,
    ridge: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Tensor:
    """Return (O, I) float64, the minimiser.

    Args:
        weight: (O, I) W.
        erased: (E, I) c_i.
        guides: (E, I) g_i.
        preserved: (P, I) c_j.
        ridge: lambda.
        erase_scale: s_e.
        preserve_scale: s_p.
    """
    w, c, g, kept = (part.detach().double() for part in (weight, erased, guides, preserved))
    gram = erase_scale * c.T @ c + preserve_scale * kept.T @ kept + ridge * torch.eye(w.shape[1]).to(w)
    # W* = W + s_e W (g - c)^T c gram^-1: the same minimiser, without the cancellation of two large terms
    change = erase_scale * w @ (g - c).T @ c
    return w + torch.linalg.solve(gram, change.T).T


def last_tokens(parts: TextToImage, prompts: Sequence[str]) -> Tensor:
    """Return (B, D): what the encoders say at the last token of each prompt (the start mark of the empty one)."""
    parts.ids(prompts)
    last = torch.tensor([len(parts.tokenizers[0](prompt).input_ids) - 2 for prompt in prompts], device=parts.device)
    with torch.no_grad():
        hidden = parts.encode(prompts).hidden
    return hidden[torch.arange(len(prompts), device=hidden.device), last]


@dataclass(frozen=True)
class UCE:
    """Erase concepts from the cross-attention of a pipeline.

    Args:
        concept: one concept or several.
        guide: what each is replaced by: one text for all, or one for each.
        preserve: prompts whose keys and values shall stay.
        ridge: lambda, above 0.
        erase_scale: s_e.
        preserve_scale: s_p.
    """

    concept: str | Sequence[str]
    guide: str | Sequence[str] = ""
    preserve: Sequence[str] = ()
    ridge: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0

    def __post_init__(self) -> None:
        concepts = check_concepts(self.concept)
        check_retained(self.preserve, concepts, name="preserve")
        if not isinstance(self.guide, str) and len(self.guide) != len(concepts):
            raise ValueError(f"guide has {len(self.guide)} texts for {len(concepts)} concepts; one each, or one text")
        check_number("ridge", self.ridge, low=0, open_low=True)
        check_number("erase_scale", self.erase_scale, low=0)
        check_number("preserve_scale", self.preserve_scale, low=0)

    def fit(self, pipe: Any, *, copy: bool = True) -> Any:
        """Return the edited pipeline, which shares all parts but the UNet with ``pipe``.

        Args:
            pipe: a pipeline with a text encoder and a UNet.
            copy: False changes ``pipe`` itself.
        """
        parts = TextToImage(pipe)
        concepts = check_concepts(self.concept)
        guides = [self.guide] * len(concepts) if isinstance(self.guide, str) else list(self.guide)
        erased, instead = last_tokens(parts, concepts), last_tokens(parts, guides)
        preserved = last_tokens(parts, self.preserve) if self.preserve else erased[:0]
        self._warn(erased, preserved)
        result = edited_copy(pipe, "unet") if copy else pipe
        for name, parameter in unet_parameters(result.unet, "kv").items():
            if not name.endswith("weight"):
                continue
            self._edit(parameter, erased, instead, preserved)
        return result

    def _edit(self, parameter: nn.Parameter, erased: Tensor, guides: Tensor, preserved: Tensor) -> None:
        found = edited_weight(
            parameter, erased, guides, preserved,
            ridge=self.ridge, erase_scale=self.erase_scale, preserve_scale=self.preserve_scale,
        )  # fmt: skip
        with torch.no_grad():
            parameter.copy_(found)

    def _warn(self, erased: Tensor, preserved: Tensor) -> None:
        c, kept = erased.double(), preserved.double()
        gram = self.erase_scale * c.T @ c + self.preserve_scale * kept.T @ kept
        condition = (float(torch.linalg.eigvalsh(gram)[-1]) + self.ridge) / self.ridge
        if condition > ILL_CONDITIONED:
            warnings.warn(
                f"the condition number of the edit is {condition:.1e}: pictures of other prompts may suffer; raise "
                f"ridge (now {self.ridge:g}), lower erase_scale, or erase fewer concepts at a time",
                stacklevel=3,
            )
