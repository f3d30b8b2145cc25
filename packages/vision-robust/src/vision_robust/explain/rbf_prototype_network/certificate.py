"""Certified L2 radii, rigorous: no Monte Carlo, no tolerance, rounding accounted for.

The tight certificate bounds the difference of two concepts as a whole. With
``v_k = (r_plus - r_minus)[i] - (r_plus - r_minus)[j]``,

    F_ij(eps) = sum_{v_k > 0} v_k exp(-t_k^up) + sum_{v_k < 0} v_k exp(-t_k^low) + sum_k (r_minus[i] - r_minus[j])

is a lower bound of ``p_i - p_j`` on the ball of radius eps, where ``t_k^low <= t_k <= t_k^up``: distances change
by at most eps, each component keeps its own sigma, and squares are taken afterwards. F falls with eps, so the greatest
eps with ``min_j max_i F_ij > 0`` is found by bisection, all samples at once; its lower end was itself proved. It is
never below the closed form, which bounds the two concepts one after the other and knows the least sigma only.

Inputs that must stay in a box give more: away from a prototype there is no way through the walls of the domain, so
``delta_k^2`` grows by at most ``2 eps |a_free| + eps^2``, ``a`` being its half gradient on the pixels that may still
move that way.

Rounding. What is certified is the model that runs, in float32 or float64, with parameters as stored. Its distances are
sums of n squared differences, off by a factor within ``1 +- gamma(n + 12)`` of the true ones (projections add an
absolute term), so each ``t_k`` that it computes lies in a slightly wider interval; its scores are sums of positive
terms of at most 4K + 1000 roundings, elementary functions being right to four units in the last place and the logarithm
above -60 (checked). So ``p_i > (1 + rho) p_j`` on those intervals proves the arg-max of the computed log scores. The
bound itself is evaluated in float64 and must exceed its own error. Not covered: TF32 and half precision.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_core.certificates.bounds.box import Rounding
from robust_core.certificates.result import About, Certificate, Status
from robust_core.checks import check_choice, check_count, check_inputs, check_labels
from robust_core.models import fingerprint, padded, predict_logits
from vision_robust.explain.rbf_prototype_network.components import Components, tangent_residual
from vision_robust.explain.rbf_prototype_network.model import CBC
from vision_robust.explain.rbf_prototype_network.radius import closed_radius, lipschitz

__all__ = ["CBCCertifier"]

METHODS = ("tight", "closed", "published")
_FLOOR = 1e-26
"""The winner's score must stay above this: its logarithm above -60, and nothing near underflow."""
_ULPS = 16
"""Roundings between a distance and its exponent, each way, with room."""


