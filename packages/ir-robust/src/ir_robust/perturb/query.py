"""Variations of a query: ``operator(query, generator) -> query``, the same text for the same seed.

    >>> Typos(2)("flow over swept wings at supersonic speed", generator=3)
    'flow over swept wings at superonic seped'

====================  ==========================================================================================
:class:`Typos`        one character edit in each of n words: swap of neighbours, deletion, insertion, a neighbour on
                      the keyboard; only words of at least four letters, never their first letter
:class:`Synonyms`     n words by one of their synonyms
:class:`DropWords`    n words left out
:class:`Shuffle`      the words in another order
:class:`RemoveStopWords`  the stop words left out
:class:`Paraphrase`   another wording by rules, for people who have no model that rewrites
:class:`Rewrite`      another wording by the user's own function or model
====================  ==========================================================================================

Operators that find nothing to change return the query as it is, and whoever measures counts that. The families are
those of the robustness literature; limits and defaults are ours. Every word that is edited stays one word and becomes
another one, so a query with n typos differs in exactly n words (or in all that may be edited, where there are fewer).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from bm25s.stopwords import STOPWORDS_EN

from ir_robust.text import Words, is_word
from robust_core.checks import check_choice, check_count
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = [
    "KEYBOARD",
    "TYPOS",
    "Compose",
    "DropWords",
    "Paraphrase",
    "QueryPerturbation",
    "RemoveStopWords",
    "Rewrite",
    "Shuffle",
    "Synonyms",
    "Typos",
    "operator",
    "sampled",
    "typos_of",
    "worst_of",
]

TYPOS = ("swap", "delete", "insert", "keyboard")
SHORTEST = 4
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def _keyboard() -> dict[str, str]:
    """Neighbours on a QWERTY keyboard, whose rows are shifted by half a key."""
    places = {c: (x + 0.5 * y, y) for y, row in enumerate(_ROWS) for x, c in enumerate(row)}
    near = {
        a: "".join(b for b, (u, v) in places.items() if b != a and abs(u - x) <= 1 and abs(v - y) <= 1)
        for a, (x, y) in places.items()
    }
    return {c: near[c] for c in _ALPHABET}


KEYBOARD = _keyboard()
"""Letter -> its neighbours."""


class QueryPerturbation(Protocol):
    """Rewrites a query."""

    @property
    def name(self) -> str:
        """For tables: short, and telling apart operators of one benchmark."""
        ...

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query rewritten, or as it is where nothing can be changed."""
        ...


def _draws(generator: Seed, purpose: str) -> torch.Generator:
    return stream(resolve_seed(generator), 0, purpose)


def _pick(n: int, draws: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=draws))


def _choose(items: Sequence[Any], n: int, draws: torch.Generator) -> list[Any]:
    return [items[i] for i in sorted(torch.randperm(len(items), generator=draws)[:n].tolist())]


@lru_cache(maxsize=10_000)
def typos_of(word: str, kind: str) -> tuple[str, ...]:
    """Return all words that one edit of a kind makes of ``word`` (in lower case), without touching its first letter.

    Args:
        word: in lower case; one with fewer than four signs, or with other signs than letters, has none.
        kind: ``"swap"``, ``"delete"``, ``"insert"`` or ``"keyboard"``.
    """
    check_choice("kind", kind, TYPOS)
    if len(word) < SHORTEST or not word.isalpha():
        return ()
    inner = range(1, len(word))
    if kind == "swap":
        found = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner[:-1]]
    elif kind == "delete":
        found = [word[:i] + word[i + 1 :] for i in inner]
    elif kind == "insert":
        found = [word[:i] + c + word[i:] for i in (*inner, len(word)) for c in _ALPHABET]
    else:
        found = [word[:i] + c + word[i + 1 :] for i in inner for c in KEYBOARD.get(word[i], "")]
    return tuple(dict.fromkeys(w for w in found if w != word and is_word(w)))


