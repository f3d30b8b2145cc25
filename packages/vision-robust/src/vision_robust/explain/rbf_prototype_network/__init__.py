r"""Robust prototype-based networks: decisions that read as "these prototypes are there, those are not", with radii.

Sascha Saralajew, Ashish Rana, Thomas Villmann, Ammar Shaker, "A Robust Prototype-Based Network with Interpretable RBF
Classifier Foundations", AAAI 2025, arXiv:2412.15499.

Prototypes in input space are detected with probability ``exp(-distance / sigma)``; each class holds a distribution over
(prototype, present or absent), and its score is the probability that the two agree. The user gets a classifier whose
scores add up from named contributions, and for every prediction a certified L2 radius at the price of a forward pass,
which can be trained directly. In the deep form the reasoning stands on the channels of any backbone: interpretable
still, without the certificate.

- detection, distances, the rule for sigma -> :class:`Components`
- reasoning, one softmax over 2K logits for each concept -> :class:`Reasoning`, :func:`agreement`
- shallow classifier -> :class:`CBC`; reasoning by presence only -> :class:`RBFClassifier`
- theorem, ``eps_ij = sigma log[(B + sqrt(B^2 + 4 A C)) / (2 C)]`` -> :func:`closed_radius`; tighter and rigorous ->
  :class:`CBCCertifier`
- margin loss, robust loss -> :class:`CBCMarginLoss`, :class:`RobustCBCLoss`, for ``robust_core.training.fit``
- deep form -> :class:`CBCHead`, :class:`DeepCBC`, :class:`PrototypeAlignment`, :func:`deep_stages`
- plots -> :func:`prototype_plot`, :func:`reasoning_plot`, :func:`explanation_plot`

Defaults are the paper's, read from its code: 20 components, two concepts for each class, prototypes from U(0.45, 0.55)
and kept in [0, 1], margin 0.3 (0.025 deep). Its sigma of 58 belongs to squared distances of 28x28 images; 2 suits 8x8
ones. Ours: the tight certificate with one sigma for each component and the walls of the domain; the closed form for
squared distances; no halving for subspaces (a distance to one is 1-Lipschitz); :meth:`CBC.initialise`, which starts
prototypes, sigma and reasoning from labelled data and is what makes training dependable. Reconstructed: the proof of
the theorem (attacks check all bounds); the losses of the deep stages, of which only lengths, rates and the margin are
known. Left out: other metrics.
"""

from vision_robust.explain.rbf_prototype_network.certificate import CBCCertifier
from vision_robust.explain.rbf_prototype_network.components import Components, euclidean_distance, tangent_distance
from vision_robust.explain.rbf_prototype_network.deep import CBCHead, DeepCBC, PrototypeAlignment, deep_stages
from vision_robust.explain.rbf_prototype_network.model import CBC, PrototypeExplanation, RBFClassifier
from vision_robust.explain.rbf_prototype_network.plots import explanation_plot, prototype_plot, reasoning_plot
from vision_robust.explain.rbf_prototype_network.radius import closed_radius, crossing_factor, squared_radius
from vision_robust.explain.rbf_prototype_network.reasoning import Reasoning, agreement
from vision_robust.explain.rbf_prototype_network.training import CBCMarginLoss, RobustCBCLoss, margin_loss, robust_loss

__all__ = [
    "CBC",
    "CBCCertifier",
    "CBCHead",
    "CBCMarginLoss",
    "Components",
    "DeepCBC",
    "PrototypeAlignment",
    "PrototypeExplanation",
    "RBFClassifier",
    "Reasoning",
    "RobustCBCLoss",
    "agreement",
    "closed_radius",
    "crossing_factor",
    "deep_stages",
    "euclidean_distance",
    "explanation_plot",
    "margin_loss",
    "prototype_plot",
    "reasoning_plot",
    "robust_loss",
    "squared_radius",
    "tangent_distance",
]
