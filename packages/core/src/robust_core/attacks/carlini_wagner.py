"""Carlini and Wagner's L2 attack: the smallest change that a gradient method finds, one search per sample.

It minimises ``||x_adv - x||^2 + c max(z_y - max_{i != y} z_i + confidence, 0)`` with Adam over ``v`` in
``x_adv = (tanh(v) + 1) / 2`` (stretched to the domain), so that the box holds by itself, and looks for the
least ``c`` that succeeds by bisection, each sample having a ``c`` of its own.

Source: Carlini and Wagner 2017 (arXiv 1608.04644), sections V and VI: :meth:`CarliniWagner.step` is the objective
``f_6``. Defaults are those of their code (9 searches, learning rate 0.01, first ``c`` 0.001, growing tenfold until it
succeeds) with 200 instead of 10,000 iterations for each. Left out: their early end of a search that no longer improves.
Inputs without bounds (``domain=None``) are searched directly, without the tanh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.attacks.minimum_norm import begin_record, finish_record, record
from robust_core.checks import check_count, check_number
from robust_core.losses.margin import margin
from robust_core.threats import L2, Threat

__all__ = ["CarliniWagner"]

_EDGE = 1 - 1e-6  # how near to +-1 the tanh of the start may be
_DECAY = (0.9, 0.999, 1e-8)  # Adam's


@dataclass(frozen=True)
class CarliniWagner(IterativeAttack):
    """Minimum-norm attack in L2.

    Args:
        threat: an :class:`~robust_core.threats.L2`; only what lies inside is reported: give a large radius to measure
            distances.
        n_iter: iterations of each search.
        n_searches: searches, that is, values of ``c`` for each sample.
        step_size: learning rate of Adam.
        initial_c: first weight of the loss.
        confidence: margin of logits to be reached before the loss is 0.
        minimise: keep shrinking the distance instead of stopping at the first success inside ``threat``.
        batch_size: rows worked on at a time.
    """

    threat: Threat
    n_iter: int = 200
    n_searches: int = 9
    step_size: float = 0.01
    initial_c: float = 1e-3
    confidence: float = 0.0
    minimise: bool = True
    batch_size: int = 256

    name: ClassVar[str] = "carlini-wagner"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, L2):
            raise ValueError(f"threat={self.threat}: this attack minimises the L2 norm; give L2(eps), or use FAB")
        check_count("n_iter", self.n_iter)
        check_count("n_searches", self.n_searches)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_number("initial_c", self.initial_c, low=0, open_low=True)
        check_number("confidence", self.confidence, low=0)

    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows: the start, Adam's moments and the bracket of ``c``."""
        rows = torch.zeros(len(problem.x), dtype=torch.float64, device=problem.x.device)
        bracket = {"c": rows + self.initial_c, "low": rows, "high": rows + torch.inf}
        return {**begin_record(problem), **bracket, **self._fresh(problem)}

    def _fresh(self, problem: Problem) -> Rows:
        start = self._variable(problem, problem.x if problem.init is None else problem.init)
        n, device = len(start), start.device
        return {
            "v": start,
            "first": torch.zeros_like(start),
            "second": torch.zeros_like(start),
            "time": torch.zeros(n, dtype=torch.int64, device=device),
            "found": torch.zeros(n, dtype=torch.bool, device=device),
        }

    def phases(self, state: Rows) -> int:
        """Return the number of searches."""
        return self.n_searches

    def restart(self, problem: Problem, state: Rows) -> Rows:
        """Return the state of the next search: a smaller ``c`` after a success, else a larger one."""
        c, found = state["c"], state["found"]
        low, high = torch.where(found, state["low"], c), torch.where(found, c, state["high"])
        c = torch.where(torch.isinf(high), 10 * c, (low + high) / 2)
        return {"c": c, "low": low, "high": high, **self._fresh(problem)}

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Evaluate the point at hand and take one step of Adam."""
        point, inner = self._point(problem, state["v"])

        def lag(logits: Tensor) -> Tensor:
            return (self.confidence - margin(logits, problem.y)).clamp(min=0)

        logits, _, slope = problem.gradient(point, lag)
        kept, broken, seen, seen_logits = record(problem, state, point, logits, minimise=self.minimise)
        found = state["found"] | (broken & (margin(logits, problem.y) >= self.confidence))
        column = (-1, *[1] * (point.ndim - 1))
        work = state["v"].dtype
        total = 2 * (point.to(work) - problem.x.to(work)) + state["c"].to(work).reshape(column) * slope.to(work)
        moved = _adam(state, total * inner, self.step_size)
        bracket = {name: state[name] for name in ("c", "low", "high")}
        return {**kept, **bracket, **moved, "found": found}, seen, seen_logits

    def finish(self, problem: Problem, state: Rows) -> Tensor:
        """Return the nearest broken points, or what comes closest to one, inside the threat."""
        current, _ = self._point(problem, state["v"])
        return finish_record(problem, state, current, minimise=self.minimise)

    def _variable(self, problem: Problem, x: Tensor) -> Tensor:
        """Return ``v`` of a point, in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if problem.threat.domain is None:
            return wide.clone()
        low, high = problem.threat.domain
        bent = ((wide - low) / (high - low) * 2 - 1) * _EDGE
        return 0.5 * torch.log((1 + bent) / (1 - bent))  # torch.atanh has other bits at the end of a vector

    def _point(self, problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored point of ``v`` and the derivative of the point, element by element."""
        if problem.threat.domain is None:
            return v.to(problem.x.dtype), torch.ones_like(v)
        low, high = problem.threat.domain
        bent = torch.tanh(v)
        point = problem.threat.clamp((low + (high - low) * (bent / _EDGE + 1) / 2).to(problem.x.dtype))
        return point, (high - low) / 2 * (1 - bent.square())


def _adam(state: Rows, gradient: Tensor, step_size: float) -> Rows:
    """Return ``v`` after one step of Adam, with its moments; every row has a clock of its own."""
    slow, fast, least = _DECAY
    time = state["time"] + 1
    first = slow * state["first"] + (1 - slow) * gradient
    second = fast * state["second"] + (1 - fast) * gradient.square()
    clock = time.to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1))
    step = (first / (1 - slow**clock)) / ((second / (1 - fast**clock)).sqrt() + least)
    return {"v": state["v"] - step_size * step, "first": first, "second": second, "time": time}
