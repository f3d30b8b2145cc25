"""Uncertainty sets: where the parameters of a two-stage problem may lie once they are known.

Every set answers the same few questions: its bounding box (``lower``, ``upper``), the inequalities beyond that box
(``constraints``), a nominal point, membership, random points, the point that is worst for a linear function, and, where
there are few enough, its vertices. The exact methods need a polyhedron or a finite list; an ellipsoid can be enclosed
in a polyhedron (:meth:`Ellipsoid.enclosing_box`), which errs on the safe side.

The names follow ``pyomo.contrib.pyros``, whose sets :func:`from_pyros` reads.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from robust_core.checks import check_count, check_number
from robust_core.errors import RobustError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Box", "Budget", "Discrete", "Ellipsoid", "Polyhedron", "UncertaintySet", "from_pyros"]

Array = NDArray[np.float64]


def _vector(name: str, values: ArrayLike, dim: int | None = None) -> Array:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim == 1 and dim is not None and array.shape == (1,):
        array = np.full(dim, array[0])
    if array.ndim != 1 or array.size == 0 or (dim is not None and array.shape != (dim,)):
        raise ValueError(f"{name} has shape {array.shape}; a vector{f' of {dim} numbers' if dim else ''} is needed")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: an uncertainty set must be bounded")
    return array


class UncertaintySet:
    """What all sets share. ``lower`` and ``upper`` bound each coordinate; ``nominal`` is a point of the set.

    Args:
        lower: (dim,) least value of each coordinate.
        upper: (dim,) greatest value of each coordinate.
        nominal: (dim,) what a planner who ignores uncertainty would assume.

    Raises:
        ValueError: not finite, shapes that differ, or a lower bound above its upper bound.
    """

    polyhedral = True

    def __init__(self, lower: ArrayLike, upper: ArrayLike, nominal: ArrayLike) -> None:
        self.lower = _vector("lower", lower)
        self.upper = _vector("upper", upper, len(self.lower))
        self.nominal = _vector("nominal", nominal, len(self.lower))
        wrong = np.flatnonzero(self.lower > self.upper)
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f"lower[{i}]={self.lower[i]:g} is above upper[{i}]={self.upper[i]:g}: the set is empty")

    @property
    def dim(self) -> int:
        """Number of uncertain parameters."""
        return len(self.lower)

    def constraints(self) -> tuple[sparse.csr_matrix, Array]:
        """Return (G, g): beyond the bounding box, the set asks ``G xi <= g``."""
        return sparse.csr_matrix((0, self.dim)), np.zeros(0)

    def contains(self, xi: ArrayLike, *, tol: float = 1e-7) -> bool:
        """Return whether ``xi`` lies in the set, up to ``tol`` (absolute, on each inequality)."""
        point = _vector("xi", xi, self.dim)
        matrix, bound = self.constraints()
        inside = bool((point >= self.lower - tol).all() and (point <= self.upper + tol).all())
        return inside and bool((matrix @ point <= bound + tol).all())

    def worst(self, direction: ArrayLike) -> Array:
        """Return a point of the set that maximises ``direction @ xi``."""
        d = _vector("direction", direction, self.dim)
        return np.where(d > 0, self.upper, self.lower)

    def sample(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, dim) random points; row i is a function of the seed and i alone."""
        check_count("n_samples", n_samples)
        seed = resolve_seed(generator)
        rows = [self._draw(np.random.default_rng(derive(seed, "uncertainty", i))) for i in range(n_samples)]
        return np.stack(rows)

    def _draw(self, rng: np.random.Generator) -> Array:
        return self.lower + (self.upper - self.lower) * rng.random(self.dim)

    def vertices(self, *, limit: int = 4096) -> Array:
        """Return (V, dim) vertices.

        Raises:
            RobustError: there are more than ``limit`` of them.
        """
        free = np.flatnonzero(self.upper > self.lower)
        if 2.0 ** len(free) > limit:
            raise RobustError(f"the set has 2**{len(free)} vertices, more than limit={limit}")
        points = np.tile(self.lower, (2 ** len(free), 1))
        for row, chosen in enumerate(itertools.product((0, 1), repeat=len(free))):
            points[row, free] = np.where(chosen, self.upper[free], self.lower[free])
        return points