@dataclass(frozen=True)
class Typos:
    """One character edit in each of ``n`` words.

    Attributes:
        n: words; 0 changes nothing.
        kinds: of edits, one of them drawn for each word.
    """

    n: int = 1
    kinds: tuple[str, ...] = TYPOS

    def __post_init__(self) -> None:
        check_count("n", self.n, low=0)
        if not self.kinds:
            raise ValueError(f"kinds=(): at least one of {', '.join(TYPOS)} is needed")
        for kind in self.kinds:
            check_choice("kinds", kind, TYPOS)

    @property
    def name(self) -> str:
        """For tables."""
        kinds = "" if self.kinds == TYPOS else f" ({', '.join(self.kinds)})"
        return f"{self.n} typo{'' if self.n == 1 else 's'}{kinds}"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query with typos in min(n, words that can be mistyped) words."""
        draws, words = _draws(generator, "typos"), Words.of(query)
        able: dict[int, list[tuple[str, ...]]] = {}
        for i, word in enumerate(words.words):
            if options := [found for kind in self.kinds if (found := typos_of(word, kind))]:
                able[i] = options
        edits = {}
        for i in _choose(list(able), self.n, draws):
            options = able[i][_pick(len(able[i]), draws)]
            edits[i] = options[_pick(len(options), draws)]
        return words.replaced(edits).text if edits else query


@dataclass(frozen=True)
class Synonyms:
    """``n`` words by one of their synonyms.

    Attributes:
        table: word -> its synonyms, in lower case; such as a table of a synonym graph.
        n: words; 0 changes nothing.
    """

    table: Mapping[str, Sequence[str]] = field(repr=False)
    n: int = 1

    def __post_init__(self) -> None:
        check_count("n", self.n, low=0)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.n} synonym{'' if self.n == 1 else 's'}"

    def _options(self, word: str) -> list[str]:
        return [other for other in self.table.get(word, ()) if other != word and is_word(other)]

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query with other words in min(n, words with synonyms) places."""
        draws, words = _draws(generator, "synonyms"), Words.of(query)
        able = {i: options for i, word in enumerate(words.words) if (options := self._options(word))}
        edits = {i: able[i][_pick(len(able[i]), draws)] for i in _choose(list(able), self.n, draws)}
        return words.replaced(edits).text if edits else query


@dataclass(frozen=True)
class DropWords:
    """``n`` words left out; one word always stays."""

    n: int = 1

    def __post_init__(self) -> None:
        check_count("n", self.n, low=0)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.n} word{'' if self.n == 1 else 's'} dropped"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query without n of its words."""
        words = Words.of(query)
        n = min(self.n, len(words) - 1)
        return words.without(_choose(range(len(words)), n, _draws(generator, "drop"))).text if n > 0 else query


@dataclass(frozen=True)
class RemoveStopWords:
    """The stop words left out, those of bm25s by default; a query of nothing else stays."""

    words: frozenset[str] = field(default=frozenset(STOPWORDS_EN), repr=False)
    name: str = "no stop words"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query without stop words."""
        words = Words.of(query)
        gone = [i for i, word in enumerate(words.words) if word in self.words]
        return words.without(gone).text if 0 < len(gone) < len(words) else query


@dataclass(frozen=True)
class Shuffle:
    """The words in another order; the signs between them keep their places."""

    name: str = "shuffled"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the words in an order that is another one, where they are not all the same."""
        words = Words.of(query)
        order = torch.randperm(len(words), generator=_draws(generator, "shuffle")).tolist()
        moved = [words.surfaces[i] for i in order]
        if moved and tuple(moved) == words.surfaces:  # draw by draw this could go on; two words that differ settle it
            other = next((i for i, word in enumerate(moved) if word != moved[0]), 0)
            moved[0], moved[other] = moved[other], moved[0]
        return Words(tuple(moved), words.gaps).text


_NOUN_ENDS = r"(?=\s*[?.!,;]|\s*$| (?:in|on|at|for|with|and|or|to|by|from|is|are)\b)"
RULES: tuple[tuple[str, str], ...] = (
    (r"^(?:what|which) (?:is|are|was|were) (?:the )?(.+?)\??$", r"\1"),
    (r"^(?:how) (?:do|does|can|could|should) (?:i|we|you|one) (.+?)\??$", r"how to \1"),
    (r"^how to (.+?)\??$", r"way to \1"),
    (r"^(?:has|have) (?:any(?:one|body)) (.+?)\??$", r"who has \1"),
    (r"^(?:is|are) there (?:any )?(.+?)\??$", r"\1"),
    (r"^(?:does|do|did|can|could|is|are) (.+?)\?$", r"whether \1"),
    (r"\b(?:in order to|so as to)\b", "to"),
    (r"\bdue to\b", "because of"),
    (r"\bsuch as\b", "like"),
    (r"\b(\w+) (?:and|&) (\w+)\b", r"\2 and \1"),
    (rf"\bthe (\w{{3,}}) of (?:an?|the) (\w{{3,}}){_NOUN_ENDS}", r"the \2 \1"),
    (rf"\b(\w{{3,}}) of (\w{{3,}}){_NOUN_ENDS}", r"\2 \1"),
    (r"\b(\w{3,})'s (\w{3,})\b", r"\2 of the \1"),
    (r"\b(\w+)n't\b", r"\1 not"),
    (r"\blarge\b", "big"),
    (r"\b(?:use|usage) of\b", "using"),
    (r"\bmethods? (?:of|for)\b", "ways of"),
    (r"\bproblems? (?:of|with)\b", "difficulties with"),
    (r"\binformation (?:on|about)\b", "details on"),
    (r"\bpapers? (?:on|about)\b", "articles on"),
)
"""(pattern, what it becomes): question frames, "X of Y" and "Y X", words in pairs, common phrases; English."""


