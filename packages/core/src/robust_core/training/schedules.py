"""Learning-rate schedules as small pure functions of the share of training done.

A schedule maps ``share`` in [0, 1] to a factor of the optimiser's learning rate. :func:`scheduled` makes of it what a
:class:`~robust_core.training.Stage` takes; any scheduler of ``torch.optim.lr_scheduler`` may stand there as well::

    Stage(objective, SGD, epochs=30, schedule=scheduled(cosine(warmup=0.05)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from robust_core.checks import check_number

__all__ = ["Shape", "constant", "cosine", "cyclic", "piecewise", "scheduled", "sigmoid_ramp", "smoothed_ramp"]

Shape = Callable[[float], float]
"""Share of training done, in [0, 1] -> factor of the learning rate."""


def _warm(shape: Shape, warmup: float) -> Shape:
    check_number("warmup", warmup, low=0, high=1, open_high=True)

    def warmed(share: float) -> float:
        return share / warmup if share < warmup else shape((share - warmup) / (1 - warmup))

    return warmed


def constant(*, warmup: float = 0.0) -> Shape:
    """1, after a linear rise from 0 in the first ``warmup`` of training."""
    return _warm(lambda share: 1.0, warmup)


def cosine(*, warmup: float = 0.0, final: float = 0.0) -> Shape:
    """Half a cosine from 1 to ``final`` (Loshchilov and Hutter 2017, without restarts)."""
    check_number("final", final, low=0)
    return _warm(lambda share: final + (1 - final) * (1 + math.cos(math.pi * min(share, 1.0))) / 2, warmup)


def piecewise(milestones: Sequence[float], *, factor: float = 0.1, warmup: float = 0.0) -> Shape:
    """Multiply by ``factor`` at each milestone, a share of training such as 0.5 and 0.75."""
    for milestone in milestones:
        check_number("milestones", milestone, low=0, high=1)
    return _warm(lambda share: factor ** sum(share >= milestone for milestone in milestones), warmup)


def cyclic(*, peak: float = 0.4, final: float = 0.0) -> Shape:
    """Rise linearly from 0 to 1 until ``peak``, then fall linearly to ``final``: the schedule of fast training."""
    check_number("peak", peak, low=0, high=1, open_low=True, open_high=True)

    def triangle(share: float) -> float:
        return share / peak if share < peak else 1 - (1 - final) * (min(share, 1.0) - peak) / (1 - peak)

    return triangle


def sigmoid_ramp(share: float) -> float:
    """Rise from exp(-5) to 1 as ``exp(-5 (1 - share)^2)``: the usual ramp of consistency weights."""
    return math.exp(-5 * (1 - min(max(share, 0.0), 1.0)) ** 2)


def smoothed_ramp(share: float, *, mid: float = 0.25, beta: float = 4.0) -> float:
    """Rise from 0 to 1: as a power ``beta`` up to ``mid``, then linearly, the slope being continuous.

    The usual ramp of the radius in certified training (the code of Gowal et al. 2018, arXiv 1810.12715).
    """
    check_number("mid", mid, low=0, high=1, open_low=True, open_high=True)
    check_number("beta", beta, low=1)
    share = min(max(share, 0.0), 1.0)
    factor = 1 / ((1 - mid) * beta * mid ** (beta - 1) + mid**beta)
    if share < mid:
        return factor * share**beta
    return 1 - factor * beta * mid ** (beta - 1) * (1 - share)


def scheduled(shape: Shape) -> Callable[[Optimizer, int], LambdaLR]:
    """Return a builder (optimiser, number of steps) -> scheduler that follows ``shape``, stepped once per step."""

    def build(optimiser: Optimizer, n_steps: int) -> LambdaLR:
        return LambdaLR(optimiser, lambda step: shape(min(step / max(n_steps, 1), 1.0)))

    return build
