"""Randomized smoothing: a certified L2 radius for any classifier, of any size, from forward passes alone.

``g(x) = argmax_c P[f(x + noise) = c]``, noise ~ N(0, sigma^2 I). If the vote of class c is at least p > 1/2, then g
answers c everywhere within ``sigma * Phi^-1(p)`` of x (Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918, theorem 1).
:meth:`Smoothing.certify` estimates p by an exact lower bound that fails with probability ``alpha``;
:meth:`Smoothing.predict` returns g(x), or abstains, with the same promise. Defaults (100 and 100,000 samples,
alpha = 0.001) are the paper's.

Four ways to certify, each of which keeps the promise of failing with probability at most ``alpha`` per row:

* ``certify(x)``: the full radius from all samples; rows that cannot get there any more are left early.
* ``certify(x, tolerance=0.05)``: the full radius, up to what more samples could still add.
* ``certify(x, radius=0.5)`` or a grid of radii: is the radius at least that? A row stops as soon as it is decided,
  typically after tens to hundreds of samples (:mod:`robust_core.certificates.sequential`).
* ``votes="soft"``: smooths the probabilities instead of the votes; wider bounds, made for functions that mix or
  differentiate them.

With labels ``y`` the vote of ``y`` itself is bounded, which needs no samples for finding the class; without them the
class is found from ``n0`` samples that are used for nothing else.

The theorem is about real arithmetic. Rounding ``x + noise`` to float32 is far below the confidence interval for
ordinary networks, but one can be built to exploit it (Voracek and Hein 2023); ``quantise_bits=8`` closes that door:
the *sum* is rounded to the grid on which images live before the network sees it.

Fixed seeds serve reports. Whoever knows the noise can attack the answer, so what faces an adversary must draw from a
secret: :meth:`Smoothing.deployed`. Left out: bounds that use the runner-up class, noise other than Gaussian.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_core.certificates.result import ABSTAIN, About, Certificate, Status
from robust_core.certificates.sampling import OnStep, count_votes, prepare, radius_grid, run_key, sample
from robust_core.certificates.smoothed import SmoothedClassifier, SmoothingState
from robust_core.certificates.statistics import binomial_p_value, family_alpha
from robust_core.certificates.stopping import (
    SOFT_LEVELS,
    FixedPlan,
    Plan,
    RadiusPlan,
    SoftPlan,
    TolerancePlan,
    gaussian_radius,
)
from robust_core.certificates.votes import NoisyPasses, refuse_unsuitable
from robust_core.checks import check_choice, check_count, check_labels, check_number
from robust_core.models import Classifier, fingerprint, frozen
from robust_core.random import Seed, resolve_seed

__all__ = ["Smoothing"]


@dataclass(frozen=True)
class Smoothing:
    """The Gaussian-smoothed version of a classifier.

    Args:
        model: maps (B, ...) to logits (B, C); used in eval mode and left as found.
        sigma: standard deviation of the noise, in units of the input.
        n0: samples that find the class.
        n_samples: samples that bound its vote, at most.
        alpha: failure probability of each returned claim.
        batch_size: noisy inputs in one pass of the model, on which memory depends alone; by default 256 on CPU and
            1024 elsewhere.
        family: ``"each"``, or ``"simultaneous"``: *all* claims of one call hold with probability 1 - alpha.
        votes: ``"hard"`` (arg-max) or ``"soft"`` (softmax probabilities).
        quantise_bits: round the sum of input and noise to multiples of ``1 / (2**bits - 1)``; 8 for images.
        give_up: probability of leaving early a row that all samples would have certified in half of the cases.
            Costs nothing in soundness; 0 never leaves a row early.
    """

    model: Classifier
    sigma: float
    _: KW_ONLY
    n0: int = 100
    n_samples: int = 100_000
    alpha: float = 0.001
    batch_size: int | None = None
    family: str = "each"
    votes: str = "hard"
    quantise_bits: int | None = None
    give_up: float = 0.001

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, low=0.0, open_low=True)
        check_count("n0", self.n0)
        check_count("n_samples", self.n_samples)
        check_number("alpha", self.alpha, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_choice("family", self.family, ("each", "simultaneous"))
        check_choice("votes", self.votes, ("hard", "soft"))
        check_number("give_up", self.give_up, low=0.0, high=0.5)
        if self.quantise_bits is not None and check_count("quantise_bits", self.quantise_bits) > 16:
            raise ValueError(f"quantise_bits={self.quantise_bits}: 1 to 16 bits are possible")

    def certify(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        radius: float | Sequence[float] | None = None,
        tolerance: float | None = None,
        on_step: OnStep | None = None,
        state: SmoothingState | None = None,
    ) -> Certificate:
        """Certify a batch.

        Args:
            x: (B, ...) inputs, float32 or float64.
            y: (B,) int64 labels: bounds the vote of ``y`` and abstains where ``y`` is not the winner.
            index: (B,) int64 positions in the original data set, which name the noise; 0 .. B-1 by default.
            generator: seed of the noise; None means 0.
            radius: one radius or several: decide whether the radius is at least that, and stop. The certificate
                carries the largest of them that holds; rows where none does are ``UNKNOWN``.
            tolerance: stop once more samples could not add more than this share to the radius.
            on_step: called with (samples drawn or spared, samples at most) after every batch.
            state: an empty :class:`SmoothingState`, filled while sampling, or one of an interrupted call, which
                is then continued: the result is the same.

        Returns:
            a certificate about the function ``"smoothed"``, with the per-row details ``n`` (samples drawn),
            ``count`` (votes among them; a sum of probabilities for soft votes), ``p_lower`` and ``label`` (the
            class whose vote was bounded).

        Raises:
            TypeError, ValueError: bad inputs, or a model whose output is no fixed function of one input.
        """
        started = time.perf_counter()
        x, index, seed = prepare(self.model, x, index, generator)
        if y is not None:
            check_labels(y, len(x))
        alpha = family_alpha(self.alpha, len(x), self.family)
        radii = radius_grid(radius)
        plan = self._plan(alpha, radii, tolerance)
        state = SmoothingState() if state is None else state
        with frozen(self.model), torch.no_grad():
            n_classes = refuse_unsuitable(self.model, x, self.sigma, seed)
            if y is not None:
                check_labels(y, len(x), n_classes)
            passes = self._passes(x, index, seed)
            mark = fingerprint(self.model)
            if state.begin(self._key(mark, x, y, index, seed, radii, tolerance), len(x)):
                state.label = self._labels(passes, y)
            sample(passes, plan, state, on_step)
        cost = {"forwards": float(passes.forwards), "seconds": time.perf_counter() - started}
        return self._certificate(plan, state, radii, alpha, self._about(mark, radii, tolerance), cost, x.device)

    def predict(
        self, x: Tensor, *, index: Tensor | None = None, generator: Seed = None, n_samples: int | None = None
    ) -> Tensor:
        """Return (B,) int64 classes of the smoothed classifier, or ``ABSTAIN``.

        A class other than the smoothed classifier's is returned with probability ``alpha`` at most. Votes are hard.

        Args:
            x: (B, ...) inputs.
            index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
            generator: seed of the noise; None means 0.
            n_samples: samples for each row; those of the constructor by default.
        """
        x, index, seed = prepare(self.model, x, index, generator)
        n = check_count("n_samples", self.n_samples if n_samples is None else n_samples)
        alpha = family_alpha(self.alpha, len(x), self.family)
        with frozen(self.model), torch.no_grad():
            refuse_unsuitable(self.model, x, self.sigma, seed)
            counts = count_votes(self._passes(x, index, seed), "smoothing/predict", n)
        best = counts.topk(2, dim=1)
        first, second = best.values.unbind(1)
        sure = torch.as_tensor(binomial_p_value(first, first + second), device=x.device) <= alpha
        sure &= best.indices[:, 0] < counts.shape[1] - 1  # "no class" never wins
        return torch.where(sure, best.indices[:, 0], ABSTAIN)

    def deployed(self, *, n_samples: int = 1000) -> Callable[[Tensor], Tensor]:
        """Return ``x -> classes`` for use in front of adversaries: every call draws its noise from a fresh secret.

        The theorem assumes that the adversary cannot predict the noise. Reports use fixed seeds; a service must
        not. The seed of each call comes from the operating system, is used once and kept nowhere.
        """
        check_count("n_samples", n_samples)

        def predict(x: Tensor) -> Tensor:
            return self.predict(x, generator=secrets.randbits(63), n_samples=n_samples)

        return predict

    def smoothed(self, *, n_samples: int = 32, fresh: bool = True, generator: Seed = None) -> SmoothedClassifier:
        """Return the smoothed classifier as a differentiable module, for attackers; see :class:`SmoothedClassifier`."""
        return SmoothedClassifier(
            self.model, self.sigma, n_samples=n_samples, fresh=fresh, seed=resolve_seed(generator)
        )

    def _passes(self, x: Tensor, index: Tensor, seed: int) -> NoisyPasses:
        return NoisyPasses(
            self.model,
            x,
            index,
            seed=seed,
            sigma=self.sigma,
            batch_size=self.batch_size,
            quantise_bits=self.quantise_bits,
        )

    def _plan(self, alpha: float, radii: list[float] | None, tolerance: float | None) -> Plan:
        if tolerance is not None:
            check_number("tolerance", tolerance, low=0.0, high=1.0, open_low=True, open_high=True)
        if radii is not None and tolerance is not None:
            raise ValueError("radius and tolerance: ask for a radius, or for the full radius up to a tolerance")
        if self.votes == "soft":
            if radii is not None or tolerance is not None:
                raise ValueError('votes="soft" draws all samples; radius and tolerance need votes="hard"')
            return SoftPlan(self.n_samples, alpha, self.give_up)
        if radii is not None:
            return RadiusPlan(self.n_samples, alpha, radii, self.sigma, self.give_up)
        if tolerance is not None:
            return TolerancePlan(self.n_samples, alpha, tolerance, self.give_up)
        return FixedPlan(self.n_samples, alpha, self.give_up)

    def _labels(self, passes: NoisyPasses, y: Tensor | None) -> np.ndarray:
        if y is not None:
            return y.cpu().numpy().copy()
        counts = count_votes(passes, "smoothing/selection", self.n0)
        return counts[:, :-1].argmax(1).cpu().numpy()

    def _certificate(
        self,
        plan: Plan,
        state: SmoothingState,
        radii: list[float] | None,
        alpha: float,
        about: About,
        cost: dict[str, float],
        device: torch.device,
    ) -> Certificate:
        if radii is None:
            radius = gaussian_radius(state.p_lower, self.sigma)
            certified, otherwise = state.p_lower > 0.5, Status.ABSTAINED
        else:
            radius = np.array([0.0, *radii])[state.level]
            certified, otherwise = state.level > 0, Status.UNKNOWN
        tensors = {
            "n": state.drawn,
            "count": state.total / SOFT_LEVELS if plan.soft else state.total,
            "p_lower": state.p_lower,
            "label": state.label,
        }
        return Certificate(
            torch.as_tensor(np.where(certified, state.label, ABSTAIN), device=device),
            torch.as_tensor(np.where(certified, radius, 0.0), device=device),
            torch.as_tensor(np.where(certified, int(Status.CERTIFIED), int(otherwise)), device=device),
            alpha,
            True,
            about,
            cost,
            {name: torch.as_tensor(value.copy(), device=device) for name, value in tensors.items()},
        )

    def _about(self, mark: str, radii: list[float] | None, tolerance: float | None) -> About:
        wrapping = f"{mark}|gaussian|{self.sigma!r}|{self.votes}|{self.quantise_bits}"
        mode = f", radius={radii}" if radii is not None else f", tolerance={tolerance}" if tolerance else ""
        bits = f", quantise_bits={self.quantise_bits}" if self.quantise_bits else ""
        method = (
            f"Smoothing(sigma={self.sigma:g}, n0={self.n0}, n_samples={self.n_samples}, alpha={self.alpha:g}, "
            f"family={self.family!r}, votes={self.votes!r}{bits}{mode})"
        )
        return About("smoothed", hashlib.sha256(wrapping.encode()).hexdigest(), "L2", method)

    def _key(self, mark: str, *parts: Any) -> str:
        settings = (self.sigma, self.n0, self.n_samples, self.alpha, self.family, self.votes)
        return run_key(mark, *settings, self.quantise_bits, self.give_up, *parts)
