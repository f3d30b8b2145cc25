"""Certificates of the dual smoothed classifier: votes on two sides, judged together."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.certificates import (
    ABSTAIN,
    About,
    Certificate,
    SmoothedClassifier,
    SmoothingState,
    Status,
    clopper_pearson_lower,
    clopper_pearson_upper,
    family_alpha,
)
from robust_core.certificates.sampling import OnStep, count_votes, prepare, radius_grid, run_key, sample
from robust_core.certificates.votes import NoisyPasses, Segment, refuse_unsuitable
from robust_core.checks import check_choice, check_count, check_labels, check_number
from robust_core.models import fingerprint, frozen
from robust_core.random import Seed, derive, resolve_seed
from vision_robust.certified.dual_randomized_smoothing.plan import DualPlan
from vision_robust.certified.dual_randomized_smoothing.radius import runner_up_radius
from vision_robust.certified.dual_randomized_smoothing.sides import DualClassifier, check_partition

__all__ = ["DualSmoothedClassifier", "DualSmoothing"]


class DualSmoothedClassifier(nn.Module):
    """``x -> log of the mean over both sides of E softmax f_s(x_s + noise)``: what attackers through the noise climb.

    Args:
        model: the two sides.
        sigmas: standard deviations of the noise, left and right.
        n_samples: draws of one call, on each side.
        fresh: new noise in every call; False keeps one draw, which makes the module a fixed function.
        seed: seed of the noise.
    """

    differentiable = True
    optimises_at_test_time = False

    def __init__(
        self,
        model: DualClassifier,
        sigmas: tuple[float, float],
        *,
        n_samples: int = 32,
        fresh: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.fresh = model, fresh
        self.left, self.right = (
            SmoothedClassifier(side.classifier, sigma, n_samples=n_samples, fresh=fresh, seed=derive(seed, name))
            for side, sigma, name in zip(model.sides, sigmas, ("left", "right"), strict=True)
        )

    @property
    def stochastic(self) -> bool:
        """Whether two calls differ."""
        return self.fresh

    def surrogate(self) -> DualSmoothedClassifier:
        """Return the module itself: it is its own differentiable surrogate."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) log-probabilities; memory grows with ``B * n_samples``."""
        left, right = self.left(self.model.left.kept(x)), self.right(self.model.right.kept(x))
        return torch.logaddexp(left, right) - math.log(2.0)