@dataclass(frozen=True)
class CBCCertifier:
    """Certify the predictions of a :class:`CBC` in L2; rigorous, and nothing is sampled.

    Args:
        model: the classifier, in float32 or float64; left as found.
        method: ``"tight"``; ``"closed"`` for the formula, ``"published"`` for the paper's own figure (which is the
            formula for Euclidean distances). The last two are never above the first.
        domain: (lowest, highest) value of valid inputs. Radii then speak of valid inputs only, and are larger; for
            ``"tight"`` only. None speaks of all inputs.
        steps: halvings of the interval that holds the radius.
        max_elements: elements of the largest tensor; limits memory.
    """

    model: CBC
    method: Literal["tight", "closed", "published"] = "tight"
    _: KW_ONLY
    domain: tuple[float, float] | None = None
    steps: int = 40
    max_elements: int = 2**24

    def __post_init__(self) -> None:
        if not isinstance(self.model, CBC):
            raise TypeError(
                f"model is a {type(self.model).__name__}; a CBC or RBFClassifier is needed: the certificate speaks of "
                "distances in input space (a CBCHead on a backbone has none)"
            )
        check_choice("method", self.method, METHODS)
        check_count("steps", self.steps)
        check_count("max_elements", self.max_elements)
        if self.domain is not None and self.method != "tight":
            raise ValueError(f"domain={self.domain}: the formula of {self.method!r} knows no domain; use 'tight'")
        if self.domain is not None and not self.domain[0] < self.domain[1]:
            raise ValueError(f"domain={self.domain}: the lowest value must be below the highest")

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify the model's own predictions on (B, ...) inputs; rows that differ from ``y`` stay unknown.

        Raises:
            TypeError, ValueError: bad arguments, half precision, inputs outside the domain.
        """
        started = time.perf_counter()
        check_inputs(x, self.domain)
        dtypes = (x.dtype, *(p.dtype for p in self.model.parameters()))
        rounding = max((Rounding.of(dtype) for dtype in dtypes), key=lambda r: r.unit)
        device = self.model.components.points.device
        if device != x.device:
            raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
        logits = predict_logits(self.model, x)
        prediction = logits.argmax(1)
        wanted = torch.ones_like(prediction, dtype=torch.bool)
        if y is not None:
            wanted = check_labels(y, len(x), logits.shape[1]) == prediction
        finite = torch.isfinite(logits).all(1)
        radius = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        rows = (wanted & finite).nonzero().flatten()
        if len(rows):
            radius[rows] = self._radii(x[rows], prediction[rows], rounding)
        status = torch.where((radius > 0) & wanted, int(Status.CERTIFIED), int(Status.UNKNOWN))
        status = torch.where(finite, status, int(Status.ERROR))
        cost = {"forwards": 2.0 * len(x), "seconds": time.perf_counter() - started}
        return Certificate(prediction, radius, status, 0.0, True, self.about(), cost)

    def about(self) -> About:
        """Return what the certificates speak of."""
        where = "" if self.domain is None else f", inputs in [{self.domain[0]:g}, {self.domain[1]:g}]"
        dtype = str(self.model.components.points.dtype).removeprefix("torch.")
        method = (
            f"classification by components, {self.method} bound{where}; encloses real arithmetic and every evaluation "
            f"order in {dtype} (not TF32 or half precision)"
        )
        return About("base", fingerprint(self.model), "L2", method)

    @torch.no_grad()
    def _radii(self, x: Tensor, label: Tensor, rounding: Rounding) -> Tensor:
        wide = copy.deepcopy(self.model).double().eval()
        radius = x.new_zeros(len(x), dtype=torch.float64)
        for one in label.unique().tolist():
            rival = _Rivals.of(wide, one, rounding)
            rows = (label == one).nonzero().flatten()
            elements = wide.components.points.numel() + rival.gain.numel() // max(1, rival.gain.shape[1])
            for part in rows.split(max(16, self.max_elements // elements)):
                inputs = padded(x[part]).double()  # so that a row's bits do not depend on its neighbours
                ranges = _Ranges.of(wide.components, inputs, rounding, self.domain)
                found = bisect(lambda eps, r=rival, s=ranges: r.lose(*s.at(eps)), ranges.top, self.steps)
                if self.method != "tight":
                    labels = torch.full_like(found, one, dtype=torch.int64)
                    found = torch.minimum(found, closed_radius(wide, inputs, labels, form=self.method).clamp(min=0))
                radius[part] = found[: len(part)]
        return radius


def bisect(holds: Callable[[Tensor], Tensor], top: Tensor, steps: int) -> Tensor:
    """Return (B,) the greatest eps found in [0, top] for which ``holds``, each of them tested; 0 where none.

    Args:
        holds: (B,) eps -> (B,) bool, false from some eps on.
        top: (B,) where to stop.
        steps: halvings.
    """
    passed = holds(top)
    low, high = torch.where(passed, top, 0.0), top
    for _ in range(steps):
        middle = (low + high) / 2
        passed = holds(middle)
        low, high = torch.where(passed, middle, low), torch.where(passed, high, middle)
    return low


@dataclass(frozen=True)
class _Ranges:
    """Where the exponents that the model computes may lie, over balls around inputs.

    Attributes:
        delta: (B, K) distances.
        reach: (B, K) lengths of ``x - w``; rounding of projections is relative to these.
        free: (B, K) bounds of the slope of ``delta^2 / 2`` in directions that the domain leaves open.
        slope: (K,) Lipschitz constants of the distances.
        sigma: (K,).
        error: (K,) error of computed distances, relative to ``reach``.
        stored: how much longer than its norm, as measured in float64, a difference may be.
        exponent: relative error of the exponents.
        squared: whether exponents are squares.
    """

    delta: Tensor
    reach: Tensor
    free: Tensor
    slope: Tensor
    sigma: Tensor
    error: Tensor
    stored: float
    exponent: float
    squared: bool

    @classmethod
    def of(cls, components: Components, x: Tensor, rounding: Rounding, domain: tuple[float, float] | None) -> _Ranges:
        flat, points, basis = components.flat(x), components.points, components.basis
        delta, slope = components.distances(x), lipschitz(components)
        n, reach, amplification = flat.shape[1] + 12, delta, torch.ones_like(slope)
        if basis is not None:
            # x - w, Q^T (.), Q (.) and the difference: errors of |x - w| + |Q| |Q|^T |x - w|, element by element
            n += basis.shape[2]
            reach = torch.cdist(flat, points, compute_mode="donot_use_mm_for_euclid_dist")
            amplification = amplification + torch.linalg.matrix_norm(basis.abs(), 2).square() * (1 + 1e-9)
        free = slope * delta if domain is None else _free_slope(components, flat, domain)
        wide = rounding.gamma_wide(4 * n + 64)
        error = (rounding.gamma(n) + 2 * rounding.gamma_wide(n)) * amplification
        exponent = rounding.gamma(_ULPS) + rounding.gamma_wide(_ULPS)
        squared = components.distance == "squared"
        return cls(delta, reach, free * (1 + wide), slope, components.sigma, error, wide, exponent, squared)

    @property
    def top(self) -> Tensor:
        """(B,) radii beyond which there is nothing to find."""
        far = 40 * self.sigma.amax()
        return self.delta.amax(1) + (far.sqrt() if self.squared else far)

    def at(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, K) the least and the greatest exponent within ``eps`` (B,)."""
        moved = (eps * (1 + self.stored))[:, None]
        stretched = self.slope * moved
        error = self.error * (self.reach + moved)
        low = (self.delta - stretched - error).clamp(min=0)
        grown = torch.sqrt(self.delta.square() + 2 * moved * self.free + stretched.square()) * (1 + self.stored)
        high = torch.minimum(self.delta + stretched, grown) + error
        if self.squared:
            low, high = low.square(), high.square()
        return low / self.sigma * (1 - self.exponent), high / self.sigma * (1 + self.exponent)


