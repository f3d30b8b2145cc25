"""The rules as modules: anything that senders hold goes in, and each knows what it withstands.

    rule = TrimmedMean(f=5)
    rule(torch.stack(gradients))                  # (n, d) -> (d,)
    rule([model.state_dict() for model in models])  # n state dicts of parameters -> one
    Compose(NNM(f=5), TrimmedMean(f=5))           # mixing first

``nonfinite`` says what happens to senders of NaN or infinity: see :mod:`optim_robust.byzantine.vectors`. No module
holds state or is differentiable; the functions of the same names take plain (n, d) tensors.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from optim_robust.byzantine import coordinates, preaggregators, rules, subsets, theory
from optim_robust.byzantine.vectors import NONFINITE, Vectors, check_faulty, check_vectors, screen, stack_vectors
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = [
    "AGGREGATORS",
    "ARC",
    "CAF",
    "CGE",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clipping",
    "Compose",
    "FilterL2",
    "GeometricMedian",
    "Krum",
    "MeaMed",
    "Mean",
    "Median",
    "MultiKrum",
    "NearestNeighborAverage",
    "Phocas",
    "PreAggregator",
    "TrimmedMean",
]


class Aggregator(nn.Module):
    """A rule for f faulty senders.

    Args:
        f: senders that may be faulty.
        nonfinite: ``"raise"``, ``"drop"`` or ``"discount"``.
    """

    proved: str | None = None
    """The key of :func:`optim_robust.byzantine.theory.kappa`, or None where no constant is proved."""
    columnwise: bool = False
    """Whether each coordinate is treated alone (see :class:`optim_robust.byzantine.mixing.Aggregation`)."""

    def __init__(self, f: int = 0, *, nonfinite: str = "raise") -> None:
        super().__init__()
        self.f = check_count("f", f, low=0)
        self.nonfinite = check_choice("nonfinite", nonfinite, NONFINITE)

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the (d,) result for finite (n, d) vectors."""
        raise TypeError(f"{type(self).__name__} defines no rule(x, f)")

    def forward(self, x: Vectors) -> Tensor | dict[str, Tensor]:
        """Return what the rule makes of the senders' vectors, in the form in which they came.

        Args:
            x: (n, d); or n tensors of one shape; or n mappings of parameters.

        Raises:
            ValueError: too few senders for ``f``; NaN or infinity where that is refused.
            AggregationError: more senders sent NaN or infinity than may be faulty.
        """
        matrix, restore = stack_vectors(x)
        check_faulty(len(matrix), self.f, most=self.breakdown(len(matrix)), rule=type(self).__name__)
        f = self.f
        if self.nonfinite != "raise":  # else the functions look themselves
            matrix, f = screen(matrix, f, self.nonfinite)
        return restore(self.rule(matrix, f))

    def breakdown(self, n: int) -> int:
        """Return the largest f that the rule takes of n senders; it promises nothing above."""
        return (n - 1) // 2

    def kappa(self, n: int) -> float | None:
        """Return the proved constant of robustness with n senders, or None where none is proved here."""
        constant = None if self.proved is None else theory.kappa(self.proved, n, self.f)
        return None if constant == math.inf else constant

    def extra_repr(self) -> str:
        """Show ``f`` and the policy."""
        return f"f={self.f}, nonfinite={self.nonfinite!r}"


class Mean(Aggregator):
    """The mean: what everyone uses, and what one liar decides. It takes an ``f`` only to be compared with."""

    proved = "mean"
    columnwise = True

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean."""
        return rules.mean(x)


class Median(Aggregator):
    """Coordinate-wise median."""

    proved = "median"
    columnwise = True

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the median of each coordinate."""
        return coordinates.median(x)


class TrimmedMean(Aggregator):
    """Coordinate-wise mean without the f smallest and f largest values."""

    proved = "trimmed-mean"
    columnwise = True

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the trimmed mean of each coordinate."""
        return coordinates.trimmed_mean(x, f)


class MeaMed(Aggregator):
    """Mean of the n - f values nearest to the median, in each coordinate."""

    proved = "meamed"
    columnwise = True

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean around the median."""
        return coordinates.mean_around_median(x, f)


class Phocas(Aggregator):
    """Mean of the n - f values nearest to the trimmed mean, in each coordinate."""

    proved = "phocas"
    columnwise = True

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean around the trimmed mean."""
        return coordinates.phocas(x, f)


class GeometricMedian(Aggregator):
    """The point of least summed distance; ``nu`` > 0 smooths it (and voids the constant)."""

    def __init__(self, f: int = 0, *, nu: float = 0.0, max_iter: int = 1000, nonfinite: str = "raise") -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.nu = check_number("nu", nu, low=0.0)
        self.max_iter = check_count("max_iter", max_iter)
        self.proved = "geometric-median" if nu == 0.0 else None

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the geometric median."""
        return rules.geometric_median(x, nu=self.nu, max_iter=self.max_iter)


