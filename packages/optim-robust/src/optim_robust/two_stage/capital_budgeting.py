"""Two-stage robust capital budgeting (Subramanyam, Gounaris and Wiesemann 2020): costs and revenues are uncertain.

Projects are taken early (x) or, once xi in [-1, 1]^4 is known, late (y) at a fraction kappa of their revenue:

    min -r(xi)'(x + kappa y),  c(xi)'(x + y) <= B,  x + y <= 1,  x and y binary,
    c_i(xi) = (1 + phi_i'xi / 2) c_i,  r_i(xi) = (1 + psi_i'xi / 2) r_i.

With phi >= 0 and sum(phi_i) = 1, as in the generator, x is affordable for every xi exactly if 1.5 c'x <= B: a static
row of X. Where some phi is negative that worst cost is not linear in x, and the row falls back to the nominal cost.

With loans (the paper's mixed-integer variant; in the solver that its authors published the early loan is a continuous
first-stage variable too) the planner may borrow x0 before and y0 after xi is known, each at most ``max_loan``:

    min -r(xi)'(x + kappa y) + lambda (x0 + mu y0),  c(xi)'x <= B + x0,  c(xi)'(x + y) <= B + x0 + y0.

Whatever projects are taken, y0 = max(0, c(xi)'(x + y) - B - x0) is best: at most 2^n plans still, each of which costs
the greater of two affine functions of xi. ``max_loan`` = 1.5 sum(c) - B, as in the files, never binds.

Files: ``seed n 4 B max_loan``, then c, r, n lines phi, n lines psi. The published ones name a ``max_loan`` although
their published results are without loans: it is read only where loans are asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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
        max_loan: the most that may be borrowed early, and again late; 0 is the problem without loans.
        loan_cost: lambda, the price of a unit borrowed early, not negative.
        late_factor: mu >= 1, how many times that a unit borrowed late costs.
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
        max_loan: float = 0.0,
        loan_cost: float = 0.12,
        late_factor: float = 1.2,
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
        self.max_loan = float(check_number("max_loan", float(max_loan), low=0.0))
        self.loan_cost = float(check_number("loan_cost", float(loan_cost), low=0.0))
        self.late_factor = float(check_number("late_factor", float(late_factor), low=1.0))
        self.n = n
        self._cost_slopes = self.phi / 2 * self.cost[:, None]
        revenue_slopes = self.psi / 2 * self.revenue[:, None]
        super().__init__(
            x=self._stage("early"),
            y=self._stage("late"),
            uncertainty=Box(-np.ones(k), np.ones(k)),
            c=self._prices(-self.revenue, -revenue_slopes, self.loan_cost),
            d=self._prices(-self.kappa * self.revenue, -self.kappa * revenue_slopes, self.loan_cost * self.late_factor),
            technology=self._rows("early"),
            recourse=self._rows("late"),
            rhs=AffineVector(np.concatenate([[self.budget] * (2 if self.max_loan else 1), np.ones(n)]), dim=k),
            static=self._affordable(),
            row_names=["budget", *(["early budget"] if self.max_loan else []), *(f"once{i}" for i in range(n))],
            name=name,
            sense=-1,
        )

    def _stage(self, when: str) -> Stage:
        names, loans = [f"{when}{i}" for i in range(self.n)], int(self.max_loan > 0)
        return Stage.of(
            self.n + loans,
            upper=np.append(np.ones(self.n), [self.max_loan] * loans),
            integer=np.append(np.ones(self.n, dtype=bool), [False] * loans),
            names=names + [f"{when}_loan"] * loans,
        )

    def _prices(self, known: Array, slopes: Array, loan: float) -> AffineVector:
        """Return costs of projects, and of a loan behind them where there are loans."""
        if not self.max_loan:
            return AffineVector(known, slopes)
        return AffineVector(np.append(known, loan), np.vstack([slopes, np.zeros(slopes.shape[1])]))

    def _rows(self, when: str) -> AffineMatrix:
        """Return one stage's part of the rows: the budget, with loans also that of the early stage alone, and once."""
        loans, k = int(self.max_loan > 0), self.phi.shape[1]

        def load(costs: Array, loan: float) -> Any:
            row = np.append(costs, [loan] * loans)
            early = [row if when == "early" else 0 * row] * loans
            return sparse.vstack([sparse.csr_matrix(np.array([row, *early])), sparse.csr_matrix((self.n, len(row)))])

        once = sparse.vstack([sparse.csr_matrix((1 + loans, self.n + loans)), sparse.eye(self.n, self.n + loans)])
        return AffineMatrix(load(self.cost, -1.0) + once, {j: load(self._cost_slopes[:, j], 0.0) for j in range(k)})

    def _affordable(self) -> tuple[Array, Array]:
        """Return the static row: c'x + sum_j |sum_i phi_ij c_i x_i| / 2, the worst cost of x over the box."""
        worst = self.cost + (self._cost_slopes.sum(1) if (self.phi >= 0).all() else 0.0)
        return np.append(worst, [-1.0] * int(self.max_loan > 0))[None], np.array([self.budget])

    @classmethod
    def from_file(cls, path: str | Path, *, loans: bool = False) -> CapitalBudgeting:
        """Read a published instance (the format is in the module's text).

        Args:
            path: the file.
            loans: whether its ``max_loan`` may be borrowed.

        Raises:
            MalformedFileError: the file breaks this format, or loans are asked for and it allows none.
        """
        lines = read_numbers(path)
        if not lines or len(lines[0]) != 5:
            raise MalformedFileError(f"{path}, line 1: 'seed n 4 budget max_loan' is needed, five numbers")
        _, n, k, budget, loan = lines[0]
        if n < 1 or k < 1 or n != int(n) or k != int(k) or len(lines) != 3 + 2 * int(n):
            raise MalformedFileError(f"{path}: {n:g} projects need {3 + 2 * n:g} lines, {len(lines)} are there")
        if loans and loan <= 0:
            raise MalformedFileError(f"{path}: max_loan={loan:g}; loans need one above 0")
        widths = [int(n)] * 2 + [int(k)] * (2 * int(n))
        wrong = next((i for i, (row, w) in enumerate(zip(lines[1:], widths, strict=True), 2) if len(row) != w), None)
        if wrong is not None:
            raise MalformedFileError(f"{path}, line {wrong}: {widths[wrong - 2]} numbers are needed")
        phi, psi = np.array(lines[3 : 3 + int(n)]), np.array(lines[3 + int(n) :])
        name, most = (f"{Path(path).name}:loans", loan) if loans else (Path(path).name, 0.0)
        try:
            return cls(cost=lines[1], revenue=lines[2], phi=phi, psi=psi, budget=budget, max_loan=most, name=name)
        except ValueError as error:
            raise MalformedFileError(f"{path}: {error}") from error

    def to_file(self, path: str | Path, *, seed: int = 0) -> None:
        """Write the instance in the published format, which has no place for kappa and the prices of loans."""
        rows = [self.cost, self.revenue, *self.phi, *self.psi]
        text = [
            f"{seed} {self.n} {self.dim} {self.budget!r} {self.max_loan!r}",
            *(" ".join(map(repr, row.tolist())) for row in rows),
        ]
        Path(path).write_text("\n".join(text) + "\n", encoding="ascii")

    @classmethod
    def random(cls, n: int, *, n_factors: int = 4, loans: bool = False, generator: Seed = None) -> CapitalBudgeting:
        """Draw an instance as the papers do: costs U[1, 10], revenue a fifth, exposures uniform on the simplex."""
        check_count("n", n)
        rng = np.random.default_rng(derive(resolve_seed(generator), "capital budgeting", n))
        cost = rng.uniform(1, 10, n)
        phi, psi = (rng.dirichlet(np.ones(check_count("n_factors", n_factors)), n) for _ in range(2))
        budget, name = float(cost.sum() / 2), f"CB_n{n}_xi{n_factors}" + ":loans" * loans
        most = float(1.5 * cost.sum() - budget) if loans else 0.0
        return cls(cost=cost, revenue=cost / 5, phi=phi, psi=psi, budget=budget, max_loan=most, name=name)

    def sample_first_stage(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, n_x) affordable first stages: q uniform, then each project early with probability 1 - q.

        Draws that some xi makes unaffordable are rejected (the papers reject on the nominal cost only). Where there are
        loans, every second early loan is the least that the projects need, the others lie between that and the most.
        """
        seed, rows = resolve_seed(generator), []
        worst = self.A.toarray()[0, : self.n]
        for i in range(check_count("n_samples", n_samples)):
            rng = np.random.default_rng(derive(seed, "first stage", i))
            need = math.inf
            while need > self.max_loan:
                x = (rng.random(self.n) < 1 - rng.random()).astype(np.float64)
                need = max(0.0, float(worst @ x) - self.budget)
            if self.max_loan:
                x = np.append(x, need + (i % 2) * rng.random() * (self.max_loan - need))
            rows.append(x)
        return np.stack(rows)

    def sample_uncertainty(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, k) uniform points of the box."""
        return self.uncertainty.sample(n_samples, generator=generator)

    def recourse(self, x: Array, xi: Array, *, deadline: Deadline | None = None) -> Recourse:
        """Solve the second stage exactly as a knapsack over the projects not yet taken; the late loan extends it."""
        if deadline is not None and deadline.passed:
            return Recourse(math.nan, None, Status.TIME_LIMIT)
        answer = self._late(x, xi, math.inf)
        return Recourse(math.inf, None, Status.INFEASIBLE) if answer is None else Recourse(*answer, Status.OPTIMAL)

    def spare_recourse(
        self, x: Array, xi: Array, most: float, *, deadline: Deadline | None = None
    ) -> tuple[float, Array] | None:
        """Return (total cost, y) of the cheapest late projects that bring the total cost down to ``most``, or None.

        With loans there is none: they leave hardly a row that xi breaks.
        """
        first = self.first_stage_cost(x, xi)
        answer = None if self.max_loan else self._late(x, xi, first - most)
        return None if answer is None or first + answer[0] > most else (first + answer[0], answer[1])

    def _late(self, x: Array, xi: Array, enough: float) -> tuple[float, Array] | None:
        """Return (cost, y) of the best late projects, or of the cheapest that gain ``enough``; None: x is too dear."""
        n, cost = self.n, self.cost * (1 + self.phi @ xi / 2)
        gain, price = -self.d.at(xi)[:n], self.loan_cost * self.late_factor
        left = self.budget + float(x[n:].sum()) - float(cost @ x[:n])
        if left < -1e-9 * (1 + self.budget):
            return None
        left, free = max(0.0, left), np.flatnonzero(x[:n] < 0.5)
        weights = np.maximum(cost[free], 0.0)[:, None]
        value, option = multiple_choice_knapsack(
            weights, gain[free][:, None], left, loan=self.max_loan, price=price, enough=enough
        )
        y = np.zeros(self.y.size)
        y[free] = option > 0
        y[n:] = min(self.max_loan, max(0.0, float(cost @ y[:n]) - left))
        return -value, y

    @property
    def finite_plans(self) -> bool:
        """True: the late loan follows from the late projects and xi."""
        return True

    def plan_forms(self, x: Array, y: Array) -> tuple[list[tuple[float, Array]], tuple[Array, Array]]:
        """Return the costs of the late projects y without a late loan and with one, and the rows at the greatest loan.

        The greater cost counts: a loan that the budget does not need has a negative size in the second form.
        """
        if not self.max_loan:
            return super().plan_forms(x, y)
        bare, full = np.append(np.round(y[:-1]), 0.0), np.append(np.round(y[:-1]), self.max_loan)
        constant, slopes = self.cost_form(x, bare)
        over, more = self.row_form(x, bare)
        price = self.loan_cost * self.late_factor
        return [(constant, slopes), (constant + price * over[0], slopes + price * more[0])], self.row_form(x, full)