class Box(UncertaintySet):
    """Each coordinate anywhere between its bounds; nominal: the middle.

    Args:
        lower: (dim,) least values.
        upper: (dim,) greatest values.
        nominal: (dim,) nominal point, by default the middle.
    """

    def __init__(self, lower: ArrayLike, upper: ArrayLike, *, nominal: ArrayLike | None = None) -> None:
        low = _vector("lower", lower)
        middle = (low + _vector("upper", upper, len(low))) / 2
        super().__init__(low, upper, middle if nominal is None else nominal)


class Budget(UncertaintySet):
    """``{origin + deviation * z : 0 <= z <= 1, sum(z) <= gamma}`` (Bertsimas and Sim); nominal: the origin.

    Args:
        deviation: (dim,) how far each coordinate can move from its origin (of either sign).
        gamma: how many coordinates can move fully at once.
        origin: (dim,) or one number; by default 0.
    """

    def __init__(self, deviation: ArrayLike, gamma: float, *, origin: ArrayLike = 0.0) -> None:
        self.deviation = _vector("deviation", deviation)
        self.gamma = float(check_number("gamma", float(gamma), low=0.0))
        self.origin = _vector("origin", origin, len(self.deviation))
        moved = self.origin + self.deviation * min(1.0, self.gamma)
        super().__init__(np.minimum(self.origin, moved), np.maximum(self.origin, moved), self.origin)

    def constraints(self) -> tuple[sparse.csr_matrix, Array]:
        """Return the one row ``sum((xi - origin) / deviation) <= gamma``."""
        moving = self.deviation != 0
        rate = np.where(moving, 1.0 / np.where(moving, self.deviation, 1.0), 0.0)
        return sparse.csr_matrix(rate[None]), np.array([self.gamma + float(rate @ self.origin)])

    def worst(self, direction: ArrayLike) -> Array:
        """Spend the budget on the coordinates that gain most."""
        gain = _vector("direction", direction, self.dim) * self.deviation
        z, left = np.zeros(self.dim), self.gamma
        for i in np.argsort(-gain, kind="stable"):
            if gain[i] <= 0 or left <= 0:
                break
            z[i] = min(1.0, left)
            left -= z[i]
        return self.origin + self.deviation * z

    def _draw(self, rng: np.random.Generator) -> Array:
        z = rng.random(self.dim)
        z *= min(1.0, self.gamma * rng.random() ** (1.0 / self.dim) / max(z.sum(), 1e-300))
        return self.origin + self.deviation * z

    def vertices(self, *, limit: int = 4096) -> Array:
        """Return the vertices: up to floor(gamma) coordinates at 1, or floor(gamma) of them and one at the rest."""
        moving = np.flatnonzero(self.deviation)
        whole = min(math.floor(self.gamma), len(moving))
        rest = self.gamma - whole if whole < len(moving) else 0.0
        count = sum(math.comb(len(moving), k) for k in range(whole + 1))
        count += math.comb(len(moving), whole) * (len(moving) - whole) if rest > 0 else 0
        if count > limit:
            raise RobustError(f"the set has {count} vertices, more than limit={limit}")
        points = []
        for size in range(whole + 1):
            for chosen in itertools.combinations(moving, size):
                z = np.zeros(self.dim)
                z[list(chosen)] = 1.0
                points.append(z)
                if size == whole and rest > 0:
                    for i in set(moving.tolist()) - set(chosen):
                        more = z.copy()
                        more[i] = rest
                        points.append(more)
        return self.origin + self.deviation * np.stack(points)