class Krum(Aggregator):
    """The row whose nearest others are nearest; ``neighbours="blanchard"`` is the paper's count, without a constant."""

    def __init__(self, f: int = 0, *, neighbours: str = "allouah", nonfinite: str = "raise") -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.neighbours = check_choice("neighbours", neighbours, ("allouah", "blanchard"))
        self.proved = "krum" if neighbours == "allouah" else None

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the chosen row."""
        return rules.krum(x, f, neighbours=self.neighbours)

    def breakdown(self, n: int) -> int:
        """Return the largest f: n >= 2 f + 3 with the paper's count."""
        return (n - 3) // 2 if self.neighbours == "blanchard" else super().breakdown(n)


class MultiKrum(Aggregator):
    """Mean of the m rows of best scores; m = n - f when None."""

    def __init__(
        self, f: int = 0, m: int | None = None, *, neighbours: str = "allouah", nonfinite: str = "raise"
    ) -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.m = None if m is None else check_count("m", m)
        self.neighbours = check_choice("neighbours", neighbours, ("allouah", "blanchard"))

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean of the chosen rows."""
        return rules.multi_krum(x, f, self.m, neighbours=self.neighbours)

    def breakdown(self, n: int) -> int:
        """Return the largest f: n >= 2 f + 3 with the paper's count."""
        return (n - 3) // 2 if self.neighbours == "blanchard" else super().breakdown(n)


class MDA(Aggregator):
    """Mean of the n - f rows of least diameter."""

    proved = "mda"

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean of the chosen rows."""
        return subsets.minimum_diameter_average(x, f)


class SMEA(Aggregator):
    """Mean of the n - f rows of least top eigenvalue of the covariance."""

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean of the chosen rows."""
        return subsets.smea(x, f)


class CAF(Aggregator):
    """Weighted mean along a path of down-weighting of what deviates most."""

    proved = "caf"

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the weighted mean."""
        return rules.caf(x, f)


class FilterL2(Aggregator):
    """Mean after senders lost weight along every direction that varies more than the honest could.

    ``sigma`` bounds the honest standard deviation in any direction; None estimates it, and only then, with the default
    ``expansion`` of 20, a constant is proved (a known sigma has its own bound, see
    :mod:`optim_robust.byzantine.theory`).
    """

    def __init__(
        self, f: int = 0, *, sigma: float | None = None, expansion: float = 20.0, nonfinite: str = "raise"
    ) -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.sigma = None if sigma is None else check_number("sigma", sigma, low=0.0, open_low=True)
        self.expansion = check_number("expansion", expansion, low=1.0)
        self.proved = "filter-l2" if sigma is None and expansion == 20.0 else None

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the weighted mean."""
        return rules.filter_l2(x, f, sigma=self.sigma, expansion=self.expansion)


