"""When to stop sampling the two sides of an image, and what their counts prove together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from robust_core.certificates import clopper_pearson_lower, clopper_pearson_upper, split_alpha
from robust_core.certificates.stopping import Evidence, Plan, doubling_looks
from robust_core.certificates.votes import chunk_sizes, fine_chunk_sizes
from vision_robust.certified.dual_randomized_smoothing.radius import dual_radius

__all__ = ["DualPlan"]


class DualPlan(Plan):
    """When to stop sampling the two sides of an image, and what their counts prove together.

    Each side has half of ``alpha``, whatever is asked. Without radii and tolerance all of it belongs to the bound at
    ``n``. Otherwise half of that half belongs to the last look and the rest is split evenly among the earlier ones:
    all bounds hold together, so the best of them counts and one may stop whenever the answer is known.

    Args:
        n: samples on each side, at most.
        alpha: failure probability of the joint claim.
        sigmas: standard deviations, left and right.
        radii: an increasing grid to decide; the row stops where no larger one can hold.
        tolerance: stop once more samples could not add more than this share to the radius.
        give_up: probability of leaving a row that all samples would have decided favourably in half of the cases.
    """

    def __init__(
        self,
        n: int,
        alpha: float,
        sigmas: tuple[float, float],
        *,
        radii: Sequence[float] | None = None,
        tolerance: float | None = None,
        give_up: float = 0.001,
    ) -> None:
        early = radii is not None or tolerance is not None
        sizes = fine_chunk_sizes(n) if early else chunk_sizes(n)
        looks = _growing_looks(sizes) if early else doubling_looks(n)
        super().__init__(looks, sizes, "dual-smoothing/early" if early else "dual-smoothing/estimation")
        m = len(looks)
        shares = [1.0] * (m - 1) + [max(m - 1.0, 1.0)]
        self.alphas = split_alpha(alpha / 2, m, weights=shares) if early else (0.0,) * (m - 1) + (alpha / 2,)
        self.sigmas, self.give_up, self.tolerance = sigmas, give_up, tolerance
        self.radii = None if radii is None else np.array([*radii, np.inf])

    def radius(self, p_lower: np.ndarray) -> np.ndarray:
        """Return (k,) radii from (2, k) lower bounds; -1 where the sum of the quantiles is not above 0."""
        p_left, p_right = torch.from_numpy(p_lower)
        radius = dual_radius(p_left, p_right, *self.sigmas).numpy()
        return np.where(radius > 0, radius, -1.0)

    def look(self, i: int, rows: np.ndarray, evidence: Evidence) -> None:
        """See :meth:`Plan.look`; a row and its other side are decided together."""
        n = len(evidence.total) // 2
        pair = np.stack([rows[rows < n], rows[rows < n] + n])  # both sides of a live image are live
        count, seen = evidence.total[pair], self.looks[i]
        if self.alphas[i] > 0:
            bound = np.asarray(clopper_pearson_lower(count, seen, self.alphas[i]))
            evidence.p_lower[pair] = np.maximum(evidence.p_lower[pair], bound)
        radius = self.radius(evidence.p_lower[pair])
        target = np.zeros(len(radius))
        if self.radii is not None:
            level = np.maximum(evidence.level[pair[0]], (radius[:, None] >= self.radii).sum(1))
            evidence.level[pair] = level
            target = self.radii[level]
        done = np.isinf(target) | (seen == self.looks[-1])
        if not done.all() and self.give_up > 0:
            best = np.asarray(clopper_pearson_upper(count, seen, self.give_up / (2 * len(self.looks))))
            done |= self._at_end(count, seen, best) < target
        if self.tolerance is not None:
            rate = count / seen
            hope = self._at_end(count, seen, np.minimum(rate + np.sqrt(rate * (1 - rate) / seen), 1.0))
            done |= (radius > 0) & (radius >= (1.0 - self.tolerance) * hope)
        evidence.done[pair] = done

    def _at_end(self, count: np.ndarray, seen: int, rate: np.ndarray) -> np.ndarray:
        """Return the radii after all samples if the rest succeeds at ``rate``."""
        n = self.looks[-1]
        final = np.minimum(np.ceil(count + (n - seen) * rate), n)
        return self.radius(np.asarray(clopper_pearson_lower(final, n, self.alphas[-1])))


def _growing_looks(sizes: list[int]) -> list[int]:
    ends = np.cumsum(sizes).tolist()
    looks = [ends[0]]
    for end in ends[1:]:
        if end >= 1.5 * looks[-1] or end == ends[-1]:
            looks.append(end)
    return looks
