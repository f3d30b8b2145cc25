"""Rules that see the senders through their distances, each as one Gram matrix and one weighted sum.

Everything between the two passes over the data is float64 arithmetic on n x n numbers, so an iteration (Weiszfeld's,
CAF's) costs nothing beside the passes, and no rule draws random numbers.

Rules: Krum and multi-Krum (Blanchard et al. 2017, arXiv 1703.02757), geometric median (smoothed Weiszfeld, Pillutla et
al. 2019, arXiv 1912.13445; the step away from data points after Vardi and Zhang 2000), centred clipping (Karimireddy
et al. 2021, arXiv 2012.10333), nearest-neighbour averaging (Farhadkhani et al. 2023, arXiv 2209.10931), comparative
gradient elimination (Gupta et al. 2020), spectral filtering: FilterL2 (the filter of Diakonikolas et al. 2017, arXiv
1703.00893, as Zhu et al. 2022, arXiv 2205.11765, aggregate with it) and CAF (Allouah et al. 2025). Subset rules and
Bulyan stand in :mod:`optim_robust.byzantine.subsets`.

Krum's scores sum the squared distances to the n - f - 1 nearest others, not to the n - f - 2 of the paper: with the
paper's count no bound of the form of :func:`optim_robust.byzantine.theory.kappa` holds at n = 7, f = 3. The paper's
is ``neighbours="blanchard"``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optim_robust.byzantine.geometry import combine, distances_to, gram, mean_of_nearest, pairwise
from optim_robust.byzantine.vectors import admit, check_vectors
from robust_core.checks import check_choice, check_count, check_number

__all__ = [
    "caf",
    "centered_clipping",
    "comparative_elimination",
    "filter_l2",
    "geometric_median",
    "krum",
    "krum_scores",
    "mean",
    "multi_krum",
    "nearest_neighbor_average",
    "smoothed_weiszfeld",
]


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Return the (d,) mean of the rows: no faulty sender is withstood.

    Args:
        x: (n, d) one row for each sender.
    """
    x = admit(x)
    n = len(x)
    return combine(torch.full((n,), 1 / n, dtype=torch.float64), x)


def krum_scores(squared: Tensor, f: int, *, neighbours: str = "allouah") -> Tensor:
    """Return each sender's sum of squared distances to its nearest others.

    Args:
        squared: (n, n) squared distances.
        f: senders that may be faulty.
        neighbours: ``"allouah"``: n - f - 1 others; ``"blanchard"``: n - f - 2, the paper's.
    """
    check_choice("neighbours", neighbours, ("allouah", "blanchard"))
    count = len(squared) - f - (1 if neighbours == "allouah" else 2)
    others = squared.clone().fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]  # each is its own first
    return others[:, :count].sum(1)