def _free_slope(components: Components, flat: Tensor, domain: tuple[float, float]) -> Tensor:
    """Return (B, K) lengths of the half gradient of ``delta^2`` on the elements that may move that way."""
    if components.basis is None:
        gradient = flat[:, None] - components.points
    else:
        residual = tangent_residual(flat, components.points, components.basis)
        inside = torch.einsum("bkd,kds->bks", residual, components.basis)
        gradient = residual - torch.einsum("bks,kds->bkd", inside, components.basis)
    low, high = domain
    blocked = ((gradient > 0) & (flat >= high)[:, None]) | ((gradient < 0) & (flat <= low)[:, None])
    if components.basis is not None:  # the sign of a rounded projection may be wrong where it is next to 0
        blocked &= gradient.abs() > 1e-9 * torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
    return torch.linalg.vector_norm(gradient.masked_fill(blocked, 0.0), dim=2)


@dataclass(frozen=True)
class _Rivals:
    """One class against all concepts of the others; I own concepts, J of the others.

    Attributes:
        gain: (I * J, K) positive part of ``v``.
        loss: (I * J, K) negative part of ``v``, at most 0.
        base: (I * J,) constant of F.
        plus, minus: (I, K) weights of the class's own concepts.
        size: (I * J, K) and ``size_base`` (I * J,): absolute terms of F, for its rounding in float64.
        pairs: (I, J).
        unit: rounding of F relative to its absolute terms.
    """

    gain: Tensor
    loss: Tensor
    base: Tensor
    plus: Tensor
    minus: Tensor
    size: Tensor
    size_base: Tensor
    pairs: tuple[int, int]
    unit: float

    @classmethod
    def of(cls, model: CBC, label: int, rounding: Rounding) -> _Rivals:
        plus, minus = model.reasoning.weights()
        k, per_class = plus.shape[1], model.reasoning.concepts_per_class
        ahead = 1 + 2.01 * (rounding.gamma(4 * k + 1000) + rounding.gamma_wide(4 * k + 1000))
        mine = torch.arange(len(plus), device=plus.device) // per_class == label
        v = (plus - minus)[mine][:, None] - ahead * (plus - minus)[~mine]
        base = minus[mine].sum(1)[:, None] - ahead * minus[~mine].sum(1)
        size = (plus + minus)[mine][:, None] + ahead * (plus + minus)[~mine]
        size_base = minus[mine].sum(1)[:, None] + ahead * minus[~mine].sum(1)
        v, size = v.flatten(0, 1), size.flatten(0, 1)
        unit = rounding.gamma_wide(4 * k + 64)
        own, pairs = (plus[mine], minus[mine]), (base.shape[0], base.shape[1])
        return cls(v.clamp(min=0), v.clamp(max=0), base.flatten(), *own, size, size_base.flatten(), pairs, unit)

    def lose(self, low: Tensor, high: Tensor) -> Tensor:
        """Return (B,) whether every rival loses to some own concept for all exponents between ``low`` and ``high``."""
        least, most = torch.exp(-high), torch.exp(-low)
        ahead = least @ self.gain.mT + most @ self.loss.mT + self.base
        error = self.unit * (most @ self.size.mT + self.size_base)
        score = least @ self.plus.mT + (-torch.expm1(-low)) @ self.minus.mT
        won = (ahead > error).unflatten(1, self.pairs) & (score > _FLOOR)[:, :, None]
        return won.any(1).all(1)
