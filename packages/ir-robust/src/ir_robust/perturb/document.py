"""Edits of a document, as functions of text: words of the query repeated, a sentence put in, words left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from ir_robust.text import Words
from robust_core.checks import check_choice
from robust_core.random import Seed, resolve_seed, stream

__all__ = ["PLACES", "delete_words", "insert_sentence", "sentences_of", "spam_terms"]

PLACES = ("head", "tail", "random")
_END = re.compile(r"(?<=[.!?])\s+")


def spam_terms(doc: str, terms: Sequence[str], place: str = "head", *, generator: Seed = None) -> str:
    """Return a document with ``terms`` put in.

    Args:
        doc: the text.
        terms: words, in the order in which they go in.
        place: ``"head"``, ``"tail"``, or ``"random"``: each term at a place of its own.
        generator: seed of those places.
    """
    check_choice("place", place, PLACES)
    words = Words.of(doc)
    if place != "random":
        return words.with_inserted(0 if place == "head" else len(words), terms).text
    draws = stream(resolve_seed(generator), 0, "spam")
    places = torch.randint(len(words) + 1, (len(terms),), generator=draws).tolist()
    for at, term in sorted(zip(places, terms, strict=True), key=lambda pair: -pair[0]):  # from behind: places stay
        words = words.with_inserted(at, [term])
    return words.text


def insert_sentence(doc: str, sentence: str, place: str = "head", *, generator: Seed = None) -> str:
    """Return a document with a sentence before it, behind it, or between two of its sentences."""
    check_choice("place", place, PLACES)
    own = sentences_of(doc)
    if place == "random":
        draws = stream(resolve_seed(generator), 0, "sentence")
        at = int(torch.randint(len(own) + 1, (), generator=draws))
    else:
        at = 0 if place == "head" else len(own)
    return " ".join([*own[:at], sentence.strip(), *own[at:]])


def sentences_of(doc: str) -> list[str]:
    """Return the sentences of a text, split behind ``.``, ``!``, ``?``; one without a word goes with the one before."""
    found: list[str] = []
    for part in _END.split(doc.strip()):
        if found and not len(Words.of(part)):
            found[-1] = f"{found[-1]} {part}".strip()
        elif part:
            found.append(part)
    return found


def delete_words(doc: str, positions: Iterable[int]) -> str:
    """Return a document without the words at ``positions``."""
    return Words.of(doc).without(positions).text
