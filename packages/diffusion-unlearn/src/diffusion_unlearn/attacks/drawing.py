"""Draw what was written, ask the judge, and remember: no text is drawn twice with one seed.

Only verdicts are kept, never pictures: a picture is a function of its text, seed and guidance, and can be drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffusion_unlearn.judges import Judge, ask
from diffusion_unlearn.pipeline import Conditioning, TextToImage
from robust_core.checks import check_count, check_number

__all__ = ["Drawing", "Look", "Try"]


class Try(NamedTuple):
    """A picture that might show the concept: of this text, this seed, this guidance."""

    text: str
    seed: int
    guidance: float


class Look(NamedTuple):
    """What the judge says of a picture; the score is NaN where the text was too long to be drawn."""

    hit: bool
    score: float


@dataclass
class Drawing:
    """Pictures of a pipeline under the eyes of a judge.

    Attributes:
        parts: the pipeline.
        judge: says whether the concept is seen.
        steps: of the sampler.
        batch_size: pictures at a time.
        known: verdicts so far.
        n_drawn: pictures drawn so far.
    """

    parts: TextToImage
    judge: Judge
    steps: int = 50
    batch_size: int = 16
    known: dict[Try, Look] = field(default_factory=dict)
    n_drawn: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps), check_count("batch_size", self.batch_size)

    def look(self, tries: Sequence[Try]) -> list[Look]:
        """Return the judge's verdicts, drawing only what was not drawn before."""
        fresh = [t for t in dict.fromkeys(tries) if t not in self.known]
        self.known |= {t: Look(False, math.nan) for t in fresh if not self.parts.fits(t.text)}
        fresh = [t for t in fresh if t not in self.known]
        for guidance in dict.fromkeys(t.guidance for t in fresh):
            check_number("guidance", guidance, low=0)
            rows = [t for t in fresh if t.guidance == guidance]
            looks = self._judged([t.text for t in rows], [t.seed for t in rows], guidance)
            self.known |= dict(zip(rows, looks, strict=True))
        return [self.known[t] for t in tries]

    def look_at(self, condition: Conditioning, tries: Sequence[Try]) -> list[Look]:
        """Return the judge's verdicts on pictures of conditions (B rows) that no text has; nothing is remembered.

        Args:
            condition: B rows.
            tries: texts that stand for them before the judge, seeds and guidance.
        """
        found: list[Look] = [Look(False, math.nan)] * len(tries)
        for guidance in dict.fromkeys(t.guidance for t in tries):
            rows = [i for i, t in enumerate(tries) if t.guidance == guidance]
            texts, seeds = [tries[i].text for i in rows], [tries[i].seed for i in rows]
            for i, one in zip(rows, self._judged(texts, seeds, guidance, condition[rows]), strict=True):
                found[i] = one
        return found

    def _judged(
        self, texts: list[str], seeds: list[int], guidance: float, condition: Conditioning | None = None
    ) -> list[Look]:
        found: list[Look] = []
        for start in range(0, len(texts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            images = self.parts.generate(
                texts[rows] if condition is None else None, seeds[rows],
                condition=None if condition is None else condition[rows],
                guidance=guidance, steps=self.steps, batch_size=self.batch_size,
            )  # fmt: skip
            self.n_drawn += len(images)
            verdict = ask(self.judge, images, texts[rows])
            found += [Look(h, s) for h, s in zip(verdict.hit.tolist(), verdict.score.tolist(), strict=True)]
        return found