@dataclass(frozen=True)
class Paraphrase:
    """Another wording by rules: patterns of which one that fits is drawn, ``n`` times.

    Attributes:
        n: rules applied one after another; fewer where none fits any more.
        rules: (pattern, replacement) of :func:`re.sub`, without regard to capitals; each is used at most once.
    """

    n: int = 1
    rules: tuple[tuple[str, str], ...] = field(default=RULES, repr=False)

    def __post_init__(self) -> None:
        check_count("n", self.n, low=0)

    @property
    def name(self) -> str:
        """For tables."""
        return "paraphrase" if self.n == 1 else f"paraphrase x{self.n}"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query in other words."""
        draws, text = _draws(generator, "paraphrase"), query
        left = list(self.rules)
        for _ in range(self.n):
            fits = []
            for rule in left:
                changed = re.sub(rule[0], rule[1], text, count=1, flags=re.IGNORECASE)
                if changed != text and len(Words.of(changed)):
                    fits.append((rule, changed))
            if not fits:
                break
            rule, text = fits[_pick(len(fits), draws)]
            left.remove(rule)
        return text


@dataclass(frozen=True)
class Rewrite:
    """The user's own function ``query -> query``, or ``(query, seed) -> query`` where it draws."""

    function: Callable[..., str] = field(repr=False)
    name: str = "rewritten"

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return what the function says.

        Raises:
            TypeError: something other than text.
        """
        takes = [
            p
            for p in inspect.signature(self.function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
        found = self.function(query, resolve_seed(generator)) if len(takes) > 1 else self.function(query)
        if not isinstance(found, str):
            raise TypeError(f"{self.name}: the function gave {type(found).__name__} for a query; text is needed")
        return found


@dataclass(frozen=True)
class Compose:
    """Operators one after another."""

    operators: tuple[QueryPerturbation, ...]

    @property
    def name(self) -> str:
        """For tables."""
        return " + ".join(op.name for op in self.operators)

    def __call__(self, query: str, generator: Seed = None) -> str:
        """Return the query after all of them, each with a stream of its own."""
        seed = resolve_seed(generator)
        for place, op in enumerate(self.operators):
            query = op(query, derive(seed, "compose", place))
        return query


def operator(thing: Any) -> QueryPerturbation:
    """Return ``thing`` as an operator: one already, or any function as :class:`Rewrite` takes it.

    Raises:
        TypeError: neither.
    """
    if not callable(thing):
        raise TypeError(f"operators: {type(thing).__name__} cannot be called; (query, generator) -> query is needed")
    if isinstance(getattr(thing, "name", None), str):
        return cast("QueryPerturbation", thing)
    name: Any = getattr(thing, "__name__", type(thing).__name__)
    return Rewrite(cast("Callable[..., str]", thing), str(name))


def sampled(op: QueryPerturbation, qid: str, query: str, n_draws: int, *, generator: Seed = None) -> list[str]:
    """Return ``n_draws`` variations of a query; they depend on seed, operator's name and number of the query alone.

    Every model of a comparison is asked the same variations: differences between models are then paired.
    """
    seed = resolve_seed(generator)
    return [op(query, derive(seed, "query", op.name, qid, draw)) for draw in range(n_draws)]


def worst_of(
    op: QueryPerturbation, query: str, value: Callable[[str], float], *, m: int = 10, generator: Seed = None
) -> tuple[str, float, int]:
    """Attack a query by the worst of ``m`` variations, or none of them where all help.

    Args:
        op: what makes variations.
        query: the query.
        value: its effectiveness, asked as a black box.
        m: variations.
        generator: seed.

    Returns:
        The worst wording, its effectiveness, and how often ``value`` was asked.
    """
    check_count("m", m)
    tried = dict.fromkeys([query, *sampled(op, "", query, m, generator=generator)])
    values = {text: float(value(text)) for text in tried}
    worst = min(values, key=values.__getitem__)
    return worst, values[worst], len(values)
