"""Two-stage robust capital budgeting (Subramanyam, Gounaris and Wiesemann 2020): costs and revenues are uncertain.

Projects are taken early (x) or, once xi in [-1, 1]^4 is known, late (y) at a fraction kappa of their revenue:

    min -r(xi)'(x + kappa y),  c(xi)'(x + y) <= B,  x + y <= 1,  x and y binary,
    c_i(xi) = (1 + phi_i'xi / 2) c_i,  r_i(xi) = (1 + psi_i'xi / 2) r_i.

With phi >= 0 and sum(phi_i) = 1, as in the generator, x is affordable for every xi exactly if 1.5 c'x <= B: a static
row of X. Where some phi is negative that worst cost is not linear in x, and the row falls back to the nominal cost.
Files: ``seed n 4 B max_loan``, then c, r, n lines phi, n lines psi. The loan variant of the papers is not built; a file
with a loan is refused.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from optim_robust.solver import Deadline, Status
from optim_robust.two_stage.knapsack import read_numbers
from optim_robust.two_stage.multiple_choice import multiple_choice_knapsack
from optim_robust.two_stage.problem import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.two_stage.solution import Recourse
from optim_robust.uncertainty import Box
from robust_core.checks import check_count, check_number
from robust_core.errors import MalformedFileError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["CapitalBudgeting"]

Array = NDArray[np.float64]


class CapitalBudgeting(TwoStageProblem):
    """An instance with n projects and k risk factors.

    Args:
        cost: (n,) nominal costs, positive.
        revenue: (n,) nominal revenues.
        phi: (n, k) exposure of the costs, not negative.
        psi: (n, k) exposure of the revenues.
        budget: B.
        kappa: part of the revenue that a late project keeps, in [0, 1].
        name: of the instance.

    Raises:
        ValueError: shapes that differ, NaN, costs that can become negative.
    """

    def __init__(
        self,
        *,
        cost: ArrayLike,
        revenue: ArrayLike,
        phi: ArrayLike,
        psi: ArrayLike,
        budget: float,
        kappa: float = 0.8,
        name: str = "capital budgeting",
    ) -> None:
        self.cost, self.revenue = (np.asarray(v, dtype=np.float64) for v in (cost, revenue))
        self.phi, self.psi = (np.asarray(v, dtype=np.float64) for v in (phi, psi))
        n, k = self.phi.shape if self.phi.ndim == 2 else (0, 0)
        for key, shape in {"cost": (n,), "revenue": (n,), "psi": (n, k)}.items():
            values = getattr(self, key)
            if values.shape != shape or n == 0 or not np.isfinite(values).all():
                raise ValueError(
                    f"{key} has shape {values.shape}; finite {shape} is needed, to fit phi {self.phi.shape}"
                )
        if not np.isfinite(self.phi).all() or (self.cost < 0).any() or (np.abs(self.phi).sum(1) > 2).any():
            raise ValueError("costs could become negative: cost >= 0 and sum |phi_i| <= 2 are needed")
        self.budget = float(check_number("budget", float(budget), low=0.0))
        self.kappa = float(check_number("kappa", float(kappa), low=0.0, high=1.0))
        self.n = n
        cost_slopes, revenue_slopes = (e / 2 * v[:, None] for e, v in ((self.phi, self.cost), (self.psi, self.revenue)))
        none, eye = sparse.csr_matrix((n, n)), sparse.identity(n, format="csr")
        load = sparse.csr_matrix(self.cost[None])
        moved = {j: sparse.vstack([sparse.csr_matrix(cost_slopes[None, :, j]), none]) for j in range(k)}
        # The worst cost of x over the box is c'x + sum_j |sum_i phi_ij c_i x_i| / 2, linear where phi >= 0.
        worst = self.cost + (cost_slopes.sum(1) if (self.phi >= 0).all() else 0.0)
        super().__init__(
            x=Stage.of(n, names=[f"early{i}" for i in range(n)]),
            y=Stage.of(n, names=[f"late{i}" for i in range(n)]),
            uncertainty=Box(-np.ones(k), np.ones(k)),
            c=AffineVector(-self.revenue, -revenue_slopes),
            d=AffineVector(-self.kappa * self.revenue, -self.kappa * revenue_slopes),
            technology=AffineMatrix(sparse.vstack([load, eye]), moved),
            recourse=AffineMatrix(sparse.vstack([load, eye]), moved),
            rhs=AffineVector(np.concatenate([[self.budget], np.ones(n)]), dim=k),
            static=(worst[None], np.array([self.budget])),
            row_names=["budget", *(f"once{i}" for i in range(n))],
            name=name,
            sense=-1,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> CapitalBudgeting:
        """Read a published instance (the format is in the module's text).

        Raises:
            MalformedFileError: the file breaks this format, or allows loans.
        """
        lines = read_numbers(path)
        if not lines or len(lines[0]) != 5:
            raise MalformedFileError(f"{path}, line 1: 'seed n 4 budget max_loan' is needed, five numbers")
        _, n, k, budget, loan = lines[0]
        if n < 1 or k < 1 or n != int(n) or k != int(k) or len(lines) != 3 + 2 * int(n):
            raise MalformedFileError(f"{path}: {n:g} projects need {3 + 2 * n:g} lines, {len(lines)} are there")
        if loan != 0:
            raise MalformedFileError(f"{path}: max_loan={loan:g}; the variant with loans is not supported")
        widths = [int(n)] * 2 + [int(k)] * (2 * int(n))
        wrong = next((i for i, (row, w) in enumerate(zip(lines[1:], widths, strict=True), 2) if len(row) != w), None)
        if wrong is not None:
            raise MalformedFileError(f"{path}, line {wrong}: {widths[wrong - 2]} numbers are needed")
        phi, psi = np.array(lines[3 : 3 + int(n)]), np.array(lines[3 + int(n) :])
        try:
            return cls(cost=lines[1], revenue=lines[2], phi=phi, psi=psi, budget=budget, name=Path(path).name)
        except ValueError as error:
            raise MalformedFileError(f"{path}: {error}") from error

    def to_file(self, path: str | Path, *, seed: int = 0) -> None:
        """Write the instance in the published format."""
        rows = [self.cost, self.revenue, *self.phi, *self.psi]
        text = [f"{seed} {self.n} {self.dim} {self.budget!r} 0", *(" ".join(map(repr, row.tolist())) for row in rows)]
        Path(path).write_text("\n".join(text) + "\n", encoding="ascii")

    @classmethod
    def random(cls, n: int, *, n_factors: int = 4, generator: Seed = None) -> CapitalBudgeting:
        """Draw an instance as the papers do: costs U[1, 10], revenue a fifth, exposures uniform on the simplex."""
        check_count("n", n)
        rng = np.random.default_rng(derive(resolve_seed(generator), "capital budgeting", n))
        cost = rng.uniform(1, 10, n)
        phi, psi = (rng.dirichlet(np.ones(check_count("n_factors", n_factors)), n) for _ in range(2))
        return cls(cost=cost, revenue=cost / 5, phi=phi, psi=psi, budget=cost.sum() / 2, name=f"CB_n{n}_xi{n_factors}")

    def sample_first_stage(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, n) affordable first stages: q uniform, then each project early with probability 1 - q.

        Draws that some xi makes unaffordable are rejected (the papers reject on the nominal cost only).
        """
        seed, rows = resolve_seed(generator), []
        for i in range(check_count("n_samples", n_samples)):
            rng = np.random.default_rng(derive(seed, "first stage", i))
            x = np.ones(self.n)
            while (self.A @ x > self.b).any():
                x = (rng.random(self.n) < 1 - rng.random()).astype(np.float64)
            rows.append(x)
        return np.stack(rows)

    def sample_uncertainty(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, k) uniform points of the box."""
        return self.uncertainty.sample(n_samples, generator=generator)

    def recourse(self, x: Array, xi: Array, *, deadline: Deadline | None = None) -> Recourse:
        """Solve the second stage exactly as a knapsack over the projects not yet taken."""
        if deadline is not None and deadline.passed:
            return Recourse(math.nan, None, Status.TIME_LIMIT)
        cost, gain = self.cost * (1 + self.phi @ xi / 2), -self.d.at(xi)
        left = self.budget - float(cost @ x)
        if left < -1e-9 * (1 + self.budget):
            return Recourse(math.inf, None, Status.INFEASIBLE)
        free = np.flatnonzero(x < 0.5)
        twice = [np.repeat(np.maximum(v[free], low)[:, None], 2, axis=1) for v, low in ((cost, 0.0), (gain, -np.inf))]
        value, option = multiple_choice_knapsack(twice[0], twice[1], max(0.0, left))
        y = np.zeros(self.n)
        y[free] = option > 0
        return Recourse(-value, y, Status.OPTIMAL)
