"""What an attack on an erasure is given, and what it gives back.

An attack is a frozen dataclass of settings with ``run(scene)``: for each prompt of the scene it looks for a text (or a
seed, or embeddings) with which the victim draws the concept again. ``threat`` says what the attacker needs:

=============  =======================================================================================
``"prompt"``   he writes the prompt; the seed stays
``"seed"``     he draws the same prompt again
``"embedding"``  he reaches behind the tokenizer: stronger, never counted with the others
=============  =======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_unlearn.attacks.drawing import Drawing, Look, Try
from diffusion_unlearn.pipeline import TextToImage
from robust_core.random import derive

__all__ = ["THREATS", "Found", "PromptAttack", "Scene", "first_hits"]

THREATS = ("prompt", "seed", "embedding")
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What an attack found for one prompt.

    Attributes:
        success: the judge saw the concept.
        text: what was drawn: where it succeeded, what brought the concept back; elsewhere the last or best try.
        seed: with which it was drawn.
        score: the judge's; NaN where nothing was drawn.
        n_tries: pictures that the attacker needed, or all that he had.
        n_gradients: forward and backward passes of this prompt.
        tokens: those that were searched for, where there are such.
        reads_back: whether the text, read anew, has exactly these tokens; None where none were searched for.
    """

    success: bool
    text: str
    seed: int
    score: float = math.nan
    n_tries: int = 0
    n_gradients: int = 0
    tokens: list[int] = field(default_factory=list)
    reads_back: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {"score": self.score if math.isfinite(self.score) else None}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Found:
        """Return what :meth:`as_json` wrote."""
        return cls(**{**row, "score": math.nan if row["score"] is None else row["score"]})


@dataclass(eq=False)
class Scene:
    """Some prompts that do not draw the concept, before the eyes of an attacker.

    Attributes:
        victim: the erased pipeline.
        tries: B prompts with seed and guidance.
        index: B positions in the whole set, to which random streams belong.
        drawing: draws and judges.
        latents: (B, C, H, W) of pictures of the concept, for attacks that need such.
        original: the pipeline before the erasure, likewise.
        seed: of everything random.
        label: of the attack in its run; its name if empty.
        precision: of losses: ``"float32"``, ``"bfloat16"`` or ``"float16"`` (mixed).
        gradient_checkpointing: compute activations of the UNet again instead of keeping them.
        on_step: called with (what is done, steps done, steps in all).
    """

    victim: TextToImage
    tries: Sequence[Try]
    index: Sequence[int]
    drawing: Drawing
    latents: Tensor | None = None
    original: TextToImage | None = None
    seed: int = 0
    label: str = ""
    precision: str = "float32"
    gradient_checkpointing: bool = False
    on_step: OnStep | None = None

    def __len__(self) -> int:
        """Return B."""
        return len(self.tries)

    @property
    def texts(self) -> list[str]:
        """B prompts."""
        return [t.text for t in self.tries]

    def streams(self) -> Tensor:
        """Return (B,) int64, the names of the prompts' random streams."""
        return torch.tensor(list(self.index), dtype=torch.int64, device=self.victim.device)

    def report(self, task: str, done: int, total: int) -> None:
        """Tell how far it is."""
        if self.on_step is not None:
            self.on_step(task, done, total)


@dataclass(frozen=True)
class PromptAttack:
    """Base of the attacks: settings, and :meth:`run`."""

    name: ClassVar[str] = ""
    threat: ClassVar[str] = "prompt"
    needs_target: ClassVar[bool] = False
    """Whether it needs pictures of the concept."""
    needs_original: ClassVar[bool] = False
    """Whether it needs the pipeline before the erasure."""

    def run(self, scene: Scene) -> list[Found]:
        """Return what was found for each prompt of the scene."""
        raise TypeError(f"{type(self).__name__} is no attack: it has no way to run")

    def check(self, parts: TextToImage, prompts: Sequence[str]) -> None:
        """Raise where it cannot work on these prompts, before anything is drawn."""
        del parts, prompts

    def seed(self, scene: Scene) -> int:
        """Return the seed of this attack: attacks of one run share no random numbers, nor do two of one kind."""
        return derive(scene.seed, "attack", scene.label or self.name)


def first_hits(drawing: Drawing, options: Sequence[Sequence[Try]], report: Callable[[int, int], None]) -> list[Found]:
    """Draw the tries of each prompt in their order until the judge sees the concept.

    Tries of all open prompts are drawn together; what is found and counted does not depend on how many at a time.

    Args:
        drawing: draws and judges.
        options: the tries of each prompt, at least one.
        report: called with (prompts decided, prompts).
    """
    best: list[Found | None] = [None] * len(options)
    seen = 0
    while open_ := [i for i, found in enumerate(best) if found is None]:
        block = max(drawing.batch_size // len(open_), 1)
        looks = iter(drawing.look([t for i in open_ for t in options[i][seen : seen + block]]))
        for i in open_:
            mine: list[Look] = [next(looks) for _ in options[i][seen : seen + block]]
            won = next((j for j, one in enumerate(mine) if one.hit), None)
            if won is not None:
                tried = options[i][seen + won]
                best[i] = Found(True, tried.text, tried.seed, mine[won].score, n_tries=seen + won + 1)
            elif seen + block >= len(options[i]):
                tried = options[i][-1]
                best[i] = Found(False, tried.text, tried.seed, drawing.known[tried].score, n_tries=len(options[i]))
        seen += block
        report(sum(found is not None for found in best), len(best))
    return [found for found in best if found is not None]