def _admit(x: Tensor, f: int, neighbours: str, rule: str) -> Tensor:
    check_choice("neighbours", neighbours, ("allouah", "blanchard"))
    n = len(check_vectors(x))
    return admit(x, f, most=(n - 3) // 2 if neighbours == "blanchard" else None, rule=rule)


@torch.no_grad()
def krum(x: Tensor, f: int, *, neighbours: str = "allouah") -> Tensor:
    """Return a copy of the row whose nearest others are nearest; ties go to the lower index.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty: 2 f < n, or n >= 2 f + 3 with the paper's count.
        neighbours: see :func:`krum_scores`.
    """
    x = _admit(x, f, neighbours, "Krum")
    scores = krum_scores(pairwise(x), f, neighbours=neighbours)
    return x[int(scores.argsort(stable=True)[0])].clone()


@torch.no_grad()
def multi_krum(x: Tensor, f: int, m: int | None = None, *, neighbours: str = "allouah") -> Tensor:
    """Return the mean of the m rows with the smallest scores of Krum.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty.
        m: rows to average, 1 .. n - f; n - f when None.
        neighbours: see :func:`krum_scores`.
    """
    x = _admit(x, f, neighbours, "multi-Krum")
    n = len(x)
    m = n - f if m is None else check_count("m", m)
    if m > n - f:
        raise ValueError(f"m={m}: at most n - f = {n - f} rows can all be honest")
    return mean_of_nearest(krum_scores(pairwise(x), f, neighbours=neighbours), m, x)


@torch.no_grad()
def nearest_neighbor_average(x: Tensor, f: int, pivot: int | Tensor = 0) -> Tensor:
    """Return the mean of the n - f rows nearest to the pivot: MoNNA's mixing step.

    Args:
        x: (n, d) the vectors received, the node's own among them.
        f: of those, how many may be faulty. Of n - f messages that came first, f may still be.
        pivot: row of the node's own vector, or that vector (d,). It belongs to the average in any case if it is a row.
    """
    x = admit(x, f, rule="nearest-neighbour averaging")
    n, d = x.shape
    if isinstance(pivot, Tensor):
        if pivot.shape != (d,) or pivot.dtype != x.dtype:
            raise ValueError(f"pivot is {tuple(pivot.shape)} {pivot.dtype}; ({d},) {x.dtype} is needed")
        squared = distances_to(x, pivot)
    else:
        if not 0 <= check_count("pivot", pivot, low=0) < n:
            raise ValueError(f"pivot={pivot}: a row of x, 0 .. {n - 1}, is needed")
        squared = distances_to(x, x[pivot])
        squared[pivot] = -1.0
    return mean_of_nearest(squared, n - f, x)


@torch.no_grad()
def centered_clipping(x: Tensor, center: Tensor | None = None, *, tau: float = 100.0, n_iter: int = 1) -> Tensor:
    """Return ``v`` after ``n_iter`` steps of ``v += mean((x_i - v) min(1, tau / ||x_i - v||))``.

    Args:
        x: (n, d) one row for each sender.
        center: (d,) where v starts: the previous round's result (a node's own vector in self-centred clipping); the
            origin when None.
        tau: radius of clipping, in the units of ``x``, above 0.
        n_iter: steps.
    """
    x = admit(x)
    n, d = x.shape
    check_number("tau", tau, low=0.0, open_low=True)
    check_count("n_iter", n_iter)
    if center is not None and center.shape != (d,):
        raise ValueError(f"center has shape {tuple(center.shape)}; ({d},) is needed")
    v = torch.zeros_like(x[0]) if center is None else center.to(x.dtype)
    for _ in range(n_iter):
        weights = (tau / distances_to(x, v).sqrt()).clamp_(max=1.0) / n  # at distance 0 the ratio is infinite
        v = combine(weights, x).add_(v, alpha=float(1 - weights.sum()))
    return v


@torch.no_grad()
def comparative_elimination(x: Tensor, f: int) -> Tensor:
    """Return the mean of the n - f rows of least norm ("CGE"); meant for gradients, not for models.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="comparative elimination")
    return mean_of_nearest(distances_to(x, torch.zeros_like(x[0])), len(x) - f, x)


@torch.no_grad()
def geometric_median(x: Tensor, *, nu: float = 0.0, max_iter: int = 1000, tol: float = 1e-10) -> Tensor:
    """Return the (d,) point with the least sum of distances to the rows.

    Weiszfeld's steps act on the weights of the rows, in float64: the distances to a weighted mean follow from inner
    products around the row nearest to all. A row that is itself the median is recognised by its optimality.

    Args:
        x: (n, d) one row for each sender.
        nu: smoothing, in the units of ``x``: weights are 1 / max(distance, nu). 0 is the exact median.
        max_iter: steps at most.
        tol: stop when no row pulls the result by more, relative to the typical distance.
    """
    x = admit(x)
    check_number("nu", nu, low=0.0)
    check_number("tol", tol, low=0.0)
    check_count("max_iter", max_iter)
    medoid = int(pairwise(x).sqrt().sum(1).argsort(stable=True)[0])
    inner = gram(x, medoid)
    if nu == 0.0 and _is_median(inner):
        return x[medoid].clone()
    return combine(_weiszfeld(inner, nu, max_iter, tol), x)


def _is_median(inner: Tensor) -> bool:
    """Whether the row that inner products are centred on is the geometric median.

    It is iff the unit vectors from it to the others sum to at most its multiplicity in norm.
    """
    length = inner.diagonal().sqrt()
    away = length > 0
    units = inner[away][:, away] / (length[away][:, None] * length[away][None, :])
    return float(units.sum()) <= float((~away).sum()) ** 2


def _weiszfeld(inner: Tensor, nu: float, max_iter: int, tol: float) -> Tensor:
    """Return the weights of the rows in their geometric median, from inner products around one of them.

    Rows are scaled to comparable lengths first: a far row has a small weight and a long vector, and only the product
    of the two may enter a sum with near rows.
    """
    length = inner.diagonal().sqrt()
    typical = float(length[length > 0].median()) if bool((length > 0).any()) else 1.0
    scale = length.clamp(min=typical)
    units = inner / (scale[:, None] * scale[None, :])
    floor = max(nu, 1e-12 * typical)
    weights = 1 / (length + typical)
    weights = weights / weights.sum()
    for _ in range(max_iter):
        place = weights * scale
        projected = units @ place
        squared = scale * (scale * units.diagonal() - 2 * projected) + place @ projected
        new = 1 / squared.clamp(min=0.0).sqrt().clamp(min=floor)
        new = new / new.sum()
        moved = float(((new - weights) * scale).abs().max()) / typical
        weights = new
        if moved <= tol:
            break
    return weights


@torch.no_grad()
def smoothed_weiszfeld(x: Tensor, *, nu: float = 0.1, n_iter: int = 3, start: Tensor | None = None) -> Tensor:
    """Return a few smoothed Weiszfeld steps: what other libraries and papers run as "the geometric median".

    Three steps from the origin are far from converged; this is for comparisons, :func:`geometric_median` for use.

    Args:
        x: (n, d) one row for each sender.
        nu: least distance, in the units of ``x``, above 0.
        n_iter: steps.
        start: (d,) first point; the origin when None.
    """
    x = admit(x)
    check_number("nu", nu, low=0.0, open_low=True)
    check_count("n_iter", n_iter)
    point = torch.zeros_like(x[0]) if start is None else start
    for _ in range(n_iter):
        weights = 1 / distances_to(x, point).sqrt().clamp(min=nu)
        point = combine(weights / weights.sum(), x)
    return point


def _filtering(squared: Tensor, f: int) -> Iterator[tuple[Tensor, float, Tensor]]:
    """Yield (weights that sum to 1, top eigenvalue of the weighted covariance, projections on it) while filtering.

    All weights start at 1. While they sum to more than n - 2 f, each is multiplied by 1 - t_i / max t, where t_i is the
    squared deviation from the weighted mean along the top eigenvector. Eigenvectors come from the n x n inner products.

    Args:
        squared: (n, n) squared distances.
        f: senders that may be faulty.
    """
    n = len(squared)
    weights = torch.ones(n, dtype=torch.float64, device=squared.device)
    for _ in range(n):  # each turn takes all weight from at least one row
        share = weights / weights.sum()
        to_mean = squared @ share - 0.5 * share @ squared @ share
        inner = 0.5 * (to_mean[:, None] + to_mean[None, :] - squared)  # <x_i - mean, x_j - mean>
        root = share.sqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * inner * root[None, :])
        scaled = inner @ (root * vectors[:, -1])  # projections times the root of the top eigenvalue
        top = float(values[-1])
        yield share, top, scaled / max(top, 1e-300) ** 0.5
        deviation = scaled.square()
        worst = deviation[weights > 0].max()
        if f == 0 or float(worst) <= 0.0:
            return
        weights = weights * (1 - deviation / worst).clamp(min=0.0)
        if float(weights.sum()) <= n - 2 * f:
            return


@torch.no_grad()
def caf(x: Tensor, f: int) -> Tensor:
    """Return the weighted mean with the least top eigenvalue along a path of down-weighting ("CAF").

    The path is that of :func:`filter_l2`, with the eigenvectors computed exactly, from the n x n inner products.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="CAF")
    best, _, _ = min(_filtering(pairwise(x), f), key=lambda state: state[1])
    return combine(best, x)


