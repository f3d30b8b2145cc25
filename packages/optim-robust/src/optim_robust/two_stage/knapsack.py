"""Two-stage robust knapsack (Arslan and Detienne 2022, INFORMS J. Comput. 34): only profits are uncertain.

A planner accepts items (x). The adversary degrades profits, ``p_i - dev_i xi_i`` with ``sum xi <= gamma``. The planner
then produces an accepted item (y), or outsources it, or produces and repairs it (r) so that no profit is lost:

    cost = sum (f_i - p_i) x_i + sum (dev_i xi_i - f_i) y_i - sum dev_i xi_i r_i,
    sum c_i y_i + t_i r_i <= C,  r_i <= y_i <= x_i,  all binary.

The profit that the literature prints is minus this cost (``sense=-1``). Files of the published instances
(``github.com/borisdetienne/RobustDecomposition``, MIT) are read by :meth:`RobustKnapsack.from_file`; the generator
draws from the same distributions. The recourse is an exact multiple-choice knapsack
(:func:`.multiple_choice.multiple_choice_knapsack`) of 0.2 to 4 ms, equal to the MILP of the general form.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from optim_robust.solver import Deadline, Status
from optim_robust.two_stage.multiple_choice import multiple_choice_knapsack
from optim_robust.two_stage.problem import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.two_stage.solution import Recourse
from optim_robust.uncertainty import Budget
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import MalformedFileError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["CORRELATIONS", "RobustKnapsack", "read_numbers"]

Array = NDArray[np.float64]
CORRELATIONS = ("UN", "WC", "ASC", "SC")


def read_numbers(path: str | Path, *, limit: int = 10_000_000) -> list[list[float]]:
    """Return the numbers of a text file, line by line; empty lines are skipped.

    Raises:
        MalformedFileError: not text, too large, or a word that is not a finite number (with its line).
    """
    file = Path(path)
    if file.stat().st_size > limit:
        raise MalformedFileError(f"{file}: {file.stat().st_size} bytes are no instance (limit {limit})")
    try:
        text = file.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise MalformedFileError(f"{file}: not a text file of numbers") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = [float(word) for word in line.split()]
        except ValueError as error:
            raise MalformedFileError(f"{file}, line {number}: {error}") from error
        if not all(map(math.isfinite, values)):
            raise MalformedFileError(f"{file}, line {number}: NaN or infinity")
        if values:
            lines.append(values)
    return lines


class RobustKnapsack(TwoStageProblem):
    """An instance. Its x are the n items, its y the n productions followed by the n repairs.

    Args:
        profit: (n,) nominal profits (p-bar in the paper).
        degradation: (n,) greatest loss of profit (p-hat), not negative.
        repair: (n,) repair weights t.
        weight: (n,) weights c.
        outsourcing: (n,) outsourcing costs f.
        capacity: C.
        gamma: budget of the adversary.
        name: of the instance.

    Raises:
        ValueError: vectors of different lengths, NaN, or a negative weight, degradation or capacity.
    """

    def __init__(
        self,
        *,
        profit: ArrayLike,
        degradation: ArrayLike,
        repair: ArrayLike,
        weight: ArrayLike,
        outsourcing: ArrayLike,
        capacity: float,
        gamma: float,
        name: str = "knapsack",
    ) -> None:
        given = {
            "profit": profit, "degradation": degradation, "repair": repair, "weight": weight,
            "outsourcing": outsourcing,
        }  # fmt: skip
        table = {key: np.asarray(values, dtype=np.float64) for key, values in given.items()}
        n = len(np.atleast_1d(table["profit"]))
        for key, values in table.items():
            if values.shape != (n,) or n == 0:
                raise ValueError(f"{key} has shape {values.shape}; ({n},) is needed, at least one item")
            low = 0.0 if key in ("degradation", "repair", "weight") else -math.inf
            if not np.isfinite(values).all() or values.min() < low:
                raise ValueError(f"{key} must be finite{' and not negative' if low == 0 else ''}")
        self.profit, self.degradation, self.repair = table["profit"], table["degradation"], table["repair"]
        self.weight, self.outsourcing = table["weight"], table["outsourcing"]
        self.capacity = float(check_number("capacity", float(capacity), low=0.0))
        self.gamma, self.n = float(gamma), n
        eye, none = sparse.identity(n, format="csr"), sparse.csr_matrix((n, n))
        shift = sparse.vstack([sparse.diags(self.degradation), -sparse.diags(self.degradation)])
        load = sparse.csr_matrix(np.concatenate([self.weight, self.repair])[None])
        super().__init__(
            x=Stage.of(n, names=[f"x{i}" for i in range(n)]),
            y=Stage.of(2 * n, names=[f"{kind}{i}" for kind in "yr" for i in range(n)]),
            uncertainty=Budget(np.ones(n), self.gamma),
            c=AffineVector(self.outsourcing - self.profit, dim=n),
            d=AffineVector(np.concatenate([-self.outsourcing, np.zeros(n)]), shift),
            technology=AffineMatrix(sparse.vstack([sparse.csr_matrix((1, n)), -eye, none])),
            recourse=AffineMatrix(
                sparse.vstack([load, sparse.hstack([eye, none]), sparse.hstack([-eye, eye])]),
            ),
            rhs=AffineVector(np.concatenate([[self.capacity], np.zeros(2 * n)]), dim=n),
            row_names=["capacity", *(f"produce{i}" for i in range(n)), *(f"repair{i}" for i in range(n))],
            name=name,
            sense=-1,
        )

    # --- instances ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path) -> RobustKnapsack:
        """Read a published instance: ``n C gamma``, then n lines ``profit degradation repair weight outsourcing``.

        Raises:
            MalformedFileError: the file breaks this format.
        """
        lines = read_numbers(path)
        if not lines or len(lines[0]) != 3:
            raise MalformedFileError(f"{path}, line 1: 'n C gamma' is needed, three numbers")
        n, capacity, gamma = lines[0]
        if n < 1 or n != int(n) or len(lines) != n + 1:
            raise MalformedFileError(f"{path}: the first line announces {n:g} items, {len(lines) - 1} lines follow")
        wrong = next((i for i, line in enumerate(lines[1:], start=2) if len(line) != 5), None)
        if wrong is not None:
            raise MalformedFileError(f"{path}, line {wrong}: five numbers are needed, not {len(lines[wrong - 1])}")
        columns = np.array(lines[1:]).T
        keys = ("profit", "degradation", "repair", "weight", "outsourcing")
        try:
            return cls(**dict(zip(keys, columns, strict=True)), capacity=capacity, gamma=gamma, name=Path(path).name)
        except ValueError as error:
            raise MalformedFileError(f"{path}: {error}") from error

    def to_file(self, path: str | Path) -> None:
        """Write the instance in the published format."""
        rows = np.stack([self.profit, self.degradation, self.repair, self.weight, self.outsourcing], axis=1)
        text = [f"{self.n} {self.capacity!r} {self.gamma!r}", *(" " + " ".join(map(repr, r.tolist())) for r in rows)]
        Path(path).write_text("\n".join(text) + "\n", encoding="ascii")

    @classmethod
    def random(
        cls,
        n: int,
        *,
        correlation: str | None = None,
        delta: float | None = None,
        h: float | None = None,
        dev: float | None = None,
        generator: Seed = None,
    ) -> RobustKnapsack:
        """Draw an instance as the published ones were drawn (R = 1000, H = 100); what is None is drawn uniformly.

        Args:
            n: items.
            correlation: UN, WC, ASC or SC: how profits follow weights.
            delta: spread of the degradations, of {0.1, 0.5, 1}.
            h: of {40, 80}; the capacity is h / 101 of all weights.
            dev: of {0.1, 0.15, 0.2}; the budget is dev * n.
            generator: seed.
        """
        check_count("n", n)
        rng = np.random.default_rng(derive(resolve_seed(generator), "knapsack", n))
        kind = (
            CORRELATIONS[rng.integers(4)]
            if correlation is None
            else check_choice("correlation", correlation, CORRELATIONS)
        )
        drawn = [float(rng.choice(menu)) for menu in ((0.1, 0.5, 1.0), (40.0, 80.0), (0.1, 0.15, 0.2))]
        delta, h, dev = (d if given is None else given for given, d in zip((delta, h, dev), drawn, strict=True))
        big = 1000.0
        c = rng.uniform(1, big, n)
        p = {
            "UN": lambda: rng.uniform(1, big, n),
            "WC": lambda: np.maximum(1.0, rng.uniform(c - big / 20, c + big / 20)),
            "ASC": lambda: rng.uniform(c + big / 10 - big / 1000, c + big / 10 + big / 1000),
            "SC": lambda: c + big / 10,
        }[kind]()
        p_hat = p * rng.uniform((1 - delta) / 2, (1 + delta) / 2, n)
        f = p * rng.uniform(1.1, 1.5, n)
        t = {
            "UN": lambda: rng.uniform(1, c),
            "WC": lambda: p_hat / 2 + rng.uniform(-big / 40, big / 40, n),
            "ASC": lambda: p_hat / 2 + c / 10 + rng.uniform(-big / 1000, big / 1000, n),
            "SC": lambda: p_hat / 2 + c / 10,
        }[kind]()
        return cls(
            profit=p, degradation=p_hat, repair=np.maximum(1.0, t), weight=c, outsourcing=f,
            capacity=h / 101 * c.sum(), gamma=dev * n, name=f"RKP_{kind}_n{n}_h{h:g}_dev{dev:g}_d{delta:g}",
        )  # fmt: skip

    def sample_first_stage(self, n_samples: int, *, generator: Seed = None) -> Array:
        """Return (n_samples, n) first stages: q uniform, then each item accepted with probability 1 - q."""
        seed = resolve_seed(generator)
        rows = []
        for i in range(check_count("n_samples", n_samples)):
            rng = np.random.default_rng(derive(seed, "first stage", i))
            rows.append(rng.random(self.n) < 1 - rng.random())
        return np.stack(rows).astype(np.float64)

    def sample_uncertainty(self, n_samples: int, *, scheme: str = "paper", generator: Seed = None) -> Array:
        """Return (n_samples, n) points of the set.

        ``"paper"``: ``b u / sum(u)`` with b uniform in [1 / gamma, gamma], clipped to [0, 1]: interior points only.
        ``"mixed"``: every second one is a random vertex, which is where the adversary ends.
        """
        check_choice("scheme", scheme, ("paper", "mixed"))
        seed, rows = resolve_seed(generator), []
        for i in range(check_count("n_samples", n_samples)):
            rng = np.random.default_rng(derive(seed, "xi", i))
            u = rng.random(self.n)
            if scheme == "mixed" and i % 2:
                rows.append(self.uncertainty.worst(u))
                continue
            low, high = sorted((min(1.0 / self.gamma, self.gamma) if self.gamma else 0.0, self.gamma))
            rows.append(np.clip(rng.uniform(low, high) * u / u.sum(), 0.0, 1.0))
        return np.stack(rows)

    # --- oracle ------------------------------------------------------------------------------------------------------

    def recourse(self, x: Array, xi: Array, *, deadline: Deadline | None = None) -> Recourse:
        """Solve the second stage exactly as a multiple-choice knapsack; always feasible (y = r = 0)."""
        if deadline is not None and deadline.passed:
            return Recourse(math.nan, None, Status.TIME_LIMIT)
        kept = np.flatnonzero(x > 0.5)
        gain = np.stack([self.outsourcing - self.degradation * xi, self.outsourcing], axis=1)[kept]
        load = np.stack([self.weight, self.weight + self.repair], axis=1)[kept]
        value, option = multiple_choice_knapsack(load, gain, self.capacity)
        y = np.zeros(2 * self.n)
        y[kept], y[self.n + kept] = option > 0, option == 2
        return Recourse(-value, y, Status.OPTIMAL)
