"""What attacks with gradients share: the problem that core's searches solve, and how its outcome is told.

The victim is asked about token embeddings; times ascend with the steps, noise is fresh in every step and belongs to
(prompt, step), and all prompts and all draws of a step go through the model as one batch. The judge sees the decoded
text, once for each time; the text with the filling that the search starts from is never drawn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_unlearn.attacks.base import Found, PromptAttack, Scene
from diffusion_unlearn.attacks.losses import LOSSES, even_times, scaled_gradient
from diffusion_unlearn.attacks.writing import POSITIONS, Writing
from diffusion_unlearn.erasure.training import recomputing
from diffusion_unlearn.pipeline import Conditioning, TextToImage
from robust_core.attacks.tokens import TokenProblem
from robust_core.attacks.tokens.relaxed import Relaxed
from robust_core.checks import check_choice, check_count, check_number
from robust_core.device import autocast
from robust_core.random import SampleStreams

__all__ = ["GradientAttack", "TokenAttack", "repeated", "saving_memory"]

RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Conditioning], Tensor]
"""``(rows (n,), x0, noise, t, condition) -> (n,)``, with n = texts x draws."""


def repeated(condition: Conditioning, n: int) -> Conditioning:
    """Return every row n times in a row."""
    rows = torch.arange(len(condition), device=condition.hidden.device).repeat_interleave(n)
    return condition if n == 1 else condition[rows]


def saving_memory(scene: Scene) -> AbstractContextManager[None]:
    """Return the context in which gradients are taken: activations are computed again where the scene says so."""
    return recomputing(scene.victim.pipe.unet) if scene.gradient_checkpointing else nullcontext()


@dataclass(frozen=True)
class GradientAttack(PromptAttack):
    """Base of the attacks that go down a loss.

    Args:
        k: tokens that are searched for.
        position: where they stand: prefix, suffix, middle, spread or replace.
        lr: step size.
        loss: ``"l2"`` or ``"l1"``.
        noise_batch: noises of one step, averaged.
        vocabulary: tokens that may be used; None means all but the marks.
    """

    needs_target: ClassVar[bool] = True

    k: int = 5
    position: str = "prefix"
    lr: float = 0.01
    loss: str = "l2"
    noise_batch: int = 1
    vocabulary: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count("k", self.k), check_count("noise_batch", self.noise_batch)
        check_choice("position", self.position, POSITIONS)
        check_choice("loss", self.loss, LOSSES)
        check_number("lr", self.lr, low=0, open_low=True)

    def writing(self, parts: TextToImage, prompts: Sequence[str]) -> Writing:
        """Return the prompts with their places."""
        return Writing.around(parts, prompts, self.k, self.position, vocabulary=self.vocabulary)

    def check(self, parts: TextToImage, prompts: Sequence[str]) -> None:
        """Raise ValueError where a prompt has no room."""
        self.writing(parts, prompts)

    @property
    @abstractmethod
    def n_steps(self) -> int:
        """Gradients for each prompt."""

    @abstractmethod
    def row_loss(self, scene: Scene) -> RowLoss:
        """Return the loss of noised pictures under prompts."""

    @abstractmethod
    def times(self, scene: Scene) -> Callable[[SampleStreams, int], Tensor]:
        """Return ``(streams (n,), draw) -> times``: a scalar, or (n, noise_batch), on the device."""

    def problem(self, scene: Scene, writing: Writing, *, judge: Any = None) -> TokenProblem:
        """Return what the search solves: the loss as a function of embeddings, noise by (prompt, draw).

        Args:
            scene: with pictures of the concept.
            writing: its prompts.
            judge: ``(ids, text) -> (n,) bool``.
        """
        if scene.latents is None:
            raise ValueError(f"{self.name} needs pictures of the concept: give targets, or the original pipeline")
        parts, latents, n = scene.victim, scene.latents, self.noise_batch
        loss, time, n_steps = self.row_loss(scene), self.times(scene), self.n_steps
        streams = SampleStreams(self.seed(scene), scene.streams(), "noise")
        shape, device = tuple(latents.shape[1:]), latents.device
        # in half precision small gradients are 0: they are taken of the sum over entries, and scaled back at the end
        factor = float(latents[0].numel()) if torch.float16 in (parts.dtype, _dtype(scene.precision)) else 1.0

        def embedded(embeddings: Tensor, text: Tensor, draw: int) -> Tensor:
            own = streams.select(text)
            noise = own.normal((n, *shape), chunk=draw).to(latents.dtype).flatten(0, 1)
            t = time(own, draw)
            rows = text.repeat_interleave(n)
            with autocast(device, scene.precision):
                condition = repeated(writing.condition(scaled_gradient(embeddings, 1 / factor), text), n)
                errors = loss(rows, latents[rows], noise, t.flatten() if t.ndim else t, condition)
            if embeddings.requires_grad:
                scene.report(f"{self.name}: steps", draw + 1, n_steps)
            return scaled_gradient(errors.unflatten(0, (-1, n)).mean(1), factor)

        models = [parts.pipe.unet, *parts.encoders]
        if scene.original is not None:
            models += [scene.original.pipe.unet, *scene.original.encoders]
        return TokenProblem(
            writing.space, embedded=embedded, embedding=writing.embedding, judge=judge, stochastic=True, models=models
        )


def _dtype(precision: str) -> torch.dtype:
    return getattr(torch, precision)


@dataclass(frozen=True)
class TokenAttack(GradientAttack):
    """Base of the attacks that end in a text: core's search, with a look of the judge after each time.

    Args:
        weight_decay: of Adam, added to the gradient.
        timesteps: how many times, evenly spaced and ascending; the search goes on from one to the next.
        iterations: steps at each.
    """

    weight_decay: float = 0.1
    timesteps: int = 50
    iterations: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("timesteps", self.timesteps), check_count("iterations", self.iterations)
        check_number("weight_decay", self.weight_decay, low=0)

    @property
    def n_steps(self) -> int:
        """Gradients for each prompt."""
        return self.timesteps * self.iterations

    @abstractmethod
    def search(self, batch_size: int = 1) -> Relaxed:
        """Return core's search, for ``batch_size`` prompts at a time."""

    def times(self, scene: Scene) -> Callable[[SampleStreams, int], Tensor]:
        """Return the time of each step."""
        n_train = int(scene.victim.pipe.scheduler.config.num_train_timesteps)
        times = even_times(self.timesteps, n_train).to(scene.victim.device)
        return lambda streams, draw: times[min(draw // self.iterations, self.timesteps - 1)]

    def run(self, scene: Scene) -> list[Found]:
        """Search, draw what was found, and go on until the judge sees the concept."""
        writing, drawing = self.writing(scene.victim, scene.texts), scene.drawing
        n_tries, last = [0] * len(scene), [t.text for t in scene.tries]

        def judge(ids: Tensor, text: Tensor) -> Tensor:
            rows = (ids != writing.space.ids[text]).any(1).nonzero()[:, 0].tolist()
            which = [int(text[r]) for r in rows]
            tries = [scene.tries[i]._replace(text=t) for i, t in zip(which, writing.texts(ids[rows]), strict=True)]
            fresh = [t not in drawing.known for t in tries]
            verdict = torch.zeros(len(ids), dtype=torch.bool)
            for r, i, one, new, look in zip(rows, which, tries, fresh, drawing.look(tries), strict=True):
                verdict[r], last[i] = look.hit, one.text
                n_tries[i] += new
            return verdict.to(ids.device)

        problem = self.problem(scene, writing, judge=judge)
        search = self.search(len(scene))
        with saving_memory(scene):
            result = search.run(problem, index=scene.streams(), generator=self.seed(scene))
        texts = [t if s else p for t, s, p in zip(writing.texts(result.ids), result.success, last, strict=True)]
        everyone = torch.arange(len(scene), device=result.ids.device)
        found = []
        for i, (tokens, back) in enumerate(
            zip(writing.written(result.ids, everyone), writing.reads_back(result.ids), strict=True)
        ):
            won = bool(result.success[i])
            one = scene.tries[i]._replace(text=texts[i])
            known = drawing.known.get(one)
            found.append(
                Found(
                    won, one.text, one.seed, known.score if known else float("nan"), n_tries[i],
                    int(result.n_gradients[i]), tokens if won else [], back if won else None,
                )
            )  # fmt: skip
        return found