class CGE(Aggregator):
    """Mean of the n - f rows of least norm: comparative gradient elimination."""

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean of the chosen rows."""
        return rules.comparative_elimination(x, f)


class Bulyan(Aggregator):
    """Krum again and again, then a mean around the median: n >= 4 f + 3."""

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return Bulyan's result."""
        return subsets.bulyan(x, f)

    def breakdown(self, n: int) -> int:
        """Return the largest f, (n - 3) // 4."""
        return max(0, (n - 3) // 4)


class CenteredClipping(Aggregator):
    """Clipped steps from the previous result, which the caller passes: ``rule(x, center=previous)``."""

    def __init__(self, f: int = 0, *, tau: float = 100.0, n_iter: int = 1, nonfinite: str = "raise") -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.tau = check_number("tau", tau, low=0.0, open_low=True)
        self.n_iter = check_count("n_iter", n_iter)

    def forward(self, x: Vectors, center: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return the result; ``center`` (d,) is where the steps start, the origin when None."""
        matrix, restore = stack_vectors(x)
        check_faulty(len(matrix), self.f, rule="CenteredClipping")
        if self.nonfinite != "raise":
            matrix, _ = screen(matrix, self.f, self.nonfinite)
        return restore(rules.centered_clipping(matrix, center, tau=self.tau, n_iter=self.n_iter))

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the result of steps from the origin."""
        return rules.centered_clipping(x, tau=self.tau, n_iter=self.n_iter)


class NearestNeighborAverage(Aggregator):
    """Mean of the n - f vectors nearest to the own one, row ``pivot``: MoNNA's mixing.

    Its guarantee is one of mixing (:func:`optim_robust.byzantine.theory.nna_bound`): it rests on an honest pivot.
    """

    def __init__(self, f: int = 0, pivot: int = 0, *, nonfinite: str = "raise") -> None:
        super().__init__(f, nonfinite=nonfinite)
        self.pivot = check_count("pivot", pivot, low=0)

    def forward(self, x: Vectors) -> Tensor | dict[str, Tensor]:
        """Return the mean; dropped senders do not move the pivot."""
        matrix, restore = stack_vectors(x)
        check_faulty(len(matrix), self.f, rule="NearestNeighborAverage")
        if self.pivot >= len(matrix):
            raise ValueError(f"pivot={self.pivot}: a row of x, 0 .. {len(matrix) - 1}, is needed")
        if self.nonfinite == "raise":
            return restore(rules.nearest_neighbor_average(matrix, self.f, self.pivot))
        own = matrix[self.pivot]
        screen(own[None], 0)
        rows, f = screen(matrix, self.f, self.nonfinite)
        return restore(rules.nearest_neighbor_average(rows, f, own))

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the mean of the rows nearest to row ``pivot``."""
        return rules.nearest_neighbor_average(x, f, self.pivot)


class PreAggregator(nn.Module):
    """Something done to the vectors before a rule."""

    def apply_to(self, x: Tensor, f: int) -> Tensor:
        """Return (m, d) for (n, d)."""
        raise TypeError(f"{type(self).__name__} defines no apply_to(x, f)")

    def forward(self, x: Tensor) -> Tensor:
        """Return (m, d) for (n, d)."""
        return self.apply_to(check_vectors(x), getattr(self, "f", 0))

    def kappa(self, n: int, f: int, after: float | None) -> float | None:
        """Return the constant together with a rule of constant ``after``, or None where none is proved."""
        return None


class NNM(PreAggregator):
    """Nearest-neighbour mixing: each row becomes the mean of its n - f nearest."""

    def __init__(self, f: int) -> None:
        super().__init__()
        self.f = check_count("f", f, low=0)

    def apply_to(self, x: Tensor, f: int) -> Tensor:
        """Return the mixed rows."""
        return preaggregators.nearest_neighbor_mixing(x, f)

    def kappa(self, n: int, f: int, after: float | None) -> float | None:
        """Return 8 f / (n - f) (1 + kappa of the rule)."""
        return None if after is None else theory.kappa_of_mixing(n, f, after)


class Bucketing(PreAggregator):
    """Means of random groups of ``s`` rows, drawn anew at each call from (seed, number of the call)."""

    def __init__(self, s: int, *, generator: Seed = None) -> None:
        super().__init__()
        self.s, self.seed, self.calls = check_count("s", s), resolve_seed(generator), 0

    def apply_to(self, x: Tensor, f: int) -> Tensor:
        """Return the means of the groups."""
        self.calls += 1
        return preaggregators.bucketing(x, self.s, generator=derive(self.seed, "call", self.calls))


class Clipping(PreAggregator):
    """Rows longer than ``c`` scaled down to that length."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = check_number("c", c, low=0.0, open_low=True)

    def apply_to(self, x: Tensor, f: int) -> Tensor:
        """Return the clipped rows."""
        return preaggregators.clipping(x, self.c)


class ARC(PreAggregator):
    """The longest rows scaled down to the norm of the next: adaptive robust clipping."""

    def __init__(self, f: int) -> None:
        super().__init__()
        self.f = check_count("f", f, low=0)

    def apply_to(self, x: Tensor, f: int) -> Tensor:
        """Return the clipped rows."""
        return preaggregators.adaptive_clipping(x, f)


class Compose(Aggregator):
    """Pre-aggregators one after another, then a rule, whose ``f`` and policy count for all.

    Args:
        *parts: pre-aggregators, and one :class:`Aggregator` at the end. Where a part has an ``f``, it is the rule's.
    """

    def __init__(self, *parts: nn.Module) -> None:
        if not parts or not isinstance(parts[-1], Aggregator):
            raise ValueError("Compose takes pre-aggregators and, at the end, an aggregator")
        final = parts[-1]
        for part in parts[:-1]:
            if not isinstance(part, PreAggregator):
                raise TypeError(f"{type(part).__name__} is no pre-aggregator; only the last part aggregates")
            if getattr(part, "f", final.f) != final.f:
                raise ValueError(f"{type(part).__name__} has f={part.f}, the rule f={final.f}: one f counts for all")
        super().__init__(final.f, nonfinite=final.nonfinite)
        self.before = nn.ModuleList(parts[:-1])
        self.final = final

    def rule(self, x: Tensor, f: int) -> Tensor:
        """Return the result of all parts."""
        for part in self.before:
            assert isinstance(part, PreAggregator)
            x = part.apply_to(x, f)
        check_faulty(len(x), f, most=self.final.breakdown(len(x)), rule=f"{type(self.final).__name__} on what is left")
        return self.final.rule(x, f)

    def breakdown(self, n: int) -> int:
        """Return the largest f that all parts take of n senders."""
        left = n
        for part in self.before:
            left = math.ceil(left / part.s) if isinstance(part, Bucketing) else left
        return min((n - 1) // 2, self.final.breakdown(left))

    def kappa(self, n: int) -> float | None:
        """Return the proved constant of the composition, or None."""
        constant = self.final.kappa(n)
        for part in reversed(self.before):
            assert isinstance(part, PreAggregator)
            constant = part.kappa(n, self.f, constant)
        return constant


AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "meamed": MeaMed,
    "phocas": Phocas,
    "geometric-median": GeometricMedian,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "mda": MDA,
    "smea": SMEA,
    "caf": CAF,
    "filter-l2": FilterL2,
    "cge": CGE,
    "bulyan": Bulyan,
    "centered-clipping": CenteredClipping,
    "nna": NearestNeighborAverage,
}
"""Name -> module; each is built with ``f``."""
