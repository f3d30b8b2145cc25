r"""Dual randomized smoothing: certify a large image by two small ones, each with noise and a network of its own.

Song Xia, Yi Yu, Xudong Jiang, Henghui Ding, "Mitigating the Curse of Dimensionality for Certified Robustness via Dual
Randomized Smoothing", ICLR 2024, arXiv:2404.09586. (Another method of nearly this name, on noise that varies with the
input, is of 2026.)

The radius that smoothing can reach shrinks as the number of pixels d grows, like 1/sqrt(d). Two interleaved halves of
an image show nearly the same: a network that sees one of them copes with less noise, and the two certificates add up.
Who certifies with Gaussian smoothing gets a second certifier for redundant images of high resolution, at the same cost
for each sample. It is no free gain: a linear classifier is certified at most as far as by plain smoothing, equally far
where its halves are balanced, so measure both on your data.

- partition, what each network is given -> :func:`checkerboard_partition`, :class:`SubImage`, :class:`Side`
- g(x) = argmax_c p_c^L + p_c^R -> :class:`DualSmoothing` (``certify``, ``predict``), :class:`DualSmoothedClassifier`
- theorem, R = sigma / sqrt(2) (Phi^-1(p_L) + Phi^-1(p_R)), unequal noise too -> :func:`dual_radius`
- the same with bounds of the runner-up classes -> :func:`runner_up_radius`
- training: cross entropy under noise -> ``GaussianNoise``; with consistency -> ``NoiseConsistency(sigma, 4, 15.0,
  entropy=0.75)``, both in ``robust_core.training``; both sides at once -> :class:`EachSide`
- regulariser of clean pre-training -> :func:`stability`, :class:`StableCrossEntropy`

Departures from the published code, each of which would claim too much: quantiles are added with their signs (the code
clips radii at 0, or takes the root of the sum of their squares); ``alpha`` is split between the sides; networks are
given kept pixels only, whatever they are (the code denoises whole images before it splits them); bounds come from the
counts that were drawn. Left out: the diffusion denoisers. Defaults: the samples and ``alpha`` of the paper; noise that
compares with plain smoothing at sigma is sigma / sqrt(2) on each side, which gives equal largest radii. Reconstructed:
the bound with runner-up classes, and early stopping for the sum of two bounds; the tests check both by brute force.
"""

from vision_robust.certified.dual_randomized_smoothing.certifier import DualSmoothedClassifier, DualSmoothing
from vision_robust.certified.dual_randomized_smoothing.plan import DualPlan
from vision_robust.certified.dual_randomized_smoothing.radius import dual_radius, runner_up_radius
from vision_robust.certified.dual_randomized_smoothing.sides import (
    DualClassifier,
    Side,
    SubImage,
    check_side,
    checkerboard_partition,
)
from vision_robust.certified.dual_randomized_smoothing.training import EachSide, StableCrossEntropy, stability

__all__ = [
    "DualClassifier",
    "DualPlan",
    "DualSmoothedClassifier",
    "DualSmoothing",
    "EachSide",
    "Side",
    "StableCrossEntropy",
    "SubImage",
    "check_side",
    "checkerboard_partition",
    "dual_radius",
    "runner_up_radius",
    "stability",
]
