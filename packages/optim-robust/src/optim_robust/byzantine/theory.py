"""What is proved of rules and of mixing, as numbers, and how to measure the same on data.

**(f, kappa)-robustness** (Allouah et al. 2023, arXiv 2302.01772): for every set S of n - f senders,
``|F(x) - mean_S|^2 <= kappa * (1 / |S|) sum_S |x_i - mean_S|^2``. No rule has kappa below f / (n - 2 f).
:func:`kappa` holds the constants of that paper for median, geometric median, trimmed mean, Krum (with n - f - 1
neighbours) and mixing before a rule; and five that are proved here, with h = n - f:

- MDA, ``8 f^2 / h``: the chosen set M and S share a row k, and differ by at most f pairs (a in M, b in S), each with
  |a - b| <= |a - k| + |k - b| <= 2 diam(S), as diam(M) <= diam(S). So |F - mean_S| <= 2 f diam(S) / h, and
  diam(S)^2 <= 2 h Var(S).
- MeaMed and Phocas, ``4 (f / h) (1 + sqrt(f k / h))^2``, k the constant of the centre c (median, trimmed mean): in each
  coordinate a kept value outside S is no farther from c than the value of S that it displaced, so |F - mean_S| <=
  (2 / h) sum_{<= f rows b of S} (|b - mean_S| + |mean_S - c|) <= (2 / h) (sqrt(f h) + f sqrt(k)) std(S).
- CAF and FilterL2, ``(1 + sqrt K)^2 2 f / (n - 3 f)`` for f / n < 0.211 (FilterL2: K at least its expansion). Let s^2
  be the top eigenvalue of S's covariance, l that of the weights w of sum W, t the squared deviations along its
  eigenvector, r = f / (n - 2 f). As long as the rows of S have lost no more weight than the others, w / W and the
  uniform weights of S share a mass of at least 1 - f / h, so their means differ by at most (sqrt l + s) sqrt r, and
  sum_S w t <= h (s^2 + r (sqrt l + s)^2). Where l > K s^2, a = 1 / sqrt K the root of h (a^2 + r (1 + a)^2) =
  (n - 2 f) / 2, this is less than W l / 2: the others lose more, again. They have at most f to lose and each step
  takes all of somebody's, so l <= K s^2 comes before W <= n - 2 f, whatever S is. A mean with W > n - 2 f and
  l <= K s^2 shares a mass of 1 - 2 f / h with S at least. (FilterL2 stops earlier only where l <= expansion s^2.
  With a sigma that is truly above s the first such step is in time: (s + sqrt(max(K s^2, expansion sigma^2)))^2 r.)

**(alpha, lambda)-reduction** (MoNNA, arXiv 2209.10931): a mixing map takes honest x to y with
``Gamma(y) <= alpha Gamma(x)`` and ``|mean y - mean x|^2 <= lambda Gamma(x)``, Gamma the mean squared distance to the
mean. Learning needs alpha < 1. For nearest-neighbour averaging with exactly f faulty senders, proved here:

- every peer hears all n and keeps h = n - f: ``Gamma(y) + |mean y - mean x|^2 <= 8 f / h Gamma(x)``. The kept set
  differs from the honest one by pairs (b, a) with |b - x_i| <= |a - x_i|, so |y_i - mean x| <= (1/h) sum_a 2 |a - x_i|
  over at most f rows a; Cauchy, and sum_{i,a} |x_i - x_a|^2 = 2 h^2 Gamma(x). A contraction if n > 9 f.
- every peer keeps n - 2 f of the first n - f: ``<= (1 + sqrt 8)^2 f (n - f) / (n - 2 f)^2 Gamma(x)``.

The paper's own constants (recalled, not checked: alpha = 9.88 f / (n - f), lambda = 9 f / (n - f) for n >= 11 f) are
weaker than the first of these and not used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from optim_robust.byzantine.vectors import check_faulty, check_vectors
from robust_core.checks import check_choice, check_count

__all__ = [
    "KAPPA_RULES",
    "contracts",
    "kappa",
    "kappa_lower_bound",
    "kappa_of_mixing",
    "measured_kappa",
    "nna_bound",
    "reduction_coefficients",
]


def _median(n: int, f: int) -> float:
    return 4 * (1 + f / (n - 2 * f)) ** 2


def _trimmed(n: int, f: int) -> float:
    return 6 * f / (n - 2 * f) * (1 + f / (n - 2 * f))


def _near(n: int, f: int, centre: float) -> float:
    share = f / (n - f)
    return 4 * share * (1 + math.sqrt(share * centre)) ** 2


def _filtered(n: int, f: int, expansion: float) -> float:
    if f == 0:
        return 0.0
    r, target = f / (n - 2 * f), (n - 2 * f) / (2 * (n - f))
    if r >= target:
        return math.inf
    a = (math.sqrt(r * r + (1 + r) * (target - r)) - r) / (1 + r)  # a^2 + r (1 + a)^2 = target
    return (1 + math.sqrt(max(expansion, 1 / a**2))) ** 2 * 2 * f / (n - 3 * f)


_FORMULAS: dict[str, Callable[[int, int], float]] = {
    "median": _median,
    "geometric-median": _median,
    "trimmed-mean": _trimmed,
    "krum": lambda n, f: 6 * (1 + f / (n - 2 * f)),
    "mda": lambda n, f: 8 * f**2 / (n - f),
    "meamed": lambda n, f: _near(n, f, _median(n, f)),
    "phocas": lambda n, f: _near(n, f, _trimmed(n, f)),
    "caf": lambda n, f: _filtered(n, f, 1.0),
    "filter-l2": lambda n, f: _filtered(n, f, 20.0),
    "mean": lambda n, f: 0.0 if f == 0 else math.inf,
}
KAPPA_RULES = tuple(_FORMULAS)
"""Rules for which :func:`kappa` knows a constant."""


def kappa(rule: str, n: int, f: int) -> float:
    """Return a proved constant kappa of ``rule`` with f of n senders faulty; infinite where none is known.

    The mean has none; for "caf" and "filter-l2" none is proved from f = 0.211 n on.

    Args:
        rule: one of :data:`KAPPA_RULES`.
        n: senders.
        f: faulty ones, 2 f < n.
    """
    check_choice("rule", rule, KAPPA_RULES)
    check_count("n", n)
    check_faulty(n, f)
    return _FORMULAS[rule](n, f)


def kappa_of_mixing(n: int, f: int, kappa_of_rule: float) -> float:
    """Return the constant of nearest-neighbour mixing followed by a rule of constant ``kappa_of_rule``."""
    check_count("n", n)
    check_faulty(n, f)
    return 8 * f / (n - f) * (1 + kappa_of_rule)


def kappa_lower_bound(n: int, f: int) -> float:
    """Return f / (n - 2 f), which no rule undercuts."""
    check_count("n", n)
    check_faulty(n, f)
    return f / (n - 2 * f)


def measured_kappa(x: Tensor, result: Tensor, f: int) -> float:
    """Return the largest ratio |result - mean_S|^2 / Var(S) over all S of n - f rows: a lower bound on kappa.

    All C(n, f) subsets are looked at: for small n.

    Args:
        x: (n, d) one row for each sender.
        result: (d,) what the rule made of them.
        f: faulty senders.
    """
    n = len(check_vectors(x))
    check_faulty(n, f)
    if math.comb(n, f) > 100_000:
        raise ValueError(f"C({n}, {f}) = {math.comb(n, f)} subsets are too many; 100,000 at most")
    rows, point = x.double(), result.double()
    worst, subsets = 0.0, itertools.combinations(range(n), n - f)
    while block := list(itertools.islice(subsets, 4096)):
        chosen = rows[torch.tensor(block, device=x.device)]
        centre = chosen.mean(1)
        error = (point - centre).square().sum(1)
        spread = (chosen - centre[:, None]).square().sum(2).mean(1)
        real = error > 1e-12 * chosen.square().sum(2).amax(1)  # what rounding leaves is no violation
        ratio = torch.where(real, error / spread, torch.zeros_like(error))
        worst = max(worst, float(ratio.max()))
    return worst


def reduction_coefficients(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return (alpha, lambda) of one mixing: Gamma(y) / Gamma(x) and |mean y - mean x|^2 / Gamma(x).

    Args:
        x: (h, d) honest vectors before mixing.
        y: (h, d) after it.

    Raises:
        ValueError: shapes differ, or all rows of ``x`` are equal (Gamma(x) = 0).
    """
    if check_vectors(x).shape != check_vectors(y).shape:
        raise ValueError(f"x is {tuple(x.shape)} and y is {tuple(y.shape)}; one shape is needed")
    before, after = x.double(), y.double()
    spread = float((before - before.mean(0)).square().sum(1).mean())
    if spread == 0:
        raise ValueError("all rows of x are equal: there is nothing to reduce")
    left = float((after - after.mean(0)).square().sum(1).mean())
    return left / spread, float((after.mean(0) - before.mean(0)).square().sum()) / spread


def nna_bound(n: int, f: int, *, synchronous: bool = True) -> float:
    """Return a proved bound on alpha + lambda of nearest-neighbour averaging.

    Args:
        n: peers.
        f: faulty ones: 2 f < n, or 3 f < n where peers take the first n - f messages.
        synchronous: whether every peer hears all n.
    """
    check_count("n", n)
    check_faulty(n, f, most=None if synchronous else (n - 1) // 3, rule="nearest-neighbour averaging")
    if synchronous:
        return 8 * f / (n - f)
    return (1 + math.sqrt(8)) ** 2 * f * (n - f) / (n - 2 * f) ** 2


def contracts(n: int, f: int, *, synchronous: bool = True) -> bool:
    """Return whether nearest-neighbour averaging is proved to bring honest peers together (alpha < 1)."""
    return nna_bound(n, f, synchronous=synchronous) < 1
