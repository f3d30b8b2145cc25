"""Searches that let the gradient at the present tokens propose the next ones.

- :class:`GCG`, greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043, algorithm 1): the ``top_k`` tokens of
  lowest one-hot gradient in every slot, a batch of random single exchanges among them, the best of the batch is next.
  Where fewer exchanges exist than the batch holds, all are tried. The batch is spread evenly over (slot, token).
- :class:`NearestPGD`, the word substitution of PRADA (Wu et al. 2023, arXiv 2204.01321): the most important slots by
  the norm of the gradient, PGD on their embeddings, then in each the other candidate nearest to where its vector went,
  kept if the loss falls. The steps are reconstructed from the paper's description; radius and step size are options.

Both ask the true loss (``problem.loss``) about texts, and take gradients from ``problem.embedded``, which may belong to
a surrogate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_core.attacks.tokens.discrete import importance, run_mask
from robust_core.attacks.tokens.engine import SearchRun, TokenSearch, best_of
from robust_core.attacks.tokens.options import Options
from robust_core.attacks.tokens.problem import TokenProblem
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["GCG", "GradientSearch", "NearestPGD", "chosen_slots"]

_CELLS = 1 << 24


@dataclass(frozen=True)
class GradientSearch(TokenSearch):
    """Base of the searches that need gradients with respect to embeddings."""

    def check(self, problem: TokenProblem) -> None:
        """Raise ValueError where the problem offers no gradients."""
        if problem.embedded is None:
            raise ValueError(
                f"{type(self).__name__} needs gradients: give the problem embedded and embedding, or use a search by "
                "queries (Greedy, Beam, RandomSearch)"
            )


def options_of(run: SearchRun, row: Tensor, where: Tensor) -> Options:
    """Return the candidates of some slots."""
    embedding = run.problem.embedding
    assert embedding is not None  # what `check` refuses
    return Options(run.space, embedding, row, where, padding=run.settings.padding)


def chosen_slots(run: SearchRun) -> Tensor:
    """Return (b, m) the slots that a search may rewrite freely: all, or the most important of those within the budget.

    Importance is the norm of the gradient at the original text; it is asked for where a choice is needed.
    """
    space = run.space
    n_slots = (space.n_alternatives > 0).sum(1)
    m = max(int(torch.minimum(n_slots, space.allowance).max()), 1)
    places, rank = space.where, torch.arange(m, device=run.device)
    needed = (n_slots > space.allowance) & (space.allowance > 0)
    if bool(needed.any()):
        value = importance(run, "gradient", among=needed)
        places = places.gather(1, value.argsort(dim=1, descending=True, stable=True))
    return torch.where(rank < space.allowance[:, None], places[:, :m], -1)


@dataclass(frozen=True)
class GCG(GradientSearch):
    """Greedy coordinate gradient.

    Args:
        n_steps: rounds. The paper: 500.
        n_candidates: texts asked about in each round. The paper: 512.
        top_k: tokens of each slot among which they are drawn. The paper: 256.
        monotone: stay where no candidate is better; the paper always moves to the best of the batch.
    """

    n_steps: int = 500
    n_candidates: int = 512
    top_k: int = 256
    monotone: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_steps", "n_candidates", "top_k"):
            check_count(name, getattr(self, name))

    def search(self, run: SearchRun) -> None:
        """Exchange one token after the other."""
        ids = run.space.ids.clone()
        streams = run.streams("gcg")
        everyone = torch.arange(len(run), device=run.device)
        options = options_of(run, everyone, run.space.where)
        for step in range(self.n_steps):
            row = run.active()
            row = row[(run.space.n_alternatives[row] > 0).any(1) & (run.space.allowance[row] > 0)]
            if not len(row):
                return
            losses, gradient = run.gradient(row, ids[row], run.space.where[row], step=step)
            column, total = self._proposals(run, options, row, ids[row], gradient)
            width = min(int(total.max()), self.n_candidates)
            n_tried = total.clamp(max=self.n_candidates)
            draws = streams.select(row).uniform((width,), chunk=step, dtype=torch.float64)
            number = torch.arange(width, device=run.device)
            spread = ((number + draws) * (total / n_tried.clamp(min=1))[:, None]).to(torch.int64)
            exchange = torch.where((total <= self.n_candidates)[:, None], number, spread)
            text, place = (number < n_tried[:, None]).nonzero(as_tuple=True)
            tried = self._exchanged(run, row, ids, column, text, exchange[text, place])
            found = run.query(row[text], tried, step=step)
            best = best_of(text, found, len(row))
            moved = (best < len(text)).nonzero()[:, 0]
            if self.monotone:
                if run.problem.loss is not None:  # the gradient's losses are those of a surrogate
                    losses = run.query(row, ids[row], step=step)
                moved = moved[found[best[moved]] < losses[moved]]
            ids[row[moved]] = tried[best[moved]]
            run.end_step(step)

    def _proposals(
        self, run: SearchRun, options: Options, row: Tensor, ids: Tensor, gradient: Tensor
    ) -> tuple[_Columns, Tensor]:
        """Return the columns of the most promising exchanges in every slot, and (a,) how many there are in all."""
        where = run.space.where[row]
        place = where.clamp(min=0)
        changed = run.space.changed(row, ids)
        here = changed.gather(1, place)
        room = (changed.sum(1) < run.space.allowance[row])[:, None]
        usable = (run.space.n_alternatives[row] > 0) & (room | here)
        present = ids.gather(1, place)
        columns, counts = [], []
        width = run.space.table.shape[1] + 1
        for part in torch.arange(len(row), device=run.device).split(max(_CELLS // (where.shape[1] * width), 1)):
            some = options.select(row[part])
            valid = some.valid & usable[part][..., None]
            valid &= ~some.holds(present[part])
            score = some.scores(gradient[part]).masked_fill(~valid, torch.inf)
            columns.append(score.topk(min(self.top_k, width), dim=2, largest=False, sorted=True).indices)
            counts.append(valid.sum(2).clamp(max=self.top_k))
        count = torch.cat(counts)
        return _Columns(torch.cat(columns), count.cumsum(1)), count.sum(1)

    def _exchanged(
        self, run: SearchRun, row: Tensor, ids: Tensor, columns: _Columns, text: Tensor, number: Tensor
    ) -> Tensor:
        slot = torch.searchsorted(columns.end[text], number[:, None], right=True)[:, 0]
        begin = torch.where(slot > 0, columns.end[text, (slot - 1).clamp(min=0)], 0)
        column = columns.column[text, slot, number - begin]
        where = run.space.where[row[text], slot]
        tried = ids[row[text]]
        tried[torch.arange(len(text), device=run.device), where] = run.space.token(row[text], where, column)
        return tried


@dataclass
class _Columns:
    column: Tensor  # (a, S, k) columns, the most promising first
    end: Tensor  # (a, S) exchanges up to and with each slot


@dataclass(frozen=True)
class NearestPGD(GradientSearch):
    """Move the embeddings of the most important slots down the gradient, then take the nearest candidates.

    Args:
        n_rounds: times that all of it is done, each from the best text so far.
        n_steps: steps of PGD in each round.
        step_size: length of a step, as a share of the mean norm of the embeddings.
        eps: how far a vector may go, as such a share; None means any distance.
        metric: what "nearest" means, ``"euclidean"`` or ``"cosine"``.
        jointly: also ask about all replacements at once, before one after the other.
    """

    n_rounds: int = 1
    n_steps: int = 10
    step_size: float = 0.2
    eps: float | None = None
    metric: Literal["euclidean", "cosine"] = "euclidean"
    jointly: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_rounds", self.n_rounds)
        check_count("n_steps", self.n_steps)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_choice("metric", self.metric, ("euclidean", "cosine"))
        if self.eps is not None:
            check_number("eps", self.eps, low=0, open_low=True)

    def search(self, run: SearchRun) -> None:
        """Perturb, replace, keep what helps."""
        where = chosen_slots(run)
        everyone = torch.arange(len(run), device=run.device)
        options = options_of(run, everyone, where)
        unit = float(options.norms().mean())
        draws = self.n_steps + 1 + run.space.ids.shape[1]  # that a round may use
        for number in range(self.n_rounds):
            row = run.active()
            row = row[(where[row] >= 0).any(1)]
            if not len(row):
                return
            points, row = self._perturbed(run, options, row, unit, number * draws)
            if not len(row):
                return
            some = options.select(row)
            present = run.best_ids[row].gather(1, some.where.clamp(min=0))
            column = some.nearest(points, metric=self.metric, other_than=present)
            self._replace(run, some, column, number * draws + self.n_steps)
            run.end_step(number)

    def _perturbed(
        self, run: SearchRun, options: Options, row: Tensor, unit: float, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return where the vectors went, and of which texts: those that have queries left."""
        base, where = run.best_ids.clone(), options.where
        start = options.vectors(base.gather(1, where.clamp(min=0)))
        points = start.clone()
        for step in range(first, first + self.n_steps):
            row = row[run_mask(run, run.active())[row]]
            if not len(row):
                break
            _, gradient = run.gradient(row, base[row], where[row], step=step, embeddings=points[row])
            length = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
            moved = points[row] - self.step_size * unit * gradient / length.clamp(min=1e-30)
            if self.eps is not None:
                away = moved - start[row]
                far = torch.linalg.vector_norm(away, dim=2, keepdim=True).clamp(min=1e-30)
                moved = start[row] + away * (self.eps * unit / far).clamp(max=1)
            points[row] = moved
        return points[row], row

    def _replace(self, run: SearchRun, options: Options, column: Tensor, first: int) -> None:
        """Ask about the replacements, all at once and then one after the other from the most important on."""
        row = options.row
        if self.jointly:
            run.query(row, options.write(run.best_ids[row], column), step=first)
        token = options.tokens(column)
        for slot in range(column.shape[1]):
            going = run_mask(run, run.active())[row] & (options.where[:, slot] >= 0)
            some = going.nonzero()[:, 0]
            ids = run.best_ids[row[some]]
            ids[torch.arange(len(some), device=run.device), options.where[some, slot]] = token[some, slot]
            new = (ids != run.best_ids[row[some]]).any(1)
            run.query(row[some][new], ids[new], step=first + 1 + slot)
