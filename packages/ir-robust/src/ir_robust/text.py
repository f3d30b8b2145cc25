"""Words of a text and the way back: what attackers, smoothers and certifiers all mean by "the words of a document".

    >>> words = Words.of("The Wing's slip-stream.")
    >>> words.words
    ('the', "wing's", 'slip', 'stream')
    >>> words.replaced({2: "air"}).text
    "The Wing's air-stream."

A word is a maximal run of letters and digits, apostrophes inside it included; everything between words is a gap and is
kept to the letter, so ``Words.of(text).text == text``. Replacing words by words never moves the borders: the result
splits into the same number of words at the same places, which is what a certificate about "the i-th word" rests on.
Words are compared in lower case; a replacement takes on the capitals of what it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Words", "is_word"]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def is_word(text: str) -> bool:
    """Return whether ``text`` is exactly one word in lower case, and so can stand in a table of substitutes."""
    return _WORD.fullmatch(text) is not None and text == text.lower()


@dataclass(frozen=True)
class Words:
    """A text in pieces.

    Attributes:
        surfaces: the words as they are written, M of them.
        gaps: what stands before, between and after them, M + 1 pieces.
    """

    surfaces: tuple[str, ...]
    gaps: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Words:
        """Split a text."""
        surfaces, gaps, end = [], [], 0
        for match in _WORD.finditer(text):
            gaps.append(text[end : match.start()])
            surfaces.append(match.group())
            end = match.end()
        return cls(tuple(surfaces), (*gaps, text[end:]))

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.surfaces)

    @property
    def words(self) -> tuple[str, ...]:
        """The words in lower case; the few that would fall apart there (``İ``) as they are written."""
        return tuple(map(_lower, self.surfaces))

    @property
    def text(self) -> str:
        """The text, to the letter."""
        parts = [self.gaps[0]]
        for surface, gap in zip(self.surfaces, self.gaps[1:], strict=True):
            parts += (surface, gap)
        return "".join(parts)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each word in :attr:`text`, as of Python slices: to find a word's tokens by their offsets."""
        found, at = [], len(self.gaps[0])
        for surface, gap in zip(self.surfaces, self.gaps[1:], strict=True):
            found.append((at, at + len(surface)))
            at += len(surface) + len(gap)
        return found

    def replaced(self, edits: Mapping[int, str]) -> Words:
        """Return these words with some of them replaced.

        Args:
            edits: position -> new word in lower case; it is written with the capitals of the old one.

        Raises:
            IndexError: a position that is not there.
            ValueError: a replacement that is not one word in lower case.
        """
        surfaces = list(self.surfaces)
        for position, word in edits.items():
            if not 0 <= position < len(surfaces):
                raise IndexError(f"edits: position {position} of a text of {len(surfaces)} words")
            if word == _lower(surfaces[position]):
                continue
            if not is_word(word):
                raise ValueError(f"edits[{position}]={word!r}: one word in lower case is needed")
            surfaces[position] = _with_capitals(word, surfaces[position])
        return Words(tuple(surfaces), self.gaps)

    def without(self, positions: Iterable[int]) -> Words:
        """Return these words with some of them left out; of the two gaps beside one, that with more signs stays.

        Raises:
            IndexError: a position that is not there.
        """
        surfaces, gaps = list(self.surfaces), list(self.gaps)
        for i in sorted(set(positions), reverse=True):
            if not 0 <= i < len(surfaces):
                raise IndexError(f"positions: position {i} of a text of {len(self)} words")
            before, after = gaps[i].strip(), gaps[i + 1].strip()
            keep_after = len(after) > len(before) or (i == len(surfaces) - 1 and len(after) == len(before))
            gaps[i : i + 2] = [gaps[i + 1] if keep_after else gaps[i]]
            del surfaces[i]
        return Words(tuple(surfaces), tuple(gaps))

    def with_inserted(self, at: int, new: Sequence[str]) -> Words:
        """Return these words with ``new`` before word ``at``, or at the end where ``at`` is their number.

        Raises:
            IndexError: a place that is not there.
            ValueError: something that is not one word.
        """
        if not 0 <= at <= len(self):
            raise IndexError(f"at: place {at} of a text of {len(self)} words")
        for word in new:
            if not _WORD.fullmatch(word):
                raise ValueError(f"new={word!r}: one word is needed")
        if not new:
            return self
        inner = [" "] * (len(new) - 1)
        if at < len(self):
            gaps = (*self.gaps[: at + 1], *inner, " ", *self.gaps[at + 1 :])
        elif not len(self):
            gaps = (self.gaps[0], *inner, "")
        else:
            last = self.gaps[-1]
            gaps = (*self.gaps[:-1], last if last[-1:].isspace() else f"{last} ", *inner, "")
        return Words((*self.surfaces[:at], *new, *self.surfaces[at:]), gaps)

    def lowered(self, words: Sequence[str | None]) -> str:
        """Return the text with ``words`` in their places, in lower case; None keeps what is written."""
        parts = [self.gaps[0]]
        for surface, word, gap in zip(self.surfaces, words, self.gaps[1:], strict=True):
            parts += (surface if word is None else word, gap)
        return "".join(parts)


def _lower(word: str) -> str:
    lowered = word.lower()
    return lowered if lowered.isascii() or _WORD.fullmatch(lowered) else word


def _with_capitals(word: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        changed = word.upper()
    elif like[0].isupper():
        changed = word[0].upper() + word[1:]
    else:
        return word
    return changed if changed.lower() == word and _WORD.fullmatch(changed) else word
