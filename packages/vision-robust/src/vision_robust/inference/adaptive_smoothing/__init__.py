r"""Adaptive smoothing: the accuracy of one classifier and the robustness of another, without retraining either.

Yatong Bai, Brendon G. Anderson, Aerin Kim, Somayeh Sojoudi, "Improving the Accuracy-Robustness Trade-Off of
Classifiers via Adaptive Smoothing", arXiv:2301.12554.

A standard classifier g (``accurate``) and a robust one h (``robust``) are mixed on their probabilities,
``f_i(x) = log((1 - alpha) g_i(x) + alpha h_i(x))``; here the paper's alpha is ``mixing_weight``. A constant weight of
at least 1/2 carries certificates; a small mixing network that detects attacks moves the weight input by input.

- f, its weight and its scales -> :class:`MixedClassifier` (``mixture``)
- mixing network, versions 3 and 4 of the official release -> :class:`MixingNetwork`; on penultimate features ->
  :class:`SmallMixingNetwork`
- training loss and training attacks -> :class:`MixingObjective`, an objective for ``robust_core.training.fit``
- adaptive attack on the mixture -> :class:`MixingAPGD` (for each rank of target), :class:`MixingPGD`
- margin lemma, Lipschitz and smoothing theorems -> ``robust_core.certificates.mixed``; applied to a mixture ->
  :class:`MixedLipschitzCertifier`, :class:`MixedSmoothing`
- choice of a constant weight -> :func:`tradeoff_curve`, :func:`select_mixing_weight`

Left out: the gradient-norm weight R(x) of the earlier "locally biased smoothing", inferior to R = 1 in the paper.
Defaults are those of the official CIFAR-100 configuration. Reconstructed: the proofs of the certificates, which the
tests check by brute force.
"""

from vision_robust.inference.adaptive_smoothing.certify import MixedLipschitzCertifier, MixedSmoothing
from vision_robust.inference.adaptive_smoothing.mixed import MixedClassifier, mixture
from vision_robust.inference.adaptive_smoothing.network import FeatureTap, MixingNetwork, SmallMixingNetwork
from vision_robust.inference.adaptive_smoothing.select import TradeOff, select_mixing_weight, tradeoff_curve
from vision_robust.inference.adaptive_smoothing.training import (
    MixingAPGD,
    MixingLoss,
    MixingObjective,
    MixingPGD,
    randomised_attack,
)

__all__ = [
    "FeatureTap",
    "MixedClassifier",
    "MixedLipschitzCertifier",
    "MixedSmoothing",
    "MixingAPGD",
    "MixingLoss",
    "MixingNetwork",
    "MixingObjective",
    "MixingPGD",
    "SmallMixingNetwork",
    "TradeOff",
    "mixture",
    "randomised_attack",
    "select_mixing_weight",
    "tradeoff_curve",
]