@torch.no_grad()
def filter_l2(x: Tensor, f: int, *, sigma: float | None = None, expansion: float = 20.0) -> Tensor:
    """Return the weighted mean once no direction varies more than honest senders could ("FilterL2").

    While the top eigenvalue of the weighted covariance exceeds ``expansion * sigma^2``, senders lose weight by their
    squared deviation along its eigenvector, the farthest all of it. If nothing is left to take (the weights sum to
    n - 2 f), ``sigma`` was too small, and the mean of least top eigenvalue is returned.

    Where ``sigma`` is not known, the honest variance along an eigenvector is bounded from below by that of the n - f
    consecutive projections that vary least: no set of n - f senders, the honest one included, has less.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
        sigma: standard deviation of the honest vectors in their worst direction, in the units of ``x``, above 0; None
            estimates it.
        expansion: how many times the honest variance is let pass, at least 1; 20 in the federated literature.
    """
    x = admit(x, f, rule="FilterL2")
    check_number("expansion", expansion, low=1.0)
    if sigma is not None:
        check_number("sigma", sigma, low=0.0, open_low=True)
    best, least = torch.empty(0), torch.inf
    for share, top, projections in _filtering(pairwise(x), f):
        if top < least:
            best, least = share, top
        honest = sigma**2 if sigma is not None else _least_variance(projections, len(x) - f)
        if top <= expansion * honest:
            return combine(share, x)
    return combine(best, x)


def _least_variance(values: Tensor, keep: int) -> float:
    """Return the least variance of ``keep`` of the (n,) values: that of a window of the sorted ones."""
    return float(values.sort().values.unfold(0, keep, 1).var(1, correction=0).min())
