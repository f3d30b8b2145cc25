"""Which texts an attacker may write: the threat model of token attacks.

A :class:`TokenSpace` is one batch of texts with the tokens that may stand in each place. Every place that may change
(a *slot*) names a row of one table of candidates, so that a whole vocabulary (one row), synonyms of every word (one row
for each word) and lists for single places are the same thing to every search. The token that stands in a slot may
always stay. At most ``budget`` slots of a text may differ from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count

__all__ = ["Position", "Slots", "TokenSpace", "insert_slots", "stack_tokens"]

Position = Literal["prefix", "suffix", "middle", "spread", "replace"]
_POSITIONS = ("prefix", "suffix", "middle", "spread", "replace")


def check_ids(name: str, value: Tensor, *, low: int = 0) -> Tensor:
    """Return ``value`` if it is a non-empty int64 matrix of at least ``low``."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor of token ids, not {kind}")
    if value.ndim != 2 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; a non-empty matrix of token ids is needed")
    if int(value.min()) < low:
        raise ValueError(f"{name} holds {int(value.min())}; token ids start at 0")
    return value


@dataclass(frozen=True, eq=False)
class TokenSpace:
    """The texts that may be written in place of some texts; usually built by one of the three class methods.

    Args:
        ids: (B, T) int64 original token ids.
        slots: (B, T) int64, the row of ``table`` whose tokens may stand there; -1 where the token must stay.
        table: (R, K) int64 candidates, each row without repetitions, filled up with -1 at its end.
        budget: slots of one text that may differ from it: one number, (B,) int64, or None for all of them.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range; repeated candidates; a budget below 0.
    """

    ids: Tensor
    slots: Tensor
    table: Tensor
    budget: Tensor | int | None = None

    def __post_init__(self) -> None:
        check_ids("ids", self.ids)
        check_ids("slots", self.slots, low=-1)
        check_ids("table", self.table, low=-1)
        if self.slots.shape != self.ids.shape or int(self.slots.max()) >= len(self.table):
            raise ValueError(
                f"slots has shape {tuple(self.slots.shape)} and rows up to {int(self.slots.max())}; the shape of ids, "
                f"{tuple(self.ids.shape)}, and rows below {len(self.table)} are needed"
            )
        for name in ("slots", "table"):
            if getattr(self, name).device != self.ids.device:
                raise ValueError(f"{name} is on {getattr(self, name).device}, ids on {self.ids.device}; move one")
        empty = self.table < 0
        if bool((empty[:, :-1] & ~empty[:, 1:]).any()):
            raise ValueError("table has -1 before a token; fill rows up at their end only")
        ordered = self.table.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("table repeats a token within a row; list each candidate once")
        object.__setattr__(self, "budget", self._checked_budget())

    def _checked_budget(self) -> Tensor:
        budget, n = self.budget, len(self.ids)
        if budget is None:
            return torch.full((n,), self.ids.shape[1], device=self.ids.device)
        if not isinstance(budget, Tensor):
            return torch.full((n,), check_count("budget", budget, low=0), device=self.ids.device)
        if budget.dtype != torch.int64 or budget.shape != (n,) or int(budget.min()) < 0:
            raise ValueError(f"budget is {budget.dtype} {tuple(budget.shape)}; an int, or ({n},) int64 of at least 0")
        return budget.to(self.ids.device)

    @classmethod
    def vocabulary(
        cls,
        ids: Tensor,
        editable: Tensor,
        n_tokens: int,
        *,
        allowed: Iterable[int] | Tensor | None = None,
        banned: Iterable[int] | Tensor = (),
        budget: Tensor | int | None = None,
    ) -> TokenSpace:
        """Return the space where any token of a vocabulary may stand in each editable place.

        Args:
            ids: (B, T) int64 token ids.
            editable: (B, T) bool, the places that may change.
            n_tokens: size of the vocabulary.
            allowed: tokens that may be used; None means all.
            banned: tokens that may not (end of text, padding, the name of the erased concept).
            budget: see the class.
        """
        check_count("n_tokens", n_tokens)
        check_ids("ids", ids)
        usable = torch.full((n_tokens,), allowed is None, device=ids.device)
        usable[_checked_tokens("allowed", () if allowed is None else allowed, n_tokens).to(ids.device)] = True
        usable[_checked_tokens("banned", banned, n_tokens).to(ids.device)] = False
        if not bool(usable.any()):
            raise ValueError("no token is left: allowed minus banned is empty")
        slots = torch.where(_checked_mask(editable, ids), 0, -1)
        return cls(ids, slots, usable.nonzero().T.contiguous(), budget)

    @classmethod
    def substitutes(
        cls, ids: Tensor, table: Tensor, *, editable: Tensor | None = None, budget: Tensor | int | None = None
    ) -> TokenSpace:
        """Return the space where each token may become one of its substitutes.

        Args:
            ids: (B, T) int64 token (or word) ids.
            table: (V, K) int64, row w lists the substitutes of w, filled up with -1; w itself may be among them.
            editable: (B, T) bool, the places that may change; None means all whose token has a row.
            budget: see the class.
        """
        check_ids("ids", ids)
        check_ids("table", table, low=-1)
        editable = torch.ones_like(ids, dtype=torch.bool) if editable is None else _checked_mask(editable, ids)
        if bool((ids >= len(table))[editable].any()):
            raise ValueError(f"table has {len(table)} rows, ids reach {int(ids[editable].max())}: a row for each token")
        return cls(ids, torch.where(editable, ids, -1), table, budget)

    @classmethod
    def lists(
        cls, ids: Tensor, choices: Sequence[Sequence[Sequence[int]]], *, budget: Tensor | int | None = None
    ) -> TokenSpace:
        """Return the space with a list of tokens for each place; an empty list where the token must stay.

        Args:
            ids: (B, T) int64 token ids.
            choices: for each text, for each place (those left out at the end must stay), tokens that may stand there.
            budget: see the class.
        """
        check_ids("ids", ids)
        slots = torch.full_like(ids, -1)
        rows: dict[tuple[int, ...], int] = {}
        if len(choices) != len(ids) or any(len(text) > ids.shape[1] for text in choices):
            raise ValueError(f"choices has {len(choices)} texts; ids has {len(ids)} of length {ids.shape[1]}")
        for number, text in enumerate(choices):
            for place, options in enumerate(text):
                if len(options):
                    slots[number, place] = rows.setdefault(tuple(options), len(rows))
        table = torch.full((max(len(rows), 1), max(map(len, rows), default=1)), -1, device=ids.device)
        for options, row in rows.items():
            table[row, : len(options)] = torch.as_tensor(options, dtype=torch.int64)
        return cls(ids, slots, table, budget)

    # -- what searches need -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ids)

    @property
    def allowance(self) -> Tensor:
        """(B,) int64: slots of each text that may differ from it."""
        return cast(Tensor, self.budget)

    @cached_property
    def where(self) -> Tensor:
        """(B, S) int64: the places of each text that have an alternative, ascending; -1 after the last."""
        open_ = self._alternatives_by_place > 0
        order = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        places = torch.where(open_, order, self.ids.shape[1]).sort(1).values[:, : max(int(open_.sum(1).max()), 1)]
        return torch.where(places < self.ids.shape[1], places, -1)

    @cached_property
    def n_alternatives(self) -> Tensor:
        """(B, S) int64: tokens other than the original that may stand in each slot; 0 where there is none."""
        return torch.where(self.where >= 0, self._alternatives_by_place.gather(1, self.where.clamp(min=0)), 0)

    @cached_property
    def rank_of_own(self) -> Tensor:
        """(B, T) int64: column of the original token in its row of the table; K where it is not listed."""
        width = self.table.shape[1]
        rank = torch.full_like(self.ids, width)
        if len(self.table) == 1:
            inverse = torch.full((int(max(self.ids.max(), self.table.max())) + 1,), width, device=self.ids.device)
            inverse[self.table[0][self.table[0] >= 0]] = (self.table[0] >= 0).nonzero()[:, 0]
            return torch.where(self.slots >= 0, inverse[self.ids], width)
        text, place = (self.slots >= 0).nonzero(as_tuple=True)
        for part in torch.arange(len(text), device=self.ids.device).split(max((1 << 22) // width, 1)):
            same = self.table[self.slots[text[part], place[part]]] == self.ids[text[part], place[part], None]
            rank[text[part], place[part]] = torch.where(same.any(1), same.to(torch.uint8).argmax(1), width)
        return rank

    @cached_property
    def _alternatives_by_place(self) -> Tensor:
        listed = (self.table >= 0).sum(1)
        count = listed[self.slots.clamp(min=0)] - (self.rank_of_own < self.table.shape[1]).to(torch.int64)
        return torch.where(self.slots >= 0, count, 0)

    @cached_property
    def _listed(self) -> Tensor:
        """(V + 2,) bool, of a table of one row: whether a token stands in it; the last two never do (-1, too large)."""
        listed = torch.zeros(int(self.table.max()) + 3, dtype=torch.bool, device=self.ids.device)
        listed[self.table[0][self.table[0] >= 0]] = True
        return listed

    def alternative(self, text: Tensor, place: Tensor, number: Tensor) -> Tensor:
        """Return (n,) tokens: the ``number``-th other than the original that may stand at ``place`` of ``text``."""
        column = number + (number >= self.rank_of_own[text, place]).to(torch.int64)
        return self.table[self.slots[text, place], column]

    def token(self, text: Tensor, place: Tensor, column: Tensor) -> Tensor:
        """Return the tokens in columns of the table at some places; column K stands for the original token."""
        width = self.table.shape[1]
        token = self.table[self.slots[text, place], column.clamp(max=width - 1)]
        return torch.where(column < width, token, self.ids[text, place])

    def changed(self, text: Tensor, ids: Tensor) -> Tensor:
        """Return (n, T) bool: where ``ids`` differ from the originals of ``text`` (n,)."""
        return ids != self.ids[text]

    def contains(self, text: Tensor, ids: Tensor) -> Tensor:
        """Return (n,) bool: whether ``ids`` (n, T) may be written in place of ``text`` (n,)."""
        changed = self.changed(text, ids)
        fine = changed.sum(1) <= self.allowance[text]
        row, place = changed.nonzero(as_tuple=True)
        slot, token = self.slots[text[row], place], ids[row, place]
        if len(self.table) == 1:
            listed = self._listed[token.clamp(min=-1, max=len(self._listed) - 2)]
        else:
            listed = (self.table[slot.clamp(min=0)] == token[:, None]).any(1)
        wrong = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        wrong.index_add_(0, row, (~(listed & (slot >= 0) & (token >= 0))).to(torch.int64))
        return fine & (wrong == 0)

    def rows(self, rows: Tensor) -> TokenSpace:
        """Return the same space for some of the texts; nothing is checked again."""
        chosen = object.__new__(TokenSpace)
        for name, value in (
            ("ids", self.ids[rows]),
            ("slots", self.slots[rows]),
            ("table", self.table),
            ("budget", self.allowance[rows]),
        ):
            object.__setattr__(chosen, name, value)
        for name in ("where", "n_alternatives", "rank_of_own", "_alternatives_by_place"):
            chosen.__dict__[name] = getattr(self, name)[rows]
        if len(self.table) == 1:
            chosen.__dict__["_listed"] = self._listed
        return chosen


def _checked_tokens(name: str, tokens: Iterable[int] | Tensor, n_tokens: int) -> Tensor:
    chosen = tokens if isinstance(tokens, Tensor) else torch.tensor(list(tokens), dtype=torch.int64)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < n_tokens:
        raise ValueError(f"{name} holds {int(chosen.min())} .. {int(chosen.max())}; tokens are 0 .. {n_tokens - 1}")
    return chosen


def _checked_mask(editable: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(editable, Tensor) or editable.dtype != torch.bool or editable.shape != ids.shape:
        shape = tuple(editable.shape) if isinstance(editable, Tensor) else type(editable).__name__
        raise ValueError(f"editable is {shape}; a bool tensor of the shape of ids, {tuple(ids.shape)}, is needed")
    return editable.to(ids.device)


# -- texts of different lengths, and places to write in ------------------------------------------------------------


class Slots(NamedTuple):
    """Texts with places to write in: ``ids`` (B, T') and ``editable`` (B, T') bool."""

    ids: Tensor
    editable: Tensor


def stack_tokens(texts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Return (B, T) ids, filled up at the end, and (B,) lengths of texts of different lengths."""
    if not texts or not any(len(text) for text in texts):
        raise ValueError("texts is empty; at least one token is needed")
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.full((len(texts), int(lengths.max())), fill)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.as_tensor(text, dtype=torch.int64)
    return ids, lengths


def insert_slots(
    ids: Tensor,
    k: int,
    position: Position = "prefix",
    *,
    fill: int,
    start: Tensor | int = 0,
    end: Tensor | int | None = None,
    length: int | None = None,
) -> Slots:
    """Make ``k`` places to write in around, inside, or in place of a part of each text.

    The text proper stands at ``start .. end - 1``; before and after it stand marks and filling, which are moved along.

    Args:
        ids: (B, T) int64 token ids.
        k: places for each text.
        position: before the text, after it, in its middle, spread evenly over it, or ``"replace"``: its first ``k``
            tokens themselves.
        fill: token that stands in new places at first. It may stay there, so name one that may be used.
        start: first place of the text, one number or (B,).
        end: place after its last, one number or (B,); None means T.
        length: tokens that the model takes: what is longer loses filling at its end; None means T + k.

    Raises:
        ValueError: the text, and the mark that follows it, do not fit in ``length``; fewer than k tokens to replace.
    """
    check_ids("ids", ids)
    check_count("k", k)
    check_count("fill", fill, low=0)
    check_choice("position", position, _POSITIONS)
    n, width = ids.shape
    first = torch.as_tensor(start, device=ids.device).expand(n)
    last = torch.as_tensor(width if end is None else end, device=ids.device).expand(n)
    if bool(((first < 0) | (last < first) | (last > width)).any()):
        raise ValueError(f"start and end must satisfy 0 <= start <= end <= {width} for every text")
    number = torch.arange(k, device=ids.device)
    if position == "replace":
        if bool((last - first < k).any()):
            raise ValueError(f"k={k}: a text has only {int((last - first).min())} tokens to replace")
        editable = torch.zeros_like(ids, dtype=torch.bool).scatter(1, first[:, None] + number, True)
        return Slots(ids.clone(), editable)
    length = width + k if length is None else check_count("length", length)
    if length > width + k:
        raise ValueError(f"length={length}: the texts with their new places are {width + k} long; fill them up first")
    needed = last + k + (last < width).to(torch.int64)  # a mark that ends the text must stay
    if bool((needed > length).any()):
        raise ValueError(f"length={length}: a text needs {int(needed.max())} places with k={k}; shorten it or lower k")
    span = (last - first)[:, None]
    at = first[:, None] + {
        "prefix": torch.zeros_like(span),
        "suffix": span,
        "middle": span // 2,
        "spread": span * (number + 1) // (k + 1),
    }[position].expand(n, k)
    source = torch.arange(width, device=ids.device)
    target = source + (at[:, None, :] <= source[:, None]).sum(2)
    longer = torch.full((n, width + k), fill, device=ids.device)
    longer.scatter_(1, target, ids)
    editable = torch.ones_like(longer, dtype=torch.bool).scatter(1, target, False)
    return Slots(longer[:, :length].contiguous(), editable[:, :length].contiguous())
