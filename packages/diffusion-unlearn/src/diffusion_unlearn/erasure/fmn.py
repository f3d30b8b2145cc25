"""Forget-Me-Not: pictures of a concept are trained to pay no attention to its words.

Zhang, Wang, Xu, Wang and Shi 2023 (arXiv 2303.17591). With A the probabilities of all cross-attentions (layers, heads,
pixels, tokens) on noised pictures of the concept, and T the positions of its tokens in the prompt, the loss is

    | A[..., T] |_F          the norm, not its square                     :func:`attention_norm`

Defaults are those of the released code: 35 steps of one picture, learning rate 2e-6, gradients clipped to norm 1, the
whole UNet, and the end marks among T (``ends=True``). The method is weak under attack and sensitive to the number of
steps; it is here as a baseline.

Departures: Adam without weight decay (see :mod:`diffusion_unlearn.erasure.ca`). Left out: new tokens that are learned
for the concept first (textual inversion), which stand in for words where a concept has none; training the text encoder.

Fused attention never has the probabilities: while an objective looks, diffusers' plain processor stands in for it
(:func:`recorded_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import UNET_PARTS, check_concepts, trained_parameters
from diffusion_unlearn.erasure.pictures import PictureErasure, PicturePool, noised
from diffusion_unlearn.erasure.training import ErasureObjective
from diffusion_unlearn.pipeline import UnsupportedPipelineError
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import stream
from robust_core.training import Batch, Loss

__all__ = ["FMN", "ForgettingObjective", "attention_norm", "recorded_attention", "token_positions"]


@contextmanager
def recorded_attention(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which every cross-attention adds its probabilities (B * heads, pixels, tokens) when it is run.

    Raises:
        UnsupportedPipelineError: the network has no cross-attention.
    """
    from diffusers.models.attention_processor import AttnProcessor

    layers: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    if not layers:
        raise UnsupportedPipelineError(f"{type(unet).__name__} has no cross-attention")
    found: list[Tensor] = []

    def listening(layer: Any) -> Any:
        def scores(*arguments: Any) -> Tensor:
            seen = type(layer).get_attention_scores(layer, *arguments)
            found.append(seen)
            return seen

        return scores

    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(AttnProcessor())
            layer.get_attention_scores = listening(layer)
        yield found
    finally:
        for layer, processor in zip(layers, before, strict=True):
            del layer.get_attention_scores
            layer.set_processor(processor)


def attention_norm(probabilities: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Return the norm (a scalar) of all attention to some tokens.

    Args:
        probabilities: of each layer, (B * heads, pixels, T).
        positions: (B, T) bool, the tokens of each row's concept.
    """
    total = torch.zeros((), device=positions.device)
    for layer in probabilities:
        rows = layer.float().square().sum(1).unflatten(0, (len(positions), -1)).sum(1)
        total = total + (rows * positions.to(rows)).sum()
    return total.sqrt()


def token_positions(ids: Tensor, subject: Sequence[int], *, end: int | None = None) -> Tensor:
    """Return (T,) bool: where a sequence of tokens stands in ``ids`` (T,); with ``end``, also that token's places.

    Raises:
        ValueError: it does not stand there.
    """
    row, words = ids.tolist(), list(subject)
    found = torch.zeros(len(row), dtype=torch.bool)
    for i in range(len(row) - len(words) + 1):
        if words and row[i : i + len(words)] == words:
            found[i : i + len(words)] = True
    if not found.any():
        raise ValueError("the subject's tokens do not stand in the prompt")
    return found if end is None else found | (ids.cpu() == end)


@dataclass(frozen=True)
class FMN(PictureErasure):
    """Erase a concept by taking attention from its words; see the module.

    Args:
        concept: prompts that stand for it, one or several.
        subject: the words in these prompts that lose attention; None means all their words.
        ends: whether the end marks lose it too (in CLIP they hold the meaning of the whole).
        part: one of :data:`~diffusion_unlearn.erasure.parts.UNET_PARTS`.
        n_steps: steps of Adam; more than some dozens harm other pictures.
        lr: learning rate.
        batch_size: pictures in a step.
        clip_norm: largest norm of a gradient; None clips nothing.
        generator: seed.
    """

    concept: str | Sequence[str]
    subject: str | None = None
    ends: bool = True
    part: str = "full"
    n_steps: int = 35
    lr: float = 2e-6
    batch_size: int = 1
    clip_norm: float | None = 1.0
    generator: int | None = None

    def __post_init__(self) -> None:
        for prompt in check_concepts(self.concept):
            if self.subject is not None and self.subject.lower() not in prompt.lower():
                raise ValueError(f"subject={self.subject!r} does not stand in the prompt {prompt!r}")
        check_choice("part", self.part, UNET_PARTS)
        check_number("lr", self.lr, low=0, open_low=True)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, low=0, open_low=True)
        check_count("n_steps", self.n_steps), check_count("batch_size", self.batch_size)

    @property
    def pictured(self) -> tuple[Sequence[str], int]:
        """The concept's prompts, 8 pictures of each."""
        return check_concepts(self.concept), 8

    def _objective(self, pipe: Any, pool: PicturePool) -> ForgettingObjective:
        return ForgettingObjective(pipe, self, pool)


class ForgettingObjective(ErasureObjective):
    """The loss of one step; made by :meth:`FMN.objective`."""

    def __init__(self, pipe: Any, method: FMN, pool: PicturePool) -> None:
        parameters = trained_parameters(pipe, method.part)
        super().__init__(pipe, "unet", parameters, generator=method.generator)
        self.method, self.pool = method, pool.to(self.parts.device)
        self.frozen = self.frozen_conditions(pool.prompts)
        self.positions = torch.stack([self._positions(prompt) for prompt in pool.prompts])
        self._heard: list[Tensor] | None = None

    def _positions(self, prompt: str) -> Tensor:
        tokenizer = self.parts.tokenizers[0]
        subject = prompt if self.method.subject is None else self.method.subject
        words = tokenizer(subject).input_ids[1:-1]
        end = tokenizer.eos_token_id if self.method.ends else None
        return token_positions(self.parts.ids([prompt])[0][0], words, end=end)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep the plain processors in place: activations that are computed again must be of the same kind."""
        with recorded_attention(self.model) as self._heard:
            yield
        self._heard = None

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one step; ``batch`` may be empty."""
        seed = self.step_seed(batch)
        rows = torch.randint(len(self.pool.prompts), (self.method.batch_size,), generator=stream(seed, 0, "prompts"))
        seen = noised(self.parts, self.pool, rows, seed, "forgetting")
        condition = self.told(model, self.pool.prompts, rows, self.frozen)
        with recorded_attention(model) if self._heard is None else nullcontext(self._heard) as heard:
            heard.clear()
            self.student(model, seen.latents, seen.times, condition)
            probabilities = list(heard)
            heard.clear()
        loss = attention_norm(probabilities, self.positions[rows].to(seen.latents.device))
        return Loss(loss, {"erase": loss.detach()})

    def after_step(self, model: nn.Module, step: int) -> None:
        """Forget what activations that were computed again added."""
        if self._heard is not None:
            self._heard.clear()
