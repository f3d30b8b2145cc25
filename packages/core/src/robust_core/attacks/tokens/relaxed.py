"""Searches over relaxed tokens: mixtures on the simplex, and free embeddings that are projected onto tokens.

- :class:`Simplex`: a probability for each candidate of each slot, projected gradient steps, rows projected onto the
  simplex. ``forward="sample"`` draws one token a slot, sends that text through the model and the gradient straight
  through (UnlearnDiffAtk, Zhang et al. 2024, arXiv 2310.11868: Adam, gradient clamped to [-1, 1]); ``"argmax"`` takes
  the likeliest tokens instead; ``"soft"`` sends the mixture itself (Geisler et al. 2024, arXiv 2402.09154, with their
  projection onto little entropy as an option). The text that is asked about is the arg-max.
- :class:`Projected`: PEZ (Wen et al. 2023, arXiv 2302.03668): the gradient is taken at the nearest tokens, and applied
  to continuous vectors. Its use for erased concepts is P4D (Chin et al. 2024, arXiv 2309.06135).

Where the budget is below the number of slots, the most important slots are rewritten (norm of the gradient).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from robust_core.attacks.tokens.discrete import run_mask
from robust_core.attacks.tokens.engine import SearchRun
from robust_core.attacks.tokens.gradient import GradientSearch, chosen_slots, options_of
from robust_core.attacks.tokens.options import Options
from robust_core.attacks.tokens.problem import TokenProblem
from robust_core.attacks.tokens.simplex import project_entropy, project_simplex
from robust_core.checks import check_choice, check_count, check_number

__all__ = ["Projected", "Relaxed", "Simplex", "adam_step"]

Rows = dict[str, Tensor]


def adam_step(
    state: Rows, gradient: Tensor, step: int, *, lr: float, weight_decay: float = 0.0, decoupled: bool = False
) -> Tensor:
    """Move ``state["x"]`` by Adam (Kingma and Ba 2015, arXiv 1412.6980), in place, and return it.

    Args:
        state: ``x`` (b, ...) and its moments ``mean`` and ``square``, updated.
        gradient: (b, ...).
        step: steps taken before.
        lr: step size.
        weight_decay: pull towards 0, added to the gradient, or to the step where ``decoupled`` (AdamW).
        decoupled: see ``weight_decay``.
    """
    x, mean, square = (state[name] for name in ("x", "mean", "square"))
    adam(
        [x], [gradient], [mean], [square], [], [torch.tensor(float(step))], decoupled_weight_decay=decoupled,
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=weight_decay, eps=1e-8, maximize=False,
    )  # fmt: skip
    return x


def adam_state(x: Tensor) -> Rows:
    """Return the state of :func:`adam_step` at the beginning."""
    return {"x": x.clone(), "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}


@dataclass(frozen=True)
class Relaxed(GradientSearch):
    """Base: steps on something continuous, and a look now and then at the text that it stands for.

    Args:
        n_steps: steps.
        check_every: steps between two looks at that text, by the loss and the judge; the last step has one too.
        lr: step size of Adam.
        weight_decay: see :func:`adam_step`.
        compare: ask for the losses of the original and of the texts that are looked at. If not, the judge alone looks
            (there must be one, and no goal); a text that failed comes back as he last saw it, with a loss of NaN.
    """

    check_every: int = 10
    n_steps: int = 200
    lr: float = 0.1
    weight_decay: float = 0.0
    compare: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_steps", self.n_steps)
        check_number("lr", self.lr, low=0, open_low=True)
        check_number("weight_decay", self.weight_decay, low=0)

    @property
    def compares(self) -> bool:
        """Whether the losses of texts are asked for."""
        return self.compare

    def check(self, problem: TokenProblem) -> None:
        """Raise ValueError where the problem offers no gradients, or nothing to decide by."""
        super().check(problem)
        if not self.compare and (problem.judge is None or problem.goal is not None):
            raise ValueError("compare=False leaves all to the judge: give the problem a judge, and no goal")

    @abstractmethod
    def begin(self, run: SearchRun, options: Options) -> Rows:
        """Return the state of fresh rows; ``x`` is what moves."""

    @abstractmethod
    def move(self, run: SearchRun, options: Options, state: Rows, step: int) -> Rows:
        """Return the state after one step, from one gradient."""

    @abstractmethod
    def columns(self, options: Options, state: Rows) -> Tensor:
        """Return (a, m) the columns of the tokens that the state stands for."""

    def search(self, run: SearchRun) -> None:
        """Move, look, and let decided rows leave."""
        where = chosen_slots(run)
        row = run.active()
        row = row[(where[row] >= 0).any(1)]
        if not len(row):
            return
        options = options_of(run, row, where[row])
        state = self.begin(run, options)
        for step in range(self.n_steps):
            going = run_mask(run, run.active())[options.row]
            if not bool(going.all()):
                rows = going.nonzero()[:, 0]
                options, state = options.select(rows), {name: value[rows] for name, value in state.items()}
            if not len(options.row):
                return
            state = self.move(run, options, state, step)
            if (step + 1) % self.check_every == 0 or step + 1 == self.n_steps:
                ids = options.write(run.space.ids[options.row], self.columns(options, state))
                run.check(options.row, ids, step=step)
            run.end_step(step, judge=False)


def random_columns(run: SearchRun, options: Options, purpose: str) -> Tensor:
    """Return (b, m) columns drawn uniformly from the candidates."""
    draws = run.streams(purpose).select(options.row).uniform((options.where.shape[1],), dtype=torch.float64)
    valid = options.valid
    return options.column_of_rank((draws * valid.sum(2)).to(torch.int64))


@dataclass(frozen=True)
class Simplex(Relaxed):
    """Projected gradient steps on probabilities of candidates.

    The defaults are UnlearnDiffAtk's, but for its number of steps: ``Simplex(n_steps=2000, check_every=40)``. Adam
    sees little more than the signs of the gradient; ``optimiser="sgd"`` is the plain projected gradient.

    The state holds three numbers for each text of a batch, slot and candidate: with a whole vocabulary, keep
    ``batch_size`` small.

    Args:
        optimiser: ``"adam"`` or ``"sgd"``.
        forward: what goes through the model: ``"sample"`` (one token drawn for each slot), ``"argmax"`` (the likeliest)
            or ``"soft"`` (the mixture of embeddings). The first two send the gradient straight through.
        init: ``"uniform"``, ``"own"`` (the original tokens) or ``"random"`` probabilities.
        clamp: bound on the entries of the gradient; None for none.
        gini: bound on the Gini index of a slot's probabilities (entropy projection); None for none.
    """

    lr: float = 0.01
    weight_decay: float = 0.1
    optimiser: Literal["adam", "sgd"] = "adam"
    forward: Literal["sample", "argmax", "soft"] = "sample"
    init: Literal["uniform", "own", "random"] = "uniform"
    clamp: float | None = 1.0
    gini: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimiser", self.optimiser, ("adam", "sgd"))
        check_choice("forward", self.forward, ("sample", "argmax", "soft"))
        check_choice("init", self.init, ("uniform", "own", "random"))
        if self.clamp is not None:
            check_number("clamp", self.clamp, low=0, open_low=True)
        if self.gini is not None:
            check_number("gini", self.gini, low=0, high=1)

    def begin(self, run: SearchRun, options: Options) -> Rows:
        """Return the first probabilities."""
        valid = options.valid
        if self.init == "own":
            x = torch.zeros(valid.shape, dtype=options.dtype, device=run.device).scatter(2, options.own[..., None], 1.0)
            x = torch.where(valid, x, 0)
        elif self.init == "random":
            streams = run.streams("simplex start").select(options.row)
            draws = streams.uniform((valid.shape[1], valid.shape[2]), dtype=options.dtype)
            x = torch.where(valid, -draws.log(), 0)  # exponentials: uniform on the simplex
            x = x / x.sum(2, keepdim=True).clamp(min=1e-30)
        else:
            x = valid.to(options.dtype) / valid.sum(2, keepdim=True).clamp(min=1)
        return adam_state(x)

    def columns(self, options: Options, state: Rows) -> Tensor:
        """Return the likeliest tokens."""
        return state["x"].masked_fill(~options.valid, -1.0).argmax(2)

    def move(self, run: SearchRun, options: Options, state: Rows, step: int) -> Rows:
        """Take one step on the probabilities and project them."""
        ids = run.space.ids[options.row]
        mixture = None
        if self.forward == "soft":
            mixture = options.mix(state["x"])
        elif self.forward == "sample":
            ids = options.write(ids, self._drawn(run, options, state, step))
        else:
            ids = options.write(ids, self.columns(options, state))
        _, gradient = run.gradient(options.row, ids, options.where, step=step, embeddings=mixture)
        slope = options.scores(gradient)
        slope = slope if self.clamp is None else slope.clamp_(-self.clamp, self.clamp)
        valid = options.valid
        if self.optimiser == "adam":
            x = adam_step(state, slope, step, lr=self.lr, weight_decay=self.weight_decay)
        else:
            x = state["x"] * (1 - self.lr * self.weight_decay) - self.lr * slope
        x = project_simplex(x, valid)
        state["x"] = x if self.gini is None else project_entropy(x, self.gini, valid)
        return state

    def _drawn(self, run: SearchRun, options: Options, state: Rows, step: int) -> Tensor:
        streams = run.streams("simplex").select(options.row)
        draw = streams.uniform((options.where.shape[1],), chunk=step, dtype=state["x"].dtype)[..., None]
        reach = state["x"].cumsum(2)
        column = torch.searchsorted(reach, draw * reach[..., -1:])
        return column.clamp(max=reach.shape[2] - 1)[..., 0]


@dataclass(frozen=True)
class Projected(Relaxed):
    """Continuous prompts, projected onto tokens where the gradient is taken (PEZ).

    Defaults: PEZ takes AdamW with lr 0.1, weight decay 0.1 and 3000 steps; P4D, as UnlearnDiffAtk runs it, Adam with
    ``lr=0.01, weight_decay=0.1, decoupled=False``.

    Args:
        init: ``"random"`` candidates or the ``"own"`` (original) tokens.
        metric: what the nearest token is, ``"cosine"`` or ``"euclidean"``.
        decoupled: weight decay as in AdamW.
    """

    weight_decay: float = 0.1
    init: Literal["random", "own"] = "random"
    metric: Literal["cosine", "euclidean"] = "cosine"
    decoupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("random", "own"))
        check_choice("metric", self.metric, ("cosine", "euclidean"))

    def begin(self, run: SearchRun, options: Options) -> Rows:
        """Return the first vectors: those of tokens."""
        column = random_columns(run, options, "projected start") if self.init == "random" else options.own
        return adam_state(options.vectors(options.tokens(column)))

    def columns(self, options: Options, state: Rows) -> Tensor:
        """Return the nearest tokens."""
        return options.nearest(state["x"], metric=self.metric)

    def move(self, run: SearchRun, options: Options, state: Rows, step: int) -> Rows:
        """Apply the gradient at the nearest tokens to the vectors."""
        ids = options.write(run.space.ids[options.row], self.columns(options, state))
        _, gradient = run.gradient(options.row, ids, options.where, step=step)
        adam_step(state, gradient, step, lr=self.lr, weight_decay=self.weight_decay, decoupled=self.decoupled)
        return state
