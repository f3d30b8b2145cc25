"""Non-parametric Lipschitz regression: values at the data under all pairwise constraints, and their extension.

:func:`lipschitz_values` solves ``min sum |v_i - u_i|^2  s.t.  |v_i - v_j| <= alpha |x_i - x_j|`` by a primal-dual
scheme: multipliers on the pairs (few are active) and semi-smooth Newton steps on the augmented Lagrangian. It reports
the duality gap, and what it returns satisfies every pair. For more points than fit in memory with all their pairs, it
starts from the nearest neighbours of each point and adds the pairs that the solution breaks until none is broken: the
same optimum, from few pairs (``neighbours=``).

:func:`extend` evaluates it anywhere. To meet ``|u - v_i| <= alpha |x - x_i|`` at each query by itself (a small cone
problem) is *not* enough: two queries so answered may differ by more than alpha times their distance. Here the whole
extension is alpha-Lipschitz: the McShane midpoint for one output, else the explicit Kirszbraun formula of Azagra,
Le Gruyer and Mudarra (arXiv 1810.10288), for finitely many points a quadratic programme over the simplex:
``F(x) = sum l_i v_i`` with ``l`` minimising ``|D'l|^2 + sum l_i |d_i|^2 + (|V'l|^2 - sum l_i |v_i|^2) / alpha^2``,
``d_i = x_i - x`` (derived: convex envelope of a minimum of parabolas of equal curvature).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse, spatial
from scipy.sparse import linalg as sparse_linalg
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.errors import NotDifferentiableError, TrainingError

__all__ = ["MAX_POINTS", "GraphValues", "extend", "lipschitz_values", "pair_ratio"]

MAX_POINTS = 2_000
"""All pairs are kept in memory: a few arrays of N x N x m numbers."""
MAX_NEIGHBOUR_POINTS = 50_000
"""With neighbours, pairs are looked at in blocks; time grows with their number all the same."""
DENSE = 1_000
"""Up to so many unknowns the Newton system is solved as a dense one."""
ROUNDS = 30
"""Times that broken pairs are added."""


@dataclass(frozen=True)
class GraphValues:
    """Solution of the problem on the graph.

    Attributes:
        x: (N, n) distinct points, float64.
        v: (N, m) values; every pair satisfies the constraint in float64.
        gap: relative duality gap: how far the objective may be from its optimum.
        conflicts: points given more than once with different values, which no function fits exactly.
        n_iter: updates of the multipliers.
    """

    x: Tensor
    v: Tensor
    gap: float
    conflicts: int
    n_iter: int


def pair_ratio(x: Tensor, v: Tensor) -> float:
    """Return the largest ``|v_i - v_j| / |x_i - x_j|`` over pairs of distinct points (N, n), (N, m)."""
    return max((float(ratio.max()) for _, ratio in _ratios(x.double(), v.double())), default=0.0)


def _ratios(x: Tensor, v: Tensor, *, cells: int = 4_000_000) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, (rows, N - first - 1) slopes) of all pairs, each pair once, in blocks that fit in memory."""
    size = len(x)
    step = max(1, cells // max(size, 1))
    for first in range(0, size - 1, step):
        rows, cols = torch.arange(first, min(first + step, size - 1)), torch.arange(first + 1, size)
        apart = torch.cdist(x[rows], x[cols], compute_mode="donot_use_mm_for_euclid_dist")
        moved = torch.cdist(v[rows], v[cols], compute_mode="donot_use_mm_for_euclid_dist")
        later = cols[None] > rows[:, None]
        yield first, torch.where(later, moved / torch.where(later, apart, 1.0), 0.0)


def lipschitz_values(
    x: Tensor,
    u: Tensor,
    lipschitz: float,
    *,
    neighbours: int | None = None,
    tolerance: float = 1e-7,
    n_iter: int = 60,
) -> GraphValues:
    """Return the least-squares values under ``|v_i - v_j| <= lipschitz |x_i - x_j|`` on all pairs.

    Args:
        x: (N, n) points.
        u: (N, m) values of the expert.
        lipschitz: the constant, above 0.
        neighbours: start from so many nearest neighbours of each point and add what is broken, for up to 50,000
            points; None takes all pairs at once, for up to 2,000.
        tolerance: of the relative duality gap.
        n_iter: updates of the multipliers at most.

    Raises:
        ValueError: too many points, or fewer than two.
        TrainingError: the gap is still above 1e-3 after ``n_iter`` steps.
    """
    check_number("lipschitz", lipschitz, low=0, open_low=True)
    most = MAX_POINTS if neighbours is None else MAX_NEIGHBOUR_POINTS
    x, u = x.detach().cpu().double(), u.detach().cpu().double()
    points, place, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    if not 2 <= len(points) <= most:
        raise ValueError(
            f"x holds {len(points)} distinct points; 2 .. {most} are taken"
            + (f" (up to {MAX_NEIGHBOUR_POINTS} with neighbours=10)" if neighbours is None else " (else use a network)")
        )
    weight = counts.double()
    means = torch.zeros(len(points), u.shape[1], dtype=torch.float64).index_add_(0, place, u) / weight[:, None]
    spread = (u - means[place]).abs().amax(1)
    conflicts = len(torch.unique(place[spread > 1e-12 * (1 + u.abs().amax(1))]))
    v, gap, steps = means, 0.0, 0
    if pair_ratio(points, means) > lipschitz:
        if neighbours is None and means.numel() > 2 * MAX_POINTS:
            raise ValueError(
                f"{len(points)} points with {u.shape[1]} outputs: {2 * MAX_POINTS} numbers at most are solved with "
                "all pairs; give neighbours=10"
            )
        if neighbours is None:
            pairs = _Pairs(points, means, weight, lipschitz, torch.triu_indices(len(points), len(points), 1))
            v, gap, steps = _solve(pairs, means, tolerance, n_iter)
        else:
            v, gap, steps = _grow(points, means, weight, lipschitz, check_count("neighbours", neighbours), tolerance,
                                  n_iter)  # fmt: skip
        # strictly inside: shrunk towards the mean by what is left of the violation, and a hair more
        middle = (weight[:, None] * v).sum(0) / weight.sum()
        over = max(1.0, pair_ratio(points, v) / lipschitz) * (1 + 1e-12)
        v = middle + (v - middle) / over
    return GraphValues(points, v, gap, conflicts, steps)


def _nearest(points: Tensor, k: int) -> Tensor:
    """Return (2, E) pairs of each point with its ``k`` nearest, each once."""
    k = min(k, len(points) - 1)
    near = torch.as_tensor(spatial.KDTree(points.numpy()).query(points.numpy(), k + 1)[1])[:, 1:]
    edges = torch.stack([torch.arange(len(points)).repeat_interleave(k), near.reshape(-1).long()])
    edges = edges[:, edges[0] != edges[1]]  # a nearest neighbour may tie with the point itself
    return torch.unique(edges.sort(0).values, dim=1)


def _broken(points: Tensor, v: Tensor, lipschitz: float, slack: float, *, each: int = 4) -> Tensor:
    """Return (2, E) the pairs that break the constant by more than ``slack``, the worst few of each point."""
    found = []
    for first, ratio in _ratios(points, v):
        worst, place = ratio.topk(min(each, ratio.shape[1]), dim=1)
        rows, which = (worst > lipschitz * (1 + slack)).nonzero(as_tuple=True)
        found.append(torch.stack([rows + first, place[rows, which] + first + 1]))
    return torch.cat(found, 1)


def _grow(
    points: Tensor, u: Tensor, weight: Tensor, lipschitz: float, neighbours: int, tolerance: float, n_iter: int
) -> tuple[Tensor, float, int]:
    """Solve on the pairs of neighbours and on those that were found broken, until none is: then on all pairs.

    A solution on some pairs that keeps all of them is optimal for all; its gap is that of the multipliers found, which
    are 0 on the others.
    """
    edges, v, steps, pairs = _nearest(points, neighbours), u, 0, None
    loose = max(tolerance, 1e-4)  # while pairs are still missing, exactness would be for nothing
    for _ in range(ROUNDS):
        pairs = _Pairs(points, u, weight, lipschitz, edges, before=pairs)
        v, _, taken = _solve(pairs, v, loose, n_iter)
        steps += taken
        more = _broken(points, v, lipschitz, max(1e-6, loose))
        if more.shape[1]:
            edges = torch.unique(torch.cat([edges, more], 1), dim=1)
        elif loose == tolerance:
            break
        else:
            loose = tolerance
    over = max(1.0, pair_ratio(points, v) / lipschitz)
    gap = pairs.gap(v, over) / pairs.scale if pairs is not None else 0.0
    if gap > 1e-3:
        raise TrainingError(f"the duality gap is {gap:.1e} after {ROUNDS} rounds of pairs; give more neighbours")
    return v, gap, steps


class _Pairs:
    """The augmented Lagrangian ``sum p |v - u|^2 / 2 + sum_e dist(v_i - v_j + l_e / rho, ball r_e)^2 rho / 2``."""

    def __init__(
        self, points: Tensor, u: Tensor, weight: Tensor, lipschitz: float, edges: Tensor, before: _Pairs | None = None
    ) -> None:
        self.rows, self.cols = edges
        self.reach = lipschitz * (points[self.rows] - points[self.cols]).norm(dim=1)
        self.u, self.pull = u, (weight / weight.mean())[:, None]
        self.scale = float((self.pull * (u - u.mean(0)).square()).sum()) + 1e-300
        self.multiplier = torch.zeros(len(self.rows), u.shape[1], dtype=torch.float64)
        self.rho = 1.0
        if before is not None:  # edges are sorted, and hold those of before
            keys = self.rows * len(u) + self.cols
            place = torch.searchsorted(keys, before.rows * len(u) + before.cols)
            self.multiplier[place], self.rho = before.multiplier, before.rho

    def force(self, v: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (E, m) forces of the pairs, and their vectors with their lengths."""
        z = v[self.rows] - v[self.cols] + self.multiplier / rho
        length = z.norm(dim=1)
        return rho * z * (1 - self.reach / length.clamp(min=1e-300)).clamp(min=0)[:, None], z, length

    def spread(self, force: Tensor) -> Tensor:
        """Return (N, m) the sum of the forces on each point."""
        zero = torch.zeros_like(self.u)
        return zero.index_add(0, self.rows, force).index_add(0, self.cols, -force)

    def value(self, v: Tensor, rho: float) -> float:
        """Return the augmented Lagrangian."""
        force, _, _ = self.force(v, rho)
        return 0.5 * float((self.pull * (v - self.u).square()).sum()) + float(force.square().sum()) / (2 * rho)

    def newton(self, v: Tensor, rho: float, *, n_iter: int = 50) -> Tensor:
        """Minimise over v by semi-smooth Newton steps with a line search."""
        m, n = v.shape[1], len(v)
        for _ in range(n_iter):
            force, z, length = self.force(v, rho)
            slope = self.pull * (v - self.u) + self.spread(force)
            if float(slope.norm()) <= 1e-11 * (1 + float(self.u.norm())):
                break
            on = length > self.reach
            ratio = (self.reach[on] / length[on])[:, None, None]
            unit = (z[on] / length[on, None])[:, :, None]
            block = rho * ((1 - ratio) * torch.eye(m, dtype=torch.float64) + ratio * unit @ unit.mT)
            i, j = self.rows[on], self.cols[on]
            towards = -_newton_step(i, j, block, self.pull.expand(n, m), slope)
            size, before, fall = 1.0, self.value(v, rho), float((slope * towards).sum())
            while self.value(v + size * towards, rho) > before + 1e-4 * size * fall and size > 1e-6:
                size *= 0.5
            v = v + size * towards
        return v

    def gap(self, v: Tensor, over: float | None = None) -> float:
        """Return the value of a feasible point near ``v`` minus the dual value at the multipliers, at least 0.

        ``over`` is the largest share of its reach that a pair uses; that of the pairs held here when None.
        """
        if over is None:
            over = max(1.0, float(((v[self.rows] - v[self.cols]).norm(dim=1) / self.reach).max()))
        inside = v.mean(0) + (v - v.mean(0)) / over
        primal = 0.5 * float((self.pull * (inside - self.u).square()).sum())
        force = self.spread(self.multiplier)
        dual = float((force * self.u).sum()) - 0.5 * float((force.square() / self.pull).sum())
        return max(primal - dual + float((self.reach * self.multiplier.norm(dim=1)).sum()), 0.0)


def _newton_step(i: Tensor, j: Tensor, block: Tensor, pull: Tensor, slope: Tensor) -> Tensor:
    """Return (N, m) the solution of ``H d = slope``, H of the (E, m, m) blocks of pairs (i, j) and a diagonal."""
    n, m = slope.shape
    places = ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1))
    if n * m <= DENSE:
        hessian = torch.zeros(n, n, m, m, dtype=torch.float64)
        for a, b, sign in places:
            hessian.index_put_((a, b), sign * block, accumulate=True)
        whole = hessian.permute(0, 2, 1, 3).reshape(n * m, n * m)
        whole.diagonal().add_(pull.reshape(-1))
        return torch.cholesky_solve(slope.reshape(-1, 1), torch.linalg.cholesky(whole)).reshape(n, m)
    inner = torch.arange(m)
    rows = torch.cat([(a[:, None, None] * m + inner[:, None]).expand_as(block).reshape(-1) for a, _, _ in places])
    cols = torch.cat([(b[:, None, None] * m + inner).expand_as(block).reshape(-1) for _, b, _ in places])
    values = torch.cat([(sign * block).reshape(-1) for _, _, sign in places])
    off = sparse.coo_array((values.numpy(), (rows.numpy(), cols.numpy())), shape=(n * m, n * m))
    whole = (off + sparse.diags_array(pull.reshape(-1).numpy())).tocsc()
    factor = sparse_linalg.splu(
        whole, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    return torch.from_numpy(factor.solve(slope.reshape(-1).numpy())).reshape(n, m)


def _solve(pairs: _Pairs, v: Tensor, tolerance: float, n_iter: int) -> tuple[Tensor, float, int]:
    """Return values, relative gap and steps: multipliers grow by the forces that remain, until the dual closes."""
    gap = float("inf")
    for step in range(1, n_iter + 1):
        v = pairs.newton(v, pairs.rho)
        pairs.multiplier = pairs.force(v, pairs.rho)[0]
        gap = pairs.gap(v) / pairs.scale
        if gap <= tolerance:
            return v, gap, step
        pairs.rho = min(pairs.rho * 3, 1e4)
    if gap > 1e-3:
        raise TrainingError(f"the duality gap is {gap:.1e} after {n_iter} steps; take more, or scale x and u")
    return v, gap, n_iter


def extend(points: Tensor, values: Tensor, lipschitz: float, x: Tensor) -> Tensor:
    """Return (B, m) an extension that is ``lipschitz`` everywhere and takes ``values`` at ``points``.

    Args:
        points: (N, n).
        values: (N, m), with all pairs within the constant.
        lipschitz: the constant.
        x: (B, n) queries; differentiable in them for one output only.

    Raises:
        NotDifferentiableError: a gradient is asked for with more than one output.
    """
    if values.shape[1] == 1:
        reach = lipschitz * (x.double()[:, None] - points.double()).norm(dim=2)
        low, high = (values[:, 0] - reach).amax(1), (values[:, 0] + reach).amin(1)
        return (0.5 * (low + high))[:, None]
    if x.requires_grad and torch.is_grad_enabled():
        raise NotDifferentiableError(
            "the extension to several outputs is an optimum without gradient here; attack it by attacks without "
            "gradients, or through a network policy fitted to the same data"
        )
    spots, scaled = points.double().cpu().numpy(), values.double().cpu().numpy() / lipschitz
    rows = [_weights(spots - row, scaled) @ scaled for row in x.detach().double().cpu().numpy()]
    return lipschitz * torch.as_tensor(np.stack(rows), device=x.device)


def _weights(d: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return (N,) weights on the simplex that minimise ``|[d w]'l|^2 + l'(|d|^2 - |w|^2)``, by an active set."""
    a = np.concatenate([d, w - w.mean(0)], 1)
    linear = (d**2).sum(1) - (a[:, d.shape[1] :] ** 2).sum(1)
    first = int(np.argmin(linear + (a**2).sum(1)))
    active, share = [first], np.ones(1)
    size = float((a**2).sum(1).max()) + 1e-300
    for _ in range(50 * (a.shape[1] + 2) + len(a)):
        slope = 2 * a @ (share @ a[active]) + linear
        best = int(np.argmin(slope))
        if slope[best] >= share @ slope[active] - 1e-11 * size or best in active:
            break
        active, share = [*active, best], np.append(share, 0.0)
        while True:
            k = len(active)
            corner = a[active]
            kkt = np.zeros((k + 1, k + 1))
            kkt[:k, :k] = 2 * corner @ corner.T + 1e-13 * size * np.eye(k)  # affinely dependent points: a tiny ridge
            kkt[:k, k] = kkt[k, :k] = size
            wanted = np.linalg.solve(kkt, np.append(-linear[active], size))[:k]
            if (wanted > 0).all():
                share = wanted / wanted.sum()
                break
            falling = wanted <= 0
            ratio = np.where(falling, share / np.maximum(share - wanted, 1e-300), np.inf)
            leaves = int(np.argmin(ratio))
            share = share + min(ratio[leaves], 1.0) * (wanted - share)
            active = [i for j, i in enumerate(active) if j != leaves]
            share = np.clip(np.delete(share, leaves), 0, None)
            share = share / share.sum()
    found = np.zeros(len(a))
    found[active] = share
    return found
