"""Concept ablation: the prompts of a concept come to draw what those of an anchor draw.

Kumari, Zhang, Wang, Shechtman, Zhang and Zhu 2023 (arXiv 2303.13516). With x_t noised from pictures of the anchor c*, c
the concept's prompt, and sg the constant of what the *same* network says (no frozen copy), :func:`ablation_loss` of

    form "model"    |e(x_t|c) - sg e(x_t|c*)|^2
    form "noise"    |e(x_t|c) - noise|^2
    plus            prior_weight |e(x_t|c*) - noise|^2, at another x_t; 1 where the anchor's words are the concept's
                    too ("cat" for "grumpy cat")

Defaults are those of the released code: keys and values of the cross-attention, 100 steps of 8 pictures, learning rate
2e-6 times the batch, 200 pictures of the anchor in all (nudity: 400 steps of 4e-6, ``part="attn"``).
``part="embedding"`` trains the token embeddings that the concept's prompts have and the anchors' have not; which tokens
is our reading.

Departures: Adam without weight decay (0.01 would take a 60,000th of each weight in such a run); pictures are not
cropped, so that no mask is needed; they are encoded by the mean of the autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import UNET_PARTS, check_concepts, trained_parameters
from diffusion_unlearn.erasure.pictures import PictureErasure, PicturePool, noised
from diffusion_unlearn.erasure.training import ErasureObjective
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import stream
from robust_core.training import Batch, Loss

__all__ = ["AblationObjective", "ConceptAblation", "ablation_loss"]

FORMS = ("model", "noise")


def ablation_loss(student: Tensor, target: Tensor) -> Tensor:
    """Return (B,) mean square distances of the student's predictions from a target, which is a constant."""
    return (student - target.detach()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class ConceptAblation(PictureErasure):
    """Erase a concept by teaching its prompts an anchor; see the module.

    Args:
        concept: prompts that stand for it, one or several.
        anchor: what takes their place: one text for all, or one for each.
        form: ``"model"`` (default) or ``"noise"``.
        part: one of :data:`~diffusion_unlearn.erasure.parts.UNET_PARTS`, ``"text_encoder"`` or ``"embedding"``.
        prior_weight: weight of the loss that keeps the anchor.
        n_steps: steps of Adam.
        lr: learning rate.
        batch_size: pictures in a step.
        generator: seed.
    """

    concept: str | Sequence[str]
    anchor: str | Sequence[str]
    form: str = "model"
    part: str = "kv"
    prior_weight: float = 0.0
    n_steps: int = 100
    lr: float = 1.6e-5
    batch_size: int = 8
    generator: int | None = None

    def __post_init__(self) -> None:
        concepts, anchors = check_concepts(self.concept), self.anchors
        if len(anchors) != len(concepts):
            raise ValueError(f"anchor has {len(anchors)} texts for {len(concepts)} concepts; one each, or one text")
        same = [concept for concept, anchor in zip(concepts, anchors, strict=True) if concept == anchor]
        if same:
            raise ValueError(f"anchor {same[0]!r} is the concept itself: nothing would be erased")
        check_choice("form", self.form, FORMS)
        check_choice("part", self.part, (*UNET_PARTS, "text_encoder", "embedding"))
        check_number("prior_weight", self.prior_weight, low=0)
        check_number("lr", self.lr, low=0, open_low=True)
        check_count("n_steps", self.n_steps), check_count("batch_size", self.batch_size)

    @property
    def anchors(self) -> tuple[str, ...]:
        """The anchor of each prompt of the concept."""
        if isinstance(self.anchor, str):
            return (self.anchor,) * len(check_concepts(self.concept))
        return tuple(self.anchor)

    @property
    def pictured(self) -> tuple[Sequence[str], int]:
        """The anchors; 200 pictures in all."""
        anchors = tuple(dict.fromkeys(self.anchors))
        return anchors, -(-200 // len(anchors))

    def _objective(self, pipe: Any, pool: PicturePool) -> AblationObjective:
        return AblationObjective(pipe, self, pool)


class AblationObjective(ErasureObjective):
    """The loss of one step; made by :meth:`ConceptAblation.objective`."""

    def __init__(self, pipe: Any, method: ConceptAblation, pool: PicturePool) -> None:
        parameters = trained_parameters(pipe, method.part)
        super().__init__(pipe, method.component, parameters, generator=method.generator)
        self.method, self.pool = method, pool.to(self.parts.device)
        self.concepts, self.anchors = check_concepts(method.concept), method.anchors
        missing = [anchor for anchor in self.anchors if anchor not in pool.prompts]
        if missing:
            raise ValueError(f"pool holds no pictures of the anchor {missing[0]!r}")
        self.pictures = torch.tensor([pool.prompts.index(anchor) for anchor in self.anchors])
        self.frozen_concepts = self.frozen_conditions(self.concepts)
        self.frozen_anchors = self.frozen_conditions(self.anchors)
        self.kept = self._kept_embeddings() if method.part == "embedding" else None

    def _kept_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return (rows of the table that stay, what stands there): all but the tokens of the concept alone."""
        table, tokenizer = self.parts.embedding_table, self.parts.tokenizers[0]
        words = [{i for text in texts for i in tokenizer(text).input_ids} for texts in (self.concepts, self.anchors)]
        own = sorted(words[0] - words[1])
        if not own:
            raise ValueError(
                f"concept={list(self.concepts)} has no token that anchor={list(self.anchors)} has not: there is no "
                "embedding to train"
            )
        stays = torch.ones(len(table), dtype=torch.bool, device=table.device)
        stays[own] = False
        return stays, table.detach()[stays].clone()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one step; ``batch`` may be empty."""
        method, seed = self.method, self.step_seed(batch)
        rows = torch.randint(len(self.concepts), (method.batch_size,), generator=stream(seed, 0, "prompts"))
        seen = noised(self.parts, self.pool, self.pictures[rows], seed, "ablation")
        concept = self.told(model, self.concepts, rows, self.frozen_concepts)
        student, target = self.student(model, seen.latents, seen.times, concept), seen.target
        if method.form == "model":
            with torch.no_grad():
                anchor = self.told(model, self.anchors, rows, self.frozen_anchors)
                target = self.student(model, seen.latents, seen.times, anchor)
        erase = ablation_loss(student, target).mean()
        if method.prior_weight == 0:
            return Loss(erase, {"erase": erase.detach()})
        other = noised(self.parts, self.pool, self.pictures[rows], seed, "prior")
        anchor = self.told(model, self.anchors, rows, self.frozen_anchors)
        prior = ablation_loss(self.student(model, other.latents, other.times, anchor), other.target).mean()
        return Loss(erase + method.prior_weight * prior, {"erase": erase.detach(), "prior": prior.detach()})

    def after_step(self, model: nn.Module, step: int) -> None:
        """Put back the embeddings of all other tokens; ``fit`` calls it, and so should a loop of one's own."""
        if self.kept is not None:
            with torch.no_grad():
                rows, values = self.kept
                self.trainable(model)[0][rows] = values
