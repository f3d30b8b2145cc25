"""Sampling for certificates by votes: what :class:`~robust_core.certificates.smoothing.Smoothing` and its kin share.

A certifier brings passes (where noisy logits come from), a plan (when to look and what to conclude) and a state (what
was counted so far); :func:`sample` draws for every row what its next look needs, until all rows are decided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robust_core.certificates.smoothed import SmoothingState
from robust_core.certificates.stopping import SOFT_LEVELS, Evidence, Plan
from robust_core.certificates.votes import Segment, chunk_sizes, hard_votes
from robust_core.checks import check_inputs, check_number
from robust_core.models import Classifier, model_device
from robust_core.random import Seed, resolve_seed

__all__ = ["OnStep", "Passes", "count_votes", "prepare", "radius_grid", "run_key", "sample"]

OnStep = Callable[[int, int], None]
"""(samples drawn or spared, samples at most) -> None."""


class Passes(Protocol):
    """A source of logits of noisy rows, such as :class:`~robust_core.certificates.votes.NoisyPasses`."""

    @property
    def n_rows(self) -> int:
        """Rows that votes are counted for."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        ...

    def run(self, purpose: str, work: Iterable[Segment]) -> Iterator[tuple[list[Segment], Tensor, Tensor]]:
        """Yield (segments, rows, logits); see ``NoisyPasses.run``."""
        ...


def prepare(model: Classifier, x: Tensor, index: Tensor | None, generator: Seed) -> tuple[Tensor, Tensor, int]:
    """Return checked (x, index, seed).

    Raises:
        TypeError, ValueError: inputs or index of another form, or on another device than the model.
    """
    check_inputs(x)
    device = model_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
    if index is None:
        index = torch.arange(len(x))
    elif index.shape != (len(x),) or index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; int64 ({len(x)},) is needed")
    return x.detach(), index.cpu(), resolve_seed(generator)


def radius_grid(radius: float | Sequence[float] | None) -> list[float] | None:
    """Return one radius or an increasing grid as a list.

    Raises:
        ValueError: an empty grid, a negative radius, or one that is not larger than the one before.
    """
    if radius is None:
        return None
    radii = [radius] if isinstance(radius, int | float) else [float(r) for r in radius]
    for r in radii:
        check_number("radius", r, low=0.0)
    if not radii or any(b <= a for a, b in pairwise(radii)):
        raise ValueError(f"radius={radius!r}: one radius, or an increasing grid, is needed")
    return [float(r) for r in radii]


def run_key(mark: str, *parts: Any) -> str:
    """Return what names a run: two calls with the same fingerprint and parts draw the same numbers."""
    digest = hashlib.sha256(mark.encode())
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(f"|{part!r}".encode())
    return digest.hexdigest()


def count_votes(passes: Passes, purpose: str, n: int) -> Tensor:
    """Return (n_rows, C + 1) votes among ``n`` samples; the last column counts "no class"."""
    work = (Segment(row, c, size) for row in range(passes.n_rows) for c, size in enumerate(chunk_sizes(n)))
    counts: Tensor | None = None
    for _, rows, logits in passes.run(purpose, work):
        width = logits.shape[1] + 1
        if counts is None:
            counts = torch.zeros(passes.n_rows * width, dtype=torch.int64, device=logits.device)
        place = rows * width + hard_votes(logits)
        counts.index_add_(0, place, torch.ones_like(place))
    if counts is None:
        raise ValueError("x holds no rows")
    return counts.reshape(passes.n_rows, -1)


def sample(passes: Passes, plan: Plan, state: SmoothingState, on_step: OnStep | None = None) -> None:
    """Draw what each look needs, for the rows that are not decided, and let the plan judge.

    ``state.label`` says whose votes are counted; the state is consistent whenever ``on_step`` is called.
    """
    n, device = passes.n_rows, passes.device
    label = torch.from_numpy(state.label).to(device)
    sums = torch.from_numpy(np.stack([state.total, state.square])).to(device)
    evidence = Evidence(state.total, state.square, state.p_lower, state.level, state.done)
    ends, chunk, drawn = np.cumsum(plan.sizes), state.chunk.copy(), state.drawn.copy()

    def commit() -> None:  # all counts at once, so that an interrupted state is a consistent one
        state.total[:], state.square[:] = sums.cpu().numpy()
        state.chunk[:], state.drawn[:] = chunk, drawn

    while state.look < len(plan.looks) and not state.done.all():
        live = np.flatnonzero(~state.done)
        until = int(np.searchsorted(ends, plan.looks[state.look])) + 1
        work = _segments(live, chunk.copy(), plan.sizes, until)
        for segments, rows, logits in passes.run(plan.purpose, work):
            _tally(sums, rows, logits, label, soft=plan.soft)
            for row, c, size in segments:
                chunk[row], drawn[row] = c + 1, drawn[row] + size
            if on_step is not None:
                commit()
                spared = int((plan.looks[-1] - drawn[state.done]).sum())
                on_step(int(drawn.sum()) + spared, n * plan.looks[-1])
        commit()
        plan.look(state.look, live, evidence)
        state.look += 1


def _segments(live: np.ndarray, chunk: np.ndarray, sizes: list[int], until: int) -> Iterator[Segment]:
    for row in live.tolist():
        for c in range(int(chunk[row]), until):
            yield Segment(row, c, sizes[c])


def _tally(sums: Tensor, rows: Tensor, logits: Tensor, label: Tensor, *, soft: bool) -> None:
    """Add the votes for each row's label to ``sums`` (2, B): in integers, so that no order matters."""
    wanted = label[rows]
    if not soft:
        top, voted = logits.max(1)
        hit = (voted == wanted) & (top - top == 0)  # false for NaN and infinity
        sums[0].index_add_(0, rows, hit.to(torch.int64))
        return
    inside = wanted < logits.shape[1]
    column = torch.where(inside, wanted, 0)[:, None]
    vote = logits.double().softmax(1).gather(1, column).squeeze(1)
    vote = torch.where(inside & torch.isfinite(vote), vote, 0.0)
    units = (vote * SOFT_LEVELS).floor().clamp(0, SOFT_LEVELS).to(torch.int64)
    sums[0].index_add_(0, rows, units)
    sums[1].index_add_(0, rows, units * units)
