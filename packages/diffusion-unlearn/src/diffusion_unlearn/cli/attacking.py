"""The words of ``--attack``: ``NAME`` or ``NAME,setting=value,…``; the option may be given several times.

=================================  ==========================================================================
``unlearndiffatk,k=3``             any of :data:`NAMES` with settings of its own
``synonyms,three=drei|tres``       words of the prompt = what may stand for them
``synonyms:FILE.json``             the same as a JSON object: phrase -> list of phrases
=================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_core.errors import MalformedFileError, ResourceError
from robust_core.words import check_word

if TYPE_CHECKING:
    from diffusion_unlearn.attacks import PromptAttack

__all__ = ["HELP", "NAMES", "AttackWords", "attacks_of", "check_attacks", "defaults"]

NAMES = ("unlearndiffatk", "p4d", "random", "seed", "synonyms", "inversion")
ORIGINAL = ("p4d",)
"""Those that need the pipeline before the erasure."""
TARGETS = ("unlearndiffatk", "p4d", "inversion")
"""Those that need pictures of the concept."""
HELP = f"NAME[,setting=value…], several times; NAME is one of {', '.join(NAMES)}. synonyms,three=drei|tres"


@dataclass(frozen=True)
class AttackWords:
    """One ``--attack``, read.

    Attributes:
        name: one of :data:`NAMES`.
        settings: ``setting=value`` each.
        file: of synonyms.
    """

    name: str
    settings: tuple[str, ...] = ()
    file: Path | None = None


def check_attacks(words: Sequence[str], *, original: bool = True, targets: bool = True) -> dict[str, AttackWords]:
    """Return label -> what the words say, without importing torch.

    Args:
        words: one for each attack.
        original: whether the pipeline before the erasure is at hand.
        targets: whether pictures of the concept are, or can be drawn.

    Raises:
        ValueError: a name that is not known, words of no known form, or an attack that lacks what it needs.
        ResourceError: no such file.
    """
    found: dict[str, AttackWords] = {}
    for word in words:
        head, *settings = [part.strip() for part in word.split(",")]
        name, colon, file = head.partition(":")
        check_word("--attack", name, NAMES)
        if colon and (name != "synonyms" or not file):
            raise ValueError(f"--attack {word!r}: {HELP}")
        for part in settings:
            if not all(piece.strip() for piece in part.partition("=")):
                raise ValueError(f"--attack {word!r}: {part!r} is no setting=value")
        if name == "synonyms" and bool(colon) == bool(settings):
            raise ValueError(f"--attack {word!r}: give synonyms:FILE.json, or synonyms,word=other|other")
        if colon and not Path(file).expanduser().is_file():
            raise ResourceError(f"--attack {word}: no such file {file}")
        if name in ORIGINAL and not original:
            raise ValueError(f"--attack {name}: --original is needed, the pipeline before the erasure")
        if name in TARGETS and not (original or targets):
            raise ValueError(f"--attack {name}: pictures of the concept are needed: --original draws them")
        label = name if name not in found else f"{name} {sum(w.name == name for w in found.values()) + 1}"
        found[label] = AttackWords(name, tuple(settings), Path(file).expanduser() if colon else None)
    return found


def defaults(*, original: bool, targets: bool) -> list[str]:
    """Return the attacks of a run that names none: all by prompt or seed that what is at hand allows."""
    found = ["unlearndiffatk"] if original or targets else []
    return [*found, *(["p4d"] if original else []), "random", "seed"]


def attacks_of(read: dict[str, AttackWords]) -> dict[str, PromptAttack]:
    """Return label -> attack.

    Raises:
        ValueError: a setting that the attack has not, or does not allow.
        MalformedFileError: a file that is no table of synonyms.
    """
    from diffusion_unlearn.attacks import ATTACKS, Synonyms
    from robust_core.settings import parse_settings

    found: dict[str, Any] = {}
    for label, words in read.items():
        if words.name == "synonyms":
            found[label] = Synonyms(table=_table(words))
            continue
        try:
            found[label] = parse_settings(ATTACKS[words.name], words.settings)
        except ValueError as error:
            raise ValueError(f"--attack {words.name}: {str(error).removeprefix('--set ')}") from error
    return found


def _table(words: AttackWords) -> dict[str, list[str]]:
    if words.file is None:
        pairs = [part.partition("=") for part in words.settings]
        return {phrase.strip(): [other.strip() for other in others.split("|")] for phrase, _, others in pairs}
    from robust_core.io import read_json

    table = read_json(words.file)
    if not isinstance(table, dict) or not all(
        isinstance(others, list) and all(isinstance(other, str) for other in others) for others in table.values()
    ):
        raise MalformedFileError(f"{words.file}: a JSON object is needed, phrase -> list of phrases")
    return table
