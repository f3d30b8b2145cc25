"""Certificates for mixtures: what the robust classifier promises survives any accurate one beside it.

The margin lemma: with weight w of at least 1/2 and ``h_y - h_i >= (1 - w) / w`` on a ball for every other class i, the
mixture answers y on that ball whatever g does. The two theorems bound that ball; their formulas stand in
``robust_core.certificates.mixed``. For a weight that depends on the input its least value on all inputs is used.
"""

from __future__ import annotations

import copy
import time
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robust_core.certificates.mixed import certify_mixed_lipschitz, certify_mixed_smoothing, mixed_certificate
from robust_core.certificates.result import About, Certificate
from robust_core.certificates.smoothing import Smoothing
from robust_core.checks import check_choice, check_inputs, check_number
from robust_core.models import Classifier, fingerprint, predict_logits
from robust_core.random import Seed
from vision_robust.inference.adaptive_smoothing.mixed import MixedClassifier

__all__ = ["MixedLipschitzCertifier", "MixedSmoothing"]


def _check_weight(mixing_weight: float) -> float:
    check_number("mixing_weight", mixing_weight, low=0, high=1)
    if mixing_weight < 0.5:
        raise ValueError(f"mixing_weight={mixing_weight}: below 1/2 nothing can be certified")
    return mixing_weight


@dataclass(frozen=True)
class MixedSmoothing:
    """Certify the mixture of any classifier with the Gaussian-smoothed votes of a robust one, in L2.

    The function certified is ``(1 - w) softmax(accurate(x)) + w P[robust(x + noise) = .]``, w constant.

    Args:
        accurate: standard classifier g; its certificate does not depend on it, its predictions do.
        smoothing: the smoothed robust classifier, with its failure probability (votes must be hard).
        mixing_weight: weight w of the robust part, in [1/2, 1].
        bound: ``"sharp"``, or the smaller radius of the paper's theorem, ``"published"``.
    """

    accurate: Classifier
    smoothing: Smoothing
    _: KW_ONLY
    mixing_weight: float
    bound: Literal["sharp", "published"] = "sharp"

    def __post_init__(self) -> None:
        _check_weight(self.mixing_weight)
        check_choice("smoothing.votes", self.smoothing.votes, ("hard",))

    def certify(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        **more: Any,
    ) -> Certificate:
        """Certify (B, ...) inputs; arguments are those of ``Smoothing.certify`` but for ``radius``.

        Raises:
            ValueError: ``radius`` is given: early decisions at a radius speak of the smoothed classifier alone.
        """
        if more.get("radius") is not None:
            raise ValueError("radius: decide at a radius with tolerance=… instead; the mixture needs the vote itself")
        inner = self.smoothing.certify(x, y, index=index, generator=generator, **more)
        radius = certify_mixed_smoothing(
            inner.details["p_lower"],
            sigma=self.smoothing.sigma,
            mixing_weight=self.mixing_weight,
            bound=self.bound,
        )
        certificate = mixed_certificate(
            inner.details["label"],
            radius,
            robust=inner,
            accurate_fingerprint=fingerprint(self.accurate),
            mixing_weight=self.mixing_weight,
        )
        details = {**inner.details, "smoothed_radius": inner.radius}
        return replace(certificate, cost=inner.cost, details=details)


@dataclass(frozen=True)
class MixedLipschitzCertifier:
    """Certify a :class:`MixedClassifier` from Lipschitz constants of the robust classifier's probabilities.

    Args:
        mixed: the mixture; with a mixing network its least weight is what counts, and must be at least 1/2.
        lipschitz: upper bound on the Lipschitz constant of every probability ``h_i`` of the robust classifier (after
            ``robust_scale``), in the norm ``norm``: one number or (K,). Estimates from gradients or power iteration
            are lower bounds and certify nothing.
        norm: ``"L2"``, ``"Linf"`` or ``"L1"``.
    """

    mixed: MixedClassifier
    lipschitz: float | Tensor
    _: KW_ONLY
    norm: str = "L2"

    def __post_init__(self) -> None:
        _check_weight(self.mixed.lowest_weight)
        check_choice("norm", self.norm, ("Linf", "L2", "L1"))

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify (B, ...) inputs; with ``y`` only rows where the robust classifier answers ``y`` count."""
        started = time.perf_counter()
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x has dtype {x.dtype}; certificates are for float32 and float64")
        check_inputs(x)
        wide = copy.deepcopy(self.mixed.robust).double()
        probabilities = (predict_logits(wide, x.double()) * self.mixed.robust_scale).softmax(1)
        # Any lower bound on the weight is sound; this one also absorbs the rounding of float64 margins (below 1e-11).
        weight = self.mixed.lowest_weight * (1 - 1e-9)
        prediction, radius = certify_mixed_lipschitz(probabilities, self.lipschitz, weight)
        if y is not None:
            radius = torch.where(prediction == y, radius, 0.0)
        base = About("base", fingerprint(self.mixed.robust), self.norm, "Lipschitz probabilities")
        certificate = mixed_certificate(
            prediction,
            radius,
            robust=base,
            accurate_fingerprint=fingerprint(self.mixed),
            mixing_weight=self.mixed.lowest_weight,
            norm=self.norm,
        )
        cost = {"forwards": float(len(x)), "seconds": time.perf_counter() - started}
        return replace(certificate, cost=cost)
