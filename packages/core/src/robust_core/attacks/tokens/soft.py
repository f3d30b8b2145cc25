"""The embedding attack: free vectors in some places of a text, a stronger threat than any text.

No sequence of tokens has these vectors, so what it breaks need not be breakable by a prompt: report it apart. It is the
inner attack of adversarial training (AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234: Adam, 30 steps of 1e-3 from the
embedding of a random token), of concept inversion (Pham et al. 2024, arXiv 2308.01508) and, with ``fast``, a single
signed step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robust_core.attacks.tokens.engine import SearchRun, TokenSearch, held, put
from robust_core.attacks.tokens.gradient import options_of
from robust_core.attacks.tokens.problem import TokenProblem
from robust_core.attacks.tokens.relaxed import Rows, adam_state, adam_step, random_columns
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed

__all__ = ["SoftTokenResult", "SoftTokens"]


@dataclass(frozen=True, eq=False)
class SoftTokenResult:
    """What the embedding attack found.

    Attributes:
        embeddings: (B, T, D) all embeddings of the text, the free vectors among them.
        vectors: (B, S, D) the free vectors; 0 where ``where`` is -1.
        where: (B, S) their places; -1 after the last.
        loss: (B,) float64 at ``vectors``; of a stochastic loss, at the last step.
        success: (B,) bool: the goal is met. A judge of texts is not asked: there is no text.
        n_gradients: (B,) int64.
        trace: (B, n_steps + 1) float64 lowest loss so far (of a stochastic loss, the last), before and after each step.
        threat: ``"embedding"``.
    """

    embeddings: Tensor
    vectors: Tensor
    where: Tensor
    loss: Tensor
    success: Tensor
    n_gradients: Tensor
    trace: Tensor
    threat: Literal["embedding"] = field(default="embedding")


@dataclass(frozen=True)
class SoftTokens:
    """Lower the loss over the vectors in the slots of a text. Candidates only matter for where it starts.

    Args:
        n_steps: gradients.
        lr: step size.
        init: ``"random"`` candidates' embeddings, the ``"own"`` (original) tokens', or (B, S, D) vectors, such as the
            last attack's.
        fast: the sign of the gradient in place of Adam.
        eps: how far each entry may move from its start; None means any distance.
        batch_size: texts that are worked on at a time.
        padding: see :class:`TokenSearch`.
    """

    n_steps: int = 30
    lr: float = 1e-3
    init: Literal["random", "own"] | Tensor = "random"
    fast: bool = False
    eps: float | None = None
    batch_size: int = 256
    padding: bool = True

    def __post_init__(self) -> None:
        check_count("n_steps", self.n_steps, low=0)
        check_number("lr", self.lr, low=0, open_low=True)
        if isinstance(self.init, str):
            check_choice("init", self.init, ("random", "own"))
        if self.eps is not None:
            check_number("eps", self.eps, low=0)

    def run(self, problem: TokenProblem, *, index: Tensor | None = None, generator: Seed = None) -> SoftTokenResult:
        """Attack every text of the problem; see :meth:`TokenSearch.run`."""
        if problem.embedding is None:
            raise ValueError("SoftTokens needs gradients: give the problem embedded and embedding")
        where, width = problem.space.where, problem.embedding.shape[1]
        if isinstance(self.init, Tensor) and self.init.shape != (*where.shape, width):
            raise ValueError(f"init has shape {tuple(self.init.shape)}; {(*where.shape, width)} is needed")
        with held(problem, index, generator) as (index, seed):
            settings = TokenSearch(self.batch_size, padding=self.padding)
            parts = torch.arange(len(where), device=where.device).split(self.batch_size)
            found = [self._search(SearchRun(settings, problem, rows, index[rows], seed), rows) for rows in parts]
        vectors, loss, success, n_gradients, trace = (torch.cat(part) for part in zip(*found, strict=True))
        embeddings = put(problem.embedding.detach()[problem.space.ids], where, vectors.to(problem.embedding.dtype))
        return SoftTokenResult(embeddings, vectors, where, loss, success, n_gradients, trace)

    def _search(self, run: SearchRun, rows: Tensor) -> tuple[Tensor, ...]:
        everyone = torch.arange(len(run), device=run.device)
        options = options_of(run, everyone, run.space.where)
        if isinstance(self.init, Tensor):
            start = self.init.to(rows.device)[rows].to(torch.promote_types(self.init.dtype, torch.float32))
        else:
            column = random_columns(run, options, "soft start") if self.init == "random" else options.own
            start = options.vectors(options.tokens(column))
        start = torch.where((options.where >= 0)[..., None], start, 0)
        state, trace = adam_state(start), []
        best, loss = start.clone(), torch.full_like(run.best_loss, torch.inf)
        going = everyone
        for step in range(self.n_steps + 1):
            x = state["x"]
            values, gradient = run.soft(going, options.where[going], x, step=step, gradient=step < self.n_steps)
            better = values < loss[going]
            better |= run.problem.stochastic
            best[going[better]], loss[going[better]] = x[better], values[better]
            trace.append(loss.clone())
            stay = (~(loss <= run.goal)[going]).nonzero()[:, 0]
            if step == self.n_steps or not len(stay):
                break
            going, state = going[stay], {name: value[stay] for name, value in state.items()}
            state = self._moved(state, gradient[stay], start[going], step)
        trace += trace[-1:] * (self.n_steps + 1 - len(trace))
        return best, loss, loss <= run.goal, run.n_gradients, torch.stack(trace, 1)

    def _moved(self, state: Rows, gradient: Tensor, start: Tensor, step: int) -> Rows:
        x = state["x"] - self.lr * gradient.sign() if self.fast else adam_step(state, gradient, step, lr=self.lr)
        state["x"] = x if self.eps is None else torch.clamp(x, start - self.eps, start + self.eps)
        return state
