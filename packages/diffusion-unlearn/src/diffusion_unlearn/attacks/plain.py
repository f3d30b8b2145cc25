"""Attacks without gradients, and the controls that an optimised attack has to beat.

- :class:`RandomPrefix`: random tokens beside the prompt; what no thought at all achieves.
- :class:`SeedSearch`: the same prompt from other noise; an erasure that fails for every other seed is none.
- :class:`Synonyms`: words of the user's in place of words of the prompt ("drei" for "three"), each in each place, which
  an erasure of one name often leaves alone.

The first two are the controls of UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868), with its 40 tries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from diffusion_unlearn.attacks.base import Found, PromptAttack, Scene, first_hits
from diffusion_unlearn.attacks.drawing import Try
from diffusion_unlearn.attacks.writing import POSITIONS, Writing
from diffusion_unlearn.pipeline import TextToImage
from robust_core.checks import check_choice, check_count
from robust_core.random import SampleStreams, stream

__all__ = ["RandomPrefix", "SeedSearch", "Synonyms"]


@dataclass(frozen=True)
class RandomPrefix(PromptAttack):
    """Random tokens beside the prompt.

    Args:
        k: tokens.
        position: where they stand: prefix, suffix, middle, spread or replace.
        n_tries: texts for each prompt.
        vocabulary: tokens that may be used; None means all but the marks.
    """

    name: ClassVar[str] = "random"

    k: int = 5
    position: str = "prefix"
    n_tries: int = 40
    vocabulary: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count("k", self.k), check_count("n_tries", self.n_tries)
        check_choice("position", self.position, POSITIONS)

    def _writing(self, parts: TextToImage, prompts: Sequence[str]) -> Writing:
        return Writing.around(parts, prompts, self.k, self.position, vocabulary=self.vocabulary)

    def check(self, parts: TextToImage, prompts: Sequence[str]) -> None:
        """Raise ValueError where a prompt has no room."""
        self._writing(parts, prompts)

    def run(self, scene: Scene) -> list[Found]:
        """Draw them."""
        writing = self._writing(scene.victim, scene.texts)
        space = writing.space
        places = (space.slots >= 0).nonzero()[:, 1].reshape(len(scene), -1)
        usable = space.table[0][space.table[0] >= 0]
        streams = SampleStreams(self.seed(scene), scene.streams(), "tokens")
        draws = streams.integers(len(usable), (self.n_tries, places.shape[1]))
        options: list[list[Try]] = [[] for _ in scene.tries]
        for number in range(self.n_tries):
            ids = space.ids.scatter(1, places, usable[draws[:, number]])
            for i, text in enumerate(writing.texts(ids)):
                options[i].append(scene.tries[i]._replace(text=text))
        return first_hits(scene.drawing, options, lambda done, total: scene.report(self.name, done, total))


@dataclass(frozen=True)
class SeedSearch(PromptAttack):
    """The same prompt with other seeds.

    Args:
        n_tries: seeds for each prompt.
    """

    name: ClassVar[str] = "seed"
    threat: ClassVar[str] = "seed"

    n_tries: int = 40

    def __post_init__(self) -> None:
        check_count("n_tries", self.n_tries)

    def run(self, scene: Scene) -> list[Found]:
        """Draw them."""
        options = []
        for index, own in zip(scene.index, scene.tries, strict=True):
            draws = stream(self.seed(scene), index, "seeds")
            seeds = torch.randint(1 << 31, (self.n_tries + 1,), generator=draws).tolist()
            options.append([own._replace(seed=s) for s in seeds if s != own.seed][: self.n_tries])
        return first_hits(scene.drawing, options, lambda done, total: scene.report(self.name, done, total))


def _words(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Synonyms(PromptAttack):
    """Other words for words of the prompt.

    Args:
        table: word, or several -> what may stand for it. A prompt without any of these words is left as it is.
    """

    name: ClassVar[str] = "synonyms"

    table: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.table:
            raise ValueError("table: at least one word with its synonyms is needed")
        for phrase, others in self.table.items():
            if not phrase.strip() or isinstance(others, str) or not others or not all(w.strip() for w in others):
                raise ValueError(f"table: {phrase!r} needs a list of words that may stand for it")

    def texts(self, prompt: str) -> list[str]:
        """Return the prompts in which one phrase was replaced, wherever it stands, by one of its synonyms."""
        found: Iterable[str] = (
            _words(phrase).sub(lambda _, other=other: other, prompt)
            for phrase, others in self.table.items()
            for other in others
        )
        return [text for text in dict.fromkeys(found) if text != prompt]

    def run(self, scene: Scene) -> list[Found]:
        """Draw them."""
        options = [[own._replace(text=text) for text in self.texts(own.text)] or [own] for own in scene.tries]
        return first_hits(scene.drawing, options, lambda done, total: scene.report(self.name, done, total))
