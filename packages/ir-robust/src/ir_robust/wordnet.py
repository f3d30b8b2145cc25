"""WordNet's own files (``index.noun``, ``data.noun``, ...), read without NLTK, which wants more of them.

Formats: wndb(5WN). A line of an index names a lemma and its synsets, the most frequent first; a line of data names the
words of a synset, their number in hexadecimal. Lines of the licence begin with two blanks.
"""

from __future__ import annotations

import os
from pathlib import Path

from ir_robust.formats import lines
from ir_robust.text import is_word
from robust_core.checks import check_count
from robust_core.errors import DataMissingError, MalformedFileError

__all__ = ["wordnet_neighbours"]

PARTS = ("noun", "verb", "adj", "adv")


def wordnet_neighbours(folder: str | os.PathLike[str], *, senses: int | None = 1) -> dict[str, list[str]]:
    """Return word -> the single words that share one of its first ``senses`` synsets in some part of speech.

    Args:
        folder: with ``index.noun``, ``data.noun`` and so on for verb, adj, adv.
        senses: of each part of speech; None takes all.

    Raises:
        DataMissingError: a file is missing.
        MalformedFileError: a line breaks the format.
    """
    if senses is not None:
        check_count("senses", senses)
    root, found = Path(folder), {}
    for part in PARTS:
        for name in (f"index.{part}", f"data.{part}"):
            if not (root / name).is_file():
                raise DataMissingError(
                    f"{root / name} is missing; WordNet's files come with Debian's wordnet-base, in /usr/share/wordnet"
                )
        members = _synsets(root / f"data.{part}")
        for word, offsets, where in _index(root / f"index.{part}"):
            for offset in offsets[:senses]:
                if offset not in members:
                    raise MalformedFileError(f"{where}: synset {offset} is not in data.{part}")
                found.setdefault(word, set()).update(other for other in members[offset] if other != word)
    return {word: sorted(others) for word, others in found.items() if others}


def _synsets(path: Path) -> dict[str, list[str]]:
    """Return offset -> its single words in lower case."""
    found = {}
    for number, line in lines(path):
        if line.startswith("  "):
            continue
        columns = line.split()
        try:
            count = int(columns[3], 16)
            words = [columns[4 + 2 * i].partition("(")[0].lower() for i in range(count)]  # adjectives: galore(ip)
        except (IndexError, ValueError):
            raise MalformedFileError(
                f"{path}:{number}: no synset; 'offset file type count word id ...' is needed"
            ) from None
        found[columns[0]] = [word for word in words if is_word(word)]
    return found


def _index(path: Path) -> list[tuple[str, list[str], str]]:
    """Return (word, offsets of its synsets, where) of every single word."""
    found = []
    for number, line in lines(path):
        if line.startswith("  "):
            continue
        columns = line.split()
        try:
            synsets, pointers = int(columns[2]), int(columns[3])
            offsets = columns[6 + pointers :]
        except (IndexError, ValueError):
            synsets, offsets = -1, []
        if len(offsets) != synsets:
            raise MalformedFileError(f"{path}:{number}: no lemma; 'lemma part count ... offsets' is needed")
        if is_word(columns[0]):
            found.append((columns[0], offsets, f"{path}:{number}"))
    return found
