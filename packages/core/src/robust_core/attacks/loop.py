"""One loop for every iterative attack: a full batch of unbroken samples, refilled as samples break.

What happens to a sample never depends on its neighbours, the batch size or the order.

Restarts and targets are *phases*: a row that ends a phase unbroken begins the next at once, in the same batch,
so that the batch stays full over all of them and no target has a drain tail of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_count
from robust_core.models import ROW_MINIMUM

if TYPE_CHECKING:
    from robust_core.attacks.engine import IterativeAttack, Problem, Rows

__all__ = ["drive"]


def drive(attack: IterativeAttack, problem: Problem, *, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Run ``attack`` on all rows of ``problem`` and return (B, ...) the points found."""
    check_count("batch_size", attack.batch_size)
    if not problem.threat.eps:
        return problem.x.clone()  # the only point inside
    return _Loop(attack, problem, on_step).run()


class _Loop:
    """The batch in flight; a row is one sample in one phase.

    How many iterations each row has left is known on the host, so the device is asked only which rows broke: after
    every iteration while rows keep breaking (and always on the CPU, where asking is free), else ever more rarely.

    Where the attack allows it (``parallel_phases``) and no sample waits, the room in the batch is put to use:
    further phases of the samples that are left run beside the current ones. The outcome is that of one after the
    other: the lowest phase that breaks a sample counts, and lower ones are always run to their end.
    """

    def __init__(self, attack: IterativeAttack, problem: Problem, on_step: Callable[[int, int], None] | None) -> None:
        self.attack, self.everything, self.on_step = attack, problem, on_step
        self.device = problem.x.device
        self.n = len(problem.x)
        self.found = problem.x.clone()
        self.margin = torch.full((self.n,), -torch.inf, device=self.device)
        self.origin = torch.full((self.n,), _NONE, dtype=torch.int64, device=self.device)  # phase of what was found
        self.waiting = np.arange(self.n)
        self.sample = self.phase = self.left = np.empty(0, dtype=np.int64)  # of each row
        self.dead = np.empty(0, dtype=bool)
        self.opened = np.zeros(self.n, dtype=np.int64)  # phases begun, of each sample
        self.won = np.full(self.n, _NONE)  # lowest phase that broke it
        self.phases = 1
        self.here = problem
        self.state: Rows = {}
        self.patience = 1
        self.moved = False  # whether rows came, left or changed their phase

    def run(self) -> Tensor:
        batch = self.attack.batch_size
        while True:
            room = batch - len(self.sample)
            if len(self.waiting) and (4 * room >= batch or not len(self.sample)):
                self._refill(room)
            if not len(self.sample):
                return self.found
            if self.attack.parallel_phases and self.moved and not len(self.waiting):
                self._use_room()
            self.moved = False
            window = int(min(self.patience, self.left.min()))
            ends = bool((self.left == window).all())
            for i in range(window):
                self._advance(last=ends and i == window - 1)
            self._settle(window)

    # -- rows come ---------------------------------------------------------------------------------------------------

    def _refill(self, room: int) -> None:
        fresh, self.waiting = self.waiting[:room], self.waiting[room:]
        problem = self._problem(fresh, np.zeros_like(fresh))
        state = self.attack.begin(problem)
        left = self._limit(state, len(fresh))
        self.phases = self.attack.phases(state)
        self.opened[fresh] = 1
        self._join(fresh, np.zeros_like(fresh), left, _opened(problem, state))

    def _use_room(self) -> None:
        """Open further phases: in the padding those of any sample, beyond it of those that outlived their first.

        The latter mostly outlive them all, so that little is done in vain.
        """
        batch, n = self.attack.batch_size, len(self.sample)
        padding = min(batch, ROW_MINIMUM) - n
        room = (min(batch, _PLENTY) if self.device.type == "cpu" else batch) - n
        samples, parents = np.unique(self.sample, return_index=True)
        able = np.minimum(self.phases, self.won[samples]) - self.opened[samples]
        if room <= 0 or able.max() <= 0:
            return
        lowest = np.full(self.n, _NONE)
        np.minimum.at(lowest, self.sample, self.phase)
        extra = sorted(
            (self.opened[s] + k, s, p) for s, p, free in zip(samples, parents, able, strict=True) for k in range(free)
        )
        extra = [row for i, row in enumerate(extra) if i < padding or lowest[row[1]] > 0][:room]
        if not extra:
            return
        phase, sample, parent = (np.array(column) for column in zip(*extra, strict=True))
        np.add.at(self.opened, sample, 1)
        rows = self._tensor(parent)
        old = {k: v[rows] for k, v in self.state.items()}
        problem = self._problem(sample, phase)
        fresh = self.attack.restart(problem, old)
        left = self._limit(fresh, len(sample))
        self._join(sample, phase, left, _opened(problem, {**old, **fresh}))

    def _join(self, sample: np.ndarray, phase: np.ndarray, left: np.ndarray, state: Rows) -> None:
        self.state = {k: torch.cat([self.state[k], v]) for k, v in state.items()} if self.state else state
        self.sample, self.phase = np.append(self.sample, sample), np.append(self.phase, phase)
        self.left, self.dead = np.append(self.left, left), np.append(self.dead, np.zeros(len(sample), dtype=bool))
        self.moved = True
        self.here = self._problem(self.sample, self.phase)

    def _limit(self, state: Rows, count: int) -> np.ndarray:
        limit = state.pop("limit", None)
        return np.full(count, self.attack.evaluations) if limit is None else limit.cpu().numpy().copy()

    def _problem(self, sample: np.ndarray, phase: np.ndarray) -> Problem:
        return replace(self.everything.rows(self._tensor(sample)), phase=self._tensor(phase))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    # -- rows move ---------------------------------------------------------------------------------------------------

    def _advance(self, *, last: bool) -> None:
        """One iteration, then the record of each row: its first broken point, else that of highest margin."""
        attack, state = self.attack, self.state
        inner = {k: v for k, v in state.items() if k not in _RECORD}
        problem = replace(self.here, last_step=True) if last else self.here
        inner, point, logits = attack.step(problem, inner)
        reached, height = attack.judge(problem, logits)
        height = height.float()
        better = height > state["_margin"]
        if attack.stop_when_broken:
            better = (better | reached) & ~state["_broken"]
        self.state = {
            **inner,
            "_broken": state["_broken"] | reached,
            "_point": torch.where(_wide(better, point), point, state["_point"]),
            "_margin": torch.where(better, height, state["_margin"]),
        }

    def _settle(self, window: int) -> None:
        """Let rows that are done leave and rows that end a phase begin the next."""
        own = self.state.get("left")
        self.left = self.left - window if own is None else own.cpu().numpy().copy()
        ended = self.left <= 0
        if self.attack.stop_when_broken:  # the one synchronisation of a window
            dead = self.state["_broken"].cpu().numpy()
            calm = dead.sum() == self.dead.sum() and self.device.type != "cpu"
            self.patience = min(2 * self.patience, self.attack.check_every) if calm and own is None else 1
            self.dead = dead
        else:
            self.patience = max(self.left.max(), 1) if own is None else 1
        if not (ended.any() or self.dead.any()):
            return
        np.minimum.at(self.won, self.sample[self.dead], self.phase[self.dead])
        pointless = self.phase > self.won[self.sample]
        done = self.dead | ended | pointless
        if not (ended.any() or 32 * done.sum() >= len(done)):
            return
        again = ended & ~self.dead & ~pointless
        following = self.opened[self.sample] if self.attack.parallel_phases else self.phase + 1
        again &= following < np.minimum(self.phases, self.won[self.sample])
        if self.attack.parallel_phases:
            again &= ~_repeated(self.sample, again)
            self._keep(np.flatnonzero(done & ~pointless))
        else:
            self._keep(np.flatnonzero(done & ~again))
        if again.any():
            self._next_phase(again)
        if (done & ~again).any():
            self._leave(done & ~again)

    def _next_phase(self, again: np.ndarray) -> None:
        self.moved = True
        apart = self.attack.parallel_phases
        self.phase[again] = self.opened[self.sample[again]] if apart else self.phase[again] + 1
        self.opened[self.sample[again]] = self.phase[again] + 1
        self.here = replace(self.here, phase=self._tensor(self.phase))
        rows = self._tensor(np.flatnonzero(again))
        problem = self.here.rows(rows)
        fresh = self.attack.restart(problem, {k: v[rows] for k, v in self.state.items()})
        self.left[again] = self._limit(fresh, len(rows))
        if apart:
            fresh |= _record(problem)
        for key, value in fresh.items():
            self.state[key] = self.state[key].index_copy(0, rows, value)

    # -- rows leave --------------------------------------------------------------------------------------------------

    def _keep(self, rows: np.ndarray) -> None:
        """Hold what these rows found against what is known of their samples, one row of each sample at a time."""
        while len(rows):
            _, first = np.unique(self.sample[rows], return_index=True)
            self._keep_distinct(self._tensor(rows[first]), self._tensor(self.sample[rows[first]]))
            rows = np.delete(rows, first)

    def _keep_distinct(self, rows: Tensor, sample: Tensor) -> None:
        leaving = {k: v[rows] for k, v in self.state.items()}
        problem = self.here.rows(rows)
        point, phase = self.attack.finish(problem, leaving), self._tensor(self.phase)[rows]
        # A broken point stands above every margin, and the lower phase wins among equals.
        height = leaving["_margin"]
        if self.attack.stop_when_broken:
            height = height.masked_fill(leaving["_broken"], torch.inf)
        known, origin = self.margin[sample], self.origin[sample]
        better = (height > known) | ((height == known) & (phase < origin))
        self.found[sample] = torch.where(_wide(better, point), point, self.found[sample])
        self.margin[sample] = torch.where(better, height, known)
        self.origin[sample] = torch.where(better, phase, origin)

    def _leave(self, done: np.ndarray) -> None:
        self.moved = True
        stay = np.flatnonzero(~done)
        rows = self._tensor(stay)
        self.state = {k: v[rows] for k, v in self.state.items()} if len(stay) else {}
        self.sample, self.phase = self.sample[stay], self.phase[stay]
        self.left, self.dead = self.left[stay], self.dead[stay]
        self.here = self.here.rows(rows)
        if self.on_step is not None:
            self.on_step(self.n - len(self.waiting) - len(np.unique(self.sample)), self.n)


_RECORD = ("_broken", "_point", "_margin")
_PLENTY = 128  # rows from which on the cost of a pass on a CPU is in proportion to them
_NONE = 1 << 40  # later than every phase


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _repeated(sample: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Mark all but the first of the rows ``among`` that share a sample."""
    rows = np.flatnonzero(among)
    _, first = np.unique(sample[rows], return_index=True)
    marks = np.zeros(len(sample), dtype=bool)
    marks[np.delete(rows, first)] = True
    return marks


def _record(problem: Problem) -> Rows:
    n, device = len(problem.x), problem.x.device
    return {
        "_broken": torch.zeros(n, dtype=torch.bool, device=device),
        "_point": problem.x.clone(),
        "_margin": torch.full((n,), -torch.inf, dtype=torch.float32, device=device),
    }


def _opened(problem: Problem, state: Rows) -> Rows:
    return {**state, **_record(problem)}
