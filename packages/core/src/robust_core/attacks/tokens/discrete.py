"""Searches by queries alone: all texts, random texts, greedy and beam search.

- :class:`Exhaustive` knows the answer; it refuses where there are more texts than stated.
- :class:`RandomSearch` is the control: what no thought at all achieves.
- :class:`Beam` extends the best texts by one change at a time; :class:`Greedy` is the beam of width 1. The next place
  is either the best of all (``order="best"``), or given by an order: ``"left"``, ``"gradient"`` (norm of the gradient
  at the place, as in PRADA, Wu et al. 2023, arXiv 2204.01321) or ``"deletion"`` (loss without the token, Jin et al.
  2020, arXiv 1907.11932).

On losses that are sums over places, greedy is exact; a beam of unbounded width always is: it meets every text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from robust_core.attacks.tokens.engine import SearchRun, TokenSearch, rank_within
from robust_core.attacks.tokens.problem import TokenProblem
from robust_core.attacks.tokens.space import TokenSpace
from robust_core.checks import check_choice, check_count

__all__ = ["Beam", "Exhaustive", "Greedy", "Order", "RandomSearch", "count_texts", "importance"]

Order = Literal["best", "left", "gradient", "deletion"]
_BLOCK = 128  # texts of one problem that are asked about together


def count_texts(space: TokenSpace) -> list[int]:
    """Return how many texts of the space stand for each of its texts, the original included."""
    counts = []
    for numbers, budget in zip(space.n_alternatives.tolist(), space.allowance.tolist(), strict=True):
        by_changes = [1]  # elementary symmetric polynomials of the numbers of alternatives
        for number in (n for n in numbers if n):
            longer = [a + number * b for a, b in zip([*by_changes, 0], [0, *by_changes], strict=True)]
            by_changes = longer[: budget + 1]
        counts.append(sum(by_changes))
    return counts


@dataclass(frozen=True)
class Exhaustive(TokenSearch):
    """Ask about every text of the space, those of few changes first.

    Args:
        limit: texts of one space above which the search is refused.
    """

    limit: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("limit", self.limit)

    def check(self, problem: TokenProblem) -> None:
        """Raise ValueError where there are too many texts."""
        most = max(count_texts(problem.space))
        if most > self.limit:
            raise ValueError(f"limit={self.limit}: {most:,} texts would have to be tried; raise it, or use Beam")

    def search(self, run: SearchRun) -> None:
        """Try all."""
        lists = [_Enumeration(run.space, row) for row in range(len(run))]
        count = torch.tensor([len(texts) for texts in lists], device=run.device)
        for step, (row, number) in enumerate(run.blocks(count, _BLOCK)):
            present, lengths = torch.unique_consecutive(row, return_counts=True)
            parts = zip(present.tolist(), number.split(lengths.tolist()), strict=True)
            run.query(row, torch.cat([lists[text][numbers] for text, numbers in parts]), step=step)
            run.end_step(step)


class _Enumeration:
    """The changed texts of one space, by number."""

    def __init__(self, space: TokenSpace, row: int) -> None:
        self.space, self.row = space, row
        numbers = space.n_alternatives[row]
        slots = numbers.nonzero()[:, 0].tolist()
        sets = [s for k in range(1, min(int(space.allowance[row]), len(slots)) + 1) for s in combinations(slots, k)]
        width = max(map(len, sets), default=1)
        full = [[*s, *[-1] * (width - len(s))] for s in sets]
        self.sets = torch.tensor(full, dtype=torch.int64, device=numbers.device).reshape(-1, width)
        self.radix = torch.where(self.sets >= 0, numbers[self.sets.clamp(min=0)], 1)
        self.end = self.radix.prod(1).cumsum(0)

    def __len__(self) -> int:
        return int(self.end[-1]) if len(self.end) else 0

    def __getitem__(self, number: Tensor) -> Tensor:
        chosen = torch.searchsorted(self.end, number, right=True)
        rest = number - (self.end[chosen] - self.radix[chosen].prod(1))
        text = torch.full_like(number, self.row)
        ids = self.space.ids[text].clone()
        for column in range(self.sets.shape[1]):
            slot, digit = self.sets[chosen, column], rest % self.radix[chosen, column]
            rest = rest // self.radix[chosen, column]
            used = (slot >= 0).nonzero()[:, 0]
            place = self.space.where[self.row][slot[used]]
            ids[used, place] = self.space.alternative(text[used], place, digit[used])
        return ids


@dataclass(frozen=True)
class RandomSearch(TokenSearch):
    """Ask about random texts: as many changes as the budget allows, in random places, to random candidates.

    Args:
        n_samples: texts tried.
    """

    n_samples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_samples", self.n_samples)

    def search(self, run: SearchRun) -> None:
        """Try ``n_samples`` texts."""
        count = torch.full((len(run),), self.n_samples, device=run.device)
        count[run.space.n_alternatives.sum(1) == 0] = 0
        for step, (row, number) in enumerate(run.blocks(count, _BLOCK)):
            present = torch.unique_consecutive(row)
            shape = (run.space.where.shape[1], _BLOCK)  # slot first: the draws do not depend on other texts' slots
            local = torch.searchsorted(present, row), number % _BLOCK
            drawn = [
                run.streams(purpose).select(present).uniform(shape, chunk=step, dtype=torch.float64).mT[local]
                for purpose in ("places", "tokens")
            ]
            run.query(row, random_texts(run.space, row, *drawn), step=step)
            run.end_step(step)


def random_texts(space: TokenSpace, row: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Return (n, T) texts with the whole budget of changes, from two (n, S) draws of U(0, 1)."""
    numbers = space.n_alternatives[row]
    rank = places.masked_fill(numbers == 0, 2.0).argsort(1).argsort(1)
    text, slot = ((rank < space.allowance[row, None]) & (numbers > 0)).nonzero(as_tuple=True)
    place = space.where[row[text], slot]
    number = (tokens[text, slot] * numbers[text, slot]).to(torch.int64)
    ids = space.ids[row].clone()
    ids[text, place] = space.alternative(row[text], place, number)
    return ids


