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

if TYPE_CHECKING:
    from robust_core.attacks.engine import IterativeAttack, Problem, Rows

__all__ = ["drive"]


def drive(attack: IterativeAttack, problem: Problem, *, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Run ``attack`` on all rows of ``problem`` and return (B, ...) the points found."""
    check_count("batch_size", attack.batch_size)
    return _Loop(attack, problem, on_step).run()


class _Loop:
    """The batch in flight.

    How many iterations each row has left is known on the host, so the device is asked only which rows broke: after
    every iteration while rows keep breaking (and always on the CPU, where asking is free), else ever more rarely.
    """

    def __init__(self, attack: IterativeAttack, problem: Problem, on_step: Callable[[int, int], None] | None) -> None:
        self.attack, self.everything, self.on_step = attack, problem, on_step
        self.device = problem.x.device
        self.found = problem.x.clone()
        self.n = len(problem.x)
        self.begun = 0
        self.active = torch.empty(0, dtype=torch.int64, device=self.device)
        self.here = problem
        self.state: Rows = {}
        self.left = np.empty(0, dtype=np.int64)
        self.phase = np.empty(0, dtype=np.int64)
        self.dead = np.empty(0, dtype=bool)
        self.patience = 1

    def run(self) -> Tensor:
        while True:
            room = self.attack.batch_size - len(self.active)
            if self.begun < self.n and (4 * room >= self.attack.batch_size or not len(self.active)):
                self._refill(min(room, self.n - self.begun))
            if not len(self.active):
                return self.found
            window = int(min(self.patience, self.left.min()))
            ends = bool((self.left == window).all())
            for i in range(window):
                self._advance(last=ends and i == window - 1)
            self._settle(window)

    def _refill(self, count: int) -> None:
        attack = self.attack
        fresh = torch.arange(self.begun, self.begun + count, device=self.device)
        problem = self.everything.rows(fresh)
        state = attack.begin(problem)
        left = self._limit(state, count)
        state = _opened(problem, state)
        self.state = {k: torch.cat([self.state[k], v]) for k, v in state.items()} if self.state else state
        self.active = torch.cat([self.active, fresh])
        self.here = self.everything.rows(self.active)
        self.begun += count
        self.left = np.append(self.left, left)
        self.phase = np.append(self.phase, np.zeros(count, dtype=np.int64))
        self.dead = np.append(self.dead, np.zeros(count, dtype=bool))
        self._tell_phase()

    def _limit(self, state: Rows, count: int) -> np.ndarray:
        limit = state.pop("limit", None)
        return np.full(count, self.attack.evaluations) if limit is None else limit.cpu().numpy().copy()

    def _tell_phase(self) -> None:
        self.here = replace(self.here, phase=torch.from_numpy(self.phase).to(self.device))

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
        self.left -= window
        ended = self.left == 0
        if self.attack.stop_when_broken:  # the one synchronisation of a window
            dead = self.state["_broken"].cpu().numpy()
            calm = dead.sum() == self.dead.sum() and self.device.type != "cpu"
            self.patience = min(2 * self.patience, self.attack.check_every) if calm else 1
            self.dead = dead
        else:
            self.patience = max(self.left.max(), 1)
        done = self.dead | ended
        if ended.any():
            final = self.phase + 1 >= self.attack.phases(self.state)
            self._next_phase(ended & ~self.dead & ~final)
            done = self.dead | (ended & final)
        if (ended & done).any() or 32 * done.sum() >= len(done):
            self._leave(done)

    def _next_phase(self, again: np.ndarray) -> None:
        if not again.any():
            return
        rows = torch.from_numpy(np.flatnonzero(again)).to(self.device)
        self.phase[again] += 1
        self._tell_phase()
        fresh = self.attack.restart(self.here.rows(rows), {k: v[rows] for k, v in self.state.items()})
        self.left[again] = self._limit(fresh, len(rows))
        for key, value in fresh.items():
            if key not in _RECORD:
                self.state[key] = self.state[key].index_copy(0, rows, value)

    def _leave(self, done: np.ndarray) -> None:
        out = torch.from_numpy(np.flatnonzero(done)).to(self.device)
        stay = torch.from_numpy(np.flatnonzero(~done)).to(self.device)
        leaving = {k: v[out] for k, v in self.state.items()}
        self.found.index_copy_(0, self.active[out], self.attack.finish(self.here.rows(out), leaving))
        self.state = {k: v[stay] for k, v in self.state.items()} if len(stay) else {}
        self.active = self.active[stay]
        self.here = self.here.rows(stay)
        self.left, self.phase, self.dead = self.left[~done], self.phase[~done], self.dead[~done]
        if self.on_step is not None:
            self.on_step(self.begun - len(self.active), self.n)


_RECORD = ("_broken", "_point", "_margin")


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _opened(problem: Problem, state: Rows) -> Rows:
    n, device = len(problem.x), problem.x.device
    return {
        **state,
        "_broken": torch.zeros(n, dtype=torch.bool, device=device),
        "_point": problem.x.clone(),
        "_margin": torch.full((n,), -torch.inf, dtype=torch.float32, device=device),
    }