class Polyhedron(UncertaintySet):
    """``{xi : matrix @ xi <= bound}``, which must be bounded and not empty.

    Args:
        matrix: (rows, dim) coefficients.
        bound: (rows,) right-hand sides.
        nominal: (dim,) nominal point; by default the mean of the extreme points along the axes.

    Raises:
        ValueError: the set is empty or unbounded.
    """

    def __init__(
        self, matrix: ArrayLike | sparse.spmatrix, bound: ArrayLike, *, nominal: ArrayLike | None = None
    ) -> None:
        self.matrix: Any = sparse.csr_matrix(matrix, dtype=np.float64)
        self.bound = _vector("bound", bound, self.matrix.shape[0])
        dim = self.matrix.shape[1]
        signed = [sign * axis for axis in np.eye(dim) for sign in (1.0, -1.0)]
        extreme = np.stack([self._extreme(direction) for direction in signed])
        super().__init__(extreme.min(0), extreme.max(0), extreme.mean(0) if nominal is None else nominal)
        if not self.contains(self.nominal):
            raise ValueError("nominal lies outside the set")

    def _extreme(self, direction: Array) -> Array:
        from scipy.optimize import linprog

        answer = linprog(-direction, A_ub=self.matrix, b_ub=self.bound, bounds=(None, None), method="highs")
        if answer.status == 2:
            raise ValueError("the polyhedron is empty: no xi satisfies matrix @ xi <= bound")
        if answer.status != 0:
            raise ValueError(f"the polyhedron is unbounded, or no LP solution was found: {answer.message}")
        return np.asarray(answer.x)

    def constraints(self) -> tuple[sparse.csr_matrix, Array]:
        """Return the rows as they were given."""
        return self.matrix, self.bound

    def worst(self, direction: ArrayLike) -> Array:
        """Solve the linear program."""
        return self._extreme(_vector("direction", direction, self.dim))

    def _draw(self, rng: np.random.Generator) -> Array:
        corners = np.stack([self._extreme(rng.standard_normal(self.dim)) for _ in range(self.dim + 1)])
        return rng.dirichlet(np.ones(len(corners))) @ corners

    def vertices(self, *, limit: int = 4096) -> Array:
        """Return the vertices: every regular choice of ``dim`` rows whose solution satisfies the others."""
        rows, dim = len(self.bound), self.dim
        if math.comb(rows, dim) > 50 * limit:
            raise RobustError(f"C({rows}, {dim}) candidate vertices are too many to try")
        dense, found = self.matrix.toarray(), []
        for chosen in itertools.combinations(range(rows), dim):
            square = dense[list(chosen)]
            if np.linalg.matrix_rank(square) == dim:
                point = np.linalg.solve(square, self.bound[list(chosen)])
                if (dense @ point <= self.bound + 1e-9 * (1 + np.abs(self.bound))).all():
                    found.append(point)
        points = np.stack(found)
        unique = points[np.unique(np.round(points, 10), axis=0, return_index=True)[1]]
        if len(unique) > limit:
            raise RobustError(f"the set has {len(unique)} vertices, more than limit={limit}")
        return unique


class Ellipsoid(UncertaintySet):
    """``{center + shape @ u : |u|_2 <= 1}``: sampled, bounded, maximised in closed form, but not a polyhedron.

    Args:
        center: (dim,) centre, also the nominal point.
        shape: (dim, dim) matrix, of full rank.
    """

    polyhedral = False

    def __init__(self, center: ArrayLike, shape: ArrayLike) -> None:
        self.center = _vector("center", center)
        self.shape = np.asarray(shape, dtype=np.float64)
        if self.shape.shape != (len(self.center),) * 2 or np.linalg.matrix_rank(self.shape) < len(self.center):
            raise ValueError(f"shape must be a ({len(self.center)}, {len(self.center)}) matrix of full rank")
        reach = np.linalg.norm(self.shape, axis=1)
        super().__init__(self.center - reach, self.center + reach, self.center)

    def contains(self, xi: ArrayLike, *, tol: float = 1e-7) -> bool:
        """Return whether ``|shape^-1 (xi - center)| <= 1 + tol``."""
        u = np.linalg.solve(self.shape, _vector("xi", xi, self.dim) - self.center)
        return float(np.linalg.norm(u)) <= 1 + tol

    def worst(self, direction: ArrayLike) -> Array:
        """Return ``center + shape shape^T d / |shape^T d|``."""
        u = self.shape.T @ _vector("direction", direction, self.dim)
        return self.center + self.shape @ (u / max(float(np.linalg.norm(u)), 1e-300))

    def constraints(self) -> tuple[sparse.csr_matrix, Array]:
        """Refuse: no finite list of rows describes an ellipsoid.

        Raises:
            RobustError: always.
        """
        raise RobustError("an ellipsoid is no polyhedron; use enclosing_box() for a conservative one, or Discrete")

    def enclosing_box(self) -> Polyhedron:
        """Return the box along the ellipsoid's principal axes: solutions robust against it are robust against this."""
        axes, scale, _ = np.linalg.svd(self.shape, full_matrices=True)
        rows = np.concatenate([axes.T, -axes.T])
        bound = np.concatenate([scale, scale]) + rows @ self.center
        return Polyhedron(rows, bound, nominal=self.center)

    def _draw(self, rng: np.random.Generator) -> Array:
        u = rng.standard_normal(self.dim)
        return self.center + self.shape @ (u / np.linalg.norm(u) * rng.random() ** (1 / self.dim))

    def vertices(self, *, limit: int = 4096) -> Array:
        """Refuse: an ellipsoid has none."""
        raise RobustError(f"an ellipsoid has no vertices (limit={limit}); use enclosing_box() or Discrete")