def importance(run: SearchRun, order: Order, *, blank: int | None = None, among: Tensor | None = None) -> Tensor:
    """Return (b, S) how much hangs on each slot; -inf where there is none.

    Args:
        run: the search.
        order: ``"left"``, ``"gradient"`` or ``"deletion"``.
        blank: token that stands for "nothing" in ``"deletion"``.
        among: (b,) bool, the rows that it is wanted of; the others' slots count from left to right.
    """
    space = run.space
    usable = space.n_alternatives > 0
    value = torch.arange(space.where.shape[1], 0, -1, device=run.device).expand(len(run), -1).double()
    active = run.active()
    active = active if among is None else active[among[active]]
    if order == "gradient" and len(active):
        _, gradient = run.gradient(active, space.ids[active], space.where[active])
        value = value.index_copy(0, active, torch.linalg.vector_norm(gradient, dim=2).double())
    if order == "deletion":
        row, slot = (usable & run_mask(run, active)[:, None]).nonzero(as_tuple=True)
        ids = space.ids[row].clone()
        ids[torch.arange(len(row), device=run.device), space.where[row, slot]] = 0 if blank is None else blank
        change = (run.probe(row, ids) - run.best_loss[row]).abs()
        value = value.index_put((row, slot), torch.where(change < torch.inf, change, 0.0))  # infinite: not asked
    return value.masked_fill(~usable, -torch.inf)


def run_mask(run: SearchRun, rows: Tensor) -> Tensor:
    """Return (b,) bool: whether a row of the run is among ``rows``."""
    return torch.zeros(len(run), dtype=torch.bool, device=run.device).index_fill(0, rows, True)


@dataclass
class _States:
    """Texts in a beam, those of one problem together: ``row`` (n,) ascending, ``ids`` (n, T), ``loss`` (n,)."""

    row: Tensor
    ids: Tensor
    loss: Tensor

    def keep(self, chosen: Tensor) -> _States:
        return _States(self.row[chosen], self.ids[chosen], self.loss[chosen])

    def joined(self, other: _States) -> _States:
        return _States(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in ("row", "ids", "loss")))

    def best(self, width: int | None) -> _States:
        """Return the ``width`` lowest of each problem, the earlier of equals."""
        order = self.loss.argsort(stable=True)
        order = order[self.row[order].argsort(stable=True)]
        if width is not None:
            order = order[rank_within(self.row[order]) < width]
        return self.keep(order)


