"""Non-parametric Lipschitz regression: values at the data under all pairwise constraints, and their extension.

:func:`lipschitz_values` solves ``min sum |v_i - u_i|^2  s.t.  |v_i - v_j| <= alpha |x_i - x_j|`` by a primal-dual
scheme: multipliers on the pairs (few are active) and semi-smooth Newton steps on the augmented Lagrangian. It reports
the duality gap, and what it returns satisfies every pair.

:func:`extend` evaluates it anywhere. To meet ``|u - v_i| <= alpha |x - x_i|`` at each query by itself (a small cone
problem) is *not* enough: two queries so answered may differ by more than alpha times their distance. Here the whole
extension is alpha-Lipschitz: the McShane midpoint for one output, else the explicit Kirszbraun formula of Azagra,
Le Gruyer and Mudarra (arXiv 1810.10288), for finitely many points a quadratic programme over the simplex:
``F(x) = sum l_i v_i`` with ``l`` minimising ``|D'l|^2 + sum l_i |d_i|^2 + (|V'l|^2 - sum l_i |v_i|^2) / alpha^2``,
``d_i = x_i - x`` (derived: convex envelope of a minimum of parabolas of equal curvature).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_number
from robust_core.errors import NotDifferentiableError, TrainingError

__all__ = ["MAX_POINTS", "GraphValues", "extend", "lipschitz_values", "pair_ratio"]

MAX_POINTS = 2_000
"""All pairs are kept in memory: a few arrays of N x N x m numbers."""


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
    rows, cols = torch.triu_indices(len(x), len(x), 1)
    above = (v[rows].double() - v[cols].double()).norm(dim=1)
    below = (x[rows].double() - x[cols].double()).norm(dim=1)
    return float((above / below).max()) if len(rows) else 0.0


def lipschitz_values(
    x: Tensor, u: Tensor, lipschitz: float, *, tolerance: float = 1e-7, n_iter: int = 60
) -> GraphValues:
    """Return the least-squares values under ``|v_i - v_j| <= lipschitz |x_i - x_j|`` on all pairs.

    Args:
        x: (N, n) points.
        u: (N, m) values of the expert.
        lipschitz: the constant, above 0.
        tolerance: of the relative duality gap.
        n_iter: updates of the multipliers at most.

    Raises:
        ValueError: too many points, or fewer than two.
        TrainingError: the gap is still above 1e-3 after ``n_iter`` steps.
    """
    check_number("lipschitz", lipschitz, low=0, open_low=True)
    x, u = x.detach().cpu().double(), u.detach().cpu().double()
    points, place, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    if not 2 <= len(points) <= MAX_POINTS:
        raise ValueError(f"x holds {len(points)} distinct points; 2 .. {MAX_POINTS} are taken (else use a network)")
    weight = counts.double()
    means = torch.zeros(len(points), u.shape[1], dtype=torch.float64).index_add_(0, place, u) / weight[:, None]
    spread = (u - means[place]).abs().amax(1)
    conflicts = len(torch.unique(place[spread > 1e-12 * (1 + u.abs().amax(1))]))
    v, gap, steps = means, 0.0, 0
    if pair_ratio(points, means) > lipschitz:
        if means.numel() > 2 * MAX_POINTS:
            raise ValueError(
                f"{len(points)} points with {u.shape[1]} outputs: {2 * MAX_POINTS} numbers at most are solved"
            )
        v, gap, steps = _solve(points, means, weight, lipschitz, tolerance, n_iter)
        # strictly inside: shrunk towards the mean by what is left of the violation, and a hair more
        middle = (weight[:, None] * v).sum(0) / weight.sum()
        over = max(1.0, pair_ratio(points, v) / lipschitz) * (1 + 1e-12)
        v = middle + (v - middle) / over
    return GraphValues(points, v, gap, conflicts, steps)


class _Pairs:
    """The augmented Lagrangian ``sum p |v - u|^2 / 2 + sum_e dist(v_i - v_j + l_e / rho, ball r_e)^2 rho / 2``."""

    def __init__(self, points: Tensor, u: Tensor, weight: Tensor, lipschitz: float) -> None:
        self.rows, self.cols = torch.triu_indices(len(u), len(u), 1)
        self.reach = lipschitz * (points[self.rows] - points[self.cols]).norm(dim=1)
        self.u, self.pull = u, (weight / weight.mean())[:, None]
        self.multiplier = torch.zeros(len(self.rows), u.shape[1], dtype=torch.float64)

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
            hessian = torch.zeros(n, n, m, m, dtype=torch.float64)
            for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
                hessian.index_put_((a, b), sign * block, accumulate=True)
            whole = hessian.permute(0, 2, 1, 3).reshape(n * m, n * m)
            whole.diagonal().add_(self.pull.expand(n, m).reshape(-1))
            towards = -torch.cholesky_solve(slope.reshape(-1, 1), torch.linalg.cholesky(whole)).reshape(n, m)
            size, before, fall = 1.0, self.value(v, rho), float((slope * towards).sum())
            while self.value(v + size * towards, rho) > before + 1e-4 * size * fall and size > 1e-6:
                size *= 0.5
            v = v + size * towards
        return v

    def gap(self, v: Tensor) -> float:
        """Return the value of a feasible point near ``v`` minus the dual value at the multipliers, at least 0."""
        over = max(1.0, float(((v[self.rows] - v[self.cols]).norm(dim=1) / self.reach).max()))
        inside = v.mean(0) + (v - v.mean(0)) / over
        primal = 0.5 * float((self.pull * (inside - self.u).square()).sum())
        force = self.spread(self.multiplier)
        dual = float((force * self.u).sum()) - 0.5 * float((force.square() / self.pull).sum())
        return max(primal - dual + float((self.reach * self.multiplier.norm(dim=1)).sum()), 0.0)


def _solve(
    points: Tensor, u: Tensor, weight: Tensor, lipschitz: float, tolerance: float, n_iter: int
) -> tuple[Tensor, float, int]:
    """Return values, relative gap and steps: multipliers grow by the forces that remain, until the dual closes."""
    pairs = _Pairs(points, u, weight, lipschitz)
    scale = float((pairs.pull * (u - u.mean(0)).square()).sum()) + 1e-300
    v, gap, rho = u, float("inf"), 1.0
    for step in range(1, n_iter + 1):
        v = pairs.newton(v, rho)
        pairs.multiplier = pairs.force(v, rho)[0]
        gap = pairs.gap(v) / scale
        if gap <= tolerance:
            return v, gap, step
        rho = min(rho * 3, 1e4)
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