class Discrete(UncertaintySet):
    """A finite list of scenarios; nominal: the first.

    Args:
        points: (S, dim) scenarios.
        nominal: (dim,) nominal point, by default the first scenario.
    """

    polyhedral = False

    def __init__(self, points: ArrayLike, *, nominal: ArrayLike | None = None) -> None:
        self.points = np.asarray(points, dtype=np.float64)
        if self.points.ndim != 2 or self.points.size == 0 or not np.isfinite(self.points).all():
            raise ValueError(f"points has shape {self.points.shape}; a finite (scenarios, dim) table is needed")
        first = self.points[0] if nominal is None else nominal
        super().__init__(self.points.min(0), self.points.max(0), first)

    def contains(self, xi: ArrayLike, *, tol: float = 1e-7) -> bool:
        """Return whether ``xi`` is one of the scenarios."""
        return bool((np.abs(self.points - _vector("xi", xi, self.dim)).max(1) <= tol).any())

    def worst(self, direction: ArrayLike) -> Array:
        """Return the scenario that maximises the function."""
        return self.points[int(np.argmax(self.points @ _vector("direction", direction, self.dim)))]

    def constraints(self) -> tuple[sparse.csr_matrix, Array]:
        """Refuse: a list is no polyhedron.

        Raises:
            RobustError: always.
        """
        raise RobustError("a list of scenarios is no polyhedron; its points are in .points")

    def _draw(self, rng: np.random.Generator) -> Array:
        return self.points[int(rng.integers(len(self.points)))]

    def vertices(self, *, limit: int = 4096) -> Array:
        """Return the scenarios."""
        if len(self.points) > limit:
            raise RobustError(f"there are {len(self.points)} scenarios, more than limit={limit}")
        return self.points


def from_pyros(uncertainty_set: Any) -> UncertaintySet:
    """Read an uncertainty set of ``pyomo.contrib.pyros``: box, cardinality, budget, polyhedral, axis-aligned, discrete.

    Raises:
        TypeError: a set of another kind.
    """
    kind = type(uncertainty_set).__name__
    if kind == "BoxSet":
        bounds = np.asarray(uncertainty_set.bounds, dtype=np.float64)
        return Box(bounds[:, 0], bounds[:, 1])
    if kind == "CardinalitySet":
        return Budget(uncertainty_set.positive_deviation, uncertainty_set.gamma, origin=uncertainty_set.origin)
    if kind in ("PolyhedralSet", "BudgetSet"):
        return Polyhedron(uncertainty_set.coefficients_mat, uncertainty_set.rhs_vec)
    if kind == "DiscreteScenarioSet":
        return Discrete(uncertainty_set.scenarios)
    if kind == "AxisAlignedEllipsoidalSet":
        return Ellipsoid(uncertainty_set.center, np.diag(uncertainty_set.half_lengths))
    raise TypeError(f"uncertainty_set is a {kind}; box, cardinality, budget, polyhedral and discrete sets are read")