@dataclass(frozen=True)
class Beam(TokenSearch):
    """Extend the best texts by one change at a time.

    Args:
        width: texts kept for each problem; None means all, which asks about every text of the space.
        order: the next place; see the module.
        n_sweeps: passes over the places, where there is an order; later ones revise.
        patience: rounds (``"best"``) or sweeps without a lower loss after which a text is done; None means never.
        blank: token that stands for "nothing" in ``order="deletion"``; it may lie outside the space.
    """

    width: int | None = 10
    order: Order = "best"
    n_sweeps: int = 1
    patience: int | None = None
    blank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ("best", "left", "gradient", "deletion"))
        for name in ("width", "patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("n_sweeps", self.n_sweeps)
        if self.blank is not None:
            check_count("blank", self.blank, low=0)
        if self.order == "deletion" and self.blank is None:
            raise ValueError("blank=None: order='deletion' needs the token that stands for nothing (mask, filling)")

    def check(self, problem: TokenProblem) -> None:
        """Raise ValueError where the order needs gradients that the problem does not offer."""
        if self.order == "gradient" and problem.embedded is None:
            raise ValueError("order='gradient' needs the problem's embedded and embedding; else use 'deletion'")
        if self.blank is not None and problem.embedding is not None and self.blank >= len(problem.embedding):
            raise ValueError(f"blank={self.blank}: embedding has {len(problem.embedding)} rows")

    def search(self, run: SearchRun) -> None:
        """Extend round by round."""
        everyone = torch.arange(len(run), device=run.device)
        states = _States(everyone, run.space.ids, run.best_loss.nan_to_num(nan=torch.inf))
        sequence = None
        rounds = int(torch.minimum(run.space.allowance, (run.space.n_alternatives > 0).sum(1)).max())
        if self.order != "best":
            value = importance(run, self.order, blank=self.blank)
            sequence = value.argsort(dim=1, descending=True, stable=True)
            rounds = sequence.shape[1] * self.n_sweeps
        stale, known = torch.zeros_like(everyone), run.best_loss.clone()
        for number in range(rounds):
            going = run_mask(run, run.active())
            if self.patience is not None:
                going &= stale < self.patience
            states = states.keep(going[states.row].nonzero()[:, 0])
            if not len(states.row):
                return
            sweep, visit = (0, number) if sequence is None else divmod(number, sequence.shape[1])
            step = sweep * run.space.ids.shape[1] + visit
            slot = None if sequence is None else sequence[:, visit]
            states = self._round(run, states, slot, step, twins=self.width != 1 and (slot is None or sweep > 0))
            run.end_step(number)
            if sequence is None or visit + 1 == sequence.shape[1]:
                stale = torch.where(run.best_loss < known, 0, stale + 1)
                known = run.best_loss.clone()

    def _round(self, run: SearchRun, states: _States, slot: Tensor | None, step: int, *, twins: bool) -> _States:
        """Return the best texts one change further, in one slot of each text or in any."""
        children = _Children(run.space, states, slot)
        if slot is None:
            pool = states.keep(torch.zeros(0, dtype=torch.int64, device=run.device))
        elif run.problem.stochastic:  # losses of another draw cannot be compared with the children's
            pool = replace(states, loss=run.query(states.row, states.ids, step=step))
        else:
            pool = states
        for row, number in run.blocks(children.count(len(run)), _BLOCK):
            row, ids = children.texts(row, number)
            if twins:
                fresh = _unseen(pool, row, ids)
                row, ids = row[fresh], ids[fresh]
            loss = run.query(row, ids, step=step)
            asked = loss < torch.inf
            pool = pool.joined(_States(row[asked], ids[asked], loss[asked])).best(self.width)
        return pool


def _unseen(pool: _States, row: Tensor, ids: Tensor) -> Tensor:
    """Return the numbers of the texts that stand neither in the pool nor earlier in the list."""
    everything = torch.cat([torch.cat([pool.row, row])[:, None], torch.cat([pool.ids, ids])], 1)
    _, group = torch.unique(everything, dim=0, return_inverse=True)
    first = rank_within(group) == 0
    return first[len(pool.row) :].nonzero()[:, 0]


class _Children:
    """All texts one change away from those of a beam, by number: never more of them at a time than are asked for."""

    def __init__(self, space: TokenSpace, states: _States, slot: Tensor | None) -> None:
        self.space, self.states = space, states
        self.revising = slot is not None
        numbers, where = space.n_alternatives[states.row], space.where[states.row]
        changed = space.changed(states.row, states.ids)
        here = changed.gather(1, where.clamp(min=0)) & (where >= 0)
        room = (changed.sum(1) < space.allowance[states.row])[:, None]
        if slot is None:
            numbers = torch.where(room & ~here, numbers, 0)
        else:  # the slot's other tokens, the original among them where it has gone
            numbers = torch.where(room | here, numbers, 0)
            here = slot[states.row, None]
            numbers = torch.zeros_like(numbers).scatter(1, here, numbers.gather(1, here))
        self.state, self.slot = numbers.nonzero(as_tuple=True)
        self.end = numbers[self.state, self.slot].cumsum(0)
        self.begin = self.end - numbers[self.state, self.slot]
        self.row = states.row[self.state]

    def count(self, n: int) -> Tensor:
        """Return (n,) the number of children of each problem."""
        count = torch.zeros(n, dtype=torch.int64, device=self.row.device)
        count.index_add_(0, self.row, self.end - self.begin)
        self._first = count.cumsum(0) - count
        return count

    def texts(self, row: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n,) problems and (n, T) texts of the children with these numbers."""
        number = self._first[row] + number
        pair = torch.searchsorted(self.end, number, right=True)
        state, place = self.state[pair], self.space.where[row, self.slot[pair]]
        token = self.space.alternative(row, place, number - self.begin[pair])
        ids = self.states.ids[state].clone()
        line = torch.arange(len(ids), device=ids.device)
        if self.revising:  # the token that stands there gives way to the original, which is no alternative
            token = torch.where(token == ids[line, place], self.space.ids[row, place], token)
        ids[line, place] = token
        return row, ids


@dataclass(frozen=True)
class Greedy(Beam):
    """Make the best single change, again and again: the beam of width 1, done when a round brings nothing.

    With ``order="left"``, ``"gradient"`` or ``"deletion"`` place after place gets its best token; later sweeps revise.
    """

    width: int | None = 1
    patience: int | None = 1
