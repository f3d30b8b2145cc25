"""The engine that every search over tokens runs on: it asks, counts, checks, remembers and stops.

A search proposes; :class:`SearchRun` alone evaluates. So whatever a search does, no text outside its space is ever
asked about or returned, no query beyond the limit is made, nothing is done for texts that are decided, the best text of
the whole search is kept, and each text's answer depends neither on its batch nor on the size of batches.

Words of the papers: *token* ids in places of a text, a *query* is one evaluation of the loss at one text (those that
also give a gradient included), a *step* numbers the rounds of a search. The attacker minimises the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.attacks.tokens.problem import Loss, TokenAttackResult, TokenProblem
from robust_core.checks import check_count
from robust_core.errors import NotDifferentiableError
from robust_core.models import frozen, padded
from robust_core.random import SampleStreams, Seed, reseeded, resolve_seed

__all__ = ["SearchRun", "TokenSearch", "best_of", "held", "put", "rank_within"]


@dataclass(frozen=True)
class TokenSearch:
    """Base of the searches: a frozen dataclass of settings with the method :meth:`search`.

    Args:
        batch_size: rows that go through the loss at a time, and texts that are worked on at a time.
        max_queries: queries that may be made for each text; None means no limit.
        stop_at_success: nothing more is done for a text once it succeeded. If False, its loss is lowered further
            (without a judge: what a judge accepted is never exchanged).
        check_every: steps between two looks of the judge.
        padding: fill small batches of embeddings up (to 16 rows at least), so that a text's answer has the same bits in
            any company. Turn it off for large models, where a batch of one costs a sixteenth of that. ``loss`` is
            asked about nothing but the texts that are counted.
    """

    batch_size: int = 256
    max_queries: int | None = None
    stop_at_success: bool = True
    check_every: int = 1
    padding: bool = True

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("check_every", self.check_every)
        if self.max_queries is not None:
            check_count("max_queries", self.max_queries)

    @property
    def compares(self) -> bool:
        """Whether the losses of texts are asked for, so that the best of those that failed is known."""
        return True

    def search(self, run: SearchRun) -> None:
        """Propose texts to ``run`` until nothing is left to do; it keeps what is best. Here: none but the originals."""
        del run

    def check(self, problem: TokenProblem) -> None:
        """Raise where this search cannot work on the problem, before any query."""
        del problem

    def run(
        self,
        problem: TokenProblem,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TokenAttackResult:
        """Attack every text of the problem.

        Args:
            problem: what may be written and what is wanted.
            index: (B,) int64 positions in the original data, which name the random streams; 0 .. B-1 by default.
            generator: seed of the run; None means 0.
            on_step: called with (texts decided or done, texts in all) after each step.

        Raises:
            TypeError, ValueError: arguments that do not fit, before any query.
            NotDifferentiableError: a gradient was needed that the loss does not have.
        """
        if not isinstance(problem, TokenProblem):
            raise TypeError(f"problem must be a TokenProblem, not {type(problem).__name__}")
        self.check(problem)
        n = len(problem.space)
        runs: list[SearchRun] = []
        with held(problem, index, generator) as (index, seed):
            for rows in torch.arange(n, device=index.device).split(self.batch_size):
                done = sum(len(run) for run in runs)
                report = None if on_step is None else (lambda decided, done=done: on_step(done + decided, n))
                runs.append(SearchRun(self, problem, rows, index[rows], seed, report))
                runs[-1].begin()
                self.search(runs[-1])
                runs[-1].end()
        return _joined(problem, runs)


@contextmanager
def held(problem: TokenProblem, index: Tensor | None, generator: Seed) -> Iterator[tuple[Tensor, int]]:
    """Hold the models still and lend them random streams; give the names of the streams and the seed."""
    ids = problem.space.ids
    index = torch.arange(len(ids), device=ids.device) if index is None else index
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (len(ids),):
        raise ValueError(f"index must be int64 of shape ({len(ids)},): a name of the random stream of each text")
    seed = resolve_seed(generator)
    with ExitStack() as stack:
        for model in problem.modules:
            stack.enter_context(frozen(model))
        stack.enter_context(reseeded(seed, ids.device))
        yield index.to(ids.device), seed


def _joined(problem: TokenProblem, runs: list[SearchRun]) -> TokenAttackResult:
    def column(name: str) -> Tensor:
        return torch.cat([getattr(run, name) for run in runs])

    longest = max(len(run.trace) for run in runs)
    trace = [torch.stack([*run.trace, *run.trace[-1:] * (longest - len(run.trace))], 1) for run in runs]
    ids = column("best_ids")
    return TokenAttackResult(
        ids,
        column("best_loss"),
        column("initial_loss"),
        column("success"),
        ids != problem.space.ids,
        column("n_queries"),
        column("n_gradients"),
        column("n_judged"),
        torch.cat(trace),
    )


class SearchRun:
    """One search on some texts: all that a search may use. Rows are numbered within the run, ``0 .. len(run) - 1``.

    Attributes:
        space: the space of these texts.
        best_ids: (b, T) the best texts so far.
        best_loss: (b,) float64 their losses.
        success: (b,) bool.
        goal: (b,) float64; -inf where there is none.
    """

    def __init__(
        self,
        search: TokenSearch,
        problem: TokenProblem,
        rows: Tensor,
        index: Tensor,
        seed: int,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self.settings, self.problem, self.space = search, problem, problem.space.rows(rows)
        self._rows, self._index, self._seed, self._report = rows, index, seed, report
        n, device = len(rows), rows.device
        goal = torch.as_tensor(-torch.inf if problem.goal is None else problem.goal)
        self.goal = goal.to(device=device, dtype=torch.float64).expand(len(problem.space))[rows]
        self.best_ids = self.space.ids.clone()
        self.best_loss = torch.full((n,), torch.nan, dtype=torch.float64, device=device)
        self.initial_loss = self.best_loss
        self.success = torch.zeros(n, dtype=torch.bool, device=device)
        self.n_queries, self.n_gradients, self.n_judged = (torch.zeros_like(rows) for _ in range(3))
        self.trace: list[Tensor] = []
        self._seen_draw: int | None = None  # draw at which best_loss was measured, of a stochastic loss
        self._judged = torch.full_like(self.best_ids, -1)

    def __len__(self) -> int:
        """Return the number of texts of this run."""
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        """The device of the ids."""
        return self._rows.device

    def streams(self, purpose: str) -> SampleStreams:
        """Return the random streams of these texts."""
        return SampleStreams(self._seed, self._index, purpose)

    def active(self) -> Tensor:
        """Return (a,) the rows that are neither decided nor out of queries."""
        return self._is_active().nonzero()[:, 0]

    def _is_active(self) -> Tensor:
        stops = self.settings.stop_at_success or self.problem.judge is not None
        active = ~self.success if stops else torch.ones_like(self.success)
        return active if self.settings.max_queries is None else active & (self._left() > 0)

    def _left(self) -> Tensor:
        """Return (b,) int64, the evaluations that the limit still allows."""
        assert self.settings.max_queries is not None
        return (self.settings.max_queries - self.n_queries).clamp(min=0) // self.problem.n_draws

    # -- the beginning and the end of a step --------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask about the original texts."""
        everyone = torch.arange(len(self), device=self.device)
        if self.settings.compares:
            self.query(everyone, self.space.ids)
        self.initial_loss = self.best_loss.clone()
        self.judge(everyone, self.space.ids, self.best_loss)
        self.trace.append(self.best_loss.clone())

    def end_step(self, step: int, *, judge: bool = True) -> None:
        """Let the judge see the best texts where it is time to, and note where the search stands."""
        if judge and (step + 1) % self.settings.check_every == 0:
            self.judge(torch.arange(len(self), device=self.device), self.best_ids, self.best_loss)
        self.trace.append(self.best_loss.clone())
        if self._report is not None:
            self._report(len(self) - len(self.active()))

    def end(self) -> None:
        """Let the judge see the best texts that it has not seen."""
        self.judge(torch.arange(len(self), device=self.device), self.best_ids, self.best_loss)

    # -- losses -------------------------------------------------------------------------------------------------------

    def query(self, row: Tensor, ids: Tensor, *, step: int = 0) -> Tensor:
        """Return (n,) float64 losses of texts, and keep the best ones.

        All rows are evaluated that are active when the call begins and within the limit, in the given order;
        the others are infinite. NaN counts as infinite.

        Args:
            row: (n,) text of the run that each row of ``ids`` is an edit of.
            ids: (n, T) inside the space.
            step: number of the round, which chooses the draw of a stochastic loss.
        """
        self._require_inside(row, ids)
        asked, values = self._ask(row, ids, step)
        self._record(row[asked], ids[asked], values, step)
        losses = torch.full((len(row),), torch.inf, dtype=torch.float64, device=self.device)
        losses[asked] = values
        return losses

    def probe(self, row: Tensor, ids: Tensor, *, step: int = 0) -> Tensor:
        """Return (n,) float64 losses of texts that may lie outside the space, only to learn from: none is kept."""
        asked, values = self._ask(row, ids, step)
        losses = torch.full((len(row),), torch.inf, dtype=torch.float64, device=self.device)
        losses[asked] = values
        return losses

    def _ask(self, row: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        asked = self._is_active()[row]
        if self.settings.max_queries is not None:
            place = torch.zeros_like(row)
            among = asked.nonzero()[:, 0]
            place[among] = rank_within(row[among])
            asked = asked & (place < self._left()[row])
        asked = asked.nonzero()[:, 0]
        values = [self._losses(row[part], ids[part], step) for part in asked.split(self.settings.batch_size)]
        self.n_queries.index_add_(0, row[asked], torch.full_like(asked, self.problem.n_draws))
        return asked, torch.cat(values)

    def _losses(self, row: Tensor, ids: Tensor, step: int) -> Tensor:
        if not len(row):
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        problem, text = self.problem, self._rows[row]
        with torch.no_grad():
            if problem.loss is not None:
                return self._mean(problem.loss, ids, text, step)
            return self._mean(problem.embedded, self._embed(ids), text, step)

    def _mean(self, function: Loss | None, x: Tensor, text: Tensor, step: int) -> Tensor:
        assert function is not None
        n = len(text)
        if self.settings.padding and x.is_floating_point():
            x, text = padded(x), padded(text)
        if not self.problem.stochastic:
            return _checked_losses(function(x, text), x)[:n]
        first = step * self.problem.n_draws
        total = _checked_losses(function(x, text, first), x)
        for draw in range(first + 1, first + self.problem.n_draws):
            total = total + _checked_losses(function(x, text, draw), x)
        return total[:n] / self.problem.n_draws

    def _embed(self, ids: Tensor) -> Tensor:
        assert self.problem.embedding is not None
        return nn.functional.embedding(ids, self.problem.embedding.detach())

    def gradient(
        self, row: Tensor, ids: Tensor, where: Tensor, *, step: int = 0, embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (n,) float64 losses and (n, m, D) gradients with respect to the embeddings at some places.

        The texts count as queried. They are kept if they are best, unless ``embeddings`` stand in for tokens, the loss
        is stochastic, or the problem states its loss apart: then these are the losses of a surrogate.

        Args:
            row: (n,) active texts of the run, each once.
            ids: (n, T) inside the space.
            where: (n, m) places; -1 gives a gradient of 0.
            step: see :meth:`query`.
            embeddings: (n, m, D) to stand at these places instead of those of the tokens.
        """
        self._require_inside(row, ids)
        losses, gradients = self._passes(row, ids, where, step, embeddings, gradient=True)
        if embeddings is None and not self.problem.stochastic and self.problem.loss is None:
            self._record(row, ids, losses, step)
        return losses, gradients

    def soft(self, row: Tensor, where: Tensor, vectors: Tensor, *, step: int, gradient: bool) -> tuple[Tensor, Tensor]:
        """Return (n,) losses of the original texts with free vectors (n, m, D) in places, and perhaps gradients."""
        return self._passes(row, self.space.ids[row], where, step, vectors, gradient=gradient)

    def _passes(
        self, row: Tensor, ids: Tensor, where: Tensor, step: int, vectors: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self._pass(row[p], ids[p], where[p], step, None if vectors is None else vectors[p], gradient=gradient)
            for p in torch.arange(len(row), device=self.device).split(self.settings.batch_size)
        ]
        for counter in (self.n_queries, self.n_gradients)[: 1 + gradient]:
            counter.index_add_(0, row, torch.full_like(row, self.problem.n_draws))
        losses, gradients = (torch.cat(column) for column in zip(*parts, strict=True))
        return losses, gradients

    def _pass(
        self, row: Tensor, ids: Tensor, where: Tensor, step: int, vectors: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        x, text = self._embed(ids), self._rows[row]
        x = x if vectors is None else put(x, where, vectors.to(x.dtype))
        if not gradient:
            with torch.no_grad():
                losses = self._mean(self.problem.embedded, x, text, step)
            return losses, torch.zeros_like(losses)
        x.requires_grad_(True)
        with torch.enable_grad():
            losses = self._mean(self.problem.embedded, x, text, step)
            if not losses.requires_grad:
                raise NotDifferentiableError(_NO_GRADIENT)
            (slope,) = torch.autograd.grad(losses.sum(), x, allow_unused=True)
        if slope is None:
            raise NotDifferentiableError(_NO_GRADIENT)
        slope = slope.gather(1, where.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        slope = slope.to(torch.promote_types(slope.dtype, torch.float32)).nan_to_num()
        return losses.detach(), torch.where((where >= 0)[..., None], slope, 0)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _require_inside(self, row: Tensor, ids: Tensor) -> None:
        if not bool(self.space.contains(row, ids).all()):
            raise ValueError(f"{type(self.settings).__name__} proposed a text outside its space: the search is wrong")

    def _record(self, row: Tensor, ids: Tensor, losses: Tensor, step: int) -> None:
        if not len(row):
            return
        if self.problem.stochastic and self._seen_draw != step:
            self._measure_again(step)
        first = best_of(row, losses, len(self))
        rows = (first < len(row)).nonzero()[:, 0]
        first = first[rows]
        better = ~(losses[first] >= self.best_loss[rows])  # NaN: nothing was measured yet
        if self.problem.judge is not None:
            better &= ~self.success[rows]
        rows, first = rows[better], first[better]
        self.best_ids[rows], self.best_loss[rows] = ids[first], losses[first]
        if self.problem.judge is None:
            self.success |= self.best_loss <= self.goal

    def _measure_again(self, step: int) -> None:
        """Measure the best texts at the draw of this step: only losses of one draw can be compared."""
        self._seen_draw = step
        rows = torch.arange(len(self), device=self.device)[~self.best_loss.isnan()]
        asked, values = self._ask(rows, self.best_ids[rows], step)
        self.best_loss[rows[asked]] = values

    def judge(self, row: Tensor, ids: Tensor, losses: Tensor) -> None:
        """Ask the judge about texts of undecided rows (each once) that meet the goal; a success ends the search."""
        if self.problem.judge is None:
            return
        fresh = ~self.success[row] & (ids != self._judged[row]).any(1)
        if self.problem.goal is not None:
            fresh &= losses <= self.goal[row]
        row, ids, losses = row[fresh], ids[fresh], losses[fresh]
        for part in torch.arange(len(row), device=self.device).split(self.settings.batch_size):
            if not len(part):
                return
            with torch.no_grad():
                verdict = self.problem.judge(ids[part], self._rows[row[part]])
            if not isinstance(verdict, Tensor) or verdict.dtype != torch.bool or verdict.shape != (len(part),):
                raise ValueError(f"judge must return bool ({len(part)},) for {len(part)} texts")
            verdict = verdict.to(self.device)
            self.n_judged[row[part]] += 1
            self._judged[row[part]] = ids[part]
            won = part[verdict]
            self.success[row[won]] = True
            self.best_ids[row[won]], self.best_loss[row[won]] = ids[won], losses[won]

    def check(self, row: Tensor, ids: Tensor, *, step: int) -> None:
        """Ask about the present texts of a search that moves between texts, and let the judge see them."""
        if self.settings.compares:
            losses = self.query(row, ids, step=step)
        else:
            self._require_inside(row, ids)
            losses = self.best_loss[row]
            last = losses.isnan()  # of texts without a measured one, the last is kept
            self.best_ids[row[last]] = ids[last]
        self.judge(row, ids, losses)

    def blocks(self, count: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, numbers) that count through ``0 .. count[row] - 1`` for every row, ``size`` of a row at a time.

        Rows that are decided, or out of queries, are left out from the next block on. The blocks of a row do not depend
        on the others, so that what is asked before it is decided does not either.
        """
        place = torch.arange(size, device=self.device)
        begin = 0
        while True:
            rows = self.active()
            rows = rows[count[rows] > begin]
            if not len(rows):
                return
            inside = begin + place < count[rows, None]
            row, column = inside.nonzero(as_tuple=True)
            yield rows[row], begin + column
            begin += size


_NO_GRADIENT = (
    "the loss has no gradient with respect to the embeddings: use a search by queries (Greedy, Beam, RandomSearch), or "
    "give the gradients of a differentiable surrogate in `embedded` and the true loss in `loss`"
)


def _checked_losses(losses: Any, like: Tensor) -> Tensor:
    n = len(like)
    losses = torch.from_numpy(losses) if isinstance(losses, np.ndarray) else losses
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"the loss returned {shape} for {n} texts; one number for each, ({n},), is needed")
    return losses.to(like.device, torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def put(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Return ``x`` (n, T, ...) with ``values`` (n, m, ...) at the places ``where`` (n, m); -1 writes nothing."""
    row, slot = (where >= 0).nonzero(as_tuple=True)
    x = x.clone()
    x[row, where[row, slot]] = values[row, slot]
    return x


def rank_within(group: Tensor) -> Tensor:
    """Return (n,) int64: how many earlier rows belong to the same group."""
    order = group.argsort(stable=True)
    ordered = group[order]
    number = torch.arange(len(group), device=group.device)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(fresh, number, 0).cummax(0).values if len(group) else number
    rank = torch.empty_like(number)
    rank[order] = number - first
    return rank


def best_of(group: Tensor, losses: Tensor, n_groups: int) -> Tensor:
    """Return (n_groups,) the first row of lowest loss of each group; n for a group without rows."""
    lowest = torch.full((n_groups,), torch.inf, dtype=losses.dtype, device=losses.device)
    lowest.scatter_reduce_(0, group, losses, "amin")
    number = torch.arange(len(group), device=group.device)
    number = torch.where(losses == lowest[group], number, len(group))
    first = torch.full((n_groups,), len(group), device=group.device)
    return first.scatter_reduce_(0, group, number, "amin")
