"""What attacks that look for the *nearest* adversarial point share: the record of it, and what the engine sees.

Such a search wanders outside the threat. The engine is shown a point only where it lies inside; elsewhere it sees the
clean input, so that nothing outside is ever taken for a success.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_core.attacks.engine import Problem, Rows
from robust_core.losses.margin import misclassified

__all__ = ["begin_record", "finish_record", "fresh_record", "record"]

_HALVINGS = 10


def begin_record(problem: Problem) -> Rows:
    """Return the record of fresh rows: clean logits, nearest broken point and its distance (inf: none yet)."""
    known = problem.context.get("clean_logits")
    return {"clean": problem.logits(problem.x) if known is None else known, **fresh_record(problem)}


def fresh_record(problem: Problem) -> Rows:
    """Return the record of rows whose clean logits are known."""
    length = torch.full((len(problem.x),), torch.inf, dtype=torch.float64, device=problem.x.device)
    return {"nearest": problem.x, "length": length}


def record(
    problem: Problem, state: Rows, point: Tensor, logits: Tensor, *, minimise: bool
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Note the points that are broken and nearer than any before.

    Args:
        problem: the rows.
        state: their state, with the entries of :func:`begin_record`.
        point: (B, ...) points that were evaluated, inside the domain.
        logits: (B, C) their logits.
        minimise: keep looking for nearer points, so show the engine none.

    Returns:
        the new record; (B,) bool, broken; (B, ...) points and (B, C) logits to show to the engine.
    """
    broken = misclassified(logits, problem.y)
    distance = problem.threat.distance(point, problem.x)
    nearer = broken & (distance < state["length"])
    wide = (-1, *[1] * (point.ndim - 1))
    kept = {
        "clean": state["clean"],
        "nearest": torch.where(nearer.reshape(wide), point, state["nearest"]),
        "length": torch.where(nearer, distance, state["length"]),
    }
    if minimise:
        return kept, broken, problem.x, state["clean"]
    inside = distance <= problem.threat.eps
    seen = torch.where(inside.reshape(wide), point, problem.x)
    return kept, broken, seen, torch.where(inside[:, None], logits, state["clean"])


def finish_record(problem: Problem, state: Rows, current: Tensor, *, minimise: bool) -> Tensor:
    """Return what the engine saw broken; elsewhere the nearest broken point, or ``current``, shortened to ``eps``.

    Where ``minimise`` is asked for, the nearest point is first drawn towards the clean input while it stays broken.
    """
    wide = (-1, *[1] * (current.ndim - 1))
    known = torch.isfinite(state["length"]).reshape(wide)
    nearest = torch.where(known, state["nearest"], current)
    if minimise:
        nearest = _tightened(problem, nearest)
    short = problem.threat.rescale(problem.x, nearest.double() - problem.x.double())
    return torch.where(state["_broken"].reshape(wide), state["_point"], short)


def _tightened(problem: Problem, nearest: Tensor) -> Tensor:
    """Return broken points on the last tenth of the way to ``nearest``, to 1e-4 of the distance, by bisection."""
    wide = (-1, *[1] * (nearest.ndim - 1))
    delta = nearest.double() - problem.x.double()
    low = torch.full((len(nearest),), 0.9, dtype=torch.float64, device=nearest.device)
    high = torch.ones_like(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        point = problem.threat.clamp((problem.x.double() + middle.reshape(wide) * delta).to(nearest.dtype))
        broken = misclassified(problem.logits(point), problem.y)
        low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)
        nearest = torch.where(broken.reshape(wide), point, nearest)
    return nearest
