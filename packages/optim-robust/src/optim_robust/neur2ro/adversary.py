"""The adversary's problem: the scenario that the network believes to be worst for a given x.

Three ways, which agree on what they maximise: ``"milp"`` embeds the scenario's encoder (bounds tightened over the
uncertainty set, which knows of budgets), ``"gradient"`` climbs from the best of many points (conditional gradients:
they need no projection and stay inside any set), ``"sample"`` takes the best of many points. ``"milp"`` starts where
the gradient ended, and what it returns is never worse.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from optim_robust.neur2ro.chains import encode
from optim_robust.neur2ro.main_problem import Instance
from optim_robust.relu import InputSet, embed, module_of, tighten
from optim_robust.solver import Deadline, Program, Status
from optim_robust.uncertainty import Discrete
from robust_core.random import derive

__all__ = ["ADVERSARIES", "Adversary"]

Array = NDArray[np.float64]
ADVERSARIES = ("milp", "gradient", "sample")


class Adversary:
    """Maximise the network over the uncertainty set, for one x after another.

    Args:
        instance: problem and network.
        method: one of :data:`ADVERSARIES`.
        bounds: how the network's bounds are tightened.
        mip_gap: relative gap of the program.
        n_samples: points that are tried; half of them vertices.
        n_starts: how many of the best points are climbed from.
        n_iter: steps of the climb.
        seed: of the points.
        deadline: after it, bounds are no longer tightened.
    """

    def __init__(
        self, instance: Instance, *, method: str = "milp", bounds: str = "lp", mip_gap: float = 1e-3,
        n_samples: int = 10_000, n_starts: int = 5, n_iter: int = 100, seed: int = 0, deadline: Deadline | None = None,
    ) -> None:  # fmt: skip
        self.instance, self.method, self.bounds, self.mip_gap = instance, method, bounds, mip_gap
        self.n_starts, self.n_iter = n_starts, n_iter
        uncertainty = instance.problem.uncertainty
        if isinstance(uncertainty, Discrete):
            self.points = uncertainty.points
        else:
            inner = uncertainty.sample(n_samples - n_samples // 2, generator=derive(seed, "inner"))
            rng = np.random.default_rng(derive(seed, "vertices"))
            directions = rng.standard_normal((n_samples // 2, uncertainty.dim))
            flips = rng.integers(0, 2, (n_samples // 2, 1)) == 1
            directions = np.where(flips, np.abs(directions), directions)
            self.points = np.concatenate([inner, np.stack([uncertainty.worst(d) for d in directions])])
        self.codes = encode(instance.scenario, self.points)
        self.tensor_chain = module_of(instance.scenario)
        self.front: list[tuple[Array, Array]] = []
        self.n_binaries = self.n_relu = 0
        self.deadline = deadline
        if method == "milp" and not isinstance(uncertainty, Discrete):
            matrix, bound = uncertainty.constraints()
            self.region = InputSet.of(uncertainty.lower, uncertainty.upper, matrix, bound)
            until = None if deadline is None or np.isinf(deadline.limit) else deadline.start + deadline.limit
            self.front = tighten(instance.scenario, self.region, bounds, deadline=until)

    def worst(self, x: Array, deadline: Deadline) -> tuple[Array, float, bool]:
        """Return (xi, predicted value, whether it is the network's maximum over the set up to the gap)."""
        head = self.instance.value(encode(self.instance.decision, x[None])[0], of="x")
        values = encode(head, self.codes)[:, 0]
        best = int(values.argmax())
        xi, value = self.points[best], float(values[best])
        if isinstance(self.instance.problem.uncertainty, Discrete):
            return xi, value, True
        if self.method == "sample":
            return xi, value, False
        starts = np.argsort(-values, kind="stable")[: self.n_starts]
        xi, value = self._climb(head, self.points[starts])
        return self._program(head, xi, value, deadline) if self.method == "milp" else (xi, value, False)

    def _climb(self, head: list, starts: Array) -> tuple[Array, float]:
        """Climb by conditional gradients from several points; return the best point met."""
        network = torch.nn.Sequential(self.tensor_chain, module_of(head))
        uncertainty, points = self.instance.problem.uncertainty, starts.copy()
        best, best_value = starts[0], -np.inf
        for step in range(self.n_iter + 1):
            xi = torch.from_numpy(points).requires_grad_(True)
            with torch.enable_grad():
                values = network(xi)[:, 0]
                (slope,) = torch.autograd.grad(values.sum(), xi)
            values = values.detach()
            top = int(values.argmax())
            if float(values[top]) > best_value:
                best, best_value = points[top].copy(), float(values[top])
            if step < self.n_iter:
                corners = np.stack([uncertainty.worst(row) for row in slope.numpy()])
                points = points + (2.0 / (step + 3.0)) * (corners - points)
        return best, best_value

    def _program(self, head: list, xi: Array, value: float, deadline: Deadline) -> tuple[Array, float, bool]:
        chain = [*self.instance.scenario, *head]
        bounds = tighten(chain, self.region, "crown" if self.bounds == "lp" else self.bounds, known=self.front)
        made = embed(chain, self.region, bounds)
        self.n_binaries, self.n_relu = made.n_binaries, made.n_relu
        program = Program(mip_gap=self.mip_gap)
        columns = program.add_variables(self.region.lower, self.region.upper)
        program.add_rows([(self.region.matrix, columns)], upper=self.region.bound)
        (output,) = made.add_to(program, columns)
        program.set_cost(np.array([output]), -1.0)
        program.set_bounds(columns, xi, xi)
        known = program.solve(deadline.at_most(1.0))
        program.set_bounds(columns, self.region.lower, self.region.upper)
        if known.point is not None:
            program.start_from(known.point)
        answer = program.solve(deadline)
        if answer.point is not None:
            found = np.clip(answer.point[columns], self.region.lower, self.region.upper)
            inside = self.instance.problem.uncertainty.contains(found)
            there = float(encode(chain, found[None])[0, 0])
            if inside and there > value:
                xi, value = found, there
        return xi, value, answer.status == Status.OPTIMAL
