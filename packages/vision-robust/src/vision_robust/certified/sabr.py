"""SABR: certified training on a small box around an adversarial point, for less regularisation than whole intervals.

Mark Niklas Müller, Franziska Eckert, Marc Fischer, Martin Vechev, "Certified Training: Small Boxes are All You Need",
ICLR 2023, arXiv 2210.04871.

What it buys: higher clean accuracy, and higher accuracy under a strong verifier, than training on intervals of the
whole ball. The bounds that it trains on do not cover the ball: certify with ``Crown``, whose bounds do.

- an adversarial point x' of the ball by projected gradient ascent -> :meth:`SABR.attack`
- the box of radius ``tau = ratio * eps`` around x', moved and cut so that it lies inside the ball -> :func:`small_box`
- robust cross-entropy of interval bounds on that box, batch normalisation with the statistics of the clean inputs;
  warm-up, regularisers and schedule as in :mod:`vision_robust.certified.fast_certified_training` -> :class:`SABR`

``ratio=1`` is training on intervals of the whole ball. Ratios of the paper (its lambda): 0.4 for MNIST at 0.1, 0.6 at
0.3, 0.1 for CIFAR-10 at 2/255, 0.7 at 8/255, 0.4 for TinyImageNet at 1/255; weight of L1: 1e-5, 1e-6, 1e-6, 0, 1e-6.
Attack as in the official release: 8 steps of half the radius, a tenth of that after half of them, and again after 80
and 90 %; the last point is taken where the release takes the one of highest loss. Left out: boxes that shrink at each
ReLU, which the paper uses for CIFAR-10 at 2/255 alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.certificates.bounds import TrainingPass
from robust_core.certificates.bounds.box import Box
from robust_core.certificates.bounds.region import Region
from robust_core.checks import check_count, check_number
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import Linf
from robust_core.training import Batch, Loss
from robust_core.training.inner import ascend
from vision_robust.certified.fast_certified_training import FastCertified, SmoothedEps

__all__ = ["SABR", "small_box"]

STEP = 0.5
DROPS = (0.5, 0.8, 0.9)
"""Shares of the attack after which its step falls to a tenth."""


def small_box(threat: Linf, x: Tensor, point: Tensor, radius: float) -> Box:
    """Return the box of ``radius`` around ``point``, moved into the ball of ``threat`` around ``x`` and its domain.

    Where the ball, cut with its domain, is narrower than the box, the box has its width.

    Args:
        threat: the ball, with its present radius.
        x: (B, ...) inputs.
        point: (B, ...) points of the ball.
        radius: half-width, at most that of the ball.
    """
    lower, upper = threat.box(x)
    half = ((upper - lower) / 2).clamp(max=radius)
    centre = torch.minimum(torch.maximum(point, lower + half), upper - half)
    return Box.ends(torch.maximum(centre - half, lower), torch.minimum(centre + half, upper), outward=False)


class SABR(FastCertified):
    """Train on interval bounds of small boxes around adversarial points.

    Args:
        threat: an ``Linf`` ball; its radius is the target.
        ratio: radius of the small box over that of the ball (the paper's lambda), above 0; 1 is interval training.
        schedule: radius by share of training; by default a ramp over the first 30 %.
        n_iter: steps of the attack.
        l1: weight of the sum of absolute parameters.
        regularisation: weight of the warm-up regularisers at radius 0.
        tolerance: of both regularisers.
        generator: seed of the attack's starting points.
    """

    def __init__(
        self,
        threat: Linf,
        ratio: float = 0.4,
        schedule: SmoothedEps | None = None,
        *,
        n_iter: int = 8,
        l1: float = 0.0,
        regularisation: float = 0.5,
        tolerance: float = 0.5,
        generator: Seed = None,
    ) -> None:
        if not isinstance(threat, Linf):
            raise TypeError(f"threat is {threat!r}; SABR trains on boxes: Linf(eps) is needed")
        super().__init__(threat, schedule, regularisation=regularisation, tolerance=tolerance)
        self.ratio = check_number("ratio", ratio, low=0, high=1, open_low=True)
        self.n_iter = check_count("n_iter", n_iter)
        self.l1 = check_number("l1", l1, low=0)
        self.seed = resolve_seed(generator)

    def attack(self, model: nn.Module, batch: Batch, threat: Linf) -> Tensor:
        """Return (B, ...) points of the ball at which the cross-entropy of the model in eval mode is high."""
        x, y = batch["x"], batch["y"]
        streams = SampleStreams(self.step_seed(batch), self.index(batch), "start")
        point = threat.random_start(x, streams)
        ends = [0, *(math.ceil(share * self.n_iter) for share in DROPS), self.n_iter]
        for drops, (begin, end) in enumerate(pairwise(ends)):
            point = ascend(
                model,
                threat,
                x,
                point,
                lambda logits: F.cross_entropy(logits, y, reduction="none"),
                n_iter=end - begin,
                step_size=STEP * 0.1**drops * threat.eps,
            )
        return point

    def propagate(self, model: nn.Module, batch: Batch, *, eps: float, kappa: float) -> TrainingPass:
        """Return the clean logits and the bounds on the small boxes."""
        x, threat = batch["x"], Linf(eps, self.threat.domain)
        plain = self.ratio == 1 or not self.schedule(self.share(batch))
        point = x if plain else self.attack(model, batch, threat)
        radius = self.ratio * eps
        region = Region(x, x.new_full((len(x),), radius), threat.p, small_box(threat, x, point, radius))
        return self.bounds(model).training_pass(x, batch["y"], kappa=kappa, region=region)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch; see :class:`FastCertified`. ``verified`` speaks of the small boxes."""
        loss = super().forward(model, batch)
        if not self.l1:
            return loss
        size = torch.stack([parameter.abs().sum() for parameter in model.parameters()]).sum()
        return Loss(loss.total + self.l1 * size, {**loss.parts, "l1": size.detach()})