class DualPasses:
    """The passes of both sides as one: rows 0 .. B - 1 are the left side of each image, B .. 2 B - 1 the right."""

    def __init__(self, left: NoisyPasses, right: NoisyPasses) -> None:
        self.sides = (left, right)

    @property
    def n_rows(self) -> int:
        """Twice the images."""
        return 2 * self.sides[0].n_rows

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.sides[0].device

    @property
    def forwards(self) -> int:
        """Passes of either network."""
        return self.sides[0].forwards + self.sides[1].forwards

    def run(self, purpose: str, work: Iterable[Segment]) -> Iterator[tuple[list[Segment], Tensor, Tensor]]:
        """Yield (segments, rows, logits), as ``NoisyPasses.run`` does."""
        n = self.sides[0].n_rows
        for side, group in groupby(work, key=lambda segment: segment.row // n):
            own = (Segment(row - side * n, chunk, size) for row, chunk, size in group)
            for segments, rows, logits in self.sides[side].run(purpose, own):
                yield [Segment(row + side * n, chunk, size) for row, chunk, size in segments], rows + side * n, logits


@dataclass(frozen=True)
class DualSmoothing:
    """The Gaussian-smoothed version of a dual classifier: ``g(x) = argmax_c P[f_L = c] + P[f_R = c]``.

    Args:
        model: the two sides; used in eval mode and left as found.
        sigma: standard deviation of the noise in units of the input, or (left, right).
        n0: samples on each side that find the class.
        n_samples: samples on each side that bound its votes, at most.
        alpha: failure probability of each returned claim; half of it belongs to each side.
        batch_size: noisy sub-images in one pass; see :class:`robust_core.certificates.Smoothing`.
        family: ``"each"``, or ``"simultaneous"``: *all* claims of one call hold with probability 1 - alpha.
        quantise_bits: round the sum of input and noise to multiples of ``1 / (2**bits - 1)``; 8 for images.
        give_up: probability of leaving early a row that all samples would have certified in half of the cases.
    """

    model: DualClassifier
    sigma: float | tuple[float, float]
    _: KW_ONLY
    n0: int = 100
    n_samples: int = 100_000
    alpha: float = 0.001
    batch_size: int | None = None
    family: str = "each"
    quantise_bits: int | None = None
    give_up: float = 0.001

    def __post_init__(self) -> None:
        if not isinstance(self.model, DualClassifier):
            raise TypeError(f"model must be a DualClassifier, not {type(self.model).__name__}: wrap the two networks")
        if len(self.sigmas) != 2:
            raise ValueError(f"sigma={self.sigma!r}: one number, or (left, right), is needed")
        for sigma in self.sigmas:
            check_number("sigma", sigma, low=0.0, open_low=True)
        check_count("n0", self.n0)
        check_count("n_samples", self.n_samples)
        check_number("alpha", self.alpha, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_choice("family", self.family, ("each", "simultaneous"))
        check_number("give_up", self.give_up, low=0.0, high=0.5)
        if self.quantise_bits is not None and check_count("quantise_bits", self.quantise_bits) > 16:
            raise ValueError(f"quantise_bits={self.quantise_bits}: 1 to 16 bits are possible")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Standard deviations, left and right."""
        return tuple(self.sigma) if isinstance(self.sigma, Sequence) else (self.sigma, self.sigma)  # pyright: ignore

    def certify(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        radius: float | Sequence[float] | None = None,
        tolerance: float | None = None,
        runner_up: bool = False,
        on_step: OnStep | None = None,
        state: SmoothingState | None = None,
    ) -> Certificate:
        """Certify a batch; arguments, noise and early stopping are those of ``Smoothing.certify``.

        Args:
            x: (B, ..., *pixels) inputs, float32 or float64.
            y: (B,) int64 labels: bounds the votes of ``y`` and abstains where ``y`` is not the winner.
            index: (B,) int64 positions in the original data set, which name the noise; 0 .. B-1 by default.
            generator: seed of the noise; None means 0.
            radius: one radius or several: decide whether the radius is at least that, and stop. The certificate
                carries the largest of them that holds; rows where none does are ``UNKNOWN``.
            tolerance: stop once more samples could not add more than this share to the radius.
            runner_up: bound the votes of every other class too, from the same samples: larger radii where the rest of
                the votes is scattered, smaller ones where it is not, since ``alpha`` is then shared by more bounds.
                Draws all samples.
            on_step: called with (samples drawn or spared, samples at most) after every batch.
            state: an empty :class:`SmoothingState`, filled while sampling, or one of an interrupted call, which
                is then continued: the result is the same. It has two rows for each image.

        Returns:
            a certificate about the function ``"dual-smoothed"``, with the per-row details ``n`` (samples drawn on
            both sides together), ``count_left``, ``count_right``, ``p_left``, ``p_right`` and ``label``.

        Raises:
            TypeError, ValueError: bad inputs, or a side whose output is no fixed function of one input.
        """
        started = time.perf_counter()
        x, index, seed = prepare(self.model, x, index, generator)
        if y is not None:
            check_labels(y, len(x))
        if runner_up and (radius is not None or tolerance is not None or state is not None):
            raise ValueError("runner_up draws all samples: leave radius, tolerance and state out")
        alpha, radii = family_alpha(self.alpha, len(x), self.family), radius_grid(radius)
        plan = self._plan(alpha, radii, tolerance)
        state = SmoothingState() if state is None else state
        with frozen(self.model), torch.no_grad():
            passes, n_classes = self._passes(x, index, seed)
            if y is not None:
                check_labels(y, len(x), n_classes)
            mark = fingerprint(self.model)
            if state.begin(self._key(mark, x, y, index, seed, radii, tolerance, runner_up), 2 * len(x)):
                state.label = np.tile(self._labels(passes, y), 2)
            if runner_up:
                found = self._against_rivals(passes, alpha, state)
            else:
                sample(passes, plan, state, on_step)
                found = np.maximum(plan.radius(state.p_lower.reshape(2, -1)), 0.0)
        if radii is not None:
            found = np.array([0.0, *radii])[state.level[: len(x)]]
        certified = found > 0 if radii is None else state.level[: len(x)] > 0
        otherwise = Status.ABSTAINED if radii is None else Status.UNKNOWN
        cost = {"forwards": float(passes.forwards), "seconds": time.perf_counter() - started}
        about = self._about(mark, radii, tolerance, runner_up=runner_up)
        return _certificate(state, certified, found, otherwise, alpha, about, cost, x.device)

    def predict(
        self, x: Tensor, *, index: Tensor | None = None, generator: Seed = None, n_samples: int | None = None
    ) -> Tensor:
        """Return (B,) int64 classes of the dual smoothed classifier, or ``ABSTAIN``.

        A class other than its own is returned with probability ``alpha`` at most: the class of ``n0`` samples is
        returned where fresh ones prove that the sum of its two quantiles is above 0, and sampling stops there.

        Args:
            x: (B, ..., *pixels) inputs.
            index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
            generator: seed of the noise; None means 0.
            n_samples: samples for each row and side, at most; those of the constructor by default.
        """
        n = check_count("n_samples", self.n_samples if n_samples is None else n_samples)
        return replace(self, n_samples=n).certify(x, index=index, generator=generator, radius=0.0).prediction

    def deployed(self, *, n_samples: int = 1000) -> Callable[[Tensor], Tensor]:
        """Return ``x -> classes`` for use in front of adversaries; see ``Smoothing.deployed``."""
        check_count("n_samples", n_samples)

        def predict(x: Tensor) -> Tensor:
            return self.predict(x, generator=secrets.randbits(63), n_samples=n_samples)

        return predict

    def smoothed(self, *, n_samples: int = 32, fresh: bool = True, generator: Seed = None) -> DualSmoothedClassifier:
        """Return the dual smoothed classifier as a differentiable module, for attackers."""
        seed = resolve_seed(generator)
        return DualSmoothedClassifier(self.model, self.sigmas, n_samples=n_samples, fresh=fresh, seed=seed)

    def _plan(self, alpha: float, radii: list[float] | None, tolerance: float | None) -> DualPlan:
        if tolerance is not None:
            check_number("tolerance", tolerance, low=0.0, high=1.0, open_low=True, open_high=True)
        if radii is not None and tolerance is not None:
            raise ValueError("radius and tolerance: ask for a radius, or for the full radius up to a tolerance")
        return DualPlan(self.n_samples, alpha, self.sigmas, radii=radii, tolerance=tolerance, give_up=self.give_up)

    def _passes(self, x: Tensor, index: Tensor, seed: int) -> tuple[DualPasses, int | None]:
        """Return the passes of both sides, over kept pixels only, and the number of classes."""
        check_partition((self.model.left.mask, self.model.right.mask))
        passes, classes = [], []
        for side, sigma, name in zip(self.model.sides, self.sigmas, ("left", "right"), strict=True):
            kept, own = side.kept(x), derive(seed, "dual-smoothing", name)
            classes.append(refuse_unsuitable(side.classifier, kept, sigma, own))
            more = {"batch_size": self.batch_size, "quantise_bits": self.quantise_bits}
            passes.append(NoisyPasses(side.classifier, kept, index, seed=own, sigma=sigma, **more))
        if classes[0] != classes[1]:
            raise ValueError(f"model: the left side knows {classes[0]} classes, the right side {classes[1]}")
        return DualPasses(*passes), classes[0]

    def _labels(self, passes: DualPasses, y: Tensor | None) -> np.ndarray:
        if y is not None:
            return y.cpu().numpy().copy()
        counts = count_votes(passes, "dual-smoothing/selection", self.n0)
        return counts.reshape(2, -1, counts.shape[1]).sum(0)[:, :-1].argmax(1).cpu().numpy()

    def _against_rivals(self, passes: DualPasses, alpha: float, state: SmoothingState) -> np.ndarray:
        """Fill the state from all samples, and return (B,) radii inside which the class beats every other one."""
        n = self.n_samples
        counts = count_votes(passes, "dual-smoothing/runner-up", n).cpu().numpy()
        own = state.label[:, None]
        state.total[:] = np.take_along_axis(counts, own, 1)[:, 0]
        state.drawn[:] = n
        state.p_lower[:] = clopper_pearson_lower(state.total, n, alpha / 4)
        rivals = counts.shape[1] - 2  # the last column counts "no class", which never wins
        upper = np.asarray(clopper_pearson_upper(counts[:, :-1], n, alpha / (4 * max(rivals, 1))))
        lower = torch.from_numpy(state.p_lower).chunk(2)
        radius = np.full(len(own) // 2, np.inf)
        for rival in range(upper.shape[1]):
            bounds = torch.from_numpy(upper[:, rival]).chunk(2)
            beaten = runner_up_radius(lower[0], lower[1], bounds[0], bounds[1], *self.sigmas).numpy()
            radius = np.where(state.label[: len(radius)] == rival, radius, np.minimum(radius, beaten))
        return np.where(np.isfinite(radius), radius, 0.0)

    def _about(self, mark: str, radii: list[float] | None, tolerance: float | None, *, runner_up: bool) -> About:
        wrapping = f"{mark}|dual-gaussian|{self.sigmas!r}|{self.quantise_bits}"
        mode = f", radius={radii}" if radii is not None else f", tolerance={tolerance}" if tolerance else ""
        mode += ", runner_up=True" if runner_up else ""
        bits = f", quantise_bits={self.quantise_bits}" if self.quantise_bits else ""
        method = (
            f"DualSmoothing(sigma={self.sigma}, n0={self.n0}, n_samples={self.n_samples}, alpha={self.alpha:g}, "
            f"family={self.family!r}{bits}{mode})"
        )
        return About("dual-smoothed", hashlib.sha256(wrapping.encode()).hexdigest(), "L2", method)

    def _key(self, mark: str, *parts: object) -> str:
        settings = (self.sigmas, self.n0, self.n_samples, self.alpha, self.family, self.quantise_bits, self.give_up)
        return run_key(mark, "dual", *settings, *parts)


def _certificate(
    state: SmoothingState,
    certified: np.ndarray,
    radius: np.ndarray,
    otherwise: Status,
    alpha: float,
    about: About,
    cost: dict[str, float],
    device: torch.device,
) -> Certificate:
    n = len(radius)
    label = state.label[:n]
    tensors = {
        "n": state.drawn[:n] + state.drawn[n:],
        "count_left": state.total[:n],
        "count_right": state.total[n:],
        "p_left": state.p_lower[:n],
        "p_right": state.p_lower[n:],
        "label": label,
    }
    return Certificate(
        torch.as_tensor(np.where(certified, label, ABSTAIN), device=device),
        torch.as_tensor(np.where(certified, radius, 0.0), device=device),
        torch.as_tensor(np.where(certified, int(Status.CERTIFIED), int(otherwise)), device=device),
        alpha,
        True,
        about,
        cost,
        {name: torch.as_tensor(value.copy(), device=device) for name, value in tensors.items()},
    )
